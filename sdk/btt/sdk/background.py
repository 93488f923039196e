"""An event loop in a thread of its own, for those who have none."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, Final, TypeVar

T = TypeVar("T")
_END: Final[Any] = object()


class Background:
    """Runs coroutines in its thread and waits for them here."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="btt-sync", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for some work; what interrupts the waiting, such as Ctrl-C, cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            if future.cancel():
                concurrent.futures.wait([future])
            raise

    def call(self, work: Callable[[], T]) -> T:
        """Calls a function in the thread of the loop."""

        async def called() -> T:
            return work()

        return self.run(called())

    def iterate(self, source: AsyncIterator[T]) -> Iterator[T]:
        """Gives what an asynchronous iterator gives; leaving the loop over it closes it."""

        async def following() -> T:
            return await anext(source, _END)

        try:
            while (item := self.run(following())) is not _END:
                yield item
        finally:
            close = getattr(source, "aclose", None)
            if close is not None:
                self.run(close())

    @contextmanager
    def entered(self, manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Holds an asynchronous block open, in one task as it expects, while the block here runs."""
        ready: concurrent.futures.Future[T] = concurrent.futures.Future()
        # What the block here raised is its result: a future takes no StopIteration as an exception.
        leave: asyncio.Future[Exception | None] = self._loop.create_future()

        async def hold() -> None:
            try:
                async with manager as value:
                    ready.set_result(value)
                    if (wrong := await leave) is not None:
                        raise wrong
            except BaseException as error:
                if not ready.done():
                    ready.set_exception(error)
                raise

        held = asyncio.run_coroutine_threadsafe(hold(), self._loop)
        try:
            value = ready.result()
        except BaseException:
            held.cancel()
            raise
        try:
            yield value
        except Exception as error:  # noqa: BLE001 - it goes to the block that is held, and comes back
            self._loop.call_soon_threadsafe(leave.set_result, error)
            held.result()  # raises that error, or what came of it
        except BaseException:
            # A loop does not survive Ctrl-C as an error; for it, the block is cancelled.
            self._loop.call_soon_threadsafe(leave.cancel)
            concurrent.futures.wait([held])
            raise
        else:
            self._loop.call_soon_threadsafe(leave.set_result, None)
            held.result()

    def close(self) -> None:
        """Ends the loop and its thread."""

        async def last() -> None:
            await self._loop.shutdown_asyncgens()
            await self._loop.shutdown_default_executor()

        self.run(last())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def stepwise(source: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    """Gives what an iterable gives; a slow one does not hold the loop up."""
    if isinstance(source, AsyncIterable):
        async for item in source:
            yield item
        return
    items = iter(source)
    while (item := await asyncio.to_thread(next, items, _END)) is not _END:
        yield item
