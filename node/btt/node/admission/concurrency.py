"""How many paid calls run at once, and whether none does, which is when a node can stop."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from btt.node.admission.limits import Limits
from btt.sdk.errors import RateLimited
from btt.sdk.keys import Address

Key = tuple[str, Address | None]


class Concurrency:
    """Counts what runs: of the node, of each service, and of each payer in both."""

    def __init__(self) -> None:
        self._running: Counter[Key] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        """Paid calls that run now."""
        return self._running["", None]

    async def idle(self) -> None:
        """Returns when no paid call runs."""
        await self._idle.wait()

    @contextmanager
    def enter(self, payer: Address, node: Limits, service: Limits) -> Iterator[None]:
        """Counts one call for the time of the block.

        Raises:
            RateLimited: As many run as may.
        """
        scopes = (node,) if service is node else (node, service)
        for limits in scopes:
            self._check(payer, limits)
        keys: list[Key] = [key for limits in scopes for key in ((limits.name, None), (limits.name, payer))]
        self._running.update(keys)
        self._idle.clear()
        try:
            yield
        finally:
            for key in keys:
                self._running[key] -= 1
                if not self._running[key]:
                    del self._running[key]
            if not self._running:
                self._idle.set()

    def _check(self, payer: Address, limits: Limits) -> None:
        what = f"calls of {limits.name}" if limits.name else "paid calls"
        if limits.calls and self._running[limits.name, None] >= limits.calls:
            raise RateLimited(f"The node serves {limits.calls} {what} at once, and no more.")
        if limits.calls_per_payer and self._running[limits.name, payer] >= limits.calls_per_payer:
            raise RateLimited(f"A payer may run {limits.calls_per_payer} {what} at once.")
