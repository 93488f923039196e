"""One order for all operations, many of them in one commit.

What has queued up in one turn of the event loop, or while the disk was busy, is given to the writer,
a thread. It checks the signatures of this batch, lets the books decide each operation on top of those
before it, commits them as one transaction, and only then makes the answers. So one fsync serves
everyone who waited, no operation races another, nothing unchecked comes near the books, and an answer
always stands on the disk.

A client that is alone does not wait for a thread: while the disk is quick, the second of two requests
in a row that nobody else joined is carried out in the event loop. A sync that was slow, or failed,
sends those after it to the thread again, where a disk may hang and reads go on.

What decides has to know whether it was there: a process that was stopped, a disk that hung, and a clock
that was set ahead took time from everybody's challenge window. So whoever is about to decide looks at
the clock, and so does a timer when nobody asks; if more than `ABSENT_MS` lies between two looks, the
ledger was away (`docs/decisions/0016`).

There is one writer. Signatures are half of its work, and libsecp256k1 does them without the
interpreter's lock; but a second writer gains less by that than both lose in handing over the lock.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from btt.sdk.clock import SYSTEM
from btt.sdk.errors import BttError, Draining, InvariantBroken, RateLimited
from btt.services.ledger.journal import EntryRef
from btt.services.ledger.mark import INTERVAL, MarkWriter
from btt.services.ledger.overlay import Batch
from btt.services.ledger.reading import SyncFailed
from btt.services.ledger.store import Store
from btt.services.ledger.verify import Operation

MOST_IN_BATCH: Final = 512
MOST_QUEUED: Final = 4096
IN_PLACE_S: Final = 0.0005
"""A disk whose last commit took less than this is quick."""
LOOK_S: Final = 1.0
"""Between two looks at the clock while nobody asks."""
ABSENT_MS: Final = 3000
"""Between two looks more than this is an outage: no load keeps an event loop, or a sync, for so long."""
EACH_MS: Final = 2
"""And this for each window that was given back between them, or giving back many would never end."""

_log = logging.getLogger(__name__)
_Outcome = EntryRef | BttError
_Answer = TypeVar("_Answer")
_Written = tuple[Batch | None, list[object]]
"""What was committed, and one answer or error per order."""


@dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """A request that waits for its answer."""

    check: Callable[[], Operation]
    answer: Callable[[EntryRef], Any]
    future: asyncio.Future[Any]


class Sequencer:
    """Orders operations and commits them in groups.

    Use it as an async context manager; it closes the store at the end.

    Args:
        store: The books; the sequencer is their only user.
        clock: Unix milliseconds.
        committed: Called in the event loop with each batch that is durable.
        returned: Called with the time and how long the ledger was away, both milliseconds, before it
            decides anything afterwards; in a writer's thread or in the loop. After a batch that the disk
            did not take nobody knows how long that was, and it is infinite. Returns how many windows
            it gave the time back.
        charge: Bounds what one key may have carried out; see `Batch.run`.
    """

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], int],
        committed: Callable[[Batch], None] = lambda batch: None,
        returned: Callable[[int, float], int] = lambda clock_ms, away_ms: 0,
        charge: Callable[[bytes], object] = lambda key: None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._returned = returned
        self._charge = charge
        self._seen_ms = SYSTEM(), clock()
        self._away_ms = 0.0
        self._given_back = 0
        self._committed = committed
        self._queue: deque[_Order] = deque()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ledger-writer")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writing: asyncio.Future[Any] | None = None
        self._alone = False
        self._flushing: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None
        self.halted: InvariantBroken | SyncFailed | None = None
        """Set for ever once the books would have become inconsistent, or the disk cannot be trusted."""
        self.batches = 0
        """Batches committed or tried since the start."""

    async def __aenter__(self) -> Sequencer:
        self._loop = asyncio.get_running_loop()
        self._look_again(self._loop)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Refuses new operations, finishes those that wait, and closes the store."""
        if self._loop is None:
            return
        loop, self._loop = self._loop, None
        self._dispatch(loop)
        while self._writing is not None:
            await asyncio.wait([self._writing])
        for timer in (self._flushing, self._looking):
            if timer is not None:
                timer.cancel()
        await loop.run_in_executor(self._writer, self._store.close)
        self._writer.shutdown()

    async def submit(self, operation: Operation) -> EntryRef:
        """Has an operation applied; returns its entry, durable.

        Args:
            operation: From the Verifier.

        Raises:
            BttError: As `carry_out`.
        """
        return await self.carry_out(lambda: operation, _itself)

    async def carry_out(
        self, check: Callable[[], Operation], answer: Callable[[EntryRef], _Answer]
    ) -> _Answer:
        """Has a request checked, applied and answered.

        Cancelling the call does not undo it: the operation may be in the journal, and sending it
        again tells.

        Args:
            check: Verifies the request by the Verifier; called in the writer's thread, or in
                the loop.
            answer: Makes the answer of its entry, once that is durable; called likewise.

        Returns:
            The answer.

        Raises:
            BttError: The check or the books refused it.
            StorageError: The disk failed; the same operation may be sent again (SyncFailed: to the
                ledger once it was started again).
            InvariantBroken: The ledger has stopped.
            RateLimited: Too many operations wait.
            Draining: The ledger is stopping.
        """
        if self.halted is not None:
            raise _again(self.halted)
        if self._loop is None:
            raise Draining("The ledger is stopping.")
        if len(self._queue) >= MOST_QUEUED:
            raise RateLimited("Too many operations wait for the ledger.", retry_after=0.5)
        future: asyncio.Future[_Answer] = self._loop.create_future()
        self._queue.append(_Order(check, answer, future))
        if len(self._queue) == 1:
            self._loop.call_soon(self._dispatch, self._loop)
        return await future

    def _dispatch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Gives what waits to the writer, when it is free."""
        if self._writing is not None or not self._queue:
            return
        taken = [self._queue.popleft() for _ in range(min(len(self._queue), MOST_IN_BATCH))]
        # Whoever has gone cannot be told; he asks again with the same request.
        orders = [order for order in taken if not order.future.done()]
        alone, self._alone = self._alone, len(taken) == 1
        if alone and self._alone and self._store.commit_s < IN_PLACE_S:
            self._settle(loop, orders, self._carry_out(orders))
            return
        self._writing = loop.run_in_executor(self._writer, self._carry_out, orders)
        self._writing.add_done_callback(partial(self._written, loop, orders))

    def _written(
        self, loop: asyncio.AbstractEventLoop, orders: Sequence[_Order], writing: asyncio.Future[_Written]
    ) -> None:
        self._writing = None
        self._dispatch(loop)
        self._settle(loop, orders, writing.result())

    def _settle(self, loop: asyncio.AbstractEventLoop, orders: Sequence[_Order], written: _Written) -> None:
        """Tells everyone what became of a batch."""
        batch, outcomes = written
        if batch is not None:
            self._committed(batch)
        for order, outcome in zip(orders, outcomes, strict=True):
            if order.future.done():
                continue
            if isinstance(outcome, Exception):
                order.future.set_exception(outcome)
            else:
                order.future.set_result(outcome)
        if self._flushing is None and (mark := self._store.mark) is not None and mark.dirty:
            self._flushing = loop.call_later(INTERVAL, self._flush, loop, mark)

    def _flush(self, loop: asyncio.AbstractEventLoop, mark: MarkWriter) -> None:
        """Brings the mark up to date with the last commit before a rest."""
        self._flushing = None
        if self._writing is None:  # else that batch does it, or leaves it to the next flush
            self._writing = loop.run_in_executor(self._writer, _flushed, mark)
            self._writing.add_done_callback(partial(self._written, loop, ()))

    def _look_again(self, loop: asyncio.AbstractEventLoop) -> None:
        """Finds out by itself that the ledger was away, and lets it be known at once."""
        self._looking = loop.call_later(LOOK_S, self._look_again, loop)
        if self._writing is not None:
            return  # while a disk hangs the ledger is not there, however well its loop does
        known = self._away_ms
        self._look()
        if self._away_ms > known:
            self._writing = loop.run_in_executor(self._writer, self._carry_out, ())
            self._writing.add_done_callback(partial(self._written, loop, ()))

    def _look(self) -> int:
        """Returns the time, and takes note if the ledger was away before it.

        What counts is time that both this machine's clock and the ledger's show: that of a devnet is
        moved on purpose. This machine's is read on both sides of it, so no pause falls between the two.
        """
        machine_ms, now_ms = SYSTEM(), self._clock()
        gap_ms = min(SYSTEM() - self._seen_ms[0], now_ms - self._seen_ms[1])
        self._seen_ms = machine_ms, now_ms
        if gap_ms > ABSENT_MS + self._given_back * EACH_MS:
            self._away_ms += gap_ms
        self._given_back = 0
        return now_ms

    def _carry_out(self, orders: Sequence[_Order]) -> _Written:
        """Runs in the writer's thread, or in the loop while that has nothing to do."""
        checked = [_checked(order) for order in orders]
        sound = [operation for operation in checked if not isinstance(operation, Exception)]
        batch, outcomes = self._commit(sound)
        decided = iter(outcomes)
        return batch, [
            _answered(order, found if isinstance(found, Exception) else next(decided))
            for order, found in zip(orders, checked, strict=True)
        ]

    def _commit(self, operations: list[Operation]) -> tuple[Batch | None, Sequence[_Outcome]]:
        """Applies a batch; returns it if there was something to commit, and one outcome per operation."""
        if self.halted is not None:
            return None, [_again(self.halted) for _ in operations]
        self.batches += 1
        try:
            now_ms = self._look()
            if self._away_ms:
                self._given_back = self._returned(now_ms, self._away_ms)
                self._away_ms = 0.0
            batch = self._store.begin(now_ms, operations)
            outcomes = [batch.run(operation, self._charge) for operation in operations]
            if not batch.empty:
                self._store.commit(batch)
        except BttError as error:
            self._away_ms = math.inf
            if isinstance(error, InvariantBroken | SyncFailed):
                self.halted = error
                _log.critical("The ledger has stopped: %s", error.message)
            return None, [_again(error) for _ in operations]
        except Exception as error:  # noqa: BLE001 (a defect must not leave callers waiting for ever)
            # What failed may name other people's accounts: it is for the operator's log alone.
            self.halted = InvariantBroken("The ledger failed in a way it does not know.")
            _log.critical("The ledger has stopped.", exc_info=error)
            return None, [_again(self.halted) for _ in operations]
        return None if batch.empty else batch, outcomes


def _flushed(mark: MarkWriter) -> _Written:
    try:
        mark.flush()
    except BttError as error:
        _log.warning("%s", error.message)
    return None, []


def _again(error: BttError) -> BttError:
    """A fresh one for each caller: an exception that is raised twice keeps both tracebacks."""
    return type(error)(error.message)


def _itself(entry: EntryRef) -> EntryRef:
    return entry


def _checked(order: _Order) -> Operation | Exception:
    try:
        return order.check()
    except Exception as error:  # noqa: BLE001 (it is its caller's, and nobody else's)
        return error


def _answered(order: _Order, outcome: _Outcome | Exception) -> object:
    if not isinstance(outcome, EntryRef):
        return outcome
    try:
        return order.answer(outcome)
    except Exception as error:  # noqa: BLE001 (likewise)
        return error
