"""The scheduler alone, with a clock of its own: who fetches which run, and that nobody fetches one twice."""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btt.sdk.content.feed import Feed, Source, Work
from btt.sdk.content.plan import CALL_S, FIRST_RUNS, LEAST_GAIN_S, OVERDUE_S, PATIENCE, Plan
from btt.sdk.money import Rate, Unit


def whole(runs: int, *, shared: bool = True) -> Plan:
    return Plan([(0, [range(runs)])], shared=shared)


def bring(plan: Plan, task, now: float, each: float = 0.01, count: int | None = None) -> float:
    """A node delivers the next runs of a task."""
    for _ in range(task.left if count is None else count):
        now += each
        plan.arrived(task, now)
    return now


def test_a_single_node_is_asked_for_everything_in_one_call():
    plan = whole(1000, shared=False)
    task = plan.take("a", 0.0)
    assert (task.start, task.stop, task.asked) == (0, 1000, 1000)
    assert plan.take("a", 0.0) is None
    assert not plan.is_over
    bring(plan, task, 0.0)
    plan.finish(task)
    assert plan.is_over


def test_a_node_of_unknown_speed_gets_few_runs_and_a_known_one_two_seconds_of_its_own():
    plan = whole(10_000)
    first = plan.take("a", 0.0)
    second = plan.take("a", 0.0)
    assert first.left + second.left == FIRST_RUNS
    assert plan.take("a", 0.0) is None
    now = bring(plan, second, bring(plan, first, 0.0))
    plan.finish(first)
    plan.finish(second)
    before = 0
    while (task := plan.take("a", now)) is not None:
        before += task.left
    assert CALL_S / 0.01 - 2 <= before <= 1.5 * CALL_S / 0.01


def test_runs_are_handed_out_in_proportion_to_speed():
    share = simulate(3000, {"slow": 0.04, "middle": 0.02, "fast": 0.01})
    assert sum(share.values()) == 3000
    assert 1.8 < share["fast"] / share["middle"] < 2.2
    assert 3.4 < share["fast"] / share["slow"] < 4.6


def test_a_node_that_is_ready_first_leaves_the_others_their_share():
    plan = whole(128)
    for name in ("early", "late", "later"):
        plan.join(name)
    now, tasks = 0.0, [plan.take("early", 0.0)]
    now = bring(plan, tasks[0], now, each=0.003)
    plan.finish(tasks[0])
    while (task := plan.take("early", now)) is not None:
        tasks.append(task)
    assert len(tasks) > 2, "the next call is there before one ends"
    assert 0.8 * 126 / 3 < plan.before("early") <= 126 / 3


async def test_a_node_has_its_share_before_it_has_a_session_and_none_when_it_is_gone():
    plan, asked = whole(128), asyncio.Event()

    async def session(need):
        asked.set()
        await asyncio.Event().wait()

    def take_all(now: float) -> int:
        while plan.take("early", now) is not None:
            pass
        return plan.before("early")

    work = Work(None, SimpleNamespace(missing_bytes=1), plan, None, {})
    late = Feed(work, Source(SimpleNamespace(session=session), Rate(1, 1, Unit.BYTE)), nodes=2)
    opening = asyncio.create_task(late.run())
    await asked.wait()
    first = plan.take("early", 0.0)
    now = bring(plan, first, 0.0, each=0.003)
    plan.finish(first)
    assert take_all(now) <= 126 / 2 + 1
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert take_all(now) == 128 - (first.stop - first.start)


def simulate(runs: int, intervals: dict[str, float], latency: float = 0.005) -> Counter[str]:
    """Nodes that deliver one call after the other at a steady rate; raises if a run comes twice."""
    plan, share, seen, cut = whole(runs), Counter(), set(), 0
    queues: dict[str, list] = {name: [] for name in intervals}
    events: list[tuple[float, int, str]] = []
    count = 0

    def push(at: float, name: str) -> None:
        nonlocal count
        count += 1
        heapq.heappush(events, (at, count, name))

    for name in intervals:
        push(0.0, name)
    busy = dict.fromkeys(intervals, False)
    end = 0.0
    while not plan.is_over:
        now, _, name = heapq.heappop(events)
        queue = queues[name]
        if busy[name]:
            busy[name] = False
            task = queue[0]
            if task.left:
                run = task.next
                assert run not in seen
                seen.add(run)
                share[name] += 1
                plan.arrived(task, now)
                end = now
        while queue and not queue[0].left:
            task = queue.pop(0)
            cut += task.stop < task.asked
            plan.finish(task)
        while len(queue) < 4 and (task := plan.take(name, now)) is not None:
            queue.append(task)
        if queue:
            busy[name] = True
            push(now + intervals[name] + latency * (queue[0].next == queue[0].start), name)
        elif not plan.is_over:
            push(now + 0.25, name)
    assert seen == set(range(runs))
    ideal = runs / sum(1 / interval for interval in intervals.values())
    assert end < 1.2 * ideal + 2 * max(intervals.values()) + 1.5
    return share


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400),
    st.lists(st.sampled_from([0.001, 0.01, 0.05, 0.3, 2.0]), min_size=1, max_size=4),
)
def test_every_run_comes_once_and_the_end_is_not_held_up_by_the_slowest(runs, intervals):
    simulate(runs, {str(at): interval for at, interval in enumerate(intervals)})


def stalled(runs: int = 2):
    """One run that "slow" does not bring, after "fast" has brought some."""
    plan = whole(runs)
    fast = plan.take("fast", 0.0)
    slow = plan.take("slow", 0.0)
    now = bring(plan, fast, 0.0)
    plan.finish(fast)
    return plan, slow, now


def test_the_run_that_a_node_waits_for_moves_only_when_it_is_overdue():
    plan, slow, now = stalled()
    revoked = []
    slow.revoke = lambda: revoked.append(slow)
    assert plan.take("fast", now) is None
    overdue = OVERDUE_S + PATIENCE * 0.01
    assert plan.take("fast", overdue - 0.01) is None
    assert revoked == []
    taken = plan.take("fast", overdue + 0.01)
    assert (taken.start, taken.stop) == (slow.start, slow.start + 1)
    assert revoked == [slow]
    assert slow.left == 0
    plan.finish(slow, [range(2)])  # it is another one's now
    assert plan.take("slow", overdue + 0.02) is None
    plan.arrived(taken, overdue + 0.03)
    plan.finish(taken)
    assert plan.is_over


def test_work_does_not_move_for_a_trifle():
    plan = whole(8)
    first, second = plan.take("slow", 0.0), plan.take("slow", 0.0)
    now = bring(plan, first, 0.0, each=0.02)
    plan.finish(first)
    while (task := plan.take("fast", now)) is not None:
        bring(plan, task, now, each=0.001)
        plan.finish(task)
    assert second.left * 0.02 < LEAST_GAIN_S
    assert second.left == 2
    assert plan.take("slow", now) is None


def test_an_idle_node_takes_over_the_end_of_a_slow_ones_range_and_the_slow_one_stops_there():
    plan = whole(400)
    for _ in range(2):
        task = plan.take("slow", 0.0)
        bring(plan, task, 0.0, each=0.005)
        plan.finish(task)
    now, long = 1.0, plan.take("slow", 1.0)
    assert long.left > 50
    while (task := plan.take("fast", now)).start >= long.asked:
        now = bring(plan, task, now, each=0.005)
        plan.finish(task)
    stop = long.stop
    assert long.start < stop < long.asked
    assert (task.start, task.stop) == (stop, long.asked)
    bring(plan, long, now)
    assert long.is_cut


def test_what_failed_is_fetched_by_whoever_asks_next():
    plan = whole(8)
    task = plan.take("a", 0.0)
    plan.arrived(task, 0.1)
    plan.finish(task, [range(1, 8)])
    plan.leave("a")
    again = plan.take("b", 0.2)
    assert again.start == 1


def test_many_files_are_planned_and_handed_out_in_linear_time():
    count = 300_000  # anything quadratic takes longer than the time limit
    plan = Plan(((file, [range(1)]) for file in range(count)), shared=False)
    for file in range(count):
        task = plan.take("a", 0.0)
        assert task.file == file
        plan.finish(task)
    assert plan.is_over


def test_files_come_in_the_order_that_was_asked_for():
    plan = Plan([(2, [range(1)]), (0, [range(1)]), (1, [range(1)])], shared=False)
    assert [plan.take("a", 0.0).file for _ in range(3)] == [2, 0, 1]


def test_a_shorter_task_gives_back_its_end():
    plan = whole(100, shared=False)
    task = plan.take("a", 0.0)
    plan.shorten(task, 3)
    assert (task.stop, task.asked) == (3, 3)
    assert not task.is_cut
    assert plan.take("a", 0.0).start == 3


def test_what_a_reader_wants_comes_before_all_else_and_only_once():
    plan = whole(1000)
    running = plan.take("a", 0.0)
    assert plan.want("reader", 0, [range(500, 504)])
    assert not plan.want("reader", 0, [range(500, 504)])
    got = [plan.take("a", 0.0) for _ in range(3)]
    assert sorted(run for task in got for run in range(task.start, task.stop)) == [500, 501, 502, 503]
    assert not plan.want("reader", 0, [range(500, 504)])  # they are on their way
    for task in [running, *got]:
        bring(plan, task, 0.0)
        plan.finish(task)
    seen = set(range(running.start, running.stop)) | set(range(500, 504))
    while (task := plan.take("a", 1.0)) is not None:
        assert not seen & set(range(task.start, task.stop))
        seen |= set(range(task.start, task.stop))
        bring(plan, task, 1.0)
        plan.finish(task)
    assert seen == set(range(1000))


def test_a_long_call_is_cut_where_a_reader_jumps_to():
    plan = whole(1000, shared=False)
    long = plan.take("a", 0.0)
    plan.arrived(long, 0.1)
    plan.want("reader", 0, [range(600, 610)])
    assert long.stop == 600
    assert plan.take("a", 0.2).start == 600


def test_without_everything_only_what_is_read_is_fetched():
    plan = Plan([(0, [range(100)])], shared=True, everything=False)
    assert plan.take("a", 0.0) is None
    assert not plan.is_over
    plan.want("reader", 0, [range(10, 12)])
    task = plan.take("a", 0.0)
    assert task.start == 10
    plan.want("reader", 0, [range(50, 51)])  # it has jumped away
    assert plan.take("a", 0.0).start == 50
    assert plan.take("a", 0.0) is None
    plan.finish(task, [range(10, 12)])
    assert plan.take("a", 0.0) is None
