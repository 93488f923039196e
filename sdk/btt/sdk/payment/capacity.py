"""What the channel of a live session can still pay, and how it grows while calls run.

The order is what keeps money safe: the budget reserves, the ledger locks, the node says
that it knows; only then may more be signed, and more be asked for. None of it happens on the way
of a payment: whoever buys says beforehand what it will cost.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from btt.sdk.channel import Units
from btt.sdk.errors import BudgetExceeded, ChannelClosed, ChannelClosing, ChannelExpired, SessionEnded
from btt.sdk.payment.opening import is_ending
from btt.sdk.payment.purse import Purse
from btt.sdk.payment.store import CLOSING, StoredChannel
from btt.sdk.payment.topups import grow

if TYPE_CHECKING:
    from btt.sdk.payment.session import PaymentSession

TELL_S = 30.0
"""Seconds that a node may take to ask the ledger about a top-up."""


class Capacity:
    """How much a session can pay.

    Args:
        session: Whose.
        purse: What pays.
        channel: The session's channel, of which the node has just asked the ledger.
        wake: Wakes the task that writes to the node.
        changed: Set when the node was heard or the session ended.
    """

    def __init__(
        self,
        session: PaymentSession,
        purse: Purse,
        channel: StoredChannel,
        *,
        wake: asyncio.Event,
        changed: asyncio.Event,
    ) -> None:
        self._session = session
        self._purse = purse
        self._channel = channel
        self._wake = wake
        self._changed = changed
        self._growing = asyncio.Lock()
        self._known = self._told = self._sent = channel.deposit

    async def provide(self, need: int, *, least: int | None = None) -> None:
        """Makes sure that something more can be paid: tops the channel up within the budget.

        Args:
            need: Base units that are about to be spent, beside what is owed and reserved; the
                budget may reach for a part of it only.
            least: With less than this nothing can be bought, base units; one verify unit if not
                given.

        Raises:
            BudgetExceeded: The budget does not reach for `least`; says what is missing.
            ChannelExpired: The channel ends soon, and another has to be opened.
            SessionEnded: The channel was closed on the ledger, or the session ended before.
            BttError: The ledger refused, or does not answer; the session goes on as it is.
        """
        session, payer = self._session, self._session.payer
        async with self._growing:
            if session.error is not None:
                raise session.error
            if payer.spare >= need:
                return
            if is_ending(self._channel, session.offer, self._purse.clock()):
                raise ChannelExpired("The channel's lock time is too near to put more into it.")
            try:
                channel = await grow(
                    self._purse,
                    payer.channel_id,
                    used=payer.limit - payer.spare,
                    need=need,
                    least=min(need, session.offer.sheet.unit_charge if least is None else least),
                )
            except (ChannelClosing, ChannelClosed) as gone:
                self._purse.store.set_state(payer.channel_id, CLOSING)
                session.fail(SessionEnded("The channel was closed on the ledger."))
                raise SessionEnded("The channel was closed on the ledger.") from gone
            await self._tell(channel.deposit)
            # Only now may more be signed, and more be asked for.
            payer.deposit, payer.limit = channel.deposit, channel.cap

    async def ready(self) -> None:
        """Tops the channel up before a call, if it is nearly used up and its caller reserves nothing."""
        payer, unit = self._session.payer, self._session.offer.sheet.unit_charge
        if payer.spare < unit and not payer.is_reserved:
            # Doubling keeps top-ups few. Without one what is left may still do: `begin_call` decides.
            with contextlib.suppress(BudgetExceeded, ChannelExpired):
                await self.provide(max(unit, payer.deposit), least=unit)

    async def cover(self, units: Units) -> None:
        """Tops the channel up, if it can, where it holds too little for a request.

        Args:
            units: Of the request.
        """
        payer = self._session.payer
        cost = sum(payer.tally.cost(segment, count) for segment, count in units)
        if payer.spare < cost:
            with contextlib.suppress(BudgetExceeded, ChannelExpired):  # `reserve` decides
                await self.provide(max(cost, payer.deposit), least=cost)

    def reserve(self, units: Units) -> None:
        """Sets aside what a request will cost, before it is sent.

        Raises:
            BudgetExceeded: The channel does not cover it.
        """
        done = []
        try:
            for segment, count in units:
                self._session.payer.reserve(segment, count)
                done.append((segment, count))
        except BudgetExceeded:
            self.release(done)
            raise

    def release(self, units: Units) -> None:
        """Gives back what was set aside."""
        for segment, count in units:
            self._session.payer.release(segment, count)

    async def _tell(self, deposit: int) -> None:
        if deposit <= self._known:
            return
        self._told = deposit
        self._wake.set()
        try:
            async with asyncio.timeout(TELL_S):
                while self._known < deposit:
                    if self._session.error is not None:
                        raise self._session.error
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            self._session.fail(SessionEnded("The node takes no note of the top-up."))
            raise SessionEnded("The node takes no note of the top-up.") from None

    def news(self) -> int | None:
        """Returns the deposit that the node has to be told of, once."""
        if self._told == self._sent:
            return None
        self._sent = self._told
        return self._told

    def heard(self, deposit: int) -> None:
        """Takes note of the deposit that the node says it knows, base units."""
        self._known = max(self._known, deposit)
