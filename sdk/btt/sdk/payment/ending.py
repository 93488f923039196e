"""How a call ends: in its peer's words and in its time, whatever gRPC makes of either.

gRPC ends a stream with an error of its own when it was sending a message as the peer's word came,
and now and then, under load, never says that a deadline has passed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

import grpc.aio

from btt.sdk.errors import DeadlineExceeded
from btt.sdk.rpc import BROKEN_WRITE

T = TypeVar("T")


class Ending:
    """Remembers what a call ended with first, because gRPC may overwrite it.

    Args:
        call: Any call under way.
    """

    def __init__(self, call: grpc.aio.Call) -> None:
        self._first: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._ended)

    def _ended(self, call: Any) -> None:
        code, details, trailer = _known(call.code()), _known(call.details()), _known(call.trailing_metadata())
        self._first = grpc.aio.AioRpcError(code, trailing_metadata=trailer, details=details)

    def told(self, failure: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """Returns what the peer said, if it said anything; else `failure`, which gRPC raised."""
        if failure.details() == BROKEN_WRITE and self._first is not None:
            return self._first
        return failure


def _known(answer: Coroutine[Any, Any, T]) -> T:
    """Runs what does not wait, as the call has ended: in the next turn of the loop it may be overwritten."""
    try:
        answer.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    answer.close()
    raise AssertionError("the call has not ended")


async def in_time(answer: Awaitable[T], until: float) -> T:
    """Waits for an answer until some time.

    Args:
        answer: What to wait for.
        until: When it is too late, seconds of the loop's clock; may be infinite.

    Raises:
        DeadlineExceeded: It is too late.
    """
    if until == math.inf:
        return await answer
    limit = asyncio.timeout_at(until)
    try:
        async with limit:
            return await answer
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceeded("The call took longer than its deadline.") from None
