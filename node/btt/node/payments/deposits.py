"""What a node knows its channels to hold, and how it learns that one was topped up.

A payer's word starts a question to the ledger, whose answer counts. Asking costs the ledger, so
a word that the answer does not bear out ends the session, and each question of a session waits
until a while after the last: a payer makes the node ask no more often than it opens sessions, or
puts money into its channel.
"""

from __future__ import annotations

import asyncio

import structlog

from btt.node.payments.ledger import PayeeLedger
from btt.node.payments.session import Session
from btt.node.payments.store import PayeeStore
from btt.proto.ledger.v1 import ledger_pb2
from btt.sdk.errors import ChannelClosing, UpdateInvalid
from btt.sdk.keys import PrivateKey

log = structlog.get_logger(__name__)

PAUSE_S = 1.0
"""Seconds between two questions to the ledger about one session's channel."""


class Deposits:
    """Keeps deposits in step with the ledger.

    Args:
        store: The payee's books.
        ledger: Whom to ask.
        key: K2.
    """

    def __init__(self, *, store: PayeeStore, ledger: PayeeLedger, key: PrivateKey) -> None:
        self._store = store
        self._ledger = ledger
        self._key = key

    async def check(self, session: Session, claimed: int) -> None:
        """Asks the ledger whether a session's channel was topped up, as its payer says.

        Args:
            session: Its payer waits for the statement that follows.
            claimed: Base units that the channel holds, by its payer.

        Raises:
            UpdateInvalid: The ledger says less.
            ChannelClosing: The channel is open no more.
            IdentityError: The ledger does not prove it.
            LedgerUnreachable: The ledger does not answer.
        """
        payee = session.payee
        if claimed > payee.meter.deposit:
            loop = asyncio.get_running_loop()
            await asyncio.sleep(session.asked_at + PAUSE_S - loop.time())
            session.asked_at = loop.time()
            state = await self._ledger.channel(payee.channel_id, self._key)
            if state.phase != ledger_pb2.CHANNEL_PHASE_OPEN:
                raise ChannelClosing("The channel is closing on the ledger.")
            if state.deposit < claimed:
                raise UpdateInvalid(f"The ledger says that the channel holds {state.deposit}, not {claimed}.")
            # With its receipt in our hands, a ledger that forgets the top-up can be reminded.
            await self._ledger.gather(self._key, channel_id=payee.channel_id)
            await self._store.raise_deposit(payee.channel_id, state.deposit)
            payee.meter.deposit = state.deposit
            log.info("channel.topped_up", channel=payee.channel_id.hex(), deposit=state.deposit)
        session.advance()
        session.tell()
