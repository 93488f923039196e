"""Serves probe.proto: services of every kind of charge."""

from __future__ import annotations

from pathlib import Path

from btt.sdk.channel import Line, Price
from btt.sdk.money import Rate, Unit
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


BYTES = Line("probe.v1.ProbeService", Unit.BYTE)
ROWS = Line("probe.v1.ProbeService", Unit.COUNT)
PRICES = {BYTES: Price(Rate.parse("1 BTT / GiB"), 1 << 20), ROWS: Price(Rate(1, 1, Unit.COUNT), 1000)}
