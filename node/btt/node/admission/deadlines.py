"""No call runs for ever: none has longer than its service allows, whatever its caller asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from btt.sdk.errors import DeadlineExceeded


@contextmanager
def deadline(seconds: float, context: Any) -> Iterator[None]:
    """Ends the call that runs in the block after a time.

    It ends wherever it is: in the service, waiting for payment, or sending to a reader that does
    not read. gRPC itself enforces a shorter deadline that the caller sets.

    Args:
        seconds: 0 is for ever.
        context: Of the call.

    Raises:
        DeadlineExceeded: The time was up.
    """
    task = asyncio.current_task()
    own = context.time_remaining()
    if not seconds or task is None or (own is not None and own <= seconds):
        yield
        return
    up = False

    def expire() -> None:
        nonlocal up
        up = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, expire)
    try:
        yield
    except asyncio.CancelledError:
        if up and task.cancelling() <= 1:
            task.uncancel()
            raise DeadlineExceeded(f"The call took longer than {seconds:g} seconds.") from None
        raise
    finally:
        timer.cancel()
