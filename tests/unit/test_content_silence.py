"""One silent node out of several is dropped, and not sooner; others get what it had in hand."""

from __future__ import annotations

import asyncio
import types

import pytest

from btt.sdk.content import feed as module
from btt.sdk.content.feed import SILENT_S, Feed
from btt.sdk.content.plan import Plan
from btt.sdk.errors import ConnectError
from kit import leap

RUNS = 100


class Node(Feed):
    """A node that sends a run every so many seconds, and at last none."""

    def __init__(self, plan: Plan, *, every_s: float, runs: int) -> None:
        super().__init__(types.SimpleNamespace(plan=plan), None, nodes=2)
        self.every_s, self.runs = every_s, runs
        self.sent = 0

    async def _call(self, session, fetch, segment, task, reserved):
        while self.sent < self.runs and task.left:
            await asyncio.sleep(self.every_s)
            self._work.plan.arrived(task, now())
            self.sent += 1
        if task.left:
            await asyncio.Event().wait()

    async def fetch(self) -> float:
        """Takes a task from the plan and returns how long it was fetched."""
        task = self._work.plan.take(self, now())
        began = now()
        try:
            await self._fetch(None, None, None, task, [0])
        finally:
            self.took = now() - began
            self._work.plan.finish(task, [range(task.next, task.stop)])


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    """The clock by which a feed tells silence is that of the loop."""
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=now))


def test_a_node_that_falls_silent_is_dropped_in_time_and_its_runs_go_to_others():
    async def main():
        plan = Plan([(0, [range(RUNS)])], shared=True)
        silent = Node(plan, every_s=1.0, runs=2)
        with pytest.raises(ConnectError, match="nothing for 30 seconds"):
            while True:
                await silent.fetch()
        assert SILENT_S <= silent.took <= 2 * SILENT_S
        other = Node(plan, every_s=0.1, runs=RUNS)
        while not plan.is_over:
            await other.fetch()
        assert (silent.sent, other.sent) == (2, RUNS - 2), "each run once"

    leap.run(main())


def test_a_node_that_never_sends_is_dropped_too():
    async def main():
        node = Node(Plan([(0, [range(RUNS)])], shared=True), every_s=1.0, runs=0)
        await asyncio.sleep(1000)  # it is not silent before it is asked
        with pytest.raises(ConnectError):
            await node.fetch()
        assert SILENT_S <= node.took < 2 * SILENT_S

    leap.run(main())


def test_a_slow_node_that_gives_signs_is_kept():
    async def main():
        plan = Plan([(0, [range(RUNS)])], shared=True)
        slow = Node(plan, every_s=SILENT_S - 1, runs=RUNS)
        while not plan.is_over:
            await slow.fetch()
        assert slow.sent == RUNS

    leap.run(main())
