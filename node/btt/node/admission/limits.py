"""How many calls, how often and how long: for a node, and for one of its services."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of paid calls; 0 is no bound.

    Attributes:
        name: Of the service; "" for the node as a whole.
        calls: Most that run at once.
        calls_per_payer: Of those, of one payer over all its sessions and connections.
        calls_per_minute: Most that one payer begins in a minute.
        deadline_s: Seconds that a call may take at most.
    """

    name: str = ""
    calls: int = 0
    calls_per_payer: int = 0
    calls_per_minute: int = 0
    deadline_s: float = 0
