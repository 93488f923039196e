"""Runs a node as a process: signals, the lifeline of its parent, the line that says it is ready."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import structlog

from btt.node.folder import NodeFolder
from btt.node.runtime import Node
from btt.sdk.clock import SYSTEM, Clock
from btt.sdk.errors import BttError, InternalError
from btt.sdk.identity import NodeAddress
from btt.sdk.lifeline import set_at_end_of_stdin

log = structlog.get_logger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def serve(
    folder: NodeFolder,
    *,
    ready: Callable[[NodeAddress], None],
    clock: Clock = SYSTEM,
    stdin_lifeline: bool = False,
) -> None:
    """Runs a node until a signal; a second signal cuts its grace time.

    Args:
        folder: The node.
        ready: Called once it serves.
        clock: The node's time.
        stdin_lifeline: The end of standard input stops it too, so that it never outlives its parent.

    Raises:
        BttError: It could not start, or had to give up.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    node = Node(folder, clock=clock)

    def on_signal() -> None:
        if stop.is_set():
            node.hurry()
        stop.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal)
    if stdin_lifeline:
        set_at_end_of_stdin(stop)
    try:
        failure = await _run(node, stop, ready)
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
    if isinstance(failure, BttError):
        raise failure
    if failure is not None:
        raise InternalError(f"The node gave up: {failure!r}.") from failure


async def _run(node: Node, stop: asyncio.Event, ready: Callable[[NodeAddress], None]) -> BaseException | None:
    async with node:
        ready(node.address)
        stopped = asyncio.ensure_future(stop.wait())
        failed = asyncio.ensure_future(node.failed())
        await asyncio.wait({stopped, failed}, return_when=asyncio.FIRST_COMPLETED)
        failure = failed.result() if failed.done() else None
        for waiting in (stopped, failed):
            waiting.cancel()
        await asyncio.gather(stopped, failed, return_exceptions=True)
        return failure
