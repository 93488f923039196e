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
) -> bool:
    """Runs a node until a signal; a second signal cuts its grace time.

    SIGHUP reads the configuration again; SIGUSR1 drains the node, then stops it.

    Args:
        folder: The node.
        ready: Called once it serves.
        clock: The node's time.
        stdin_lifeline: The end of standard input stops it too, so that it never outlives its parent.

    Returns:
        Whether everything ended; if not, a service refuses to, and only the end of the process helps.

    Raises:
        BttError: It could not start, or had to give up.
    """
    loop = asyncio.get_running_loop()
    stop, drain = asyncio.Event(), asyncio.Event()
    node = Node(folder, clock=clock)
    reloads: set[asyncio.Task[object]] = set()

    def on_reload() -> None:
        task = asyncio.create_task(node.reload())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    def on_signal() -> None:
        if stop.is_set():
            node.hurry()
        stop.set()

    def on_drain() -> None:
        drain.set()
        stop.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal)
    loop.add_signal_handler(signal.SIGHUP, on_reload)
    loop.add_signal_handler(signal.SIGUSR1, on_drain)
    if stdin_lifeline:
        set_at_end_of_stdin(stop)
    try:
        failure = await _run(node, stop, drain, ready)
    finally:
        for number in (*_SIGNALS, signal.SIGHUP, signal.SIGUSR1):
            loop.remove_signal_handler(number)
    if isinstance(failure, BttError):
        raise failure
    if failure is not None:
        raise InternalError(f"The node gave up: {failure!r}.") from failure
    return not node.services.registry.abandoned


async def _run(
    node: Node, stop: asyncio.Event, drain: asyncio.Event, ready: Callable[[NodeAddress], None]
) -> BaseException | None:
    async with node:
        ready(node.address)
        stopped = asyncio.ensure_future(stop.wait())
        failed = asyncio.ensure_future(node.failed())
        await asyncio.wait({stopped, failed}, return_when=asyncio.FIRST_COMPLETED)
        failure = failed.result() if failed.done() else None
        for waiting in (stopped, failed):
            waiting.cancel()
        await asyncio.gather(stopped, failed, return_exceptions=True)
        if failure is None and drain.is_set():
            await node.drain()
        return failure
