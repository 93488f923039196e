"""Spreads work over the processor's cores when it comes in numbers.

Checking and making signatures is most of what the ledger computes, and libsecp256k1 computes
without the interpreter's lock. So the writer shares the signatures of a batch with helpers; few
are done by itself at once, because handing them over and back would take longer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

FEW: Final = 16
"""Up to so many are not worth sharing (about half a millisecond)."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Crew:
    """Threads that share work.

    Args:
        hands: How many work at once, the caller included; as many as there are cores by default.
    """

    def __init__(self, hands: int | None = None) -> None:
        self._hands = hands or os.cpu_count() or 1
        self._helpers = ThreadPoolExecutor(max(1, self._hands - 1), thread_name_prefix="ledger-crew")

    def map(self, work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """Does some work on each item; returns the results in order.

        Args:
            work: Called in any thread; it should not raise.
            items: What it is done on.
        """
        if self._hands == 1 or len(items) <= FEW:
            return [work(item) for item in items]
        size = -(-len(items) // self._hands)
        rest = [
            self._helpers.submit(lambda part: [work(item) for item in part], items[start : start + size])
            for start in range(size, len(items), size)
        ]
        results = [work(item) for item in items[:size]]
        for part in rest:
            results += part.result()
        return results

    def close(self) -> None:
        """Ends the threads."""
        self._helpers.shutdown()
