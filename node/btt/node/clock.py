"""This machine's time, where nobody gave another clock."""

from __future__ import annotations

import time


def system_ms() -> int:
    """Returns this machine's time, Unix milliseconds."""
    return time.time_ns() // 1_000_000
