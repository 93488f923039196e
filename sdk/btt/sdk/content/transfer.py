"""One fetch of some content: verify, write, accept, pay; resume after anything.

A run counts as accepted only once it verified against the infohash and was written.
Runs are verified and written in two threads while the next ones arrive. A broken
session or a node that was restarted is taken up again; a lie ends the transfer.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import grpc.aio

from btt.proto.content.v1 import content_pb2
from btt.sdk.channel import Line, Segment
from btt.sdk.content.run import Run
from btt.sdk.content.store import Destination
from btt.sdk.content.torrent import RUN, Torrent
from btt.sdk.errors import (
    BttError,
    BudgetExceeded,
    ChannelExpired,
    ContentMismatch,
    PriceChanged,
    SessionEnded,
)
from btt.sdk.keys import Address
from btt.sdk.money import Amount, Rate, Unit
from btt.sdk.payment.backoff import pause_s
from btt.sdk.payment.calls import Verdicts
from btt.sdk.payment.session import PaymentSession
from btt.sdk.rpc import to_error

LINE = Line("btt.proto.content.v1.ContentService", Unit.BYTE)
"""What content delivery counts."""

RUNS_PER_CALL = 1 << 16
"""Most runs asked for in one call: one call feeds two cores, and more only hold more memory."""
STREAMS = 4
"""Calls that run at a time, for content of many files."""
AHEAD = 6
"""Runs of one call that are being verified and written at a time."""
THREADS = 3
"""Threads that verify and write: one waits for the disk while two compute."""
TRIES = 12
"""Attempts without any progress before the transfer gives up."""


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
class TransferReceipt:
    """What a finished transfer brought and cost.

    Attributes:
        infohash: 32 bytes.
        path: The file or folder.
        total_bytes: Of all files.
        fetched_bytes: Received and paid in this transfer; the rest was there.
        spent: For these bytes.
        node: Who sent them.
    """

    infohash: bytes
    path: Path
    total_bytes: int
    fetched_bytes: int
    spent: Amount
    node: Address


OpenSession = Callable[[int], Awaitable[PaymentSession]]
Blame = Callable[[BttError], None]
Fetch: TypeAlias = "grpc.aio.UnaryStreamMultiCallable[content_pb2.FetchRequest, Run]"

_SERVICE = content_pb2.DESCRIPTOR.services_by_name["ContentService"].full_name
_FETCH = f"/{_SERVICE}/Fetch"


class Transfer:
    """A running fetch; an async context manager. Leaving it early keeps what arrived.

    Args:
        torrent: What to fetch.
        root: The folder to put it in.
        rate: The price that was quoted; a higher one ends the transfer.
        open_session: Opens a payment session for an expected cost, or returns the live one.
        blame: Told what made the transfer end.
    """

    def __init__(
        self, torrent: Torrent, root: Path, rate: Rate, open_session: OpenSession, blame: Blame
    ) -> None:
        self.torrent = torrent
        self.receipt: TransferReceipt | None = None
        self._rate = rate
        self._open_session = open_session
        self._blame = blame
        self._destination = Destination(root, torrent)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="verify")
        self._phase = "checking"
        self._checked = 0
        self._done = 0
        self._fetched = 0
        self._spent = 0
        self._node: Address | None = None
        self._samples: collections.deque[tuple[float, int]] = collections.deque(maxlen=50)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Transfer:
        await asyncio.to_thread(self._destination.__enter__)
        self._task = asyncio.create_task(self._run(), name="content-transfer")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        failed = kind is not None
        if failed:
            self._task.cancel()
        try:
            if failed:
                with contextlib.suppress(asyncio.CancelledError, BttError):
                    await self._task
            else:
                await self._task
        finally:
            await asyncio.to_thread(self._threads.shutdown)
            await asyncio.to_thread(self._destination.close)

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
        self._samples.append((now, self._done))
        then, before = self._samples[0]
        rate = (self._done - before) / (now - then) if now > then else 0.0
        total = self.torrent.total_bytes
        done = self._checked if self._phase == "checking" else self._done
        eta = (total - self._done) / rate if rate > 0 and self._phase == "fetching" else None
        return Progress(self._phase, done, total, rate, Amount(self._spent), eta)

    # The work

    async def _run(self) -> None:
        await asyncio.to_thread(self._destination.scan, progress=self._looked)
        missing = self._destination.missing_bytes
        self._done = self.torrent.total_bytes - missing
        self._samples.clear()
        self._phase = "fetching"
        tries = 0
        while self._destination.missing_bytes:
            before = self._fetched
            try:
                await self._fetch_missing()
            except BttError as error:
                tries = 1 if self._fetched > before else tries + 1
                if not error.retryable or tries >= TRIES:
                    self._blame(error)
                    raise
                await asyncio.sleep(pause_s(tries, error))
        for entry in self.torrent.files:
            await asyncio.to_thread(self._destination.finish, entry.index)
        self._phase = "done"
        assert self._node is not None or not missing
        self.receipt = TransferReceipt(
            infohash=self.torrent.infohash,
            path=self._destination.path,
            total_bytes=self.torrent.total_bytes,
            fetched_bytes=self._fetched,
            spent=Amount(self._spent),
            node=self._node or Address(bytes(20)),
        )

    def _looked(self, seen: int, _total: int) -> None:
        self._checked = seen

    async def _fetch_missing(self) -> None:
        session = await self._open_session(self._rate.owed(self._destination.missing_bytes))
        offered = session.offer.sheet.prices.get(LINE)
        if offered is None or offered.rate.amount * self._rate.per > self._rate.amount * offered.rate.per:
            raise PriceChanged(
                f"The node now asks {offered.rate if offered else 'nothing we know'}, not {self._rate}."
            )
        self._node = session.offer.node
        fetched = self._fetched
        todo = collections.deque(self._ranges())
        # One failing stream ends the others; what they had in hand is finished first.
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(STREAMS):
                    group.create_task(self._stream(session, todo))
        except* BttError as failed:
            raise _gravest(failed) from None
        if todo and self._fetched == fetched:
            # Another fetch of this client has reserved what the budget still had.
            missing = self._destination.missing_bytes
            cost = self._rate.owed(missing)
            raise BudgetExceeded(
                f"The budget ends here: {missing} bytes, {Amount(cost)}, are missing.", missing=cost
            )

    def _ranges(self) -> list[tuple[int, range]]:
        return [
            (entry.index, range(start, min(start + RUNS_PER_CALL, runs.stop)))
            for entry in self.torrent.files
            for runs in self._destination.missing(entry.index)
            for start in range(runs.start, runs.stop, RUNS_PER_CALL)
        ]

    def _length(self, ranges: Iterable[tuple[int, range]]) -> int:
        return sum(
            min(runs.stop * RUN, self.torrent.files[file].length) - runs.start * RUN for file, runs in ranges
        )

    async def _stream(self, session: PaymentSession, todo: collections.deque[tuple[int, range]]) -> None:
        fetch: Fetch = session.channel.unary_stream(
            _FETCH,
            request_serializer=content_pb2.FetchRequest.SerializeToString,
            response_deserializer=Run.parse,
        )
        segment = Segment(session.offer.digest, LINE)
        while todo:
            file, runs = todo.popleft()
            length = self._length([(file, runs)])
            room = session.payer.affordable(segment)
            if room < length:
                left = self._length(todo) + length
                with contextlib.suppress(BudgetExceeded, ChannelExpired):
                    await session.provide(session.payer.tally.rate(segment).owed(left))
                room = session.payer.affordable(segment)
            if room < length:
                fits = range(runs.start, runs.start + room // RUN)
                if not fits:
                    todo.appendleft((file, runs))
                    return  # what other streams have reserved still comes
                todo.appendleft((file, range(fits.stop, runs.stop)))
                runs, length = fits, len(fits) * RUN
            session.payer.reserve(segment, length)
            reserved = [length]
            try:
                await self._call(session, fetch, segment, file, runs, reserved)
            finally:
                session.payer.release(segment, reserved[0])

    async def _call(
        self,
        session: PaymentSession,
        fetch: Fetch,
        segment: Segment,
        file: int,
        runs: range,
        reserved: list[int],
    ) -> None:
        loop = asyncio.get_running_loop()
        expected = iter(runs)
        room = asyncio.Semaphore(AHEAD)
        request = content_pb2.FetchRequest(
            infohash=self.torrent.infohash, file=file, first_run=runs.start, runs=len(runs)
        )

        async def take(message: Run, verdicts: Verdicts) -> None:
            storing = loop.run_in_executor(self._threads, self._verify_and_write, file, message)
            try:
                size = await asyncio.shield(storing)
            except asyncio.CancelledError:
                # Another run's failure cancels this one, but what is written is kept, so it is paid.
                while not storing.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([storing])
                size = storing.result()
            finally:
                room.release()
            if not size:
                verdicts.reject(message)
                raise ContentMismatch(f"Run {message.run} of the content does not verify.")
            before = session.payer.tally.owed
            session.payer.release(segment, size)
            reserved[0] -= size
            verdicts.accept(message)
            self._spent += session.payer.tally.owed - before
            self._done += size
            self._fetched += size

        with session.verdicts() as verdicts:
            async with asyncio.TaskGroup() as group:
                try:
                    async for message in fetch(request):
                        if message.run != next(expected, -1):
                            raise ContentMismatch("The node sent another run than was asked for.")
                        await room.acquire()
                        group.create_task(take(message, verdicts))
                except grpc.aio.AioRpcError as failure:
                    raise to_error(failure) from failure
        if next(expected, None) is not None:
            raise SessionEnded("The node ended the call before all was sent.")

    def _verify_and_write(self, file: int, message: Run) -> int:
        """Verifies a run and writes it; returns its length, or 0 if it does not verify."""
        if not self.torrent.verify_run(file, message.run, message.data):
            return 0
        self._destination.write_run(file, message.run, message.data)
        return len(message.data)


def _gravest(group: BaseExceptionGroup[BttError]) -> BttError:
    """Returns the error to act on: one that trying again cannot mend goes first."""
    found: list[BttError] = []
    todo: list[BaseException] = [group]
    while todo:
        error = todo.pop()
        if isinstance(error, BaseExceptionGroup):
            todo += error.exceptions
        elif isinstance(error, BttError):
            found.append(error)
    return min(found, key=lambda error: error.retryable)
