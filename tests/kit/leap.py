"""An event loop whose clock leaps to the next timer when there is nothing to do: hours in an instant."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_DAY_S = 86_400.0


class _Selector(selectors.DefaultSelector):
    """Waits for nothing; what it was to wait is added to the loop's time."""

    leapt = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("nothing will ever happen")
            self.leapt += timeout
            if self.leapt > _DAY_S:
                raise RuntimeError("a day has passed")
        return ready


class LeapingLoop(asyncio.SelectorEventLoop):
    """For code without sockets."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.leapt


def run(main: Coroutine[Any, Any, _Result]) -> _Result:
    """Runs a coroutine to its end, in such a loop."""
    with asyncio.Runner(loop_factory=LeapingLoop) as runner:
        return runner.run(main)
