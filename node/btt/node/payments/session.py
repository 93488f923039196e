"""One live payment session: what may leave, what waits for payment, what the payer is told.

One event loop, no locks: every decision about money is made between two awaits.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from btt.node.payments.store import PayeeStore
from btt.sdk.channel import Payee, Segment, SignedUpdate, Standing, Units, signing_point
from btt.sdk.channel.payee import REMEMBERED_CALLS
from btt.sdk.errors import BttError, ChannelExhausted, InvalidRequest, PaymentRequired, SessionEnded
from btt.sdk.identity import Offer
from btt.sdk.keys import Address
from btt.sdk.payment.apps import AppGrant
from btt.sdk.signing import SessionCall, verify

ATTACH_S = 10.0
"""Seconds that a payment stream may take to name its session, and a call waits for it."""
TELL_S = 0.05
"""Seconds that a message waits before a payer that should sign by itself is told."""


@dataclass(slots=True)
class PayerBook:
    """A payer with sessions here: its standing, and its channels by id."""

    standing: Standing
    channels: dict[bytes, Payee] = field(default_factory=dict)
    sessions: int = 0
    lease_network: str = ""


@dataclass(frozen=True, slots=True)
class News:
    """What a payer is told.

    Attributes:
        settlements: Settled calls, with what stays owed of each.
        acknowledged: Acknowledged requests of running calls.
        stale: A statement is due.
    """

    settlements: list[tuple[bytes, dict[Segment, int]]]
    acknowledged: dict[bytes, int]
    stale: bool


@dataclass(slots=True)
class _Waiting:
    ready: asyncio.Future[bool]
    """True once it may leave, False when no payment came in time."""
    call_id: bytes
    units: Units
    patience: asyncio.TimerHandle = field(init=False)


class Session:
    """One live session; made by `Sessions.open`."""

    def __init__(
        self,
        *,
        payer: Address,
        network: str,
        book: PayerBook,
        payee: Payee,
        offer: Offer,
        epoch: int,
        grace_s: float,
        unpaid: Callable[[Session], Awaitable[None]],
        app: AppGrant,
    ) -> None:
        self.payer = payer
        self.network = network
        self.token = secrets.token_bytes(32)
        self.payee = payee
        self.offer = offer
        self.epoch = epoch
        self.app = app
        self.error: BttError | None = None
        self._attached = asyncio.Event()
        self.asked_at = -math.inf
        """When the ledger was asked about a top-up, seconds of the loop."""
        self.answers: dict[bytes, object] = {}
        """Answers of unary calls by call id, for a caller that lost one."""
        self._book = book
        self._grace_s = grace_s
        self._unpaid = unpaid
        self._waiting: deque[_Waiting] = deque()
        self._heard = 0
        self._settlements: list[tuple[bytes, dict[Segment, int]]] = []
        self._acknowledged: dict[bytes, int] = {}
        self._stale = False
        self._told_credit = payee.standing.credit
        self._told_demand = 0
        self._reminder: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()

    @property
    def attached(self) -> bool:
        """It has had its payment stream."""
        return self._attached.is_set()

    def attach(self) -> None:
        """The payment stream is there."""
        self._attached.set()

    async def until_attached(self) -> None:
        """Returns once the payment stream is there: it has a connection of its own, and may come later.

        Raises:
            SessionEnded: It did not come.
        """
        if not self._attached.is_set():
            try:
                async with asyncio.timeout(ATTACH_S):
                    await self._attached.wait()
            except TimeoutError:
                raise SessionEnded("The payment session has no payment stream.") from None

    def authorise(self, call_id: bytes, signature: bytes, ledger_id: bytes) -> None:
        """Checks that the holder of K1 makes this call.

        Raises:
            InvalidRequest: The call id has not 16 bytes.
            SignatureInvalid: Somebody else makes it, whoever has the token.
        """
        call = SessionCall(session=hashlib.sha256(self.token).digest(), call_id=call_id)
        verify(self.payee.key, call, ledger_id, signature)

    # Delivering

    def begin(self, call_id: bytes) -> None:
        """Opens a metered call.

        Raises:
            SessionEnded: The session has ended.
            CallRepeated: The id was used before.
            RateLimited: Too many calls were not reported on.
        """
        self._alive()
        self.payee.begin(call_id)

    async def charge(self, call_id: bytes, units: Units) -> None:
        """Returns once a message of these units may leave, or be let in, and has counted it.

        All of a message is charged at once: one that was charged in part would hold credit while
        it waits for the rest.

        Raises:
            ChannelExhausted: The channel does not hold enough for it.
            PaymentRequired: Payment did not come within the grace time.
            SessionEnded: The session or the call has ended.
        """
        self._alive()
        meter = self.payee.meter
        if not self._waiting and meter.fits(units) and meter.affordable(units):
            self._deliver(call_id, units)
            return
        if await self._paid_in_time(call_id, units):
            return
        if not self.is_in_order:
            await self._unpaid(self)
        self._alive()
        raise PaymentRequired(f"No payment came within {self._grace_s:g} seconds.")

    async def _paid_in_time(self, call_id: bytes, units: Units) -> bool:
        waiting = _Waiting(asyncio.get_running_loop().create_future(), call_id, units)
        self._waiting.append(waiting)
        if len(self._waiting) == 1:  # behind another nothing changes
            self.advance()
        self._be_patient(waiting)
        try:
            return await waiting.ready
        finally:
            waiting.patience.cancel()
            if waiting in self._waiting:
                self._waiting.remove(waiting)
                self.advance()

    def _be_patient(self, waiting: _Waiting) -> None:
        loop = asyncio.get_running_loop()
        waiting.patience = loop.call_later(self._grace_s, self._look_after, waiting, self._heard)

    def _look_after(self, waiting: _Waiting, heard: int) -> None:
        if heard != self._heard:
            self._be_patient(waiting)  # the payer gets on: a slow line is no default
        elif not waiting.ready.done():
            waiting.ready.set_result(False)

    @property
    def is_in_order(self) -> bool:
        """True if the payer has paid for what it had, so that not going on is no failure."""
        standing = self.payee.standing
        return (
            self.payee.meter.excess <= 0 and standing.paid > standing.written_off and not standing.in_default
        )

    def _deliver(self, call_id: bytes, units: Units) -> None:
        for segment, count in units:
            self.payee.deliver(call_id, segment, count)

    def take_back(self, call_id: bytes, units: Units) -> None:
        """Takes back what was charged and did not happen; what waits may go on."""
        for segment, count in units:
            self.payee.take_back(call_id, segment, count)
        if units:
            self.advance()

    def acknowledge(self, call_id: bytes, messages: int) -> None:
        """Tells the payer how many requests of a call are acknowledged."""
        self._acknowledged[call_id] = messages
        self._news.set()

    def advance(self) -> None:
        """Lets waiting messages leave, in order, as far as payment and credit reach."""
        meter = self.payee.meter
        while self._waiting:
            head = self._waiting[0]
            if not head.ready.done():
                if not meter.affordable(head.units):
                    head.ready.set_exception(
                        ChannelExhausted("The channel holds too little for the next piece.")
                    )
                elif not meter.fits(head.units):
                    break
                else:
                    try:
                        self._deliver(head.call_id, head.units)
                        head.ready.set_result(True)
                    except BttError as error:
                        head.ready.set_exception(error)
            self._waiting.popleft()
        if self._waiting:
            self._remind_later()
        if self._is_news:
            self.tell()

    @property
    def demand(self) -> int:
        """The cumulative payment at which the next waiting message may leave; 0 if none waits."""
        if not self._waiting:
            return 0
        head = self._waiting[0]
        return self.payee.meter.demand(head.units)

    @property
    def _is_news(self) -> bool:
        """The payer would not do the same if it were not told."""
        paid, credit, told = self.payee.meter.paid, self.payee.standing.credit, self._told_credit
        return (
            not self.payee.open_calls  # it waits to hear that all is paid
            or not told <= credit <= told + told // 8
            or (bool(self._waiting) and not self._will_pay)
            or (self._told_demand > paid and self._told_demand != self.demand)
        )

    @property
    def _will_pay(self) -> bool:
        """So much of the credit that it knows of is used that our own payer signs without being told."""
        excess = self.payee.meter.excess
        return excess > 0 and excess >= signing_point(self._told_credit, self.offer.sheet.unit_charge)

    def void(self, call_id: bytes) -> None:
        """Takes a call back whole: it failed by a fault of this node."""
        if self.payee.is_open(call_id):
            self.payee.void(call_id)
            self.advance()

    # Hearing from the payer

    async def pay(self, update: SignedUpdate, store: PayeeStore) -> None:
        """Checks an update, saves it, and only then counts it.

        Raises:
            SessionEnded: The session has ended, and its channel may be closing.
            UpdateInvalid: It is not valid for this channel.
            StorageError: It could not be saved, and does not count.
        """
        self._alive()
        checked = self.payee.check(update)
        if checked is None:
            return
        meter = self.payee.meter
        saved = await store.save(checked, meter.tally, meter.written_off)
        self.payee.accept(saved)
        self._heard += 1

    def settle(self, call_id: bytes, accepted: Mapping[Segment, int]) -> None:
        """Settles an ended call, and tells the payer.

        Raises:
            CountsDiffer: The report names more than was sent.
            InvalidRequest: The payer reports, and does not read what it is told: that would pile up.
        """
        if len(self._settlements) >= REMEMBERED_CALLS:
            raise InvalidRequest("The payment stream is not read.")
        if self.payee.is_open(call_id):
            self._heard += 1
        self._settlements.append((call_id, self.payee.settle(call_id, accepted)))
        self._acknowledged.pop(call_id, None)  # the payer asks no more
        for waiting in [w for w in self._waiting if w.call_id == call_id]:
            if not waiting.ready.done():
                waiting.ready.set_exception(SessionEnded("The call was ended by its caller."))

    # Telling the payer

    def tell(self) -> None:
        """Has the payer told how the channel stands."""
        self._stale = True
        self._news.set()

    def _remind_later(self) -> None:
        if self._reminder is None:
            loop = asyncio.get_running_loop()
            self._reminder = loop.call_later(TELL_S, self._remind, self._waiting[0])

    def _remind(self, head: _Waiting) -> None:
        self._reminder = None
        if self._waiting and self._waiting[0] is head:
            self.tell()
        elif self._waiting:
            self._remind_later()

    async def news(self) -> News:
        """Waits for something to tell.

        Raises:
            BttError: The session has ended.
        """
        while True:
            if self._settlements or self._acknowledged or self._stale:
                news = News(self._settlements, self._acknowledged, self._stale)
                self._settlements, self._acknowledged, self._stale = [], {}, False
                self._told_credit, self._told_demand = self.payee.standing.credit, self.demand
                return news
            self._alive()
            self._news.clear()
            await self._news.wait()

    def _alive(self) -> None:
        if self.error is not None:
            raise self.error

    def end(self, error: BttError) -> None:
        """Ends the session: nothing more leaves, and what waits fails with this error."""
        if self.error is None:
            self.error = error
            self._attached.set()  # who waits for it finds the session ended
            self._book.sessions -= 1
            for waiting in self._waiting:
                if not waiting.ready.done():
                    waiting.ready.set_exception(error)
            self._waiting.clear()
            if self._reminder is not None:
                self._reminder.cancel()
            self._news.set()
