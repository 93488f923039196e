"""Ends a process when the one that started it is gone, however that one ended.

The parent keeps the other end of our standard input open and never writes. The kernel closes it
with the parent, even after kill -9, and then reading ends.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress

_EXIT_CODE = 1


def follow_stdin() -> None:
    """Ends this process at once when standard input ends; for work that may be cut off anywhere."""
    _watch(lambda: os._exit(_EXIT_CODE))


def set_at_end_of_stdin(stop: asyncio.Event) -> None:
    """Sets an event of the running loop when standard input ends; for servers that stop in order."""
    loop = asyncio.get_running_loop()

    def tell() -> None:
        with suppress(RuntimeError):  # the loop has ended by itself
            loop.call_soon_threadsafe(stop.set)

    _watch(tell)


def _watch(ended: Callable[[], None]) -> None:
    def watch() -> None:
        # Not sys.stdin: its lock, held by a thread, breaks the interpreter's exit.
        with suppress(OSError):
            while os.read(0, 4096):
                pass
        ended()

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
