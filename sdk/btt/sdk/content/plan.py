"""Which run is fetched from which node: decided here, without sockets, clocks or threads.

Every wanted run is free or belongs to exactly one task, and a task to one node; a run changes
hands only while it has not arrived. So no run is bought twice, not even at the very end: what
a slow node has on its way when its last runs move elsewhere is neither accepted nor paid.

A node gets calls of about two seconds of its own speed, shorter ones towards the end, so that
nearly all calls end by themselves, and never more at once than its share: one that is ready first
leaves the others theirs. A node with nothing left to do takes over the end of what the slowest one
still has before it, and the very run that one waits for only when it is overdue.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

CALL_S = 2.0
"""Seconds of a node's speed that it has before it, when several nodes share the work."""
FIRST_RUNS = 4
"""Runs before a node whose speed is not known yet."""
PATIENCE = 3.0
"""A run is overdue after so many times what the other node takes for one, and `OVERDUE_S`."""
OVERDUE_S = 0.5
LEAST_GAIN_S = 0.2
"""Work moves only if the transfer ends so much earlier."""
_NEAR = 4  # runs: what comes so soon is not asked for again because a reader wants it at once
_MEMORY = 0.95  # of the speed, from run to run


def _nothing() -> None:
    pass


@dataclass(slots=True, eq=False)
class Task:
    """Runs of one file that one node was asked for.

    Attributes:
        feed: Who fetches them.
        file: Index of the file.
        start: First run.
        stop: Behind the last one; others may take the end over.
        asked: Behind the last one that the node was asked for.
        next: The run that arrives next.
        revoke: Called when all that had not arrived was taken over.
    """

    feed: Hashable
    file: int
    start: int
    stop: int
    asked: int
    next: int
    revoke: Callable[[], None] = _nothing

    @property
    def left(self) -> int:
        """Runs that have not arrived."""
        return max(0, self.stop - self.next)

    @property
    def is_cut(self) -> bool:
        """The node will send more than is still wanted of it."""
        return self.next >= self.stop and self.stop < self.asked


@dataclass(slots=True)
class _Pace:
    """How fast a node is: a mean over its last runs, while it has something to do."""

    mark: float = 0.0
    _runs: float = 0.0
    _seconds: float = 0.0

    def run(self, now: float) -> None:
        self._runs = self._runs * _MEMORY + 1
        self._seconds = self._seconds * _MEMORY + max(0.0, now - self.mark)
        self.mark = now

    @property
    def interval(self) -> float | None:
        """Seconds a run; None before the first."""
        return max(self._seconds / self._runs, 1e-6) if self._runs else None


@dataclass(slots=True)
class _Wish:
    file: int
    runs: list[range] = field(default_factory=list)


class Plan:
    """Hands out runs.

    Args:
        missing: Index of a file and ranges of its runs, in the order they are wanted.
        shared: Several nodes share the work; a single one is asked for a whole range at once.
        everything: All of them are wanted; otherwise only what `want` names.
    """

    def __init__(
        self, missing: Iterable[tuple[int, Iterable[range]]], *, shared: bool, everything: bool = True
    ) -> None:
        self._shared = shared
        self.everything = everything
        # Not a plain dict: that one is slow to find its first key after many were taken from its front.
        self._free: OrderedDict[int, list[range]] = OrderedDict()
        self._free_runs = 0
        self._wishes: dict[Hashable, _Wish] = {}
        self._tasks: list[Task] = []
        self._paces: dict[Hashable, _Pace] = {}
        if everything:
            for file, ranges in missing:
                self._add(file, ranges)

    @property
    def is_idle(self) -> bool:
        """Nothing is wanted and nothing is on its way."""
        return not (self._free_runs or self._tasks or self._wished)

    @property
    def has_readers(self) -> bool:
        """Somebody waits for single runs."""
        return bool(self._wishes)

    @property
    def is_over(self) -> bool:
        """Nothing will ever be wanted again."""
        return self.everything and self.is_idle

    @property
    def _wished(self) -> int:
        return sum(len(runs) for wish in self._wishes.values() for runs in wish.runs)

    def silent_s(self, feed: Hashable, now: float) -> float:
        """Seconds since a node that has work gave a sign; 0 for one that has none."""
        return now - self._paces[feed].mark if any(t.feed is feed for t in self._tasks) else 0.0

    # Handing out

    def join(self, feed: Hashable) -> None:
        """Reckons with a node, which may take some time before it asks."""
        self._paces.setdefault(feed, _Pace())

    def take(self, feed: Hashable, now: float) -> Task | None:
        """Gives a node something to fetch; None: nothing for now.

        Args:
            feed: Who asks.
            now: Seconds of a steady clock.
        """
        self.join(feed)
        return self._take_wish(feed, now) or self._take_free(feed, now) or self._take_over(feed, now)

    def _take_wish(self, feed: Hashable, now: float) -> Task | None:
        for wish in self._wishes.values():
            if wish.runs:
                total = sum(map(len, wish.runs))
                first = wish.runs.pop(0)
                size = max(1, total // (2 * max(1, len(self._paces))))
                if len(first) > size:
                    wish.runs.insert(0, range(first.start + size, first.stop))
                return self._begin(feed, wish.file, first.start, min(first.stop, first.start + size), now)
        return None

    def _take_free(self, feed: Hashable, now: float) -> Task | None:
        if not self._free_runs:
            return None
        size = self._free_runs
        if self._shared:
            window, before = self._window(feed), self.before(feed)
            room = self._share(feed) - before
            if before >= window or (before and room <= 0):
                return None
            size = max(1, min(window // 2, math.ceil(room / 2)))
        file = next(iter(self._free))
        ranges = self._free[file]
        first = ranges.pop(0)
        if len(first) > size:
            ranges.insert(0, range(first.start + size, first.stop))
        if not ranges:
            del self._free[file]
        stop = min(first.stop, first.start + size)
        self._free_runs -= stop - first.start
        return self._begin(feed, file, first.start, stop, now)

    def _take_over(self, feed: Hashable, now: float) -> Task | None:
        others = {task.feed for task in self._tasks if task.left} - {feed}
        if self._free_runs or self.before(feed) or not others:
            return None
        slowest = max(others, key=lambda other: self.before(other) * self._expected(other, now))
        before, theirs = self.before(slowest), self._expected(slowest, now)
        mine = self._paces[feed].interval or self._paces[slowest].interval or 0.0
        task = max((t for t in self._tasks if t.feed is slowest), key=lambda t: t.left)
        waited = now - self._paces[slowest].mark
        is_overdue = waited > OVERDUE_S + PATIENCE * mine
        count = min(int(before * theirs / (theirs + mine)), task.left - (not is_overdue))
        if is_overdue:
            count = max(count, 1)
        if count < 1 or before * theirs - count * mine < LEAST_GAIN_S:
            return None
        task.stop -= count
        if not task.left:
            self._paces[slowest].run(now)  # what it did not bring tells how slow it is
            task.revoke()
        return self._begin(feed, task.file, task.stop, task.stop + count, now)

    def _begin(self, feed: Hashable, file: int, start: int, stop: int, now: float) -> Task:
        if not self.before(feed):
            self._paces[feed].mark = now
        task = Task(feed, file, start, stop, stop, start)
        self._tasks.append(task)
        return task

    def before(self, feed: Hashable) -> int:
        """Runs that a node was asked for and has not brought."""
        return sum(task.left for task in self._tasks if task.feed is feed)

    def _share(self, feed: Hashable) -> int:
        """Runs that a node should bring of all that have not arrived, if all stay as fast as they are."""
        wanted = self._free_runs + sum(task.left for task in self._tasks)
        everyone = sum(self._speed(other) for other in self._paces)
        return math.ceil(wanted * self._speed(feed) / everyone)

    def _window(self, feed: Hashable) -> int:
        interval = self._paces[feed].interval
        return FIRST_RUNS if interval is None else max(FIRST_RUNS, int(CALL_S / interval))

    def _speed(self, feed: Hashable) -> float:
        known = [1 / pace.interval for pace in self._paces.values() if pace.interval]
        interval = self._paces[feed].interval
        return 1 / interval if interval else (sum(known) / len(known) if known else 1.0)

    def _expected(self, feed: Hashable, now: float) -> float:
        """Seconds that a node takes for a run, by what is known now."""
        pace = self._paces[feed]
        return max(pace.interval or 1e-6, now - pace.mark)

    # What became of it

    def arrived(self, task: Task, now: float) -> None:
        """The next run of a task is here; from now on nobody else fetches it."""
        task.next += 1
        self._paces[task.feed].run(now)

    def shorten(self, task: Task, count: int) -> None:
        """Leaves a task that has not begun only its first runs; the others are free again."""
        stop = task.start + count
        self._add(task.file, [range(stop, task.stop)], first=True)
        task.stop = task.asked = stop

    def finish(self, task: Task, missing: Iterable[range] = ()) -> None:
        """Ends a task.

        Args:
            task: Whose call has ended.
            missing: Runs of its file that have not been stored; those of the task are free again.
        """
        self._tasks.remove(task)
        self._add(task.file, within(missing, task.start, task.stop), first=True)

    def leave(self, feed: Hashable) -> None:
        """Forgets a node that fetches no more; its tasks have ended."""
        self._paces.pop(feed, None)

    def _add(self, file: int, ranges: Iterable[range], *, first: bool = False) -> None:
        added = [runs for runs in ranges if runs]
        if not added or not self.everything:
            return  # a reader that still wants them asks again; nobody pays for what is not wanted
        known = self._free.pop(file, [])
        self._free[file] = sorted([*known, *added], key=lambda runs: runs.start)
        if first:
            self._free.move_to_end(file, last=False)
        self._free_runs += sum(map(len, added))

    # Readers

    def want(self, reader: Hashable, file: int, missing: Iterable[range]) -> bool:
        """Puts what a reader needs next before all else, instead of what it wanted before.

        Args:
            reader: Who.
            file: Index of the file.
            missing: Runs that are not stored.

        Returns:
            Whether there is something new to fetch.
        """
        before = self._wishes.get(reader)
        self.forget(reader)
        wanted = list(missing)
        for task in self._tasks:
            if task.file == file:
                near = range(task.start, min(task.stop, task.next + _NEAR))
                for runs in wanted:
                    cut = max(runs.start, near.stop)
                    if cut < min(runs.stop, task.stop):
                        rest, task.stop = range(cut, task.stop), cut
                        self._add(file, _outside([rest], runs.start, runs.stop), first=True)
                wanted = _outside(wanted, task.start, task.stop)
        free = self._free.pop(file, [])
        for runs in wanted:
            kept = _outside(free, runs.start, runs.stop)
            self._free_runs -= sum(map(len, free)) - sum(map(len, kept))
            free = kept
        if free:
            self._free[file] = free
        for wish in self._wishes.values():
            for runs in wish.runs if wish.file == file else ():
                wanted = _outside(wanted, runs.start, runs.stop)
        self._wishes[reader] = wish = _Wish(file, wanted)
        return bool(wanted) and wish != before

    def forget(self, reader: Hashable) -> None:
        """Takes back what a reader wanted."""
        wish = self._wishes.pop(reader, None)
        if wish is not None and self.everything:
            self._add(wish.file, wish.runs, first=True)


def within(ranges: Iterable[range], start: int, stop: int) -> list[range]:
    """Returns the parts of some ranges from `start` on and before `stop`."""
    found = (range(max(runs.start, start), min(runs.stop, stop)) for runs in ranges)
    return [runs for runs in found if runs]


def _outside(ranges: Iterable[range], start: int, stop: int) -> list[range]:
    found = []
    for runs in ranges:
        found += [range(runs.start, min(runs.stop, start)), range(max(runs.start, stop), runs.stop)]
        if runs.stop <= start or runs.start >= stop:
            found[-2:] = [runs]
    return [runs for runs in found if runs]
