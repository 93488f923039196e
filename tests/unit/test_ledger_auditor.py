"""The ledger against an auditor who keeps accounts of his own: two dictionaries and the paper's rules.

The auditor shares no code with the ledger. He hears what people ask, decides for himself whether it
should be granted, and compares every balance after every step; at the end he has the journal
replayed and finds the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from btt.sdk.errors import BttError
from btt.sdk.keys import PrivateKey
from btt.sdk.signing import (
    ChannelClose,
    ChannelCommit,
    ChannelFinalize,
    ChannelRefund,
    ChannelUpdate,
    CloseRequest,
    TopUp,
    Transfer,
    document_digest,
    sign,
)
from btt.services.ledger import audit, books, genesis
from btt.services.ledger.books import Account, Request, Terms
from btt.services.ledger.journal import NO_HASH, Entry, EntryRef, Head
from btt.services.ledger.machine import Channel
from btt.services.ledger.overlay import Batch
from btt.services.ledger.verify import Operation, Verifier

OPERATOR = PrivateKey(bytes(31) + b"\1")
PEOPLE = [PrivateKey(bytes(31) + bytes([n])) for n in (11, 12, 13)]
K1, K2 = PrivateKey(bytes(31) + b"\x15"), PrivateKey(bytes(31) + b"\x16")
START, DAY = 1_800_000_000_000, 86_400_000
WINDOW, LIFE = 10, 40
MOST_OPEN, MOST_LOCKED, LEAST_RAISE = 2, 60, 3
TERMS = Terms(
    min_challenge_ms=1,
    min_lifetime_ms=1,
    max_open_channels=MOST_OPEN,
    max_locked=MOST_LOCKED,
    min_update_delta=LEAST_RAISE,
)
WHO = st.integers(0, 2)
MONEY = st.integers(1, 45)


@dataclass
class Book:
    """A channel in the auditor's books."""

    payer: int
    payee: int
    early: bool
    expires: int
    locked: int
    best: int = 0
    deadline: int | None = None
    gone: bool = False

    @property
    def over(self) -> bool:
        return self.deadline is not None


class Ledger:
    """The ledger under test, without its disk."""

    def __init__(self) -> None:
        self.description = genesis.describe("model", operator_key=OPERATOR.public.data, nonce=bytes(32))
        self.id = genesis.ledger_id(self.description)
        self.verifier = Verifier(self.id)
        self.head = Head(1, 0, NO_HASH, 0)
        self.next_account = 1
        self.accounts: dict[bytes, Account] = {}
        self.channels: dict[bytes, Channel] = {}
        self.requests: dict[tuple[bytes, bytes], Request] = {}
        self.entries: list[Entry] = []
        self.refs: dict[bytes, EntryRef] = {}
        batch = Batch(self, clock_ms=START, terms=TERMS)
        body, effect = genesis.issue(PEOPLE[0].address.data, 100)
        digest = document_digest(genesis.DOCUMENT, self.id, body)
        proof = OPERATOR.public.data + OPERATOR.sign(digest)
        batch.absorb(effect, digest=digest, body=body, signatures=proof)
        self.keep(batch)

    def account(self, account: bytes) -> Account | None:
        return self.accounts.get(account)

    def channel(self, channel_id: bytes) -> Channel | None:
        return self.channels.get(channel_id)

    def request(self, account: bytes, request_id: bytes) -> Request | None:
        return self.requests.get((account, request_id))

    def entry(self, request_digest: bytes) -> EntryRef | None:
        return self.refs.get(request_digest)

    def keep(self, batch: Batch) -> None:
        self.accounts |= batch.accounts
        self.channels |= batch.channels
        self.requests |= batch.requests
        self.entries += batch.entries
        self.refs |= {entry.request_digest: entry.ref for entry in batch.entries}
        self.head, self.next_account = batch.head, batch.next_account


class AuditedLedger(RuleBasedStateMachine):
    """People do what they like; the auditor knows what should come of it."""

    channels = Bundle("channels")
    done = Bundle("done")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.now = START
        self.names = 0
        self.money = {0: 100}
        self.books: dict[bytes, Book] = {}

    def name(self) -> bytes:
        self.names += 1
        return self.names.to_bytes(16, "big")

    def granted(self, operation: Operation) -> bool:
        batch = Batch(self.ledger, clock_ms=self.now, terms=TERMS)
        outcome = batch.run(operation)
        self.ledger.keep(batch)
        return not isinstance(outcome, BttError)

    def mine(self, who: int) -> list[Book]:
        return [book for book in self.books.values() if book.payer == who and not book.gone]

    def pay_out(self, book: Book, capture: int) -> None:
        for who, amount in ((book.payee, capture), (book.payer, book.locked - capture)):
            if amount:
                self.money[who] = self.money.get(who, 0) + amount
        book.gone = True

    @rule(ticks=st.integers(1, 30))
    def time_passes(self, ticks: int) -> None:
        self.now += ticks

    @rule(a=WHO, b=WHO, amount=MONEY, target=done)
    def transfer(self, a: int, b: int, amount: int) -> Operation:
        if a == b:
            return multiple()  # type: ignore[return-value]
        message = Transfer(
            sender=PEOPLE[a].address,
            recipient=PEOPLE[b].address,
            amount=amount,
            request_id=self.name(),
            valid_until_ms=self.now + DAY,
            memo=bytes(32),
        )
        operation = self.ledger.verifier.transfer(
            message.encode(),
            signer=PEOPLE[a].public.data,
            signature=sign(PEOPLE[a], message, self.ledger.id),
        )
        expected = self.money.get(a, 0) >= amount
        assert self.granted(operation) == expected
        if not expected:
            return multiple()  # type: ignore[return-value]
        self.money[a] -= amount
        self.money[b] = self.money.get(b, 0) + amount
        return operation

    @rule(a=WHO, b=WHO, amount=MONEY, early=st.booleans(), target=channels)
    def open(self, a: int, b: int, amount: int, early: bool) -> bytes:
        if a == b:
            return multiple()  # type: ignore[return-value]
        t1 = ChannelCommit(
            payer=PEOPLE[a].address,
            payee=PEOPLE[b].address,
            k1=K1.public,
            k2=K2.public,
            amount=amount,
            expires_ms=self.now + LIFE,
            challenge_ms=WINDOW,
            flags=int(early),
            fee=0,
            nonce=self.name(),
            service_ref=bytes(32),
        )
        channel = t1.channel_id(self.ledger.id)
        t2 = ChannelRefund(channel=channel, not_before_ms=t1.expires_ms)
        operation = self.ledger.verifier.open_channel(
            t1.encode(),
            signer=PEOPLE[a].public.data,
            signature=sign(PEOPLE[a], t1, self.ledger.id),
            refund_signature=sign(K2, t2, self.ledger.id),
        )
        mine = self.mine(a)
        expected = (
            self.money.get(a, 0) >= amount
            and len(mine) < MOST_OPEN
            and sum(book.locked for book in mine) + amount <= MOST_LOCKED
        )
        assert self.granted(operation) == expected
        if not expected:
            return multiple()  # type: ignore[return-value]
        self.money[a] -= amount
        self.books[channel] = Book(a, b, early, self.now + LIFE, amount)
        return channel

    @rule(channel=channels, amount=MONEY, target=done)
    def top_up(self, channel: bytes, amount: int) -> Operation:
        book = self.books[channel]
        payer = PEOPLE[book.payer]
        message = TopUp(channel=channel, amount=amount, request_id=self.name(), valid_until_ms=self.now + DAY)
        operation = self.ledger.verifier.top_up(
            message.encode(), signer=payer.public.data, signature=sign(payer, message, self.ledger.id)
        )
        expected = (
            not book.gone
            and not book.over
            and self.now < book.expires
            and self.money[book.payer] >= amount
            and sum(each.locked for each in self.mine(book.payer)) + amount <= MOST_LOCKED
        )
        assert self.granted(operation) == expected
        if not expected:
            return multiple()  # type: ignore[return-value]
        self.money[book.payer] -= amount
        book.locked += amount
        return operation

    @rule(channel=channels, cumulative=MONEY)
    def show_update(self, channel: bytes, cumulative: int) -> None:
        book = self.books[channel]
        message = ChannelUpdate(channel=channel, cumulative=cumulative)
        operation = self.ledger.verifier.update(
            message.encode(), k1=K1.public.data, signature=sign(K1, message, self.ledger.id)
        )
        if operation.digest in self.ledger.refs:
            before = len(self.ledger.entries)
            assert self.granted(operation)
            assert len(self.ledger.entries) == before
            return
        enough = cumulative - book.best >= LEAST_RAISE or cumulative == book.locked or book.over
        expected = (
            not book.gone
            and book.best < cumulative <= book.locked
            and enough
            and (book.deadline is None or self.now < book.deadline)
        )
        assert self.granted(operation) == expected
        if expected:
            book.best = cumulative

    @rule(channel=channels)
    def ask(self, channel: bytes) -> None:
        book = self.books[channel]
        payer = PEOPLE[book.payer]
        message = CloseRequest(channel=channel, request_id=self.name(), valid_until_ms=self.now + DAY)
        operation = self.ledger.verifier.request_close(
            message.encode(), signer=payer.public.data, signature=sign(payer, message, self.ledger.id)
        )
        expected = not book.gone and not book.over and (book.early or self.now >= book.expires)
        assert self.granted(operation) == expected
        if expected:
            last = book.expires + 2 * WINDOW
            book.deadline = self.now if self.now >= last else min(self.now + WINDOW, last)

    @rule(channel=channels, capture=MONEY | st.just(0), shown=MONEY | st.just(0))
    def close(self, channel: bytes, capture: int, shown: int) -> None:
        book = self.books[channel]
        message = ChannelClose(channel=channel, capture=capture)
        t3 = ChannelUpdate(channel=channel, cumulative=shown)
        operation = self.ledger.verifier.close_channel(
            message.encode(),
            signer=K2.public.data,
            signature=sign(K2, message, self.ledger.id),
            cumulative=shown,
            update_signature=sign(K1, t3, self.ledger.id) if shown else b"",
            k1=K1.public.data,
        )
        if operation.digest in self.ledger.refs:
            return
        expected = (
            not book.gone
            and capture <= max(shown, book.best)
            and shown <= book.locked
            and (book.deadline is None or self.now < book.deadline)
        )
        assert self.granted(operation) == expected
        if expected:
            self.pay_out(book, capture)

    @rule(channel=channels)
    def finalize(self, channel: bytes) -> None:
        book = self.books[channel]
        operation = self.ledger.verifier.finalize(ChannelFinalize(channel=channel).encode())
        if operation.digest in self.ledger.refs:
            return
        due = book.expires + 2 * WINDOW if book.deadline is None else book.deadline
        expected = not book.gone and self.now >= due
        assert self.granted(operation) == expected
        if expected:
            self.pay_out(book, book.best)

    @rule(operation=consumes(done))
    def ask_again(self, operation: Operation) -> None:
        before = self.ledger.entries[:]
        assert self.granted(operation)
        assert self.ledger.entries == before

    @invariant()
    def the_balances_agree(self) -> None:
        for who, key in enumerate(PEOPLE):
            found = self.ledger.account(books.user(key.address.data))
            assert (found.balance if found else 0) == self.money.get(who, 0)
            assert (found.locked if found else 0) == sum(book.locked for book in self.mine(who))
            assert (found.open_channels if found else 0) == len(self.mine(who))
        for channel, book in self.books.items():
            held = self.ledger.accounts[books.locked_in(channel)].balance
            assert held == (0 if book.gone else book.locked)
        locked = sum(book.locked for book in self.books.values() if not book.gone)
        assert sum(self.money.values()) + locked == 100

    @precondition(lambda self: self.books)
    @rule()
    def at_the_end_the_money_is_out(self) -> None:
        """Whatever was asked before, everybody can be paid once the last window is over."""
        self.now = max(self.now, *(book.expires + 2 * WINDOW for book in self.books.values()))
        for channel, book in self.books.items():
            if not book.gone:
                self.finalize(channel)
                assert book.gone

    def teardown(self) -> None:
        report, auditor = audit.audit(self.ledger.description, self.ledger.entries)
        assert report.head == self.ledger.head
        for who, key in enumerate(PEOPLE):
            assert auditor.balances.get(books.user(key.address.data), 0) == self.money.get(who, 0)
        assert {channel for channel, book in self.books.items() if not book.gone} == set(auditor.channels)


AuditedLedger.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAuditedLedger = AuditedLedger.TestCase
