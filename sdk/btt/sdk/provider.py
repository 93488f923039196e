"""One node of a client: its connection, and the one payment session with it.

Every node has a session of its own; what all of them may spend together is one budget, which the
wallet's books reserve from whenever a channel is opened.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from btt.sdk.errors import BttError, ChannelClosed, ChannelClosing, ChannelExpired, CountsDiffer
from btt.sdk.identity import NodeAddress
from btt.sdk.keys import Address
from btt.sdk.payment.backoff import retry_after
from btt.sdk.payment.connection import NodeConnection, connect_node
from btt.sdk.payment.faults import NODE_BANS, check_node, fault_of
from btt.sdk.payment.history import known_endpoint
from btt.sdk.payment.receipt import SessionReceipt
from btt.sdk.payment.session import PaymentSession

if TYPE_CHECKING:
    from btt.sdk.client import Client

CLOSE_PAUSES_S = (0.2, 1.0, 2.0, 4.0, 8.0)
"""Pauses between the tries to close a session, seconds."""


class Provider:
    """A node as one client uses it.

    Args:
        client: Whose.
        address: Where it is.
        trust_new: Accept a bare `host:port` that was never met before.
        close_channels: Close the channel when a session ends.
    """

    def __init__(
        self, client: Client, address: NodeAddress, *, trust_new: bool, close_channels: bool
    ) -> None:
        self.address = address
        self.live: PaymentSession | None = None
        self._client = client
        self._trust_new = trust_new
        self._close_channels = close_channels
        self._node: NodeConnection | None = None
        self._unclosed: bytes | None = None
        self._lock = asyncio.Lock()
        self._opening: set[asyncio.Task[PaymentSession]] = set()
        self._met: Address | None = None

    @property
    def name(self) -> str:
        """Its address, as configured."""
        return str(self.address)

    async def node(self) -> NodeConnection:
        """Returns the node, proven and with its current offer.

        Raises:
            NodeBanned: The wallet leaves it alone for a while; it was not dialled.
            BttError: It could not be reached or trusted.
        """
        books, address = self._client.books, self.address
        named = address.node or known_endpoint(books, f"{address.host}:{address.port}")
        if named is not None:
            check_node(books, named, self._client.clock())
        return await self._connected()

    async def _connected(self) -> NodeConnection:
        client = self._client
        if self._node is None or self._node.offer.valid_until_ms < client.clock():
            self._node = await connect_node(
                self.address,
                ledger_id=client.ledger_id,
                store=client.books,
                clock=client.clock,
                trust_new=self._trust_new,
            )
            self._met = self._node.offer.node
        return self._node

    def blame(self, error: BttError, *, at_last: bool = False) -> None:
        """Remembers a failure of the node, if it is one; for some it is left alone for a while.

        Args:
            error: What happened.
            at_last: Trying again was no use.
        """
        fault = fault_of(error, at_last=at_last)
        if fault is not None and self._met is not None:
            self._client.books.strike(
                self._met, fault.reason, now_ms=self._client.clock(), policy=NODE_BANS, weight=fault.weight
            )

    async def session(self, need: int) -> PaymentSession:
        """Returns the live payment session, topped up as far as needed, or opens one.

        Whoever gives up waiting does not break off the opening: money is being locked meanwhile.

        Args:
            need: Base units the coming work is expected to cost.

        Raises:
            BudgetExceeded: The budget does not reach for one verify unit; says what is missing.
            BttError: The node or the ledger refused, or did not answer.
        """
        opening = asyncio.create_task(self._session(need), name="payment-session")
        self._opening.add(opening)
        opening.add_done_callback(self._opened)
        return await asyncio.shield(opening)

    def _opened(self, opening: asyncio.Task[PaymentSession]) -> None:
        self._opening.discard(opening)
        if not opening.cancelled():
            opening.exception()  # whoever waits for it hears; nobody may

    async def _session(self, need: int) -> PaymentSession:
        async with self._lock:
            if self.live is not None and self.live.error is not None:
                self.blame(self.live.error)
                await self.live.abandon()
                self._unclosed = self.live.payer.channel_id
                self.live = None
                self._node = None  # it may have restarted with a new offer
            if self.live is not None:
                check_node(self._client.books, self.live.offer.node, self._client.clock())
                try:
                    await self.live.provide(need)
                except ChannelExpired:
                    await self._close(CLOSE_PAUSES_S)
            if self.live is None:
                await self.node()  # dials no banned one
                self.live = await self._open(need)
                self._unclosed = None
            return self.live

    async def _open(self, need: int, only: bytes | None = None) -> PaymentSession:
        # Whatever a node did, what is due to it is paid, and a channel to it closed.
        node = await self._connected()
        try:
            return await PaymentSession.open(await self._client.purse(), node, need=need, only=only)
        except BttError as error:
            self.blame(error)
            raise

    async def close_session(self, pauses: tuple[float, ...] | None = None) -> SessionReceipt | None:
        """Pays what is due and ends the session; a node or ledger that is away for a moment is waited for.

        Args:
            pauses: Seconds to wait between tries; some 15 in all if not given.

        Returns:
            The receipt; None without a session, or when the node closed the channel and its answer
            was lost.

        Raises:
            BttError: The node or the ledger did not answer; the books keep the channel.
        """
        async with self._lock:
            return await self._close(CLOSE_PAUSES_S if pauses is None else pauses)

    async def _close(self, pauses: tuple[float, ...]) -> SessionReceipt | None:
        session, self.live = self.live, None
        channel_id = session.payer.channel_id if session is not None else self._unclosed
        if channel_id is None:
            return None
        if session is not None and session.error is not None:
            self.blame(session.error)
        for pause in (*pauses, None):
            try:
                if session is None:
                    session = await self._open(0, channel_id)
                receipt = await session.close(close_channel=self._close_channels)
            except (ChannelClosed, ChannelClosing):
                return None
            except BttError as error:
                self.blame(error)
                session, self._node = None, None
                if pause is None or not error.retryable:
                    raise
                await asyncio.sleep(max(pause, retry_after(error)))
            else:
                if receipt.paid > session.payer.signed or receipt.owed > session.payer.tally.owed:
                    self.blame(CountsDiffer("The node closed with more than was accepted."))
                self._client.receipts.append(receipt)
                purse = await self._client.purse()
                with contextlib.suppress(BttError):  # the next time brings it, too
                    await purse.ledger.gather(purse.reader, channel_id=purse.scope)
                return receipt
        raise AssertionError("the last try returns or raises")

    async def abandon(self) -> None:
        """Ends what is left of the session without a word to the node; the books keep the channel."""
        for opening in list(self._opening):
            opening.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        if self.live is not None:
            await self.live.abandon()
