"""How often a payer may begin calls: a bucket of a minute for each payer and service."""

from __future__ import annotations

from collections.abc import Callable

from btt.node.admission.limits import Limits
from btt.sdk.errors import RateLimited
from btt.sdk.keys import Address

MINUTE_MS = 60_000
MAX_BUCKETS = 65_536
"""Buckets kept in memory before the full ones are dropped."""


class Rates:
    """Counts what has begun.

    Args:
        clock: Unix milliseconds.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        # When each bucket will be full again: one number says how full it is.
        self._full_at: dict[tuple[str, Address], float] = {}

    def take(self, service: str, payer: Address, limits: Limits) -> None:
        """Counts one call.

        Raises:
            RateLimited: There were too many; it says when the next may begin.
        """
        if not limits.calls_per_minute:
            return
        now = self._clock()
        each = MINUTE_MS / limits.calls_per_minute
        full_at = self._full_at.get((service, payer), 0)
        if full_at > now + MINUTE_MS:
            full_at = now  # the clock was set back
        full_at = max(now, full_at) + each
        if full_at - now > MINUTE_MS:
            what = f"calls of {service}" if service else "paid calls"
            raise RateLimited(
                f"A payer may begin {limits.calls_per_minute} {what} a minute.",
                retry_after=(full_at - now - MINUTE_MS) / 1000,
            )
        if len(self._full_at) >= MAX_BUCKETS:
            self._full_at = {key: at for key, at in self._full_at.items() if now < at <= now + MINUTE_MS}
            if len(self._full_at) >= MAX_BUCKETS:
                raise RateLimited("The node is asked by too many payers.")
        self._full_at[service, payer] = full_at
