"""One fetch of some content from one node or many; it resumes after anything.

Each node works by itself (`feed`) on what a common plan hands out. A node that lies, asks more,
or is away for good is dropped, and what it did not bring comes from the others; the transfer
ends when all is there, or when no node is left.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from btt.sdk.content.feed import Feed, Source, Work
from btt.sdk.content.plan import Plan
from btt.sdk.content.resuming import ResumeToken
from btt.sdk.content.store import Destination
from btt.sdk.content.torrent import Torrent
from btt.sdk.errors import BttError, BudgetExceeded
from btt.sdk.keys import Address
from btt.sdk.money import Amount
from btt.sdk.selection import Rejection, cause_of, no_providers

LEAST_RUNS = 4
"""A node less takes part for every so many runs that the content is short of."""

Dropped = Callable[[Source, BttError], None]
"""Called when a node is dropped, with what ended the business with it."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transfer is.

    Attributes:
        phase: "checking" what is on disk, "fetching", or "done".
        done_bytes: Verified and on disk.
        total_bytes: Of all files.
        rate_bytes_s: Bytes a second lately.
        spent: Owed for this transfer so far.
        eta_s: Seconds to the end at that rate; None while it is unknown.
    """

    phase: str
    done_bytes: int
    total_bytes: int
    rate_bytes_s: float
    spent: Amount
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class Part:
    """What one node brought.

    Attributes:
        node: Who.
        fetched_bytes: Received, verified and paid.
        spent: For these bytes.
        error: What ended the business with it before the end; None if nothing did.
    """

    node: Address
    fetched_bytes: int
    spent: Amount
    error: BttError | None


@dataclass(frozen=True, slots=True)
class TransferReceipt:
    """What a finished transfer brought and cost.

    Attributes:
        infohash: 32 bytes.
        path: The file or folder.
        total_bytes: Of all files.
        fetched_bytes: Received and paid in this transfer; the rest was there.
        spent: For these bytes.
        parts: Of the nodes that brought something.
    """

    infohash: bytes
    path: Path
    total_bytes: int
    fetched_bytes: int
    spent: Amount
    parts: tuple[Part, ...]


class Transfer:
    """A running fetch; an async context manager. Leaving it early keeps what arrived.

    Args:
        torrent: What to fetch.
        root: The folder to put it in.
        sources: Whom to fetch it from, those to be preferred first.
        token: With which another process can go on.
        dropped: Told about nodes that are dropped.
        first: Indices of files to fetch before the others, in this order.
        everything: Fetch it all; otherwise only what readers ask for, and leave the block at will.
    """

    def __init__(
        self,
        torrent: Torrent,
        root: Path,
        sources: Sequence[Source],
        *,
        token: ResumeToken,
        dropped: Dropped = lambda source, error: None,
        first: Sequence[int] = (),
        everything: bool = True,
    ) -> None:
        self.torrent = torrent
        self.token = token
        self.receipt: TransferReceipt | None = None
        self.destination = Destination(root, torrent)
        self.work: asyncio.Future[Work] = asyncio.get_running_loop().create_future()
        self._sources = sources
        self._dropped = dropped
        self._first = first
        self._everything = everything
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._phase = "checking"
        self._checked = 0
        self._feeds: list[Feed] = []
        self._errors: dict[Feed, BttError] = {}
        self._samples: collections.deque[tuple[float, int]] = collections.deque(maxlen=50)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Transfer:
        await asyncio.to_thread(self.destination.__enter__)
        self._task = asyncio.create_task(self._run(), name="content-transfer")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        leaving = kind is not None or not self._everything
        if leaving:
            self._task.cancel()
        try:
            if leaving:
                with contextlib.suppress(asyncio.CancelledError, BttError):
                    await self._task
            else:
                await self._task
        finally:
            await asyncio.to_thread(self._writer.shutdown)
            await asyncio.to_thread(self.destination.close)

    async def progress(self, interval_s: float = 0.2) -> AsyncIterator[Progress]:
        """Yields how far it is, a few times a second, until it is done.

        Raises:
            BttError: What ended the transfer.
        """
        assert self._task is not None
        while not self._task.done():
            yield self.state()
            await asyncio.wait([self._task], timeout=interval_s)
        await self._task
        yield self.state()

    def state(self) -> Progress:
        """Returns how far it is."""
        now = time.monotonic()
        stored = self.work.result().done if self.work.done() else 0
        self._samples.append((now, stored))
        then, before = self._samples[0]
        rate = (stored - before) / (now - then) if now > then else 0.0
        total = self.torrent.total_bytes
        done = self._checked if self._phase == "checking" else stored
        eta = (total - stored) / rate if rate > 0 and self._phase == "fetching" else None
        return Progress(self._phase, done, total, rate, Amount(self._spent), eta)

    def parts(self) -> tuple[Part, ...]:
        """Returns what each node has brought so far."""
        return tuple(
            Part(feed.node, feed.fetched, Amount(feed.spent), self._errors.get(feed))
            for feed in self._feeds
            if feed.node is not None
        )

    @property
    def _spent(self) -> int:
        return sum(feed.spent for feed in self._feeds)

    async def ended(self) -> None:
        """Waits until the transfer has ended.

        Raises:
            BttError: What ended it.
        """
        assert self._task is not None
        await asyncio.shield(self._task)

    # The work

    async def _run(self) -> None:
        destination = self.destination
        await asyncio.to_thread(destination.scan, progress=self._looked)
        missing = {entry.index: destination.missing(entry.index) for entry in self.torrent.files}
        left = {file: sum(map(len, ranges)) for file, ranges in missing.items()}
        order = dict.fromkeys([*self._first, *missing])
        plan = Plan(
            ((file, missing[file]) for file in order),
            shared=len(self._sources) > 1 or not self._everything,
            everything=self._everything,
        )
        work = Work(self.torrent, destination, plan, self._writer, left)
        work.done = self.torrent.total_bytes - destination.missing_bytes
        for file, runs in left.items():
            if not runs:
                work.whole.put_nowait(file)
        self._samples.clear()
        self._samples.append((time.monotonic(), work.done))  # so that a short one has a rate, too
        self._phase = "fetching"
        self.work.set_result(work)
        tasks = [asyncio.create_task(self._fetch(work)), asyncio.create_task(self._finish(work))]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in ended:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        self._phase = "done"
        self.receipt = TransferReceipt(
            infohash=self.torrent.infohash,
            path=destination.path,
            total_bytes=self.torrent.total_bytes,
            fetched_bytes=sum(feed.fetched for feed in self._feeds),
            spent=Amount(self._spent),
            parts=tuple(part for part in self.parts() if part.fetched_bytes),
        )

    def _looked(self, seen: int, _total: int) -> None:
        self._checked = seen

    async def _finish(self, work: Work) -> None:
        """Gives each file its name when it is whole; ends with the last one."""
        for _ in self.torrent.files:
            await asyncio.to_thread(self.destination.finish, await work.whole.get())

    async def _fetch(self, work: Work) -> None:
        """Lets nodes fetch until nothing is wanted; for one that drops out another one starts."""
        most = max(1, -(-sum(work.left.values()) // LEAST_RUNS))
        waiting = collections.deque(self._sources)
        count = min(len(waiting), most)
        running: dict[asyncio.Task[None], Feed] = {}
        has_room = False
        try:
            while not work.plan.is_over:
                if not running and not waiting and has_room:
                    # What the others left of their channels, which are closed by now, may do for the rest.
                    count, has_room = 1, False
                    waiting.append(
                        next(f.source for f, e in self._errors.items() if isinstance(e, BudgetExceeded))
                    )
                while waiting and len(running) < count:
                    feed = Feed(work, waiting.popleft(), nodes=count)
                    self._feeds.append(feed)
                    running[asyncio.create_task(feed.run())] = feed
                if not running:
                    raise self._why()
                for task in (await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))[0]:
                    feed = running.pop(task)
                    error = task.exception()
                    if isinstance(error, BttError):
                        self._errors[feed] = error
                        if work.failed is not None:
                            raise work.failed
                        self._dropped(feed.source, error)
                        if isinstance(error, BudgetExceeded) and len(self._sources) > 1:
                            with contextlib.suppress(BttError):
                                await feed.source.seller.close_session()
                            has_room = has_room or feed.fetched > 0
                    elif error is not None:
                        raise error
        finally:
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)

    def _why(self) -> BttError:
        errors = list(self._errors.values())
        if len({type(error) for error in errors}) == 1:
            return errors[-1]
        rejections = [
            Rejection(feed.source.seller.name, cause_of(error), error.message)
            for feed, error in self._errors.items()
        ]
        missing = self.destination.missing_bytes
        return no_providers(f"No node is left to fetch from, {missing} bytes are missing", rejections)
