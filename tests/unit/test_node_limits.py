"""The one limiter: how much passes in how long, and who goes first."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from btt.node.limits.bucket import BURST_S, Bucket
from btt.node.limits.gate import Gate
from btt.node.limits.limiter import Limiter
from btt.node.plugins.guard import guarded
from btt.node.plugins.scope import Scope, follow_tasks
from btt.node.values import parse_speed, speed_text
from kit.hanging import ends

MIB = 1 << 20


class Time:
    """A clock that goes on only while somebody sleeps."""

    now = 0.0
    ends_at = float("inf")

    def __init__(self):
        self.ended = asyncio.Event()

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.now += seconds
        if self.now >= self.ends_at:
            self.ended.set()
        await asyncio.sleep(0)


@pytest.fixture
def time():
    return Time()


@given(st.integers(1, 10**9), st.lists(st.tuples(st.floats(0, 5), st.integers(1, 10**8)), max_size=40))
def test_a_bucket_lets_no_more_pass_than_its_rate_and_its_burst_and_one_message(rate, asked):
    bucket, now, passed, largest = Bucket(rate, 0.0), 0.0, 0, 0
    for pause, amount in asked:
        now += pause
        now += bucket.wait(now)
        assert bucket.wait(now) <= 1e-3 / rate * 2 + 1e-9
        bucket.take(amount)
        passed, largest = passed + amount, max(largest, amount)
        assert passed <= rate * (now + BURST_S) + largest + 1


def test_a_bucket_lets_as_much_pass_as_its_rate():
    bucket, now, passed = Bucket(1000, 0.0), 0.0, 0
    while now < 100:
        now += bucket.wait(now)
        bucket.take(37)
        passed += 37
    assert 100_000 <= passed <= 100_000 + 250 + 2 * 37


def test_a_bucket_that_was_idle_lets_no_more_pass_at_once_than_its_burst():
    bucket, passed = Bucket(1000, 0.0), 0
    while not bucket.wait(100.0):
        bucket.take(37)
        passed += 37
    assert 1000 * BURST_S <= passed <= 1000 * BURST_S + 37


async def spend(gate, service, flow, amount, log, times=10**9):
    for _ in range(times):
        await gate.take(service, flow, amount)
        log[flow] = log.get(flow, 0) + amount


async def compete(time, gate, flows, until):
    log: dict[str, int] = {}
    tasks = [asyncio.create_task(spend(gate, service, flow, amount, log)) for service, flow, amount in flows]
    time.ends_at = until
    await time.ended.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await gate.close()
    return log


async def test_flows_share_in_bytes_whatever_the_size_of_their_messages(time):
    gate = Gate(clock=time, sleep=time.sleep)
    gate.limit(10 * MIB, {})
    log = await compete(
        time, gate, [("a", "large", MIB), ("a", "small", 10_000), ("b", "other", MIB // 3)], 10
    )
    assert sum(log.values()) == pytest.approx(100 * MIB, rel=0.06)
    assert max(log.values()) <= min(log.values()) * 1.15


async def test_many_calls_of_one_peer_are_one_flow(time):
    gate = Gate(clock=time, sleep=time.sleep)
    gate.limit(10 * MIB, {})
    flows = [("a", "greedy", 100_000)] * 10 + [("a", "modest", 100_000)]
    log = await compete(time, gate, flows, 10)
    assert log["modest"] == pytest.approx(log["greedy"], rel=0.1)


async def test_a_service_at_its_own_limit_holds_up_no_other(time):
    gate = Gate(clock=time, sleep=time.sleep)
    gate.limit(10 * MIB, {"slow": MIB})
    log = await compete(time, gate, [("slow", "s", 50_000), ("fast", "f", 50_000)], 20)
    assert log["s"] == pytest.approx(20 * MIB, rel=0.05)
    assert log["f"] == pytest.approx(180 * MIB, rel=0.05)


async def test_without_a_limit_nothing_waits_and_a_limit_that_goes_lets_all_pass(time):
    gate = Gate(clock=time, sleep=time.sleep)
    assert not gate.limits("a")
    await gate.take("a", "x", 10**12)
    gate.limit(1, {})
    await gate.take("a", "x", 10**9)
    waiting = asyncio.create_task(gate.take("a", "x", 1))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    gate.limit(0, {})
    await waiting
    assert time.now < 1


async def test_who_leaves_the_queue_holds_up_nobody(time):
    gate = Gate(clock=time, sleep=time.sleep)
    gate.limit(1000, {})
    await gate.take("a", "x", 1000)
    leaving = [asyncio.create_task(gate.take("a", "x", 10**9)) for _ in range(3)]
    staying = asyncio.create_task(gate.take("a", "y", 10))
    await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    await staying
    assert time.now < 2
    await gate.take("a", "x", 1)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert gate._flows == {}


async def test_a_service_that_ends_takes_nobody_elses_turn_with_it(time):
    gate = Gate(clock=time, sleep=time.sleep)
    gate.limit(1000, {})
    await gate.take("a", "x", 1000)
    ending = Scope(lambda error: None)
    unfollow = follow_tasks(asyncio.get_running_loop())
    first = ending.run(gate.take("a", "x", 10), name="first to wait")
    other = asyncio.create_task(gate.take("b", "y", 10))
    await asyncio.sleep(0)
    assert await ending.end(1) == []
    unfollow()
    assert first.cancelled()
    async with ends("who waits beside a service that has ended"):
        await other


async def test_both_directions_are_bounded_apart(time):
    limiter = Limiter(time)
    limiter.limit(up=0, down=0, services={"proxy": (5, 0), "storage": (0, 7)})
    assert (limiter.up.limits("proxy"), limiter.down.limits("proxy")) == (True, False)
    assert (limiter.up.limits("storage"), limiter.down.limits("storage")) == (False, True)
    given_to = limiter.of("storage")
    await given_to.send(10**9)
    await given_to.receive(10)
    for up, down in ((5, 0), (0, 7)):
        limiter.limit(up=up, down=down, services={})
        assert (limiter.up.limits("any"), limiter.down.limits("any")) == (bool(up), bool(down))
    await limiter.close()


async def test_what_a_service_sends_and_receives_is_its_own_in_that_direction(time):
    limiter = Limiter(time)
    limiter.up, limiter.down = Direction(), Direction()
    given_to = limiter.of("storage")
    await given_to.send(3, flow="peer")
    assert (limiter.up.taken, limiter.down.taken) == ([("storage", "peer", 3)], [])
    await given_to.receive(5, flow="peer")
    assert (limiter.up.taken, limiter.down.taken) == ([("storage", "peer", 3)], [("storage", "peer", 5)])


@pytest.mark.parametrize(
    ("text", "rate"), [("", 0), ("20 MiB/s", 20 * MIB), ("3B/s", 3), ("1 GiB/s", 1 << 30)]
)
def test_speeds(text, rate):
    assert parse_speed(text) == rate
    assert parse_speed(speed_text(rate)) == rate


@pytest.mark.parametrize("text", ["0 MiB/s", "20", "20 MB/s", "-1 B/s", 20, None])
def test_what_is_no_speed(text):
    with pytest.raises(ValueError, match="MiB/s"):
        parse_speed(text)


# Around the calls of services


class Sized:
    def __init__(self, size):
        self.size = size

    def ByteSize(self):  # noqa: N802 - as messages have it
        return self.size


class Direction:
    def __init__(self):
        self.taken = []

    def limits(self, service):
        return service == "probe"

    async def take(self, service, flow, amount):
        self.taken.append((service, flow, amount))


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
async def test_calls_of_every_kind_pass_the_limiter_both_ways(kind):
    incoming, outgoing = kind.split("_")
    limiter = SimpleNamespace(up=Direction(), down=Direction())
    host = SimpleNamespace(name="probe", begin_call=lambda: None, end_call=lambda _: None)
    context = SimpleNamespace(peer=lambda: "ipv4:192.0.2.1:5")

    async def read(given):
        return [each.size async for each in given] if incoming == "stream" else [given.size]

    async def unary(given, context):
        return Sized(sum(await read(given)))

    async def stream(given, context):
        for size in await read(given):
            yield Sized(size * 10)

    async def requests():
        yield Sized(1)
        yield Sized(2)

    make = getattr(grpc, f"{kind}_rpc_method_handler")
    handler = guarded(make(unary if outgoing == "unary" else stream), host, limiter)
    asked, answered = getattr(handler, kind), []
    given = requests() if incoming == "stream" else Sized(3)
    if outgoing == "unary":
        answered.append((await asked(given, context)).size)
    else:
        answered += [each.size async for each in asked(given, context)]
    sizes = [1, 2] if incoming == "stream" else [3]
    assert answered == ([size * 10 for size in sizes] if outgoing == "stream" else [3])
    assert limiter.down.taken == [("probe", "ipv4:192.0.2.1:5", size) for size in sizes]
    assert limiter.up.taken == [("probe", "ipv4:192.0.2.1:5", size) for size in answered]
