"""One order for all operations, many of them in one commit.

A single task takes what has queued up while the disk was busy and gives it to a writer. The writer
checks the signatures of this batch, lets the books decide each operation on top of those before
it, commits them as one transaction, and only then makes the answers. So one fsync serves everyone
who waited, no operation races another, nothing unchecked comes near the books, and an answer always
stands on the disk.

Signatures are most of the work, and libsecp256k1 does it without the interpreter's lock. So there
are a few writers: while one has the books, and waits for the disk, the others check their batches
or sign the answers to them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from btt.sdk.errors import BttError, Draining, InvariantBroken, RateLimited
from btt.services.ledger.journal import EntryRef
from btt.services.ledger.mark import INTERVAL, MarkWriter
from btt.services.ledger.overlay import Batch
from btt.services.ledger.reading import SyncFailed
from btt.services.ledger.store import Store
from btt.services.ledger.verify import Operation

MOST_IN_BATCH: Final = 512
MOST_QUEUED: Final = 4096
FEW: Final = 16
"""Up to so many go to one writer; more are shared among those who are free."""

WRITERS: Final = 2
"""More would only wait for the books: with them a batch spends almost half its time."""

_log = logging.getLogger(__name__)
_Outcome = EntryRef | BttError
_Answer = TypeVar("_Answer")


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
    """

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], int],
        committed: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._committed = committed
        self._queue: deque[_Order] = deque()
        self._wake = asyncio.Event()
        self._free = WRITERS
        self._writers = ThreadPoolExecutor(self._free, thread_name_prefix="ledger-writer")
        self._books = threading.Lock()
        self._writing: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self.halted: InvariantBroken | SyncFailed | None = None
        """Set for ever once the books would have become inconsistent, or the disk cannot be trusted."""
        self.batches = 0
        """Batches committed or tried since the start."""

    async def __aenter__(self) -> Sequencer:
        self._task = asyncio.create_task(self._run(), name="ledger-sequencer")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Refuses new operations, finishes those that wait, and closes the store."""
        self._stopping = True
        self._wake.set()
        if self._task is not None:
            task, self._task = self._task, None
            await task
            await asyncio.get_running_loop().run_in_executor(self._writers, self._store.close)
            self._writers.shutdown()

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
            check: Verifies the request by the Verifier; called in a writer's thread.
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
        if self._stopping or self._task is None:
            raise Draining("The ledger is stopping.")
        if len(self._queue) >= MOST_QUEUED:
            raise RateLimited("Too many operations wait for the ledger.", retry_after=0.5)
        future: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._queue.append(_Order(check, answer, future))
        self._wake.set()
        return await future

    async def _run(self) -> None:
        while not (self._stopping and not self._queue):
            if not self._queue:
                self._wake.clear()
                await self._rest()
            elif not self._free:
                await asyncio.wait(self._writing, return_when=asyncio.FIRST_COMPLETED)
            else:
                share = len(self._queue) if len(self._queue) <= FEW else -(-len(self._queue) // self._free)
                taken = [self._queue.popleft() for _ in range(min(share, MOST_IN_BATCH))]
                self._free -= 1
                writing = asyncio.create_task(self._write(taken), name="ledger-batch")
                self._writing.add(writing)
                writing.add_done_callback(self._written)
        if self._writing:
            await asyncio.wait(self._writing)

    def _written(self, task: asyncio.Task[None]) -> None:
        self._writing.discard(task)
        self._free += 1

    async def _write(self, taken: Sequence[_Order]) -> None:
        # Whoever has gone cannot be told; he asks again with the same request.
        orders = [order for order in taken if not order.future.done()]
        loop = asyncio.get_running_loop()
        batch, outcomes = await loop.run_in_executor(self._writers, self._carry_out, orders)
        if batch is not None:
            self._committed(batch)
        for order, outcome in zip(orders, outcomes, strict=True):
            if order.future.done():
                continue
            if isinstance(outcome, Exception):
                order.future.set_exception(outcome)
            else:
                order.future.set_result(outcome)

    async def _rest(self) -> None:
        """Waits for work; brings the mark up to date when there is none for a while."""
        while (mark := self._store.mark) is not None and (mark.dirty or self._writing):
            with suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL):
                    await self._wake.wait()
                return
            await asyncio.get_running_loop().run_in_executor(self._writers, self._flush, mark)
        await self._wake.wait()

    def _flush(self, mark: MarkWriter) -> None:
        try:
            with self._books:
                mark.flush()
        except BttError as error:
            _log.warning("%s", error.message)

    def _carry_out(self, orders: Sequence[_Order]) -> tuple[Batch | None, list[object]]:
        """Runs in a writer's thread; returns what was committed, and one answer or error per order."""
        checked = [_checked(order) for order in orders]
        sound = [operation for operation in checked if not isinstance(operation, Exception)]
        with self._books:
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
            batch = self._store.begin(self._clock(), operations)
            outcomes = [batch.run(operation) for operation in operations]
            if not batch.empty:
                self._store.commit(batch)
        except BttError as error:
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
