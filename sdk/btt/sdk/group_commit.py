"""Writes of many sessions in one transaction: one sync serves all who wait.

What is asked for in one turn of the event loop is committed together, and so is what gathers while
a commit is under way. Nobody hears "saved" before it is. On a quick disk a group is written in
place: handing it to a thread and back would take longer, and payment waits for it. Who was alone
lately is written at once, and not at the end of the turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import groupby
from operator import itemgetter
from typing import Any, Final

from btt.sdk.errors import StorageError

IN_PLACE_S: Final = 0.001
"""A disk whose last sync took less than this is quick. A thread costs each group two hand-overs."""
_MOST: Final = 512
"""Jobs in one transaction."""

Job = Callable[[sqlite3.Connection], Any]
Write = Callable[[sqlite3.Connection, list[Any]], None]
_ALONE: Final = object()
_Waiting = tuple[Callable[..., Any], Any, "asyncio.Future[Any]"]


class GroupCommit:
    """Runs jobs on a database, many in one transaction.

    Args:
        db: Without implicit transactions, usable from any thread; closed by its owner.
        lock: Held by whoever uses the database.
        whose: Begins the text of errors, such as "The node's books".
    """

    def __init__(self, db: sqlite3.Connection, lock: AbstractContextManager[object], *, whose: str) -> None:
        self._db = db
        self._lock = lock
        self._whose = whose
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="books")
        self._gathered: list[_Waiting] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._under_way = False
        self._alone = False
        self._early = 0
        self._closed = False
        self._sync_s = 0.0

    def run(self, job: Job) -> asyncio.Future[Any]:
        """Runs a job; to be awaited for its result, which is there once it is committed.

        Args:
            job: Called with the connection, inside a transaction, in any thread.

        Raises:
            StorageError: The transaction failed, and nothing of it happened.
        """
        return self._gather(job, _ALONE)

    def put(self, write: Write, value: Any) -> asyncio.Future[Any]:
        """Writes a value; to be awaited until it is committed.

        What many sessions write at the same time goes to the database in few statements.

        Args:
            write: Called with the connection and the values that were put to it one after the
                other, in their order; otherwise like a job.
            value: For `write`.

        Raises:
            StorageError: The transaction failed, and nothing of it happened.
        """
        return self._gather(write, value)

    def _gather(self, job: Callable[..., Any], value: Any) -> asyncio.Future[Any]:
        if self._closed:
            raise StorageError(f"{self._whose} are closed.")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        self._gathered.append((job, value, done))
        if self._loop is not loop or len(self._gathered) == 1:
            self._loop = loop
            if self._alone and not self._under_way:
                self._alone, self._early = False, 1
                self._begin()
            loop.call_soon(self._dispatch)
        return done

    def run_now(self, job: Job) -> Any:
        """Runs a job after all that were asked for before, and blocks until it is committed.

        Raises:
            StorageError: The transaction failed, and nothing of it happened.
        """
        before, self._gathered = self._gathered, []
        self._thread.submit(self._settle, before).result()
        return self._thread.submit(self._transact, [(job, _ALONE)]).result()[0]

    def close(self) -> None:
        """Commits what was asked for; the database is free afterwards."""
        self._closed = True
        self._thread.shutdown()
        self._settle(self._gathered)
        self._gathered = []

    def _dispatch(self) -> None:
        if self._under_way or self._closed:
            return
        if came := self._early + len(self._gathered):
            self._alone = came == 1
        self._early = 0
        self._begin()

    def _begin(self) -> None:
        if not self._gathered:
            return
        batch, self._gathered = self._gathered[:_MOST], self._gathered[_MOST:]
        if self._sync_s < IN_PLACE_S:
            _tell(batch, self._attempt(batch))
            self._go_on()
        else:
            assert self._loop is not None
            self._under_way = True
            self._loop.run_in_executor(self._thread, self._settle, batch)

    def _go_on(self) -> None:
        if self._gathered and self._loop is not None:
            self._loop.call_soon(self._dispatch)

    def _settle(self, batch: Sequence[_Waiting]) -> None:
        """Commits a group, and has everyone in it told by their loop."""
        found = self._attempt(batch)
        try:
            if batch:
                batch[0][2].get_loop().call_soon_threadsafe(self._arrived, batch, found)
        except RuntimeError:  # the loop has ended; what is committed is committed
            self._under_way = False

    def _arrived(self, batch: Sequence[_Waiting], found: Sequence[Any]) -> None:
        self._under_way = False
        _tell(batch, found)
        self._go_on()

    def _attempt(self, batch: Sequence[_Waiting]) -> Sequence[Any]:
        """Returns what became of each: its result, or the StorageError that it raises."""
        try:
            return self._transact(batch) if batch else ()
        except StorageError as error:
            if len(batch) > 1 and not isinstance(error.__cause__, sqlite3.OperationalError):
                # It is not the disk: one of them is wrong, and the others shall not suffer for it.
                return [found for waiting in batch for found in self._attempt([waiting])]
            return [StorageError(error.message) for _ in batch]

    def _transact(self, batch: Sequence[tuple[Any, ...]]) -> list[Any]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                results = []
                for job, group in groupby(batch, key=itemgetter(0)):
                    values = [waiting[1] for waiting in group]
                    if values[0] is _ALONE:
                        results += [job(self._db) for _ in values]
                    else:
                        job(self._db, values)
                        results += [None] * len(values)
                start = time.perf_counter()
                self._db.execute("COMMIT")
            except Exception as error:
                with contextlib.suppress(sqlite3.Error):  # the next BEGIN says so too
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                raise StorageError(f"{self._whose} could not be written ({error}).") from error
            self._sync_s = time.perf_counter() - start
            return results


def _tell(batch: Sequence[_Waiting], found: Sequence[Any]) -> None:
    for (_, _, done), result in zip(batch, found, strict=True):
        if done.done():
            continue
        if isinstance(result, StorageError):
            done.set_exception(result)
        else:
            done.set_result(result)
