"""Work that hangs fails its test soon, and says what hangs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

HANGS_S = 20.0
"""Seconds after which something hangs; it takes well below one where all is right."""


@asynccontextmanager
async def ends(what: str) -> AsyncIterator[None]:
    """Fails the test if the block does not end.

    Args:
        what: It is.
    """
    try:
        async with asyncio.timeout(HANGS_S):
            yield
    except TimeoutError:
        pytest.fail(f"{what} does not end")
