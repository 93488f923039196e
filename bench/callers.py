"""Clients of a ledger over gRPC, all in one child process, each with a connection of its own.

The same process calls the product and the bare server. Requests are signed before the clock and
receipts are checked after it, so that what is timed is the call. Closed loop: each client sends
its next request when it has its receipt. With a pace: requests leave at fixed times, whoever is
late, and the time of each is counted from when it should have left.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import grpc.aio

from bench.operations import Operations, percentile
from bench.ours.ledger import check
from bench.processes import Child, Watched, heard, say
from bench.transfers import streams
from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.proto.ledger.v1.ledger_pb2_grpc import LedgerServiceStub
from btt.sdk.keys import PublicKey

if TYPE_CHECKING:
    from btt.proto.ledger.v1.ledger_pb2_grpc import LedgerServiceAsyncStub


class _Caller:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: LedgerServiceAsyncStub = LedgerServiceStub(channel)
        self.times: list[float] = []
        self.receipts: list[tuple[pb.TransferRequest, pb.LedgerReceipt]] = []

    async def call(self, request: pb.TransferRequest, start: float) -> None:
        response = await self._stub.Transfer(request)
        self.times.append(time.perf_counter() - start)
        self.receipts.append((request, response.receipt))

    async def loop(self, requests: Sequence[pb.TransferRequest]) -> None:
        for request in requests:
            await self.call(request, time.perf_counter())


async def _paced(
    callers: Sequence[_Caller], work: Sequence[Sequence[pb.TransferRequest]], pace: float
) -> None:
    start = time.perf_counter()
    calls = [
        (caller, request)
        for turn in zip(*work, strict=True)
        for caller, request in zip(callers, turn, strict=True)
    ]
    async with asyncio.TaskGroup() as group:
        for number, (caller, request) in enumerate(calls):
            due = start + number / pace
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(caller.call(request, due))


async def _run(arguments: argparse.Namespace, certificate: bytes) -> None:
    ledger_id = bytes.fromhex(arguments.ledger_id)
    work = streams(arguments.clients, arguments.each, ledger_id)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", arguments.name)]
    credentials = grpc.ssl_channel_credentials(certificate)
    async with AsyncExitStack() as stack:
        callers = []
        for _ in work:
            channel = grpc.aio.secure_channel(f"127.0.0.1:{arguments.port}", credentials, options=options)
            await stack.enter_async_context(channel)
            await channel.channel_ready()
            callers.append(_Caller(channel))
        say("ready")
        await asyncio.to_thread(heard)
        start = time.perf_counter()
        if arguments.pace:
            await _paced(callers, work, arguments.pace)
        else:
            await asyncio.gather(*(c.loop(requests) for c, requests in zip(callers, work, strict=True)))
        seconds = time.perf_counter() - start
        if arguments.operator:
            receipts = [receipt for caller in callers for receipt in caller.receipts]
            check(receipts, ledger_id, PublicKey(bytes.fromhex(arguments.operator)))
        times = [taken for caller in callers for taken in caller.times]
        say(
            "done",
            seconds=seconds,
            operations=len(times),
            p50=percentile(times, 0.5),
            p99=percentile(times, 0.99),
            longest=max(times),
        )
        await asyncio.to_thread(heard)


def call(server: Child, *, clients: int, each: int, pace: float = 0.0) -> Operations:
    """Lets clients call a server that is ready to start, and measures both processes.

    Args:
        server: Not yet asked for its `ready`, whose fields say where it listens.
        clients: How many at once.
        each: Transfers of one client.
        pace: Transfers per second of all together; 0 for as fast as they can.
    """
    ready = server.expect("ready")
    arguments = [str(ready["port"]), ready["certificate"], ready["name"], ready["ledger_id"]]
    arguments += [ready["operator"], str(clients), str(each), str(pace)]
    with Child("clients", "bench.callers", arguments) as caller:
        caller.expect("ready")
        watched: tuple[Watched, ...] = (server, caller)
        before = [process.cpu() for process in watched]
        caller.tell()
        done = caller.expect("done")
        cpu = {p.role: p.cpu() - start for p, start in zip(watched, before, strict=True)}
    return Operations(
        done["seconds"],
        done["operations"],
        cpu,
        done["p50"],
        done["p99"],
        {"longest": done["longest"], "server_memory": server.peak()},
    )


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("certificate")
    parser.add_argument("name")
    parser.add_argument("ledger_id")
    parser.add_argument("operator")
    parser.add_argument("clients", type=int)
    parser.add_argument("each", type=int)
    parser.add_argument("pace", type=float)
    arguments = parser.parse_args()
    asyncio.run(_run(arguments, arguments.certificate.encode("ascii")))


if __name__ == "__main__":
    _main()
