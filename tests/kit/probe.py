"""Serves probe.proto: services of every kind of charge."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc

from btt.sdk.channel import Line, Price
from btt.sdk.money import Rate, Unit
from btt.sdk.payment import charges
from kit.protos import compile_proto

pb, rpc = compile_proto(Path(__file__).parent / "probe.proto")


class Probe(rpc.ProbeServiceServicer):
    """Sends what it is asked for, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.sent = 0

    async def One(self, request, context):  # noqa: N802
        self.calls += 1
        return pb.Bytes(data=bytes(request.size))

    async def Many(self, request, context):  # noqa: N802
        self.calls += 1
        for _ in range(request.messages):
            self.sent += 1
            yield pb.Bytes(data=bytes(request.size))

    async def OneChecked(self, request, context):  # noqa: N802
        return pb.Checked(data=bytes(request.size))

    async def ManyChecked(self, request, context):  # noqa: N802
        for number in range(request.messages):
            self.sent += 1
            yield pb.Checked(data=bytes([number % 256]) * request.size)

    async def Query(self, request, context):  # noqa: N802
        for _ in range(request.messages):
            yield pb.Rows(rows=request.size)

    async def Deep(self, request, context):  # noqa: N802
        half = bytes(request.size)
        for _ in range(request.messages):
            yield pb.Nested(
                parts=[pb.Part(data=[half]), pb.Part(data=[half, b""])], single=pb.Part(data=[half])
            )

    async def Free(self, request, context):  # noqa: N802
        return pb.Plain(data=bytes(request.size))

    async def FreeMany(self, request, context):  # noqa: N802
        for _ in range(request.messages):
            yield pb.Plain(data=bytes(request.size))


class Calls(rpc.CallsServiceServicer):
    """Takes and gives what it is asked to, and misbehaves on order; `taken` is what it was given."""

    def __init__(self) -> None:
        self.taken = 0
        self.sent = 0
        self.running = 0
        self.gate = asyncio.Barrier(1)
        """Calls ordered to "meet" go on together, once so many are there."""

    async def _take(self, request, context) -> None:
        self.taken += 1
        match request.order:
            case "raise":
                raise ValueError("a bad day")
            case "refuse":
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not this")
            case "code":
                context.set_code(grpc.StatusCode.NOT_FOUND)
            case "meet":
                await self.gate.wait()
            case "hang":
                await asyncio.Event().wait()

    async def Fee(self, request, context):  # noqa: N802
        if not request.size:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "nothing asked")
        return pb.Plain(data=bytes(request.size))

    async def FeeMany(self, request, context):  # noqa: N802
        for _ in range(request.messages):
            yield pb.Bytes(data=bytes(request.size))

    async def FeeChecked(self, request, context):  # noqa: N802
        for _ in range(request.messages):
            yield pb.Checked(data=bytes(request.size))

    async def Put(self, request, context):  # noqa: N802
        await self._take(request, context)
        return pb.Done(taken=len(request.data))

    async def Swap(self, request, context):  # noqa: N802
        await self._take(request, context)
        return pb.Bytes(data=bytes(request.reply))

    async def SwapMany(self, request, context):  # noqa: N802
        await self._take(request, context)
        for _ in range(request.seconds):
            self.sent += 1
            yield pb.Bytes(data=bytes(request.reply))

    async def Upload(self, requests, context):  # noqa: N802
        taken = 0
        async for request in requests:
            if request.order == "stop":
                break
            await self._take(request, context)
            taken += len(request.data)
        return pb.Done(taken=taken)

    async def UploadSwap(self, requests, context):  # noqa: N802
        reply = 0
        async for request in requests:
            await self._take(request, context)
            reply += request.reply
        return pb.Bytes(data=bytes(reply))

    async def Relay(self, requests, context):  # noqa: N802
        self.running += 1
        try:
            async for request in requests:
                if request.order == "stop":
                    return
                await self._take(request, context)
                if request.reply:
                    self.sent += 1
                    yield pb.Bytes(data=bytes(request.reply))
        finally:
            self.running -= 1

    async def RelayChecked(self, requests, context):  # noqa: N802
        async for request in requests:
            await self._take(request, context)
            yield pb.Checked(data=bytes(request.reply))

    async def Search(self, requests, context):  # noqa: N802
        async for request in requests:
            for _ in range(request.messages):
                yield pb.Rows(rows=request.size)


class Unchecked(charges.Bills):
    """What a modified node puts in place of the check of its services' bills."""

    def take(self, message):
        pass


class Bills(rpc.BillsServiceServicer):
    """Bills what its requests say, or `bill` if that is set; tries to raise its caps."""

    def __init__(self) -> None:
        self.bill: int | None = None

    def _rows(self, request):
        asked = request.size if isinstance(request, pb.Ask) else request.bill
        request.max_rows = 2**63
        if isinstance(request, pb.Order):
            request.data = bytes(1000)
        return pb.Rows(rows=asked if self.bill is None else self.bill)

    async def Total(self, request, context):  # noqa: N802
        return self._rows(request)

    async def Sort(self, request, context):  # noqa: N802
        return self._rows(request)

    async def List(self, request, context):  # noqa: N802
        for _ in range(request.messages):
            yield self._rows(request)

    async def Sum(self, requests, context):  # noqa: N802
        rows = [self._rows(request).rows async for request in requests]
        return pb.Rows(rows=sum(rows) if self.bill is None else self.bill)

    async def Merge(self, requests, context):  # noqa: N802
        async for request in requests:
            for _ in range(request.messages):
                yield self._rows(request)


BYTES = Line("probe.v1.ProbeService", Unit.BYTE)
ROWS = Line("probe.v1.ProbeService", Unit.COUNT)
PRICES = {BYTES: Price(Rate.parse("1 BTT / GiB"), 1 << 20), ROWS: Price(Rate(1, 1, Unit.COUNT), 1000)}

CALLS = "probe.v1.CallsService"
BILLS = "probe.v1.BillsService"
UP_BYTES, SECONDS, FEES = Line(CALLS, Unit.BYTE), Line(CALLS, Unit.COUNT), Line(CALLS, Unit.CALL)
CALL_PRICES = {
    UP_BYTES: Price(Rate.parse("1 BTT / GiB"), 2 << 20),
    SECONDS: Price(Rate(1, 1000, Unit.COUNT), 1 << 20),
    FEES: Price(Rate(10, 1, Unit.CALL), 3),
}
BILL_PRICES = {
    Line(BILLS, Unit.BYTE): Price(Rate(1, 10, Unit.BYTE), 1000),
    Line(BILLS, Unit.COUNT): Price(Rate(3, 1, Unit.COUNT), 1000),
    Line(BILLS, Unit.CALL): Price(Rate(7, 1, Unit.CALL), 1),
}
