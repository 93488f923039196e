"""All live payment sessions of a node, and the standing of those who pay.

One session per channel is live; opening another ends it. A payer's standing is shared by all its
channels, and lives as long as any of them has a session.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

from btt.node.payments.bans import Bans, Failure
from btt.node.payments.lent import save_lent
from btt.node.payments.session import PayerBook, Session
from btt.node.payments.store import OPEN, ChannelRecord, PayeeStore
from btt.sdk.channel import BanPolicy, Payee, Segment, SignedUpdate, Standing, Strangers, Tally
from btt.sdk.errors import BttError, SessionEnded
from btt.sdk.identity import Offer
from btt.sdk.keys import Address
from btt.sdk.payment.apps import NO_APP, AppGrant
from btt.sdk.signing import ChannelCommit

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
        bans: What follows when payment fails again and again.
    """

    unit: int
    limit: int
    strangers_per_hour: int
    strangers_per_network: int
    grace_s: float = 60.0
    bans: BanPolicy = field(default_factory=BanPolicy)


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
        self.bans = Bans(store=store, policy=policy.bans, clock=clock)
        self._strangers = Strangers(total=policy.strangers_per_hour, per_network=policy.strangers_per_network)
        self._strangers.remember(store.lent_before, clock())
        self._books: dict[Address, PayerBook] = {}
        self._by_token: dict[bytes, Session] = {}
        self._by_channel: dict[bytes, Session] = {}
        # A lock is there as long as somebody has it or waits for it: a second one would let two in at once.
        self._opening: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()
        self._none = asyncio.Event()
        self._none.set()

    def reprice(self, unit: int) -> None:
        """Lends the cost of another verify unit from now on, base units."""
        self._policy = replace(self._policy, unit=unit)
        for book in self._books.values():
            book.standing.unit = unit

    def lend_by(self, policy: CreditPolicy) -> None:
        """Lends and bans by other rules from now on.

        Args:
            policy: Its unit is that of `reprice`, and its grace time that of sessions yet to open.
        """
        self._policy = replace(policy, unit=self._policy.unit)
        self._strangers.limit(total=policy.strangers_per_hour, per_network=policy.strangers_per_network)
        self.bans.policy = policy.bans
        for book in self._books.values():
            book.standing.limit = policy.limit
        for session in self.all():
            session.advance()

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
        return self._opening.setdefault(channel_id, asyncio.Lock())

    async def open(
        self,
        *,
        channel_id: bytes,
        commit: ChannelCommit,
        deposit: int,
        offer: Offer,
        network: str,
        best: SignedUpdate | None,
        accepted: Mapping[Segment, int],
        app: AppGrant = NO_APP,
    ) -> tuple[Session, dict[Segment, int]]:
        """Opens a session of a channel, and ends the one before it; call it under `lock`.

        Args:
            channel_id: 32 bytes.
            commit: T1, from the ledger.
            deposit: What the channel holds by the ledger, base units.
            offer: What the session pins.
            network: The caller's /24 or /48.
            best: The highest update the payer has signed.
            accepted: What the payer accepted since the channel opened.
            app: The application that it is for.

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
        payee.meter.deposit = max(payee.meter.deposit, deposit)
        payee.pin(offer.sheet)
        checked = payee.check(best) if best is not None else None
        meter = payee.meter
        if checked is not None:
            payee.accept(await self._store.save(checked, meter.tally, meter.written_off))
        was_in_default = book.standing.in_default
        settled = payee.reconcile(accepted)
        await self._store.save_books(channel_id, meter.tally, meter.written_off)
        epoch = await self._store.next_epoch(channel_id, None if app is NO_APP else app.app)
        if book.standing.in_default and not was_in_default:
            await self.failed(commit.payer, network, Failure.DEFAULT)
        await self._lend(book, network)
        session = Session(
            payer=commit.payer,
            network=network,
            book=book,
            payee=payee,
            offer=offer,
            epoch=epoch,
            grace_s=self._policy.grace_s,
            unpaid=self._unpaid,
            app=app,
        )
        book.sessions += 1
        self._by_token[hashlib.sha256(session.token).digest()] = session
        self._by_channel[channel_id] = session
        self._none.clear()
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
            book = self._books[payer] = PayerBook(self._standing(records))
        for record, tally in records:
            if record.state != OPEN or record.channel_id in book.channels:
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

    def _standing(self, records: list[tuple[ChannelRecord, Tally]]) -> Standing:
        return Standing(
            unit=self._policy.unit,
            limit=self._policy.limit,
            paid=sum(r.best.cumulative if r.best else 0 for r, _ in records),
            written_off=sum(r.written_off + r.arrears for r, _ in records),
        )

    def _forget_idle(self) -> None:
        """Drops payers without a session from memory; their books are on disk."""
        for payer, book in list(self._books.items()):
            if not book.sessions and not any(self.lock(channel).locked() for channel in book.channels):
                del self._books[payer]

    async def _lend(self, book: PayerBook, network: str) -> None:
        standing = book.standing
        # To whom has lost a unit already another one would give no credit.
        if not standing.is_stranger or standing.written_off >= standing.unit:
            return
        if standing.lease < standing.unit and await self.bans.lends_to(network):
            missing = standing.unit - standing.lease  # as it is now: others of this payer may have come
            if missing > 0 and self._strangers.lend(network, missing, self._clock()):
                try:
                    await self._note_lent(network)
                except BttError:
                    self._strangers.give_back(network, missing)
                    raise
                # Another session of this payer may have been lent it meanwhile.
                taken = min(missing, max(0, standing.unit - standing.lease))
                self._strangers.give_back(network, missing - taken)
                standing.lease += taken
                book.lease_network = network

    def _note_lent(self, network: str) -> asyncio.Future[None]:
        """Writes down what is lent; done when it is on disk."""
        now = self._clock()
        lent = self._strangers.lent(network, now)
        return asyncio.ensure_future(self._store.run(lambda db: save_lent(db, lent, now)))

    def _return_lease(self, book: PayerBook) -> None:
        standing = book.standing
        if not standing.lease or (standing.is_stranger and book.sessions):
            return
        lost = standing.unpaid + standing.written_off if standing.is_stranger else 0
        self._strangers.give_back(book.lease_network, max(0, standing.lease - lost))
        if standing.lease > lost:
            with contextlib.suppress(BttError):
                self._note_lent(book.lease_network).add_done_callback(_known)
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
            if not self._by_channel:
                self._none.set()
        self._return_lease(self._books[session.payer])

    # Bans

    async def failed(self, payer: Address, network: str | None, failure: Failure) -> None:
        """Counts a failure of a payer, and disconnects it if that bans it.

        Args:
            payer: Who holds the key of the channel.
            network: Where it came from; None if that is not known.
            failure: What it did.
        """
        book = self._books.get(payer)
        stranger = book is None or book.standing.is_stranger
        banned = await self.bans.payer_failed(payer, failure, network=network if stranger else None)
        if banned is not None:
            self.disconnect(payer, None, banned)

    async def _unpaid(self, session: Session) -> None:
        await self.failed(session.payer, session.network, Failure.UNPAID)

    def disconnect(self, payer: Address, network: str | None, error: BttError) -> None:
        """Ends the sessions of a payer, of one network or of all: what it is sent ends with them."""
        for session in self.all():
            if session.payer == payer and network in (None, session.network):
                self.end(session, error)

    def peers(self) -> set[tuple[Address, str]]:
        """Returns the payers that have a session, with their networks."""
        return {(session.payer, session.network) for session in self.all()}

    def live(self, channel_id: bytes) -> Session | None:
        """Returns the live session of a channel."""
        return self._by_channel.get(channel_id)

    async def gone(self) -> None:
        """Returns when no session is live."""
        await self._none.wait()

    def all(self) -> list[Session]:
        """Returns every live session."""
        return list(self._by_channel.values())

    async def forget(self, payer: Address, channel_id: bytes, arrears: int) -> None:
        """Drops a channel that is closing or closed; what it left unpaid follows its payer.

        Args:
            payer: Whose channel it is.
            channel_id: 32 bytes.
            arrears: What it left unpaid, base units; it is in the books already.
        """
        book = self._books.get(payer)
        payee = book.channels.pop(channel_id, None) if book is not None else None
        if payee is not None:
            payee.meter.leave()
        if not arrears:
            return
        after = self._standing(await self._store.channels(payer=payer, closed=True))
        before = replace(after, written_off=after.written_off - arrears)
        if after.in_default and not before.in_default:
            await self.failed(payer, None, Failure.DEFAULT)


def _known(noted: asyncio.Future[None]) -> None:
    """Takes note of a failure to write down what came back: it lends less, and nobody waits for it."""
    if not noted.cancelled():
        noted.exception()
