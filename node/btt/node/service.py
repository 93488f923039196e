"""Runs a node as a process: signals, the lifeline of its parent, the line that says it is ready."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress

import structlog

from btt.node.folder import NodeFolder
from btt.node.runtime import Node
from btt.sdk.errors import BttError, InternalError
from btt.sdk.identity import NodeAddress

log = structlog.get_logger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def serve(
    folder: NodeFolder, *, ready: Callable[[NodeAddress], None], stdin_lifeline: bool = False
) -> None:
    """Runs a node until a signal; a second signal cuts its grace time.

    Args:
        folder: The node.
        ready: Called once it serves.
        stdin_lifeline: The end of standard input stops it too, so that it never outlives its parent.

    Raises:
        BttError: It could not start, or had to give up.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    node = Node(folder)

    def on_signal() -> None:
        if stop.is_set():
            node.hurry()
        stop.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal)
    if stdin_lifeline:
        threading.Thread(target=_watch_stdin, args=(loop, stop), daemon=True).start()
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


def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    # Not sys.stdin: its lock, held by a thread, breaks the interpreter's exit.
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    with suppress(RuntimeError):  # the loop has ended by itself
        loop.call_soon_threadsafe(stop.set)
