"""Wakes the watchers that a commit concerns; what happened they read from the journal themselves.

A watcher holds one event, whatever happens while it is slow, so it costs the same whether it
sleeps or floods, and it can miss nothing: the journal is its queue. Keys cost nothing, so those that
the books do not know share a few places, and cannot take the others.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from btt.sdk.errors import RateLimited
from btt.services.ledger.books import user
from btt.services.ledger.overlay import Batch

MOST_WATCHERS: Final = 448
"""Of keys with an account or a channel."""
MOST_STRANGERS: Final = 64
"""Of all other keys together."""
MOST_PER_KEY: Final = 8


class Hub:
    """The watchers of a running ledger."""

    def __init__(self) -> None:
        # Who came first is told first: an order of its own, and not that of memory addresses.
        self._watchers: dict[bytes, dict[asyncio.Event, None]] = {}
        self._events: dict[asyncio.Event, None] = {}
        self._per_key: Counter[bytes] = Counter()
        self._strangers = 0
        self.closed = False

    @contextmanager
    def watch(self, key: bytes, subjects: Iterable[bytes], *, known: bool) -> Iterator[asyncio.Event]:
        """Registers a watcher.

        Args:
            key: Who watches, for the bound per key.
            subjects: Account ids, keys and channel ids that concern it.
            known: Whether it has an account or a channel.

        Yields:
            An event that is set after a commit that concerns one of the subjects, and at the end.

        Raises:
            RateLimited: There are too many.
        """
        alike = len(self._events) - self._strangers if known else self._strangers
        if alike >= (MOST_WATCHERS if known else MOST_STRANGERS) or self._per_key[key] >= MOST_PER_KEY:
            raise RateLimited("Too many watch the ledger.", retry_after=30)
        event = asyncio.Event()
        wanted = frozenset(subjects)
        self._per_key[key] += 1
        self._events[event] = None
        self._strangers += not known
        for subject in wanted:
            self._watchers.setdefault(subject, {})[event] = None
        try:
            yield event
        finally:
            del self._events[event]
            self._strangers -= not known
            self._per_key[key] -= 1
            if not self._per_key[key]:
                del self._per_key[key]
            for subject in wanted:
                del self._watchers[subject][event]
                if not self._watchers[subject]:
                    del self._watchers[subject]

    def publish(self, batch: Batch) -> None:
        """Wakes whom a committed batch concerns."""
        if not self._watchers:
            return
        touched = set(batch.accounts)
        for channel in batch.channels.values():
            touched |= {channel.id, channel.k2, user(channel.payer), user(channel.payee)}
        for subject in sorted(touched & self._watchers.keys()):
            for event in self._watchers[subject]:
                event.set()

    def close(self) -> None:
        """Ends all watching."""
        self.closed = True
        for event in self._events:
            event.set()
