"""What paying costs by each kind of call: `python -m bench.content --kinds`.

The same bytes in messages of 256 KiB go down by unary calls (four at a time) and by one
stream, up by one stream of requests, and both ways by one of both: to a node, paid by a new wallet, and
to a bare gRPC server with the same handlers in the same process, in alternating rounds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.harness import GIB, Ratio, Results, workspace
from bench.ours.ping import NAME, pb, rpc
from bench.processes import Child, cpu_seconds
from btt.sdk.budget import Budget
from btt.sdk.client import Client, Wallet
from btt.sdk.keys import PrivateKey
from btt.sdk.tls import pinned_channel

MESSAGE = 256 * 1024
"""Bytes of a message."""
CALLERS = 4
"""Unary calls at a time."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way of moving all the bytes once.

    Attributes:
        rate: Bytes a second.
        cpu_per_gib: CPU seconds of client and server.
    """

    rate: float
    cpu_per_gib: float


async def _unary(stub: Any, messages: int) -> int:
    async def caller(calls: int) -> int:
        request = pb.PingRequest(size=MESSAGE)
        return sum([len((await stub.Get(request)).data) for _ in range(calls)])

    share = [messages // CALLERS + (number < messages % CALLERS) for number in range(CALLERS)]
    return sum(await asyncio.gather(*map(caller, share)))


async def _down(stub: Any, messages: int) -> int:
    request = pb.PingRequest(size=MESSAGE, messages=messages)
    return sum([len(message.data) async for message in stub.Read(request)])


async def _up(stub: Any, messages: int) -> int:
    return int((await stub.Write(_parts(pb.BulkPart, messages))).bytes)


async def _both(stub: Any, messages: int) -> int:
    return sum([len(message.data) async for message in stub.Echo(_parts(pb.BulkFree, messages))])


def _parts(kind: Any, messages: int) -> Iterator[Any]:
    return (kind(data=bytes(MESSAGE)) for _ in range(messages))


KINDS: dict[str, Callable[[Any, int], Awaitable[int]]] = {
    "unary_unary": _unary,
    "unary_stream": _down,
    "stream_unary": _up,
    "stream_stream": _both,
}


async def measure_kinds(size: int, rounds: int) -> Results[Way]:
    """Moves the bytes by every kind of call, paid and bare in turn.

    Args:
        size: Bytes, a multiple of a message.
        rounds: Of each; one more warms up.

    Returns:
        Rounds of "KIND paid" and "KIND bare".
    """
    with workspace() as folder:
        wallet = Wallet(folder / "wallet", PrivateKey.generate())
        wallet.folder.mkdir()
        arguments = [str(folder), str(wallet.account.public.address), "1"]
        with Child("server", "bench.ours.ping", arguments) as server:
            ready = await asyncio.to_thread(server.expect, "ready")
            client = Client.connect(
                ready["node"], ledger=ready["ledger"], wallet=wallet, budget=Budget("1000 BTT")
            )
            certificate = ready["certificate"].encode()
            async with (
                pinned_channel("127.0.0.1", ready["port"], certificate, NAME) as channel,
                client as btt,
            ):
                session = await btt.session(900 * 10**6)
                stubs = {"paid": rpc.BulkServiceStub(session.channel), "bare": rpc.BulkServiceStub(channel)}
                found: dict[str, list[Way]] = {f"{kind} {way}": [] for kind in KINDS for way in stubs}
                for number in range(rounds + 1):
                    for kind, move in KINDS.items():
                        for way in sorted(stubs, reverse=bool(number % 2)):
                            took = await _timed(move, stubs[way], size, server.pid)
                            if way == "paid":
                                await session.settle()
                            if number:
                                found[f"{kind} {way}"].append(took)
            if not client.receipts[0].counts_agree:
                raise RuntimeError("the books of node and client differ")
    return Results(found)


async def _timed(move: Callable[[Any, int], Awaitable[int]], stub: Any, size: int, pid: int) -> Way:
    began, spent = time.perf_counter(), time.process_time() + cpu_seconds(pid)
    moved = await move(stub, size // MESSAGE)
    seconds, cpu = time.perf_counter() - began, time.process_time() + cpu_seconds(pid) - spent
    if moved != size:
        raise RuntimeError("what arrived is not what was sent")
    return Way(size / seconds, cpu * GIB / size)


def kind_ratios(results: Results[Way]) -> dict[str, Ratio]:
    """Returns for each kind the paid rate over the bare one, and the CPU time likewise."""
    found = {}
    for kind in KINDS:
        ways = f"{kind} paid", f"{kind} bare"
        found[f"{kind}_vs_bare"] = results.paired(*ways)
        found[f"{kind}_cpu_vs_bare"] = results.paired(*ways, lambda way: way.cpu_per_gib)
    return found
