"""Bounds the connections that have calls under way; an idle one costs next to nothing."""

from __future__ import annotations

from typing import Any

from btt.sdk.errors import RateLimited


class Connections:
    """Of one node.

    Args:
        most: At once; 0 for no bound.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._calls: dict[str, int] = {}

    def enter(self, context: Any) -> None:
        """Counts a call for as long as it runs.

        Args:
            context: Of the call.

        Raises:
            RateLimited: It would be on one connection too many.
        """
        if not self.most and not self._calls:
            return
        peer = context.peer()
        calls = self._calls.get(peer, 0)
        if self.most and not calls and len(self._calls) >= self.most:
            raise RateLimited(f"The node serves {self.most} connections at once, and no more.")
        self._calls[peer] = calls + 1
        context.add_done_callback(lambda _: self._leave(peer))

    def _leave(self, peer: str) -> None:
        self._calls[peer] -= 1
        if not self._calls[peer]:
            del self._calls[peer]
