"""One simulated machine room: a virtual clock, processes that can die, disks that remember.

Everything runs on one event loop whose time is a number: it jumps to the next timer, so an hour
costs as much as what happens in it. Every handle belongs to a process by its context; the handles
of a dead process are dropped, as its memory would be. Executors and the payee store's writer thread
become queues of the same loop, so that one seed gives one order.

What dies and what stays: a process dies at a boundary, which is just before or just after a COMMIT
of SQLite or a message sent. Its connections and file handles are closed and its tasks never run
again, not even their `finally`. What it committed stays, what it did not is gone. `synchronous` is
off and `os.fsync` does nothing: a commit is durable here once it has returned, and the simulator says
nothing about disks that lose what they confirmed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import fcntl
import gc
import heapq
import os
import queue
import sqlite3
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

CURRENT: contextvars.ContextVar[Process | None] = contextvars.ContextVar("sim_process", default=None)


class Killed(BaseException):
    """Unwinds the stack of a process that has just died; no `except Exception` may see it."""


class Process:
    """One life of a party: from its start to its death.

    Args:
        name: Of the party.
        room: Where it runs.
        died: Called once when it dies.
    """

    def __init__(self, name: str, room: Room, died: Callable[[Process], None]) -> None:
        self.name = name
        self.room = room
        self.alive = True
        self.fuse = 0
        """Boundaries until it dies; 0 for never."""
        self.context = contextvars.copy_context()
        self.context.run(CURRENT.set, self)
        self.connections: list[SimConnection] = []
        self.handles: set[int] = set()
        self._died = died
        self._executor: SimExecutor | None = None

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return self.room.create_task(work, context=self.context.copy())

    def boundary(self, where: str) -> None:
        """A place where this process may die.

        Raises:
            Killed: It did, here or before.
        """
        if not self.alive:
            raise Killed
        if self.fuse:
            self.fuse -= 1
            if not self.fuse:
                self.room.crashed(self, where)
                self.kill()
                raise Killed

    def kill(self) -> None:
        if not self.alive:
            return
        self.alive = False
        for connection in self.connections:
            with suppress(sqlite3.Error):
                sqlite3.Connection.close(connection)
        for handle in self.handles:
            _close(handle)
        self._died(self)

    @property
    def executor(self) -> SimExecutor:
        if self._executor is None:
            self._executor = self.context.run(SimExecutor)
        return self._executor


_close = os.close


class Room(asyncio.BaseEventLoop):
    """The event loop.

    Args:
        crashed: Told where a process dies.
        committed: Told which database has just committed.
        latency: Returns seconds that a disk takes.
    """

    def __init__(
        self,
        *,
        crashed: Callable[[Process, str], None],
        committed: Callable[[str], None],
        latency: Callable[[], float],
    ) -> None:
        super().__init__()
        self.crashed = crashed
        self.committed = committed
        self.latency = latency
        self.failures: list[str] = []
        self.steps = 0
        self._now = 0.0
        self._tasks: list[tuple[asyncio.Task[Any], contextvars.Context]] = []
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._note)

    def time(self) -> float:
        return self._now

    def _make_task(self, loop: Any, work: Any, context: Any = None, **options: Any) -> asyncio.Task[Any]:
        context = contextvars.copy_context() if context is None else context
        task: asyncio.Task[Any] = asyncio.Task(work, loop=self, context=context, **options)
        self._tasks.append((task, context))
        if len(self._tasks) > 4096:
            self._tasks = [kept for kept in self._tasks if not kept[0].done()]
        return task

    def _note(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None and not isinstance(error, Killed):
            self.failures.append(f"{context['message']}: {error!r}")

    def _run_once(self) -> None:
        ready, timers = self._ready, self._scheduled  # type: ignore[attr-defined]
        while timers and (timers[0]._cancelled or timers[0]._when <= self._now or not ready):
            timer = heapq.heappop(timers)
            timer._scheduled = False
            if timer._cancelled:
                continue
            self._now = max(self._now, timer._when)
            ready.append(timer)
        if not ready:
            raise RuntimeError("nothing will ever happen again")
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(CURRENT)
            if process is None or process.alive:
                self.steps += 1
                handle._run()

    def _timer_handle_cancelled(self, handle: Any) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _process_events(self, events: Any) -> None:
        pass

    def run_in_executor(self, executor: Any, call: Any, *args: Any) -> Any:
        if executor is None:
            process = CURRENT.get()
            assert process is not None
            executor = process.executor
        return executor.enqueue(self, call, args)

    def bury(self) -> None:
        """Ends what is left of all processes; nothing they do or say any more counts."""
        heard, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            self._bury()
        finally:
            gc.collect()
            sys.unraisablehook = heard

    def _bury(self) -> None:
        for task, context in self._tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            work = task.get_coro()
            for _ in range(8):
                try:
                    context.run(work.close)
                    break
                except RuntimeError:  # it awaits while it ends
                    continue
                except BaseException:  # noqa: BLE001 - the dead may say what they want
                    break
        self._tasks.clear()
        self._ready.clear()  # type: ignore[attr-defined]
        self._scheduled.clear()  # type: ignore[attr-defined]
        self.close()


def running() -> Process:
    """Returns the process that runs now."""
    process = CURRENT.get()
    assert process is not None, "only processes talk"
    if not process.alive:
        raise Killed
    return process


class SimConnection(sqlite3.Connection):
    """A connection of a process: its commits are boundaries, and it dies with its process."""

    def __init__(self, database: Any, **options: Any) -> None:
        self.process = CURRENT.get()
        self.name = urlsplit(str(database)).path
        if self.process is not None and not self.process.alive:
            raise Killed
        super().__init__(database, **options)
        if self.process is not None:
            self.process.connections.append(self)

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        if self.process is None:
            return super().execute(sql, *args)
        if not self.process.alive:
            raise Killed
        if sql.startswith("PRAGMA synchronous"):
            sql = "PRAGMA synchronous = OFF"
        if sql != "COMMIT":
            return super().execute(sql, *args)
        self.process.boundary("before commit")
        cursor = super().execute(sql)
        self.process.room.committed(self.name)
        self.process.boundary("after commit")
        return cursor


class SimExecutor:
    """A thread of its own, as a queue of the loop: in order, one at a time, after a while."""

    def __init__(self, max_workers: int = 1, thread_name_prefix: str = "") -> None:
        self._queue: deque[tuple[asyncio.Future[Any], Any, Any]] = deque()

    def enqueue(self, room: Room, call: Any, args: Any) -> asyncio.Future[Any]:
        future = room.create_future()
        self._queue.append((future, call, args))
        room.call_later(room.latency(), self._next)
        return future

    def _next(self) -> None:
        if not self._queue:
            return
        future, call, args = self._queue.popleft()
        try:
            result = call(*args)
        except Exception as error:  # noqa: BLE001 - handed on to whoever waits
            if not future.cancelled():
                future.set_exception(error)
        else:
            if not future.cancelled():
                future.set_result(result)

    def submit(self, call: Any, *args: Any) -> concurrent.futures.Future[Any]:
        while self._queue:
            self._next()
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(call(*args))
        except Exception as error:  # noqa: BLE001 - handed on to whoever waits
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True) -> None:
        while self._queue:
            self._next()


class _Idle(Exception):
    """A thread would block here."""


class SimQueue:
    """A queue whose reading thread runs when something is in it."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self.worker: Callable[[], None] | None = None

    def put(self, item: Any) -> None:
        self._items.append(item)
        process = CURRENT.get()
        if item is not None and process is not None:
            process.room.call_later(process.room.latency(), self.work)

    def work(self) -> None:
        assert self.worker is not None
        with suppress(_Idle):
            self.worker()

    def get(self) -> Any:
        if not self._items:
            raise _Idle
        return self._items.popleft()

    def get_nowait(self) -> Any:
        if not self._items:
            raise queue.Empty
        return self._items.popleft()

    def empty(self) -> bool:
        return not self._items


class SimThread:
    """The writer thread of a store: it waits on the store's queue of jobs, and does nothing else."""

    def __init__(self, *, target: Any, name: str = "", daemon: bool = False) -> None:
        self._jobs: SimQueue = target.__self__._jobs
        self._jobs.worker = target

    def start(self) -> None:
        pass

    def join(self) -> None:
        self._jobs.work()


def flock(handle: int, operation: int) -> None:
    """As `fcntl.flock`; the lock goes with the process that took it."""
    _flock(handle, operation)
    own(handle)


_flock = fcntl.flock


def own(handle: int) -> None:
    """Has a handle closed when its process dies."""
    process = CURRENT.get()
    if process is not None:
        process.handles.add(handle)


def close(handle: int) -> None:
    """As `os.close`, unless the process is dead: then the handle is closed already, or another's."""
    process = CURRENT.get()
    if process is not None:
        if not process.alive:
            return
        process.handles.discard(handle)
    _close(handle)
