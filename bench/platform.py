"""What paying adds to a call, and how a node bears a thousand of them: `python -m bench.platform`.

First 1,000 streams of one new payer begin at once, all of them wait for each other, and all must
be paid under way:

- memory per stream: what the server's anonymous memory grows by while all of them are open;
- fairness: units of the slowest stream over the median, when half of all is delivered;
- Pay: seconds from a signed update to the node's word that it is paid, under this load.

Then `unary_overhead_us` compares a small paid unary call of that payer with the same call on a
bare gRPC server in the same process, both over TLS: alternating blocks, one call after another,
the median of the paired differences; CPU time is that of client and server together. A call
that runs alone is paid at once when it ends, so this counts an update, saved by both, for each.

These are reported; nothing here is compared with a peer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import uvloop

from bench.harness import workspace
from bench.ours.ping import NAME, pb, rpc
from bench.processes import Child, anonymous_bytes, cpu_seconds
from btt.sdk.budget import Budget
from btt.sdk.client import Client, Wallet
from btt.sdk.keys import PrivateKey
from btt.sdk.payment.session import PaymentSession
from btt.sdk.tls import pinned_channel

BLOCK = 100
"""Unary calls of one kind in a row."""
SMALL = 100
"""Bytes of a small response."""
SIZE = 4096
"""Bytes of a streamed response."""


@dataclass(frozen=True, slots=True)
class Unary:
    """A small unary call.

    Attributes:
        bare_us: Wall time of the bare call, microseconds.
        paid_us: Of the paid one.
        overhead_us: Median of the paired differences.
        bare_cpu_us: CPU time of client and server, the bare call.
        paid_cpu_us: The paid one.
        cpu_overhead_us: Median of the paired differences.
    """

    bare_us: float
    paid_us: float
    overhead_us: float
    bare_cpu_us: float
    paid_cpu_us: float
    cpu_overhead_us: float


@dataclass(frozen=True, slots=True)
class Streams:
    """Many streams at once.

    Attributes:
        streams: How many.
        messages: Of each.
        seconds: From the first message to the last.
        memory_per_stream: Bytes of anonymous memory of the server.
        fairness: Units of the slowest over the median, at half.
        pay_s_median: Seconds from an update to its confirmation.
        pay_s_most: The longest.
        updates: Signed while the streams ran.
    """

    streams: int
    messages: int
    seconds: float
    memory_per_stream: int
    fairness: float
    pay_s_median: float
    pay_s_most: float
    updates: int


@dataclass(slots=True)
class PayClock:
    """Times every update of a session from its signature to the node's confirmation."""

    session: PaymentSession
    waits: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Looks on at signing and statements from now on, and asks for a statement after each update.

        A node answers a claim about the deposit with a statement at once; by itself it says little.
        """
        session, payer, signed = self.session, self.session.payer, dict[int, float]()
        sign, take, news = payer.sign, session._take_statement, session.capacity.news
        asking = False

        def timed_sign(saved: Any) -> Any:
            nonlocal asking
            update = sign(saved)
            signed[update.cumulative] = time.perf_counter()
            asking = True
            session._wake.set()
            return update

        def asked() -> int | None:
            nonlocal asking
            asking, before = False, asking
            return payer.deposit if before else news()

        def timed_take(statement: Any) -> None:
            take(statement)
            for cumulative in [c for c in signed if c <= statement.paid]:
                self.waits.append(time.perf_counter() - signed.pop(cumulative))

        payer.sign = timed_sign  # type: ignore[method-assign]
        session._take_statement = timed_take  # type: ignore[method-assign]
        session.capacity.news = asked  # type: ignore[method-assign]


async def measure_unary(
    bare: Callable[[], Awaitable[Any]], paid: Callable[[], Awaitable[Any]], pid: int, rounds: int
) -> Unary:
    """Times blocks of calls of both kinds in turn.

    Args:
        bare: Makes one call.
        paid: Makes one paid call.
        pid: Of the server.
        rounds: Blocks of each kind.
    """
    wall: dict[Any, list[float]] = {bare: [], paid: []}
    cpu: dict[Any, list[float]] = {bare: [], paid: []}
    for number in range(rounds + 1):
        for call in (bare, paid) if number % 2 else (paid, bare):
            began, spent = time.perf_counter(), time.process_time() + cpu_seconds(pid)
            for _ in range(BLOCK):
                await call()
            if number:  # the first warms both up
                wall[call].append((time.perf_counter() - began) / BLOCK * 1e6)
                cpu[call].append((time.process_time() + cpu_seconds(pid) - spent) / BLOCK * 1e6)

    def paired(times: dict[Any, list[float]]) -> float:
        return statistics.median(b - a for a, b in zip(times[bare], times[paid], strict=True))

    found = [
        statistics.median(wall[bare]),
        statistics.median(wall[paid]),
        paired(wall),
        statistics.median(cpu[bare]),
        statistics.median(cpu[paid]),
        paired(cpu),
    ]
    return Unary(*(round(value, 1) for value in found))


async def measure_streams(session: PaymentSession, pid: int, streams: int, messages: int) -> Streams:
    """Runs many streams of one payer at once.

    Args:
        session: Who pays.
        pid: Of the server.
        streams: How many; the server waits for as many.
        messages: Of each.
    """
    stub = rpc.PingServiceStub(session.channel)
    clock = PayClock(session)
    clock.start()
    got = [0] * streams
    before = anonymous_bytes(pid)
    most = before
    half: list[int] = []
    began = 0.0

    async def read(number: int) -> None:
        nonlocal began, most
        async for _ in stub.Many(pb.PingRequest(size=SIZE, messages=messages)):
            if not began:
                began, most = time.perf_counter(), anonymous_bytes(pid)
            got[number] += 1
            if not half and 2 * sum(got) >= streams * messages:
                half.extend(got)

    async with asyncio.TaskGroup() as group:
        for number in range(streams):
            group.create_task(read(number))
    seconds = time.perf_counter() - began
    await session.settle()
    if got != [messages] * streams:
        raise RuntimeError("a stream did not get all it paid for")
    return Streams(
        streams=streams,
        messages=messages,
        seconds=round(seconds, 3),
        memory_per_stream=(most - before) // streams,
        fairness=round(min(half) / statistics.median(half), 3),
        pay_s_median=round(statistics.median(clock.waits), 4),
        pay_s_most=round(max(clock.waits), 4),
        updates=len(clock.waits),
    )


async def measure(*, rounds: int, streams: int, messages: int) -> tuple[Unary, Streams]:
    """Runs everything against one server.

    Args:
        rounds: Blocks of unary calls of each kind.
        streams: At once.
        messages: Of each stream.
    """
    with workspace() as folder:
        wallet = Wallet(folder / "wallet", PrivateKey.generate())
        wallet.folder.mkdir()
        arguments = [str(folder), str(wallet.account.public.address), str(streams)]
        with Child("server", "bench.ours.ping", arguments) as server:
            ready = await asyncio.to_thread(server.expect, "ready")
            pid = server.pid
            client = Client.connect(
                ready["node"], ledger=ready["ledger"], wallet=wallet, budget=Budget("1000 BTT")
            )
            certificate = ready["certificate"].encode()
            async with (
                pinned_channel("127.0.0.1", ready["port"], certificate, NAME) as channel,
                client as btt,
            ):
                session = await btt.session(900 * 10**6)
                bare, paid = rpc.PingServiceStub(channel), rpc.PingServiceStub(session.channel)
                request = pb.PingRequest(size=SMALL)
                found = await measure_streams(session, pid, streams, messages)
                unary = await measure_unary(lambda: bare.One(request), lambda: paid.One(request), pid, rounds)
            if not client.receipts[0].counts_agree:
                raise RuntimeError("the books of node and client differ")
    return unary, found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="blocks of 100 unary calls of each kind; 40 by default")
    parser.add_argument("--streams", type=int, default=1000, help="at once; 1000 by default")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and messages, under 50 s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (8 if arguments.quick else 40)
    messages = 10 if arguments.quick else 40
    unary, streams = uvloop.run(measure(rounds=rounds, streams=arguments.streams, messages=messages))
    if arguments.json:
        found = {"ratios": {}, "unary_overhead_us": unary.overhead_us}
        print(json.dumps({**found, "unary": asdict(unary), "streams": asdict(streams)}))
        return
    print(
        f"small unary call: {unary.paid_us:.0f} us paid, {unary.bare_us:.0f} us bare, "
        f"{unary.overhead_us:+.0f} us; CPU {unary.paid_cpu_us:.0f} and {unary.bare_cpu_us:.0f} us, "
        f"{unary.cpu_overhead_us:+.0f} us"
    )
    print(
        f"{streams.streams} streams: {streams.memory_per_stream / 1024:.1f} KiB each, slowest over median "
        f"{streams.fairness:.2f}, {streams.streams * streams.messages / streams.seconds:.0f} messages/s"
    )
    print(
        f"Pay under this load: {streams.pay_s_median * 1e3:.0f} ms median, "
        f"{streams.pay_s_most * 1e3:.0f} ms at most, {streams.updates} updates"
    )


if __name__ == "__main__":
    main()
