"""Time, as everything of one network sees it.

Channels, offers and contracts last for hours and months, and nobody waits that long in a trial: all
processes of a devnet read one offset from a file that each of them maps, so that moving it moves
them together and wakes whoever sleeps until then. Elsewhere a clock is this machine's.
"""

from __future__ import annotations

import asyncio
import heapq
import mmap
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from btt.sdk.errors import ConfigError

VARIABLE: Final = "BTT_CLOCK"
"""Names the clock file of a devnet, for clients."""
LONGEST_MS: Final = 100 * 366 * 86_400_000
"""Furthest that a shared clock can be moved ahead."""
_DURATION: Final = re.compile(r"([0-9]{1,12})\s*(ms|s|m|h|d)")
_MILLISECONDS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_OFFSET: Final = struct.Struct("<q")
_LOOK_S: Final = 0.2
"""Seconds between two looks of a process at whether another one has moved the clock."""


class Clock:
    """This machine's time; call it for Unix milliseconds."""

    def __call__(self) -> int:
        """Returns the time, Unix milliseconds."""
        return time.time_ns() // 1_000_000

    async def sleep(self, seconds: float) -> None:
        """Waits until this clock is so many seconds further."""
        await asyncio.sleep(seconds)


SYSTEM: Final = Clock()


class SharedClock(Clock):
    """This machine's time and an offset that all processes of a devnet share.

    Args:
        path: The file, made by `create`.

    Raises:
        ConfigError: The file is missing, or no clock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("r+b") as file:
                if os.fstat(file.fileno()).st_size != _OFFSET.size:
                    raise ConfigError(f"{path} is not the clock of a devnet.")
                self._map = mmap.mmap(file.fileno(), _OFFSET.size)
        except OSError as error:
            raise ConfigError(
                f"The devnet's clock {path} cannot be read: {error.strerror}.",
                hint=f"Start a devnet with `btt devnet up`, or unset {VARIABLE}.",
            ) from error
        self._moves: dict[asyncio.AbstractEventLoop, _Moves] = {}

    @classmethod
    def create(cls, path: Path) -> SharedClock:
        """Makes the file of a clock that shows this machine's time."""
        path.write_bytes(_OFFSET.pack(0))
        return cls(path)

    @property
    def offset_ms(self) -> int:
        """How far it is ahead of this machine."""
        return int(_OFFSET.unpack_from(self._map)[0])

    def __call__(self) -> int:
        """Returns the time of the devnet, Unix milliseconds."""
        return super().__call__() + self.offset_ms

    def advance(self, milliseconds: int) -> None:
        """Moves all processes of the devnet ahead.

        Raises:
            ValueError: It would go back, or further than a century.
        """
        moved = self.offset_ms + milliseconds
        if milliseconds < 0 or moved > LONGEST_MS:
            raise ValueError("a clock goes ahead only, and by a century at most")
        # One aligned store of eight bytes: no reader ever sees half of it.
        _OFFSET.pack_into(self._map, 0, moved)

    async def sleep(self, seconds: float) -> None:
        """Waits until the devnet's time is so many seconds further, however it got there."""
        until = self() + seconds * 1000
        with self._watched() as moves:
            while (left := until - self()) > 0:
                await moves.wait(left / 1000)

    @contextmanager
    def _watched(self) -> Iterator[_Moves]:
        loop = asyncio.get_running_loop()
        moves = self._moves.get(loop)
        if moves is None:
            moves = self._moves[loop] = _Moves(self, loop)
        moves.sleepers += 1
        try:
            yield moves
        finally:
            moves.sleepers -= 1
            if not moves.sleepers:
                self._moves.pop(loop).end()


class _Moves:
    """Looks, for all who sleep in one loop, whether the clock was moved: another process tells nobody."""

    def __init__(self, clock: SharedClock, loop: asyncio.AbstractEventLoop) -> None:
        self.sleepers = 0
        self._clock = clock
        self._loop = loop
        self._offset_ms = clock.offset_ms
        self._moved = loop.create_future()
        self._timer = loop.call_later(_LOOK_S, self._look)

    async def wait(self, seconds: float) -> None:
        """Returns after so many seconds of this machine, or once the clock was moved."""
        await asyncio.wait([self._moved], timeout=seconds)

    def end(self) -> None:
        """Looks no more."""
        self._timer.cancel()

    def _look(self) -> None:
        if self._clock.offset_ms != self._offset_ms:
            self._offset_ms = self._clock.offset_ms
            self._moved.set_result(None)
            self._moved = self._loop.create_future()
        self._timer = self._loop.call_later(_LOOK_S, self._look)


class FakeClock(Clock):
    """Time that stands still until a test moves it.

    Args:
        now_ms: Where it begins, Unix milliseconds; this machine's time by default.
    """

    def __init__(self, now_ms: int | None = None) -> None:
        self._now_ms = super().__call__() if now_ms is None else now_ms
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0

    def __call__(self) -> int:
        """Returns the time, Unix milliseconds."""
        return self._now_ms

    def advance(self, milliseconds: int) -> None:
        """Moves ahead, and wakes whoever slept until then; callable from any thread.

        Raises:
            ValueError: It would go back.
        """
        if milliseconds < 0:
            raise ValueError("a clock goes ahead only")
        self._now_ms += milliseconds
        while self._sleepers and self._sleepers[0][0] <= self._now_ms:
            _, _, sleeper = heapq.heappop(self._sleepers)
            with suppress(RuntimeError):  # its loop has ended
                sleeper.get_loop().call_soon_threadsafe(_wake, sleeper)

    async def sleep(self, seconds: float) -> None:
        """Waits until a test has moved the clock so many seconds further."""
        if seconds <= 0:
            return
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count += 1
        until = self._now_ms + seconds * 1000
        heapq.heappush(self._sleepers, (until, self._count, sleeper))
        if until > self._now_ms:  # else another thread moved it meanwhile, and may not have seen us
            await sleeper


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)


async def sleep(clock: Callable[[], int], seconds: float) -> None:
    """Waits by a clock; by this machine's if it can only tell the time.

    Args:
        clock: Unix milliseconds.
        seconds: How long.
    """
    await (clock if isinstance(clock, Clock) else SYSTEM).sleep(seconds)


def configured() -> Clock:
    """Returns the clock of a dApp: the devnet's if BTT_CLOCK names one, else this machine's.

    Raises:
        ConfigError: What BTT_CLOCK names is no clock.
    """
    path = os.environ.get(VARIABLE)
    return SharedClock(Path(path)) if path else SYSTEM


def parse_duration(text: object) -> int:
    """Reads a duration such as "90s", "15m", "1h" or "7d".

    Returns:
        Milliseconds.

    Raises:
        ValueError: It is no duration.
    """
    match = _DURATION.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise ValueError('write a duration like "30s", "15m", "1h" or "7d"')
    return int(match.group(1)) * _MILLISECONDS[match.group(2)]


def duration_text(ms: int) -> str:
    """Writes milliseconds as they are read: "90s", "15m", "1h" or "7d"."""
    unit = next(unit for unit in ("d", "h", "m", "s", "ms") if ms % _MILLISECONDS[unit] == 0)
    return f"{ms // _MILLISECONDS[unit]}{unit}"
