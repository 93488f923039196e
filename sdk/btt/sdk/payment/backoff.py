"""How long to wait before something is tried again, so that those who wait do not come back at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from btt.sdk.errors import BttError

BASE_S: Final = 0.2
LONGEST_S: Final = 5.0


def retry_after(error: BttError) -> float:
    """Returns the seconds that the other side asked us to wait; 0 if it did not."""
    return float(getattr(error, "retry_after", 0.0))


def pause_s(tries: int, error: BttError, *, chance: Callable[[], float] = random.random) -> float:
    """Returns the seconds to wait after some tries that failed.

    Doubles with every try, up to a few seconds, and lies anywhere in the upper half of that;
    what the other side asked for is waited in any case.

    Args:
        tries: That failed in a row, from 1.
        error: Of the last one.
        chance: Returns numbers from 0 to below 1.
    """
    longest = min(LONGEST_S, BASE_S * (1 << min(tries, 16)))
    return retry_after(error) + longest * (1 + chance()) / 2
