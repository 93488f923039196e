"""Looks after a client's channels while it lives: asks idle ones back, and watches its account.

The ledger tells, nobody polls: one stream that is taken up where it broke, after a pause that
grows. How far it was read is in the books, so what happened while no client ran is seen
by the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.errors import (
    BttError,
    CaptureDisputed,
    IdentityError,
    LedgerEquivocated,
    LedgerError,
    LedgerRolledBack,
    SessionEnded,
)
from btt.sdk.payment.history import saw_seq, seen_seq
from btt.sdk.payment.outcome import look
from btt.sdk.payment.purse import Purse
from btt.sdk.payment.refunds import Wanted, ask_back
from btt.sdk.payment.session import PaymentSession
from btt.sdk.payment.store import CLOSED

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
_ENDINGS: Final = (
    pb.ENTRY_KIND_CLOSE_CHANNEL,
    pb.ENTRY_KIND_REQUEST_CLOSE,
    pb.ENTRY_KIND_EXTEND,
    pb.ENTRY_KIND_FINALIZE,
)


class Keeper:
    """Looks after the channels of one client.

    Args:
        purse: Whose.
        live: Returns the sessions that pay now.
    """

    def __init__(self, purse: Purse, live: Callable[[], Sequence[PaymentSession]]) -> None:
        self._purse = purse
        self._live = live
        self.disputes: list[CaptureDisputed] = []

    async def run(self, wanted: Wanted) -> None:
        """Asks back what `wanted` says, then watches for ever."""
        pause, is_tidy = FIRST_PAUSE_S, False
        while True:
            try:
                if not is_tidy:
                    await self.tidy(wanted)
                    is_tidy = True
                async for page in self._watch():
                    pause = FIRST_PAUSE_S
                    await self._handle(page)
            except (IdentityError, LedgerRolledBack, LedgerEquivocated) as error:
                # Whoever answers is not the ledger: nothing is paid on its word.
                self._fail(error)
                return
            except BttError as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    return  # a call that is cancelled may end with an error of its own
                pause = max(pause, getattr(error, "retry_after", 0.0))
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE_S, 2 * pause)

    async def tidy(self, wanted: Wanted) -> None:
        """Asks back what lies in channels that are used no more; disputes are kept.

        Raises:
            LedgerUnreachable: The ledger does not answer.
        """
        _, disputes = await ask_back(self._purse, wanted)
        self.disputes += disputes

    def _watch(self) -> AsyncIterator[pb.LedgerEvents]:
        purse = self._purse
        ledger = purse.ledger
        seen = seen_seq(purse.store, ledger.ledger_id, purse.reader.address, ledger.recovered)
        return ledger.watch(purse.reader, channel_id=purse.scope, after_seq=seen)

    async def _handle(self, page: pb.LedgerEvents) -> None:
        for channel_id in {event.channel_id for event in page.events if event.kind in _ENDINGS}:
            stored = self._purse.store.find(channel_id)
            if stored is None or stored.state == CLOSED:
                continue
            try:
                await look(self._purse, channel_id)
            except CaptureDisputed as dispute:
                self.disputes.append(dispute)
                self._fail(dispute, channel_id)
            except LedgerError:
                continue
            else:
                self._fail(SessionEnded("The channel was closed on the ledger."), channel_id)
        if page.events:
            purse = self._purse
            ledger = purse.ledger
            saw_seq(purse.store, ledger.ledger_id, purse.reader.address, ledger.recovered, page.seen_seq)

    def _fail(self, error: BttError, channel_id: bytes | None = None) -> None:
        for session in self._live():
            if channel_id in (None, session.payer.channel_id):
                session.fail(error)
