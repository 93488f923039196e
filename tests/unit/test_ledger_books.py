"""The rules of the ledger without disk, network or clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btt.sdk.errors import (
    AccountUnknown,
    BttError,
    ChannelClosed,
    ChannelExpired,
    ChannelUnknown,
    InsufficientFunds,
    InvalidRequest,
    RequestConflict,
    RequestExpired,
    SignatureInvalid,
    SignerMismatch,
    TermsRefused,
    UpdateInvalid,
)
from btt.sdk.keys import PrivateKey
from btt.sdk.signing import (
    ChannelClose,
    ChannelCommit,
    ChannelFinalize,
    ChannelRefund,
    ChannelUpdate,
    Transfer,
    sign,
)
from btt.services.ledger import books, genesis, journal
from btt.services.ledger.books import Account, Request, Terms
from btt.services.ledger.journal import NO_HASH, Entry, EntryRef, Head, Kind, Posting, Side
from btt.services.ledger.machine import Channel, Phase
from btt.services.ledger.overlay import Batch
from btt.services.ledger.verify import Operation, TransferOperation, Verifier

LEDGER = bytes(range(32))
NOW = 1_800_000_000_000
HOUR = 3_600_000
DAY = 24 * HOUR
TERMS = Terms(min_challenge_ms=1000, max_challenge_ms=HOUR, min_lifetime_ms=HOUR, max_lifetime_ms=30 * DAY)


def key(number: int) -> PrivateKey:
    return PrivateKey(number.to_bytes(32, "big"))


ALICE, BOB, CAROL, K1, K2 = (key(n) for n in (11, 12, 13, 21, 22))
VERIFIER = Verifier(LEDGER)


class Memory:
    """The stored books of these tests: everything a batch absorbed."""

    def __init__(self, **balances: int) -> None:
        self.head = Head(1, 0, NO_HASH, 0)
        self.next_account = 1
        self.accounts: dict[bytes, Account] = {}
        self.channels: dict[bytes, Channel] = {}
        self.requests: dict[tuple[bytes, bytes], Request] = {}
        self.entries: list[Entry] = []

    def account(self, account: bytes) -> Account | None:
        return self.accounts.get(account)

    def channel(self, channel_id: bytes) -> Channel | None:
        return self.channels.get(channel_id)

    def request(self, account: bytes, request_id: bytes) -> Request | None:
        return self.requests.get((account, request_id))

    def entry(self, request_digest: bytes) -> EntryRef | None:
        return next((e.ref for e in self.entries if e.request_digest == request_digest), None)

    def fund(self, owner: PrivateKey, amount: int) -> None:
        batch = Batch(self, clock_ms=NOW, terms=TERMS)
        body, effect = genesis.issue(owner.address.data, amount)
        batch.absorb(effect, digest=bytes([len(self.entries)]) * 32, body=body, signatures=b"")
        self._keep(batch)

    def run(self, operation: Operation, *, now_ms: int = NOW, terms: Terms = TERMS) -> EntryRef:
        batch = Batch(self, clock_ms=now_ms, terms=terms)
        outcome = batch.run(operation)
        self._keep(batch)
        if isinstance(outcome, BttError):
            raise outcome
        return outcome

    def _keep(self, batch: Batch) -> None:
        self.accounts |= batch.accounts
        self.channels |= batch.channels
        self.requests |= batch.requests
        self.entries += batch.entries
        self.head, self.next_account = batch.head, batch.next_account

    def balance(self, account: bytes) -> int:
        found = self.accounts.get(account)
        return found.balance if found else 0

    def of(self, owner: PrivateKey) -> int:
        return self.balance(books.user(owner.address.data))


@pytest.fixture
def ledger() -> Memory:
    memory = Memory()
    memory.fund(ALICE, 1000)
    return memory


def transfer(
    source: PrivateKey = ALICE,
    to: PrivateKey = BOB,
    amount: int = 10,
    name: int = 1,
    until: int = NOW + HOUR,
) -> TransferOperation:
    message = Transfer(
        sender=source.address,
        recipient=to.address,
        amount=amount,
        request_id=name.to_bytes(16, "big"),
        valid_until_ms=until,
        memo=bytes(32),
    )
    return VERIFIER.transfer(
        message.encode(), signer=source.public.data, signature=sign(source, message, LEDGER)
    )


def commit(**changes: object) -> ChannelCommit:
    fields: dict[str, object] = {
        "payer": ALICE.address,
        "payee": BOB.address,
        "k1": K1.public,
        "k2": K2.public,
        "amount": 100,
        "expires_ms": NOW + DAY,
        "challenge_ms": 5000,
        "flags": 1,
        "fee": 0,
        "nonce": bytes(16),
        "service_ref": bytes(32),
    }
    return ChannelCommit(**(fields | changes))  # type: ignore[arg-type]


def opening(t1: ChannelCommit, *, payer: PrivateKey = ALICE, k2: PrivateKey = K2) -> Operation:
    refund = ChannelRefund(channel=t1.channel_id(LEDGER), not_before_ms=t1.expires_ms)
    return VERIFIER.open_channel(
        t1.encode(),
        signer=payer.public.data,
        signature=sign(payer, t1, LEDGER),
        refund_signature=sign(k2, refund, LEDGER),
    )


def closing(
    channel: bytes,
    capture: int,
    cumulative: int | None = None,
    *,
    k2: PrivateKey = K2,
    k1: PrivateKey = K1,
) -> Operation:
    cumulative = capture if cumulative is None else cumulative
    message = ChannelClose(channel=channel, capture=capture)
    update = ChannelUpdate(channel=channel, cumulative=cumulative)
    return VERIFIER.close_channel(
        message.encode(),
        signer=k2.public.data,
        signature=sign(k2, message, LEDGER),
        cumulative=cumulative,
        update_signature=sign(k1, update, LEDGER) if cumulative else b"",
        k1=k1.public.data,
    )


class TestTransfer:
    def test_moves_money_and_learns_the_key(self, ledger: Memory) -> None:
        ledger.run(transfer(amount=400))
        assert (ledger.of(ALICE), ledger.of(BOB)) == (600, 400)
        account = ledger.accounts[books.user(ALICE.address.data)]
        assert account.public_key == ALICE.public.data
        assert ledger.accounts[books.user(BOB.address.data)].public_key is None

    def test_everything_but_not_more(self, ledger: Memory) -> None:
        with pytest.raises(InsufficientFunds):
            ledger.run(transfer(amount=1001))
        ledger.run(transfer(amount=1000, name=2))
        assert ledger.of(ALICE) == 0

    def test_again_is_the_same_entry(self, ledger: Memory) -> None:
        first = ledger.run(transfer())
        assert ledger.run(transfer()) == first
        assert ledger.of(BOB) == 10

    def test_again_after_it_expired_is_the_same_entry(self, ledger: Memory) -> None:
        first = ledger.run(transfer())
        ledger.requests.clear()  # purged
        assert ledger.run(transfer(), now_ms=NOW + 10 * DAY) == first

    def test_again_in_one_batch_is_the_same_entry(self, ledger: Memory) -> None:
        batch = Batch(ledger, clock_ms=NOW, terms=TERMS)
        assert batch.run(transfer()) == batch.run(transfer())
        assert len(batch.entries) == 1

    def test_request_id_with_another_body(self, ledger: Memory) -> None:
        ledger.run(transfer(amount=10))
        with pytest.raises(RequestConflict):
            ledger.run(transfer(amount=11))
        assert ledger.of(BOB) == 10

    def test_request_ids_belong_to_the_account(self, ledger: Memory) -> None:
        ledger.fund(CAROL, 50)
        ledger.run(transfer(ALICE))
        ledger.run(transfer(CAROL))
        assert ledger.of(BOB) == 20

    def test_a_refusal_for_lack_of_funds_is_final(self, ledger: Memory) -> None:
        with pytest.raises(InsufficientFunds) as first:
            ledger.run(transfer(amount=2000))
        ledger.fund(ALICE, 5000)
        with pytest.raises(InsufficientFunds) as second:
            ledger.run(transfer(amount=2000))
        assert second.value.message == first.value.message
        with pytest.raises(RequestConflict):
            ledger.run(transfer(amount=1))
        ledger.run(transfer(amount=2000, name=2))

    def test_strangers_leave_no_rows(self, ledger: Memory) -> None:
        with pytest.raises(AccountUnknown):
            ledger.run(transfer(CAROL))
        assert not ledger.requests
        assert books.user(CAROL.address.data) not in ledger.accounts
        ledger.fund(CAROL, 50)
        ledger.run(transfer(CAROL))

    @pytest.mark.parametrize("until", [0, NOW - 1, NOW, NOW + DAY + 1])
    def test_valid_until_out_of_range(self, ledger: Memory, until: int) -> None:
        with pytest.raises(RequestExpired):
            ledger.run(transfer(until=until))
        assert not ledger.requests

    @pytest.mark.parametrize("until", [NOW + 1, NOW + DAY])
    def test_valid_until_in_range(self, ledger: Memory, until: int) -> None:
        ledger.run(transfer(until=until))
        (request,) = ledger.requests.values()
        assert request.keep_until_ms > until

    def test_refused_before_the_books(self) -> None:
        good = transfer()
        with pytest.raises(InvalidRequest, match="at least one"):
            transfer(amount=0)
        with pytest.raises(InvalidRequest, match="another account"):
            transfer(to=ALICE)
        with pytest.raises(InvalidRequest):
            VERIFIER.transfer(good.body + b"\0", signer=good.signer, signature=bytes(65))

    def test_signatures(self) -> None:
        good = transfer()
        signature = good.signatures[33:]
        other = sign(BOB, Transfer.decode(good.body), LEDGER)
        with pytest.raises(SignerMismatch):
            VERIFIER.transfer(good.body, signer=BOB.public.data, signature=other)
        with pytest.raises(SignatureInvalid):
            VERIFIER.transfer(good.body, signer=ALICE.public.data, signature=other)
        with pytest.raises(SignatureInvalid):
            Verifier(bytes(32)).transfer(good.body, signer=ALICE.public.data, signature=signature)
        with pytest.raises(SignatureInvalid):
            VERIFIER.transfer(good.body, signer=ALICE.public.data, signature=signature[:64])
        changed = good.body[:47] + bytes([good.body[47] ^ 1]) + good.body[48:]
        with pytest.raises(SignatureInvalid):
            VERIFIER.transfer(changed, signer=ALICE.public.data, signature=signature)


def test_only_the_verifier_makes_operations(ledger: Memory) -> None:
    good = transfer()
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(good, amount=1000)
    with pytest.raises(TypeError, match="Verifier only"):
        dataclasses.replace(good, amount=1000, seal=object())  # type: ignore[call-arg]
    outcome = Batch(ledger, clock_ms=NOW, terms=TERMS).run(Transfer.decode(good.body))  # type: ignore[arg-type]
    assert isinstance(outcome, BttError)


class TestOpen:
    def test_locks_the_deposit(self, ledger: Memory) -> None:
        entry = ledger.run(opening(commit()))
        channel_id = commit().channel_id(LEDGER)
        assert entry.request_digest == channel_id
        assert ledger.of(ALICE) == 900
        assert ledger.accounts[books.user(ALICE.address.data)].locked == 100
        assert ledger.balance(books.locked_in(channel_id)) == 100
        channel = ledger.channels[channel_id]
        assert (channel.phase, channel.deposit, channel.opened_seq) == (Phase.OPEN, 100, entry.seq)
        assert channel.commit == commit().encode()

    def test_the_same_t1_again_even_when_closed(self, ledger: Memory) -> None:
        first = ledger.run(opening(commit()))
        assert ledger.run(opening(commit())) == first
        ledger.run(closing(first.request_digest, 0))
        assert ledger.run(opening(commit()), now_ms=NOW + 90 * DAY) == first
        assert ledger.of(ALICE) == 1000

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"amount": 1001}, InsufficientFunds),
            ({"expires_ms": NOW}, ChannelExpired),
            ({"expires_ms": NOW + HOUR - 1}, TermsRefused),
            ({"expires_ms": NOW + 30 * DAY + 1}, TermsRefused),
            ({"challenge_ms": 999}, TermsRefused),
            ({"challenge_ms": HOUR + 1}, TermsRefused),
            ({"fee": 1}, TermsRefused),
        ],
    )
    def test_refused_by_the_books(
        self, ledger: Memory, changes: dict[str, object], error: type[BttError]
    ) -> None:
        with pytest.raises(error):
            ledger.run(opening(commit(**changes)))
        assert ledger.of(ALICE) == 1000
        assert not ledger.channels

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"amount": 0}, "at least one"),
            ({"payee": ALICE.address}, "same account"),
            ({"k1": K2.public}, "same key"),
            ({"k1": ALICE.public}, "account key"),
        ],
    )
    def test_refused_before_the_books(self, changes: dict[str, object], match: str) -> None:
        with pytest.raises(InvalidRequest, match=match):
            opening(commit(**changes))

    def test_an_unknown_payer(self, ledger: Memory) -> None:
        with pytest.raises(AccountUnknown):
            ledger.run(opening(commit(payer=CAROL.address), payer=CAROL))

    def test_t1_is_signed_by_the_payer(self) -> None:
        with pytest.raises(SignerMismatch):
            opening(commit(), payer=BOB)
        with pytest.raises(SignerMismatch):
            opening(commit(), payer=K1)

    def test_t2_is_signed_by_k2_over_these_terms(self) -> None:
        with pytest.raises(SignatureInvalid):
            opening(commit(), k2=BOB)
        t1 = commit()
        early = ChannelRefund(channel=t1.channel_id(LEDGER), not_before_ms=t1.expires_ms - 1)
        other = ChannelRefund(channel=commit(amount=99).channel_id(LEDGER), not_before_ms=t1.expires_ms)
        for refund in (early, other):
            with pytest.raises(SignatureInvalid):
                VERIFIER.open_channel(
                    t1.encode(),
                    signer=ALICE.public.data,
                    signature=sign(ALICE, t1, LEDGER),
                    refund_signature=sign(K2, refund, LEDGER),
                )

    def test_fee(self, ledger: Memory) -> None:
        terms = dataclasses.replace(TERMS, open_fee=7)
        with pytest.raises(TermsRefused):
            ledger.run(opening(commit()), terms=terms)
        with pytest.raises(InsufficientFunds):
            ledger.run(opening(commit(amount=994, fee=7)), terms=terms)
        ledger.run(opening(commit(amount=993, fee=7)), terms=terms)
        assert (ledger.of(ALICE), ledger.balance(books.FEES)) == (0, 7)


class TestClose:
    @pytest.fixture
    def channel(self, ledger: Memory) -> bytes:
        return ledger.run(opening(commit())).request_digest

    @pytest.mark.parametrize(("capture", "cumulative"), [(0, 0), (1, 1), (60, 60), (60, 80), (100, 100)])
    def test_pays_both(self, ledger: Memory, channel: bytes, capture: int, cumulative: int) -> None:
        entry = ledger.run(closing(channel, capture, cumulative))
        assert (ledger.of(ALICE), ledger.of(BOB)) == (1000 - capture, capture)
        assert ledger.balance(books.locked_in(channel)) == 0
        assert ledger.accounts[books.user(ALICE.address.data)].locked == 0
        closed = ledger.channels[channel]
        assert (closed.phase, closed.captured, closed.best) == (Phase.CLOSED, capture, cumulative)
        assert closed.closed_seq == entry.seq
        update = ChannelUpdate(channel=channel, cumulative=cumulative)
        assert closed.best_signature == (sign(K1, update, LEDGER) if cumulative else b"")

    def test_again_is_the_same_entry(self, ledger: Memory, channel: bytes) -> None:
        first = ledger.run(closing(channel, 60, 60))
        assert ledger.run(closing(channel, 60, 60)) == first
        assert ledger.run(closing(channel, 60, 80)) == first
        assert ledger.channels[channel].best == 60
        assert ledger.of(BOB) == 60

    def test_another_capture_when_closed(self, ledger: Memory, channel: bytes) -> None:
        ledger.run(closing(channel, 60))
        with pytest.raises(ChannelClosed):
            ledger.run(closing(channel, 61))
        assert ledger.of(BOB) == 60

    def test_a_stranger_gets_no_receipt_of_a_close(self, ledger: Memory, channel: bytes) -> None:
        ledger.run(closing(channel, 60))
        with pytest.raises(SignerMismatch):
            ledger.run(closing(channel, 60, k2=CAROL))

    def test_refused(self, ledger: Memory, channel: bytes) -> None:
        with pytest.raises(ChannelUnknown):
            ledger.run(closing(bytes(32), 1))
        for wrong in (BOB, ALICE, K1):
            with pytest.raises(SignerMismatch):
                ledger.run(closing(channel, 1, k2=wrong))
        with pytest.raises(InvalidRequest, match="more than the update"):
            ledger.run(closing(channel, 61, 60))
        with pytest.raises(InvalidRequest, match="more than the update"):
            ledger.run(closing(channel, 1, 0))
        with pytest.raises(UpdateInvalid):
            ledger.run(closing(channel, 100, 101))
        with pytest.raises(SignatureInvalid):
            ledger.run(closing(channel, 60, k1=CAROL))
        assert ledger.channels[channel].phase is Phase.OPEN
        assert ledger.of(BOB) == 0

    def test_update_signatures(self, ledger: Memory, channel: bytes) -> None:
        message = ChannelClose(channel=channel, capture=5)

        def attempt(cumulative: int, signature: bytes) -> None:
            VERIFIER.close_channel(
                message.encode(),
                signer=K2.public.data,
                signature=sign(K2, message, LEDGER),
                cumulative=cumulative,
                update_signature=signature,
                k1=K1.public.data,
            )

        good = sign(K1, ChannelUpdate(channel=channel, cumulative=5), LEDGER)
        attempt(5, good)
        for cumulative, signature in (
            (6, good),
            (5, sign(K2, ChannelUpdate(channel=channel, cumulative=5), LEDGER)),
            (5, sign(K1, ChannelUpdate(channel=bytes(32), cumulative=5), LEDGER)),
            (5, sign(K1, ChannelUpdate(channel=channel, cumulative=5), bytes(32))),
            (5, sign(K1, ChannelClose(channel=channel, capture=5), LEDGER)),
            (5, b""),
            (0, good),
        ):
            with pytest.raises(InvalidRequest):
                attempt(cumulative, signature)


def test_what_an_operation_counts_for(ledger: Memory) -> None:
    channel = commit().channel_id(LEDGER)
    too_much, stranger = transfer(amount=10**6, name=2), transfer(source=CAROL)
    finalize = VERIFIER.finalize(ChannelFinalize(channel=channel).encode())
    counted: list[bytes] = []
    batch = Batch(ledger, clock_ms=NOW, terms=TERMS)
    for operation in (opening(commit()), too_much, stranger, finalize):
        for _ in range(2):
            batch.run(operation, counted.append)
    alice = ALICE.public.data
    assert counted == [
        *(alice, channel),
        *(alice, too_much.digest),
        *(stranger.digest, stranger.digest),
        *(finalize.digest, finalize.digest),
    ]
    ledger._keep(batch)
    due = Batch(ledger, clock_ms=NOW + 2 * DAY, terms=TERMS)
    assert isinstance(due.run(finalize, counted.append), EntryRef)
    assert len(counted) == 8  # due, and nobody's


def test_ledger_time_never_runs_backwards(ledger: Memory) -> None:
    late = ledger.run(transfer(until=NOW + DAY), now_ms=NOW + HOUR)
    early = ledger.run(transfer(name=2, until=NOW + DAY), now_ms=NOW)
    assert (late.time_ms, early.time_ms) == (NOW + HOUR, NOW + HOUR)
    with pytest.raises(RequestExpired):
        ledger.run(transfer(name=3, until=NOW + 1), now_ms=NOW)


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("transfer"),
            st.integers(0, 2),
            st.integers(0, 2),
            st.integers(1, 700),
            st.integers(0, 5),
        ),
        st.tuples(
            st.just("open"), st.integers(0, 2), st.integers(0, 2), st.integers(1, 700), st.integers(0, 3)
        ),
        st.tuples(st.just("close"), st.integers(0, 7), st.integers(0, 700), st.integers(0, 700), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_nothing_is_made_or_lost(steps: list[tuple[str, int, int, int, int]]) -> None:
    people = (ALICE, BOB, CAROL)
    ledger = Memory()
    ledger.fund(ALICE, 1000)
    opened: list[bytes] = []
    batch = Batch(ledger, clock_ms=NOW, terms=TERMS)
    for what, a, b, c, d in steps:
        try:
            if what == "transfer":
                batch.run(transfer(people[a], people[b], c, name=d))
            elif what == "open":
                t1 = commit(payer=people[a].address, payee=people[b].address, amount=c, nonce=bytes([d]) * 16)
                opened.append(t1.channel_id(LEDGER))
                batch.run(opening(t1, payer=people[a]))
            elif opened:
                batch.run(closing(opened[a % len(opened)], min(b, c), c))
        except InvalidRequest:
            continue
    ledger._keep(batch)
    folded: dict[bytes, int] = {}
    last = Head(1, 0, NO_HASH, 0)
    for entry in ledger.entries:
        assert journal.broken(entry, last) is None
        last = Head(entry.epoch, entry.seq, entry.hash, entry.time_ms)
        for leg in entry.postings:
            sign_of = 1 if leg.side is Side.CREDIT else -1
            folded[leg.account] = folded.get(leg.account, 0) + sign_of * leg.amount
            assert books.is_asset(leg.account) or folded[leg.account] >= 0
    assert sum(folded.values()) == 0
    for account in ledger.accounts.values():
        assert account.balance == abs(folded.get(account.id, 0))
    for channel in ledger.channels.values():
        assert ledger.balance(books.locked_in(channel.id)) == channel.held
        assert 0 <= channel.captured <= channel.best <= channel.deposit
    locked = sum(account.locked for account in ledger.accounts.values())
    assert locked == sum(channel.held for channel in ledger.channels.values())
    assert sum(ledger.of(person) for person in people) + locked == 1000


class TestJournal:
    HEAD = Head(3, 41, bytes(range(32)), NOW)

    def entry(self) -> Entry:
        postings = (Posting(b"\x01" + bytes(20), Side.DEBIT, 5), Posting(b"\x03", Side.CREDIT, 5))
        return journal.append(
            self.HEAD,
            time_ms=NOW + 1,
            kind=Kind.TRANSFER,
            request_digest=bytes(32),
            body=b"body",
            signatures=b"",
            postings=postings,
        )

    def test_layout_is_pinned(self) -> None:
        entry = self.entry()
        assert (entry.seq, entry.epoch, entry.prev_hash) == (42, 3, self.HEAD.hash)
        assert entry.hash.hex() == "b694aba3a3fda912b9cc2c84cc093bf2f6cc344b17899192b89c13ce3f7b14da"

    @pytest.mark.parametrize(
        "change",
        [
            lambda e: dataclasses.replace(e, seq=43),
            lambda e: dataclasses.replace(e, time_ms=NOW + 2),
            lambda e: dataclasses.replace(e, time_ms=NOW - 1),
            lambda e: dataclasses.replace(e, epoch=4),
            lambda e: dataclasses.replace(e, kind=Kind.OPEN_CHANNEL),
            lambda e: dataclasses.replace(e, request_digest=b"\1" * 32),
            lambda e: dataclasses.replace(e, prev_hash=b"\1" * 32),
            lambda e: dataclasses.replace(e, hash=b"\1" * 32),
            lambda e: dataclasses.replace(e, postings=e.postings[::-1]),
            lambda e: dataclasses.replace(e, postings=e.postings[:1]),
            lambda e: dataclasses.replace(
                e, postings=tuple(dataclasses.replace(leg, amount=6) for leg in e.postings)
            ),
        ],
    )
    def test_every_change_shows(self, change: Callable[[Entry], Entry]) -> None:
        assert journal.broken(self.entry(), self.HEAD) is None
        assert journal.broken(change(self.entry()), self.HEAD) is not None

    def test_unbalanced_entries_show_even_with_a_good_hash(self) -> None:
        lopsided = (Posting(b"\x01" + bytes(20), Side.DEBIT, 5), Posting(b"\x03", Side.CREDIT, 6))
        entry = journal.append(
            self.HEAD,
            time_ms=NOW,
            kind=Kind.TRANSFER,
            request_digest=bytes(32),
            body=b"",
            signatures=b"",
            postings=lopsided,
        )
        assert journal.broken(entry, self.HEAD) == "Entry 42: its debits and credits differ."
