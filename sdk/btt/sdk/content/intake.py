"""What one call brings: verified and written, and only then accepted.

Both at once: a newcomer's pieces go in lockstep, and each waits for them. What does not verify is
written too, but never counted as there, so a later attempt finds a hole that holds something.

By callbacks and not by tasks: a run takes a millisecond, and a task for each costs a tenth of that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Executor
from types import TracebackType
from typing import Any, Self

from btt.sdk.content.run import Run
from btt.sdk.errors import BttError

AHEAD = 6
"""Runs of one node that are being verified and written at a time."""


class Intake:
    """Takes the runs of one call; an async context manager around the loop that reads them.

    What fails here breaks that loop off, and is raised instead of it. Whatever breaks the loop off, it
    is left when all that verifies is written and accepted: what is kept is paid.

    Args:
        room: Bounds what the calls to one node have under way here; of `AHEAD`.
        verify: Says whether a run is what was asked for, or raises why not.
        write: Puts it on the disk; called in a thread.
        writer: That thread.
        accept: Called once it has verified and is written.
    """

    def __init__(
        self,
        *,
        room: asyncio.Semaphore,
        verify: Callable[[Run], None],
        write: Callable[[Run], None],
        writer: Executor,
        accept: Callable[[Run], None],
    ) -> None:
        self._room = room
        self._verify = verify
        self._write = write
        self._writer = writer
        self._accept = accept
        self._loop = asyncio.get_running_loop()
        self._under_way = 0
        self._ended = asyncio.Event()
        self._error: Exception | None = None
        self._wrong: Run | None = None
        self._reader: asyncio.Task[Any] | None = None
        self._broke_off = False

    async def take(self, run: Run) -> None:
        """Takes a run over, as soon as there is room; the next one can be read while it is verified."""
        await self._room.acquire()
        self._under_way += 1
        # What pays for the last run goes first: it is short, and the node may wait for it.
        self._loop.call_soon(self._loop.call_soon, self._begin, run)

    async def __aenter__(self) -> Self:
        self._reader = asyncio.current_task()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reader, self._reader = self._reader, None
        assert reader is not None
        while self._under_way:
            self._ended.clear()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ended.wait()
        others = reader.uncancel() if self._broke_off else reader.cancelling()
        if self._error is not None and not _is_graver(error, self._error):
            raise self._error from None
        if others and error is None:
            raise asyncio.CancelledError

    def _begin(self, run: Run) -> None:
        if self._error is not None:
            self._end()
            return
        try:
            self._writer.submit(self._store, run)
        except Exception as error:  # noqa: BLE001 - it is raised where the loop ends
            self._fail(error)
            self._end()
            return
        try:
            self._verify(run)
        except Exception as error:  # noqa: BLE001 - as above
            self._wrong = run  # the only one: none begins after it
            self._fail(error)

    def _store(self, run: Run) -> None:
        """Writes a run, in the thread."""
        failure: Exception | None = None
        try:
            self._write(run)
        except Exception as error:  # noqa: BLE001 - as above
            failure = error
        self._loop.call_soon_threadsafe(self._stored, run, failure)

    def _stored(self, run: Run, failure: Exception | None) -> None:
        try:
            if run is not self._wrong:
                if failure is not None:
                    raise failure
                self._accept(run)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(error)
        self._end()

    def _end(self) -> None:
        self._under_way -= 1
        self._room.release()
        if not self._under_way:
            self._ended.set()

    def _fail(self, error: Exception) -> None:
        if self._error is None or _is_graver(error, self._error):
            self._error = error
        if self._reader is not None and not self._broke_off:
            self._broke_off = True
            self._reader.cancel()


def _is_graver(one: BaseException | None, other: Exception) -> bool:
    """Says whether trying again cannot mend `one`, though it could `other`."""
    if not isinstance(one, Exception) or not isinstance(other, BttError) or not other.retryable:
        return False
    return not isinstance(one, BttError) or not one.retryable
