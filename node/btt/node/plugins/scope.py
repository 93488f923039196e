"""Knows which tasks belong to which service, so that none is left when it stops.

Whatever runs on behalf of a service runs in a context that names its scope; tasks inherit the
context of whoever creates them, so also those that a service made behind our back are known.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary, WeakSet

P = ParamSpec("P")
T = TypeVar("T")

_current: ContextVar[Scope | None] = ContextVar("btt_service", default=None)


class Scope:
    """The tasks of one service.

    Args:
        failed: Called when a task that was created here ends with an exception.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed
        self._outside = contextvars.copy_context()
        self._tasks: WeakSet[asyncio.Task[Any]] = WeakSet()

    def enter(self) -> None:
        """From here on this task works for the service."""
        _current.set(self)

    def create(self, work: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """Begins work in the background."""
        task = self.run(work, name=name)
        # What the node does about it is the node's work, and must not end with the service's.
        task.add_done_callback(self._ended, context=self._outside)
        return task

    def run(self, work: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """Begins work whose result somebody waits for."""
        task = asyncio.get_running_loop().create_task(work, name=name, context=self._inside())
        self._tasks.add(task)
        return task

    def call(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Calls something of the service; tasks that it begins are the service's."""
        return self._inside().run(function, *args, **options)

    def _inside(self) -> contextvars.Context:
        context = contextvars.copy_context()
        context.run(self.enter)
        return context

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)

    def add(self, task: asyncio.Task[Any]) -> None:
        """Takes in a task that was made in this scope's context."""
        self._tasks.add(task)

    @property
    def alive(self) -> list[asyncio.Task[Any]]:
        """Tasks that have not ended."""
        return [task for task in self._tasks if not task.done()]

    async def end(self, seconds: float) -> list[asyncio.Task[Any]]:
        """Cancels what is left.

        Args:
            seconds: How long it may take to end.

        Returns:
            Tasks that refuse to.
        """
        left = self.alive
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=seconds)
        return self.alive


async def _contained(work: Coroutine[Any, Any, Any]) -> Any:
    """Keeps what would end the loop inside the task."""
    try:
        return await work
    except SystemExit as error:
        raise RuntimeError("It tried to end the process.") from error


_followed: WeakKeyDictionary[asyncio.AbstractEventLoop, int] = WeakKeyDictionary()
_before: WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = WeakKeyDictionary()


def follow_tasks(loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    """Makes a loop remember which service its tasks belong to; several nodes may ask for it.

    Returns:
        What ends that.
    """
    before: Any = loop.get_task_factory()

    def make(
        loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        context: contextvars.Context | None = options.get("context")
        scope = _current.get() if context is None else context.get(_current)
        if scope is not None:
            work = _contained(work)
        task: asyncio.Task[Any] = (
            asyncio.Task(work, loop=loop, **options) if before is None else before(loop, work, **options)
        )
        if scope is not None:
            scope.add(task)
        return task

    if not _followed.get(loop):
        loop.set_task_factory(make)  # type: ignore[arg-type]
        _before[loop] = before
    _followed[loop] = _followed.get(loop, 0) + 1

    def undo() -> None:
        _followed[loop] -= 1
        if not _followed[loop]:
            loop.set_task_factory(_before.pop(loop))

    return undo
