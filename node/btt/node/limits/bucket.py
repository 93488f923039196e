"""A token bucket: pure arithmetic, told what time it is.

Whatever is taken may leave while the level is not negative, and brings it down; so a message may
be larger than the bucket, and what passes in any time is at most the rate times that time, the
bucket, and one message.
"""

from __future__ import annotations

from typing import Final

BURST_S: Final = 0.25
"""What may pass at once, in seconds of the rate."""


class Bucket:
    """Refills at a rate, and never holds more than a quarter of a second of it.

    Args:
        rate: Bytes a second, at least 1.
        now: Seconds of a clock that does not go back.
    """

    __slots__ = ("_at", "_level", "rate")

    def __init__(self, rate: int, now: float) -> None:
        self.rate = rate
        self._level = rate * BURST_S
        self._at = now

    def wait(self, now: float) -> float:
        """Returns the seconds until something may pass; 0 if it may now."""
        if now > self._at:
            self._level = min(self.rate * BURST_S, self._level + (now - self._at) * self.rate)
            self._at = now
        # A wait that a clock cannot tell from none would be waited for again and again.
        return 0.0 if self._level > -1e-3 else -self._level / self.rate

    def take(self, amount: int) -> None:
        """Lets bytes pass."""
        self._level -= amount
