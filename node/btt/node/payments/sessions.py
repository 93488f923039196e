"""Live payment sessions of a node: who is paying, what may leave, what waits for payment.

One event loop, no locks: every decision about money is made between two awaits. One
session per channel is live; opening another ends it. A payer's standing is shared by
all its channels, and lives as long as any of them has a session.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from btt.node.payments.store import PayeeStore
from btt.sdk.channel import Payee, Segment, SignedUpdate, Standing, Strangers
from btt.sdk.errors import BttError, ChannelExhausted, PaymentRequired, SessionEnded
from btt.sdk.identity import Offer
from btt.sdk.keys import Address
from btt.sdk.signing import ChannelCommit, SessionCall, verify

TELL_S = 0.05
"""Seconds that a message waits before a payer that should sign by itself is told."""


MAX_PAYERS = 10_000
"""Payers kept in memory before those without a session are dropped."""


@dataclass(frozen=True, slots=True)
class CreditPolicy:
    """What a node lends, base units.

    Attributes:
        unit: Cost of the dearest verify unit.
        limit: Most that anyone may owe.
        strangers_per_hour: What payers without a history may owe together.
        strangers_per_network: The same for each /24 or /48.
        grace_s: Seconds a call waits for payment.
    """

    unit: int
    limit: int
    strangers_per_hour: int
    strangers_per_network: int
    grace_s: float = 60.0


@dataclass(slots=True)
class PayerBook:
    """A payer with sessions here: its standing, and its channels by id."""

    standing: Standing
    channels: dict[bytes, Payee] = field(default_factory=dict)
    sessions: int = 0
    lease_network: str = ""


@dataclass(slots=True)
class _Waiting:
    ready: asyncio.Future[None]
    call_id: bytes
    segment: Segment
    units: int


class Session:
    """One live session; made by `Sessions.open`."""

    def __init__(
        self, *, payer: Address, book: PayerBook, payee: Payee, offer: Offer, epoch: int, grace_s: float
    ) -> None:
        self.payer = payer
        self.token = secrets.token_bytes(32)
        self.payee = payee
        self.offer = offer
        self.epoch = epoch
        self.error: BttError | None = None
        self.attached = False
        self.answers: dict[bytes, object] = {}
        """Answers of unary calls by call id, for a caller that lost one."""
        self._book = book
        self._grace_s = grace_s
        self._waiting: deque[_Waiting] = deque()
        self._heard = 0
        self._settlements: list[tuple[bytes, dict[Segment, int]]] = []
        self._stale = False
        self._told_credit = payee.standing.credit
        self._news = asyncio.Event()

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
        """
        self._alive()
        self.payee.begin(call_id)

    async def charge(self, call_id: bytes, segment: Segment, units: int) -> None:
        """Returns once a message of these units may leave, and has counted it.

        Raises:
            ChannelExhausted: The channel does not hold enough for it.
            PaymentRequired: Payment did not come within the grace time.
            SessionEnded: The session or the call has ended.
        """
        self._alive()
        meter = self.payee.meter
        if not self._waiting and meter.fits(segment, units) and meter.affordable(segment, units):
            self.payee.deliver(call_id, segment, units)
            return
        waiting = _Waiting(asyncio.get_running_loop().create_future(), call_id, segment, units)
        self._waiting.append(waiting)
        tell: asyncio.TimerHandle | None = None
        if len(self._waiting) == 1:  # behind another nothing changes
            if self._will_pay and meter.affordable(segment, units):
                tell = asyncio.get_running_loop().call_later(TELL_S, self._tell)
            else:
                self.advance()
        try:
            while not waiting.ready.done():
                heard = self._heard
                # The clock starts again whenever the payer is heard: a slow line is no default.
                done, _ = await asyncio.wait([waiting.ready], timeout=self._grace_s)
                if not done and heard == self._heard:
                    raise PaymentRequired(f"No payment came within {self._grace_s:g} seconds.")
            waiting.ready.result()
        finally:
            if tell is not None:
                tell.cancel()
            waiting.ready.cancel()
            if waiting in self._waiting:
                self._waiting.remove(waiting)
                self.advance()

    async def reserve(self, segment: Segment, units: int) -> None:
        """Returns once units could leave, before the work for them is done; counts nothing.

        Raises:
            ChannelExhausted, PaymentRequired, SessionEnded: As `charge`.
        """
        probe = secrets.token_bytes(16)
        self.payee.begin(probe)
        try:
            await self.charge(probe, segment, units)
        finally:
            if probe in self.payee.open_calls:
                self.payee.void(probe)
            self.advance()

    def advance(self) -> None:
        """Lets waiting messages leave, in order, as far as payment and credit reach."""
        meter = self.payee.meter
        while self._waiting:
            head = self._waiting[0]
            if not head.ready.done():
                if not meter.affordable(head.segment, head.units):
                    head.ready.set_exception(
                        ChannelExhausted("The channel holds too little for the next piece.")
                    )
                elif not meter.fits(head.segment, head.units):
                    break
                else:
                    try:
                        self.payee.deliver(head.call_id, head.segment, head.units)
                        head.ready.set_result(None)
                    except BttError as error:
                        head.ready.set_exception(error)
            self._waiting.popleft()
        self._tell()

    @property
    def demand(self) -> int:
        """The cumulative payment at which the next waiting message may leave; 0 if none waits."""
        if not self._waiting:
            return 0
        head = self._waiting[0]
        return self.payee.meter.demand(head.segment, head.units)

    @property
    def _will_pay(self) -> bool:
        """So much of the credit that it knows of is used that our own payer signs without being told."""
        excess = self.payee.meter.excess
        return excess > 0 and 4 * excess >= 3 * self._told_credit

    def void(self, call_id: bytes) -> None:
        """Takes a call back whole: it failed by a fault of this node."""
        if call_id in self.payee.open_calls:
            self.payee.void(call_id)
            self.advance()

    # Hearing from the payer

    def heard(self) -> None:
        """The payer is alive."""
        self._heard += 1

    async def pay(self, update: SignedUpdate, store: PayeeStore) -> None:
        """Checks an update, saves it, and only then counts it.

        Raises:
            UpdateInvalid: It is not valid for this channel.
            StorageError: It could not be saved, and does not count.
        """
        checked = self.payee.check(update)
        if checked is None:
            return
        meter = self.payee.meter
        saved = await store.save(checked, meter.tally, meter.written_off)
        self.payee.accept(saved)

    def settle(self, call_id: bytes, accepted: Mapping[Segment, int]) -> None:
        """Settles an ended call, and tells the payer.

        Raises:
            CountsDiffer: The report names more than was sent.
        """
        self._settlements.append((call_id, self.payee.settle(call_id, accepted)))
        for waiting in [w for w in self._waiting if w.call_id == call_id]:
            if not waiting.ready.done():
                waiting.ready.set_exception(SessionEnded("The call was ended by its caller."))

    # Telling the payer

    def _tell(self) -> None:
        self._stale = True
        self._news.set()

    async def news(self) -> tuple[list[tuple[bytes, dict[Segment, int]]], bool]:
        """Waits for something to tell.

        Returns:
            Settled calls, and whether a statement is due.

        Raises:
            BttError: The session has ended.
        """
        while True:
            if self._settlements or self._stale:
                news = self._settlements, self._stale
                self._settlements, self._stale = [], False
                self._told_credit = self.payee.standing.credit
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
            self._book.sessions -= 1
            for waiting in self._waiting:
                if not waiting.ready.done():
                    waiting.ready.set_exception(error)
            self._waiting.clear()
            self._news.set()


class Sessions:
    """All live sessions of a node.

    Args:
        ledger_id: 32 bytes.
        store: The payee's books.
        policy: What the node lends.
        clock: Unix milliseconds.
    """

    def __init__(
        self, *, ledger_id: bytes, store: PayeeStore, policy: CreditPolicy, clock: Callable[[], int]
    ) -> None:
        self._ledger_id = ledger_id
        self._store = store
        self._policy = policy
        self._clock = clock
        self._strangers = Strangers(total=policy.strangers_per_hour, per_network=policy.strangers_per_network)
        self._books: dict[Address, PayerBook] = {}
        self._by_token: dict[bytes, Session] = {}
        self._by_channel: dict[bytes, Session] = {}
        self._opening: dict[bytes, asyncio.Lock] = {}

    def find(self, token: bytes, call_id: bytes, signature: bytes) -> Session:
        """Returns the live session that a call may use.

        Args:
            token: Of the session.
            call_id: Fresh, 16 bytes.
            signature: Of K1 over the canonical SessionCall.

        Raises:
            SessionEnded: There is no such session.
            SignatureInvalid: The caller has the token, but not K1.
        """
        session = self._by_token.get(hashlib.sha256(token).digest())
        if session is None:
            raise SessionEnded("No such payment session.")
        session.authorise(call_id, signature, self._ledger_id)
        return session

    def lock(self, channel_id: bytes) -> asyncio.Lock:
        """Returns the lock under which a channel's sessions begin and end."""
        if len(self._opening) > 4096:
            self._opening = {key: lock for key, lock in self._opening.items() if lock.locked()}
        return self._opening.setdefault(channel_id, asyncio.Lock())

    async def open(
        self,
        *,
        channel_id: bytes,
        commit: ChannelCommit,
        offer: Offer,
        network: str,
        best: SignedUpdate | None,
        accepted: Mapping[Segment, int],
    ) -> tuple[Session, dict[Segment, int]]:
        """Opens a session of a channel, and ends the one before it; call it under `lock`.

        Args:
            channel_id: 32 bytes.
            commit: T1, from the ledger.
            offer: What the session pins.
            network: The caller's /24 or /48.
            best: The highest update the payer has signed.
            accepted: What the payer accepted since the channel opened.

        Returns:
            The session, and the units per segment that stay owed.

        Raises:
            UpdateInvalid: The update is not valid for this channel.
            CountsDiffer: The payer claims more than its deposit covers.
            StorageError: The books could not be written.
        """
        previous = self._by_channel.get(channel_id)
        if previous is not None:
            self.end(previous, SessionEnded("Another session was opened on this channel."))
        book = await self._book(commit.payer, channel_id)
        payee = book.channels[channel_id]
        payee.pin(offer.sheet)
        checked = payee.check(best) if best is not None else None
        meter = payee.meter
        if checked is not None:
            payee.accept(await self._store.save(checked, meter.tally, meter.written_off))
        settled = payee.reconcile(accepted)
        await self._store.save_books(channel_id, meter.tally, meter.written_off)
        epoch = await self._store.next_epoch(channel_id)
        self._lend(book, network)
        session = Session(
            payer=commit.payer,
            book=book,
            payee=payee,
            offer=offer,
            epoch=epoch,
            grace_s=self._policy.grace_s,
        )
        book.sessions += 1
        self._by_token[hashlib.sha256(session.token).digest()] = session
        self._by_channel[channel_id] = session
        return session, settled

    async def _book(self, payer: Address, channel_id: bytes) -> PayerBook:
        """Loads a payer with all its channels, or returns the one in memory."""
        book = self._books.get(payer)
        if book is not None and channel_id in book.channels:
            return book
        records = await self._store.channels(payer=payer, closed=True)
        book = self._books.get(payer)
        if book is None:
            if len(self._books) >= MAX_PAYERS:
                self._forget_idle()
            standing = Standing(unit=self._policy.unit, limit=self._policy.limit)
            standing.paid = sum(r.best.cumulative if r.best else 0 for r, _ in records)
            standing.written_off = sum(r.written_off + r.arrears for r, _ in records)
            book = self._books[payer] = PayerBook(standing)
        for record, tally in records:
            if record.state == "closed" or record.channel_id in book.channels:
                continue
            book.channels[record.channel_id] = Payee(
                ledger_id=self._ledger_id,
                channel_id=record.channel_id,
                key=ChannelCommit.decode(record.commit).k1,
                deposit=record.deposit,
                best=record.best,
                tally=tally,
                standing=book.standing,
                written_off=record.written_off,
            )
        return book

    def _forget_idle(self) -> None:
        """Drops payers without a session from memory; their books are on disk."""
        for payer, book in list(self._books.items()):
            if not book.sessions and not any(self.lock(channel).locked() for channel in book.channels):
                del self._books[payer]

    def _lend(self, book: PayerBook, network: str) -> None:
        standing = book.standing
        if standing.is_stranger and standing.lease < standing.unit:
            missing = standing.unit - standing.lease
            if self._strangers.lend(network, missing, self._clock()):
                standing.lease = standing.unit
                book.lease_network = network

    def _return_lease(self, book: PayerBook) -> None:
        standing = book.standing
        if not standing.lease or (standing.is_stranger and book.sessions):
            return
        lost = standing.unpaid + standing.written_off if standing.is_stranger else 0
        self._strangers.give_back(book.lease_network, max(0, standing.lease - lost))
        # What is lost stays lent: it refills with the hour, and the payer keeps no fresh claim.
        standing.lease = min(standing.lease, lost)

    def paid(self, session: Session) -> None:
        """A payment came in: whatever waits for it in any session of this payer goes on."""
        book = self._books[session.payer]
        self._return_lease(book)
        for channel_id in book.channels:
            other = self._by_channel.get(channel_id)
            if other is not None:
                other.advance()

    def end(self, session: Session, error: BttError) -> None:
        """Ends a session; its channel's books stay."""
        if session.error is not None:
            return
        session.end(error)
        self._by_token.pop(hashlib.sha256(session.token).digest(), None)
        channel_id = session.payee.channel_id
        if self._by_channel.get(channel_id) is session:
            del self._by_channel[channel_id]
        self._return_lease(self._books[session.payer])

    def live(self, channel_id: bytes) -> Session | None:
        """Returns the live session of a channel."""
        return self._by_channel.get(channel_id)

    def all(self) -> list[Session]:
        """Returns every live session."""
        return list(self._by_channel.values())

    def forget(self, session_payer: Address, channel_id: bytes) -> None:
        """Drops a channel that is closing; what it left unpaid follows its payer."""
        book = self._books.get(session_payer)
        if book is None:
            return
        payee = book.channels.pop(channel_id, None)
        if payee is not None:
            payee.meter.leave()


def network_of(peer: str) -> str:
    """Returns the /24 or /48 of a gRPC peer name, such as "ipv4:192.0.2.7:4000"."""
    family, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0].removeprefix("[").removesuffix("]").replace("%5B", "").replace("%5D", "")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return family
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return str(ipaddress.ip_network((address, 24 if address.version == 4 else 48), strict=False))
