"""A ledger inside the process of a test (entry point `btt.devnet`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from btt.sdk.clock import Clock
from btt.sdk.keys import Address
from btt.services.ledger import folder as folders
from btt.services.ledger import server


@asynccontextmanager
async def serve(folder: Path, *, supply_to: Address, clock: Clock) -> AsyncIterator[str]:
    """Makes a ledger and runs it until the context ends.

    Args:
        folder: New.
        supply_to: Gets the whole issue.
        clock: The ledger's time.

    Yields:
        Its address.
    """
    folders.init(folder, name="devnet", supply_to=supply_to, clock=clock)
    async with server.serve(server.LedgerConfig(folder=folder, grace=1.0), clock=clock) as running:
        yield str(running.address)
