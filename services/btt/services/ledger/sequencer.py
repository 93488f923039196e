"""One order for all operations, many of them in one commit.

A single task takes what has queued up while the disk was busy. The one writer thread checks the
signatures of the batch, lets the books decide each operation on top of those before it, commits
them as one transaction, and only then answers. So one fsync serves everyone who waited, no operation
races another, nothing unchecked comes near the books, and an answer always stands on the disk.

While a batch is written, those who are in the one before hear their answers and ask anew: of a
batch that leaves nobody waiting, half hear of it before the others, so that the writer need not wait
for all of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from btt.sdk.errors import BttError, Draining, InvariantBroken, RateLimited
from btt.services.ledger.crew import FEW, Crew
from btt.services.ledger.journal import EntryRef
from btt.services.ledger.mark import INTERVAL, MarkWriter
from btt.services.ledger.overlay import Batch
from btt.services.ledger.reading import SyncFailed
from btt.services.ledger.store import Store
from btt.services.ledger.verify import Operation

MOST_IN_BATCH: Final = 512
MOST_QUEUED: Final = 4096

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
        self._last: Batch | None = None
        self._queue: deque[_Order] = deque()
        self._wake = asyncio.Event()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger-writer")
        self._crew = Crew()
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
            await asyncio.get_running_loop().run_in_executor(self._writer, self._store.close)
            self._writer.shutdown()
            self._crew.close()

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
            check: Verifies the request by the Verifier; called by the writer, in any of its threads.
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
        loop = asyncio.get_running_loop()
        late: list[tuple[_Order, object]] = []
        while True:
            if not self._queue:
                _tell(late)
                if self._stopping:
                    return
                self._wake.clear()
                await self._rest()
                continue
            taken = [self._queue.popleft() for _ in range(min(len(self._queue), MOST_IN_BATCH))]
            # Whoever has gone cannot be told; he asks again with the same request.
            orders = [order for order in taken if not order.future.done()]
            writing = loop.run_in_executor(self._writer, self._write, orders)
            _tell(late)
            outcomes = await writing
            if self._last is not None:
                self._committed(self._last)
            late = list(zip(orders, outcomes, strict=True))
            if not self._queue and len(late) > FEW:
                half = len(late) // 2
                _tell(late[:half])
                late = late[half:]
                await asyncio.sleep(0)  # those who heard ask anew

    async def _rest(self) -> None:
        """Waits for work; brings the mark up to date when there is none for a while."""
        while (mark := self._store.mark) is not None and mark.dirty:
            with suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL):
                    await self._wake.wait()
                return
            await asyncio.get_running_loop().run_in_executor(self._writer, self._flush, mark)
        await self._wake.wait()

    def _flush(self, mark: MarkWriter) -> None:
        try:
            mark.flush()
        except BttError as error:
            _log.warning("%s", error.message)

    def _write(self, orders: Sequence[_Order]) -> list[object]:
        """Runs in the writer thread; returns the answer to each order, or why there is none."""
        checked = self._crew.map(_checked, orders)
        sound = [operation for operation in checked if not isinstance(operation, Exception)]
        outcomes = iter(self._commit(sound))
        decided = [found if isinstance(found, Exception) else next(outcomes) for found in checked]
        return self._crew.map(_answered, list(zip(orders, decided, strict=True)))

    def _commit(self, operations: list[Operation]) -> list[_Outcome]:
        """Applies a batch; returns one outcome per operation."""
        self._last = None
        if self.halted is not None:
            return [_again(self.halted) for _ in operations]
        self.batches += 1
        try:
            batch = self._store.begin(self._clock(), operations)
            outcomes = [batch.run(operation) for operation in operations]
            if not batch.empty:
                self._store.commit(batch)
                self._last = batch
        except BttError as error:
            if isinstance(error, InvariantBroken | SyncFailed):
                self.halted = error
                _log.critical("The ledger has stopped: %s", error.message)
            return [_again(error) for _ in operations]
        except Exception as error:  # noqa: BLE001 (a defect must not leave callers waiting for ever)
            # What failed may name other people's accounts: it is for the operator's log alone.
            self.halted = InvariantBroken("The ledger failed in a way it does not know.")
            _log.critical("The ledger has stopped.", exc_info=error)
            return [_again(self.halted) for _ in operations]
        return outcomes


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


def _answered(decided: tuple[_Order, _Outcome | Exception]) -> object:
    order, outcome = decided
    if not isinstance(outcome, EntryRef):
        return outcome
    try:
        return order.answer(outcome)
    except Exception as error:  # noqa: BLE001 (likewise)
        return error


def _tell(answers: list[tuple[_Order, object]]) -> None:
    """Wakes those who wait for these answers, and forgets the answers."""
    for order, outcome in answers:
        if order.future.done():
            continue
        if isinstance(outcome, Exception):
            order.future.set_exception(outcome)
        else:
            order.future.set_result(outcome)
    answers.clear()
