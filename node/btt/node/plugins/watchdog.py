"""Notices when something holds up the event loop, and says which service it was.

One thread asks the loop for a sign of life. If none comes, it looks at what the loop's thread is
doing right now: the innermost frame that belongs to a service names it. This costs the calls
nothing. What never returns cannot be ended from outside; the log then names whom to remove.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Final

import structlog

log = structlog.get_logger(__name__)

LIMIT_S: Final = 2.0
_EVERY_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Blocked:
    """The loop was held up.

    Attributes:
        service: Whose code ran; empty if it was no service's.
        where: File, line and function.
        seconds: For how long.
    """

    service: str
    where: str
    seconds: float


class Watchdog:
    """Watches one loop.

    Args:
        packages: Returns the service by the package or module of its code; called in the thread.
        told: Called in the loop, once it goes on.
        limit_s: How long the loop may be held up.
        noticed: Called in the watchdog's thread, while the loop is held up.
    """

    def __init__(
        self,
        packages: Callable[[], Mapping[str, str]],
        told: Callable[[Blocked], None],
        *,
        limit_s: float = LIMIT_S,
        noticed: Callable[[str, str], None] | None = None,
    ) -> None:
        self._packages = packages
        self._told = told
        self._limit_s = limit_s
        self._noticed = noticed
        self.lag_s = 0.0

    def start(self) -> None:
        """Watches the running loop."""
        self._loop = asyncio.get_running_loop()
        self._stop = threading.Event()
        self._loop_thread = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="loop-watchdog", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        # Not joined here: it may be waiting for the sign that this loop gives now.
        await asyncio.to_thread(self._thread.join)

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY_S):
            alive = threading.Event()
            asked = time.monotonic()
            try:
                self._loop.call_soon_threadsafe(alive.set)
            except RuntimeError:
                return  # the loop has ended
            if not alive.wait(self._limit_s):
                service, where = self._blame()
                log.error("loop.blocked", service=service, where=where)
                if self._noticed is not None:
                    self._noticed(service, where)
                while not alive.wait(_EVERY_S):
                    if self._stop.is_set() or self._loop.is_closed():
                        return
                seconds = time.monotonic() - asked
                try:
                    self._loop.call_soon_threadsafe(self._told, Blocked(service, where, seconds))
                except RuntimeError:
                    return
            self.lag_s = time.monotonic() - asked

    def _blame(self) -> tuple[str, str]:
        packages = self._packages()
        innermost = frame = sys._current_frames().get(self._loop_thread)
        while frame is not None:
            service = self._service(frame, packages)
            if service:
                return service, _place(frame)
            frame = frame.f_back
        return "", _place(innermost) if innermost is not None else ""

    def _service(self, frame: FrameType, packages: Mapping[str, str]) -> str:
        module = str(frame.f_globals.get("__name__", ""))
        while module:
            if module in packages:
                return packages[module]
            module = module.rpartition(".")[0]
        return ""


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
