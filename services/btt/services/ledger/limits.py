"""How often one key may ask: a token bucket per key, in bounded memory.

A key is charged after its signature was checked and for what is new alone, else a stranger could use
up another's share: signed bodies are copied, and who sends a copy is anybody. Copies have a share of
their own, that of the body.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from btt.sdk.errors import RateLimited


class RateLimiter:
    """Token buckets; any thread may charge.

    Args:
        rate: Requests per second that a key may make for ever.
        burst: Requests that it may make at once.
        most_keys: Buckets that are kept; the one used longest ago goes first.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        *,
        rate: float,
        burst: int,
        most_keys: int = 100_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._most_keys = most_keys
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def charge(self, key: bytes) -> None:
        """Takes one token of a key, or of a body by its digest.

        Raises:
            RateLimited: There is none; the error says when there will be.
        """
        now = self._clock()
        with self._lock:
            left, since = self._buckets.pop(key, (self._burst, now))
            left = min(self._burst, left + (now - since) * self._rate)
            allowed = left >= 1
            self._buckets[key] = (left - 1 if allowed else left, now)
            while len(self._buckets) > self._most_keys:
                self._buckets.popitem(last=False)
        if not allowed:
            wait = (1 - left) / self._rate
            raise RateLimited(f"This is asked too often; again in {wait:.3f} s.", retry_after=wait)
