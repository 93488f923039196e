"""Pays out what is due, so that no money waits for somebody to remember it.

Anybody may finalize a channel; the ledger does it too. What it misses while it is down it finds at
the next round, since the database knows what is due.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

from btt.sdk.clock import sleep
from btt.sdk.errors import BttError
from btt.sdk.signing import ChannelFinalize
from btt.services.ledger.sequencer import Sequencer
from btt.services.ledger.verify import Verifier

MOST_AT_ONCE: Final = 256

_log = logging.getLogger(__name__)


class Sweeper:
    """Finalizes due channels.

    Args:
        due: Returns ids of at most so many due channels.
        sequencer: Where operations go.
        verifier: Makes them.
    """

    def __init__(
        self, *, due: Callable[[int], Awaitable[list[bytes]]], sequencer: Sequencer, verifier: Verifier
    ) -> None:
        self._due = due
        self._sequencer = sequencer
        self._verifier = verifier

    async def sweep(self) -> int:
        """Finalizes what is due now; returns how many channels."""
        done = 0
        for channel_id in await self._due(MOST_AT_ONCE):
            operation = self._verifier.finalize(ChannelFinalize(channel=channel_id).encode())
            try:
                await self._sequencer.submit(operation)
            except BttError as error:
                _log.warning("channel %s could not be paid out: %s", channel_id.hex(), error.message)
                continue
            done += 1
        return done

    async def run(self, every: float, clock: Callable[[], int]) -> None:
        """Sweeps for ever.

        Args:
            every: Seconds between rounds.
            clock: What they are measured by.
        """
        while True:
            await sleep(clock, every)
            try:
                await self.sweep()
            except BttError as error:
                _log.warning("due channels could not be read: %s", error.message)
