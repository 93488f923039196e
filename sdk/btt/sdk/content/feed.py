"""What one node does for a transfer: take runs, verify, write, accept, pay.

A run counts as accepted only once it verified against the infohash and was written.
Runs are verified and written (`intake`) while the next ones arrive. A broken session
or a node that was restarted is taken up again; a lie ends the business with that node.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import grpc.aio

from btt.proto.content.v1 import content_pb2
from btt.sdk.channel import Line, Segment
from btt.sdk.content.intake import AHEAD, Intake
from btt.sdk.content.plan import Plan, Task
from btt.sdk.content.run import Run
from btt.sdk.content.store import Destination
from btt.sdk.content.torrent import RUN, Torrent
from btt.sdk.errors import (
    BttError,
    BudgetExceeded,
    ChannelExpired,
    ConnectError,
    ContentMismatch,
    PriceChanged,
    SessionEnded,
)
from btt.sdk.keys import Address
from btt.sdk.money import Amount, Rate, Unit
from btt.sdk.payment.backoff import pause_s
from btt.sdk.payment.session import PaymentSession
from btt.sdk.rpc import to_error

LINE = Line("btt.proto.content.v1.ContentService", Unit.BYTE)
"""What content delivery counts."""

STREAMS = 4
"""Calls to a node that run at a time, for content of many files."""
GROW_RUNS = 32
"""Runs that a channel which is used up grows by, at least."""
TRIES = 12
"""Attempts without any progress before a node is given up."""
SILENT_S = 30.0
"""Seconds without a run after which a call is broken off."""
LOOK_S = 0.25
"""Seconds after which a node with nothing to do looks whether another one is overdue."""

Fetch: TypeAlias = "grpc.aio.UnaryStreamMultiCallable[content_pb2.FetchRequest, Run]"

_SERVICE = content_pb2.DESCRIPTOR.services_by_name["ContentService"].full_name
_FETCH = f"/{_SERVICE}/Fetch"


class Seller(Protocol):
    """A node as a transfer uses it."""

    @property
    def name(self) -> str:
        """What to call it."""

    async def session(self, need: int) -> PaymentSession:
        """Opens a payment session for an expected cost in base units, or returns the live one."""

    async def close_session(self) -> object:
        """Pays what is due and frees what is left of the channel."""


@dataclass(frozen=True, slots=True)
class Source:
    """A node to fetch from.

    Attributes:
        seller: The node.
        rate: The price that was quoted: what money is set aside by.
        most: The highest price that is agreed to, the quoted one if not given; a higher one ends the
            business.
    """

    seller: Seller
    rate: Rate
    most: Rate | None = None


@dataclass(slots=True)
class Work:
    """What all nodes of a transfer share.

    Attributes:
        torrent: What is fetched.
        destination: Where it is kept.
        plan: Who fetches what.
        writer: Writes, one run at a time.
        left: Runs that each file lacks.
        whole: Files that lack nothing any more, as they become so.
        done: Bytes that are verified and on disk.
        failed: Why our own disk takes no more; whatever comes next, from whomever, is paid in vain.
    """

    torrent: Torrent
    destination: Destination
    plan: Plan
    writer: ThreadPoolExecutor
    left: dict[int, int]
    whole: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    done: int = 0
    failed: BttError | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def changed(self, timeout_s: float | None = None) -> None:
        """Waits until the plan or what is stored has changed, or for so many seconds."""
        event = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await event.wait()

    def notify(self) -> None:
        """Tells all who wait that something has changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    def stored(self, file: int, size: int) -> None:
        """Counts a run that was written."""
        self.done += size
        self.left[file] -= 1
        if not self.left[file]:
            self.whole.put_nowait(file)
        if self.plan.has_readers:
            self.notify()


class Feed:
    """One node's part in a transfer.

    Args:
        work: What all nodes share.
        source: The node.
        nodes: How many share the work.
    """

    def __init__(self, work: Work, source: Source, *, nodes: int) -> None:
        self.source = source
        self.node: Address | None = None
        self.fetched = 0
        self.spent = 0
        self._work = work
        self._nodes = nodes
        self._room = asyncio.Semaphore(AHEAD)
        self._dry = False

    async def run(self) -> None:
        """Fetches until nothing is wanted any more.

        Raises:
            BttError: What ended the business with this node.
        """
        tries = 0
        self._work.plan.join(self)
        try:
            while not self._work.plan.is_over:
                if self._work.plan.is_idle:
                    await self._work.changed()
                    continue
                before = self.fetched
                try:
                    await self._round()
                except BttError as error:
                    tries = 1 if self.fetched > before else tries + 1
                    if not error.retryable or self._work.failed or tries >= TRIES:
                        raise
                    await asyncio.sleep(pause_s(tries, error))
        finally:
            self._work.plan.leave(self)
            self._work.notify()

    async def _round(self) -> None:
        missing = self._work.destination.missing_bytes
        session = await self.source.seller.session(self.source.rate.owed(self._share(missing)))
        agreed, offered = self.source.most or self.source.rate, session.offer.sheet.prices.get(LINE)
        if offered is None or offered.rate.amount * agreed.per > agreed.amount * offered.rate.per:
            raise PriceChanged(
                f"The node now asks {offered.rate if offered else 'nothing we know'}, not {agreed}."
            )
        self.node = session.offer.node
        self._dry = False
        fetched = self.fetched
        # One failing stream ends the others; what they had in hand is finished first.
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(STREAMS):
                    group.create_task(self._stream(session))
        except* BttError as failed:
            raise _gravest(failed) from None
        if self._dry and self.fetched == fetched:
            # Another node or fetch of this client has reserved what the budget still had.
            missing = self._work.destination.missing_bytes
            cost = offered.rate.owed(missing)
            raise BudgetExceeded(
                f"The budget ends here: {missing} bytes, {Amount(cost)}, are missing.", missing=cost
            )

    def _share(self, missing: int) -> int:
        """Bytes that this node is expected to send: its part, in whole runs."""
        if not self._work.plan.everything:
            # A reader may leave at any time: as much again as it had, so that top-ups stay few.
            return min(missing, max(self.fetched, GROW_RUNS * RUN))
        return min(missing, -(-missing // (self._nodes * RUN)) * RUN)

    async def _stream(self, session: PaymentSession) -> None:
        fetch: Fetch = session.channel.unary_stream(
            _FETCH,
            request_serializer=content_pb2.FetchRequest.SerializeToString,
            response_deserializer=Run.parse,
        )
        segment = Segment(session.offer.digest, LINE)
        plan = self._work.plan
        while not plan.is_over and not self._dry:
            task = plan.take(self, time.monotonic())
            if task is None:
                await self._work.changed(LOOK_S if self._nodes > 1 else None)
                continue
            reserved = [0]
            try:
                self._dry |= not await self._reserve(session, segment, task, reserved)
                if task.left:
                    await self._fetch(session, fetch, segment, task, reserved)
            finally:
                session.payer.release(segment, reserved[0])
                plan.finish(task, self._work.destination.missing(task.file))
                self._work.notify()

    async def _reserve(
        self, session: PaymentSession, segment: Segment, task: Task, reserved: list[int]
    ) -> bool:
        """Sets the cost of a task aside, of its first runs if the budget reaches for no more.

        Returns:
            Whether it reaches for any; what other streams have reserved still comes.
        """
        plan, payer = self._work.plan, session.payer
        if payer.affordable(segment) < self._length(task):
            missing = self._work.destination.missing_bytes
            others = (plan.before(self) - task.left) * RUN
            more = max(self._length(task), self._share(missing) - others, min(missing, GROW_RUNS * RUN))
            with contextlib.suppress(BudgetExceeded, ChannelExpired):
                await session.provide(session.offer.sheet.prices[LINE].rate.owed(more))
        room = payer.affordable(segment)
        is_short = room < self._length(task)  # the end may have been taken over meanwhile
        if is_short:
            plan.shorten(task, room // RUN)
        task.asked = task.stop
        reserved[0] = self._length(task)
        payer.reserve(segment, reserved[0])
        return bool(task.left) or not is_short

    def _length(self, task: Task) -> int:
        return max(0, min(task.stop * RUN, self._work.torrent.files[task.file].length) - task.start * RUN)

    async def _fetch(
        self, session: PaymentSession, fetch: Fetch, segment: Segment, task: Task, reserved: list[int]
    ) -> None:
        """Makes one call, and breaks it off when others have taken its runs over, or nothing comes."""
        call = asyncio.create_task(self._call(session, fetch, segment, task, reserved))
        revoked = False

        def revoke() -> None:
            nonlocal revoked
            revoked = True
            call.cancel()

        task.revoke = revoke
        try:
            while not call.done():
                await asyncio.wait([call], timeout=SILENT_S)
                if not call.done() and self._work.plan.silent_s(self, time.monotonic()) >= SILENT_S:
                    raise ConnectError(f"The node has sent nothing for {SILENT_S:.0f} seconds.")
        finally:
            task.revoke = _no_call
            while not call.done():
                call.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([call])
            if not call.cancelled():
                call.exception()  # whoever has ended this has a graver one
        if not call.cancelled():
            call.result()
        elif not revoked:
            raise SessionEnded("The call was broken off.")

    async def _call(
        self, session: PaymentSession, fetch: Fetch, segment: Segment, task: Task, reserved: list[int]
    ) -> None:
        work, plan, file = self._work, self._work.plan, task.file
        request = content_pb2.FetchRequest(
            infohash=work.torrent.infohash, file=file, first_run=task.start, runs=task.asked - task.start
        )

        def verify(run: Run) -> None:
            if not work.torrent.verify_run(file, run.run, run.data):
                verdicts.reject(run)
                raise ContentMismatch(f"Run {run.run} of the content does not verify.")

        def write(run: Run) -> None:
            try:
                work.destination.write_run(file, run.run, run.data)
            except BttError as error:
                work.failed = error
                raise

        def accept(run: Run) -> None:
            work.destination.keep(file, run.run)
            size = len(run.data)
            before = session.payer.tally.owed
            session.payer.release(segment, size)
            reserved[0] -= size
            verdicts.accept(run)
            self.spent += session.payer.tally.owed - before
            self.fetched += size
            work.stored(file, size)

        with session.verdicts() as verdicts:
            async with Intake(
                room=self._room, verify=verify, write=write, writer=work.writer, accept=accept
            ) as intake:
                try:
                    async for run in fetch(request):
                        if run.run != task.next or task.next >= task.asked:
                            raise ContentMismatch("The node sent another run than was asked for.")
                        plan.arrived(task, time.monotonic())
                        await intake.take(run)
                        if task.is_cut:
                            return
                except grpc.aio.AioRpcError as failure:
                    raise to_error(failure) from failure
        if task.next < task.stop:
            raise SessionEnded("The node ended the call before all was sent.")


def _no_call() -> None:
    pass


def _gravest(group: BaseExceptionGroup[BttError]) -> BttError:
    """Returns the error to act on: one that trying again cannot mend goes first."""
    return min(_errors(group), key=lambda error: error.retryable)


def _errors(group: BaseExceptionGroup[BttError]) -> Iterator[BttError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _errors(error)
        else:
            yield error
