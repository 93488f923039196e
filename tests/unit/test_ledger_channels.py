"""Top-ups, stored updates, requested closes and finalizes, by the rules of the ledger alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from btt.sdk.errors import (
    BttError,
    ChannelClosed,
    ChannelClosing,
    ChannelExpired,
    ChannelLocked,
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
    EARLY_CLOSE,
    ChannelClose,
    ChannelCommit,
    ChannelFinalize,
    ChannelRefund,
    ChannelUpdate,
    CloseRequest,
    TopUp,
    Transfer,
    sign,
)
from btt.services.ledger import books, genesis
from btt.services.ledger.books import Account, Request, Terms
from btt.services.ledger.journal import NO_HASH, EntryRef, Head
from btt.services.ledger.machine import Channel, Phase
from btt.services.ledger.overlay import Batch
from btt.services.ledger.verify import Operation, Verifier

LEDGER = bytes(range(32))
NOW = 1_800_000_000_000
SECOND, HOUR = 1000, 3_600_000
WINDOW, EXPIRES = 60 * SECOND, NOW + 2 * HOUR
GONE = EXPIRES + 2 * WINDOW
TERMS = Terms(min_challenge_ms=1000, min_lifetime_ms=1000)
ALICE, BOB, CAROL, K1, K2 = (PrivateKey(n.to_bytes(32, "big")) for n in (11, 12, 13, 21, 22))
VERIFIER = Verifier(LEDGER)


class Memory:
    """Committed books in memory, and a clock."""

    def __init__(self) -> None:
        self.head = Head(1, 0, NO_HASH, 0)
        self.next_account = 1
        self.accounts: dict[bytes, Account] = {}
        self.channels: dict[bytes, Channel] = {}
        self.requests: dict[tuple[bytes, bytes], Request] = {}
        self.refs: dict[bytes, EntryRef] = {}
        self.now_ms = NOW
        self.terms = TERMS

    def account(self, account: bytes) -> Account | None:
        return self.accounts.get(account)

    def channel(self, channel_id: bytes) -> Channel | None:
        return self.channels.get(channel_id)

    def request(self, account: bytes, request_id: bytes) -> Request | None:
        return self.requests.get((account, request_id))

    def entry(self, request_digest: bytes) -> EntryRef | None:
        return self.refs.get(request_digest)

    def fund(self, owner: PrivateKey, amount: int) -> None:
        batch = Batch(self, clock_ms=self.now_ms, terms=self.terms)
        body, effect = genesis.issue(owner.address.data, amount)
        batch.absorb(effect, digest=bytes([len(self.refs)]) * 32, body=body, signatures=b"")
        self._keep(batch)

    def run(self, operation: Operation) -> EntryRef:
        batch = Batch(self, clock_ms=self.now_ms, terms=self.terms)
        outcome = batch.run(operation)
        self._keep(batch)
        if isinstance(outcome, BttError):
            raise outcome
        return outcome

    def _keep(self, batch: Batch) -> None:
        self.accounts |= batch.accounts
        self.channels |= batch.channels
        self.requests |= batch.requests
        self.refs |= {entry.request_digest: entry.ref for entry in batch.entries}
        self.head, self.next_account = batch.head, batch.next_account

    def of(self, owner: PrivateKey) -> int:
        found = self.accounts.get(books.user(owner.address.data))
        return found.balance if found else 0

    def locked(self) -> tuple[int, int]:
        found = self.accounts[books.user(ALICE.address.data)]
        return found.locked, found.open_channels


@pytest.fixture
def ledger() -> Memory:
    memory = Memory()
    memory.fund(ALICE, 1000)
    return memory


def opening(*, flags: int = 0, amount: int = 100, name: int = 0) -> Operation:
    t1 = ChannelCommit(
        payer=ALICE.address,
        payee=BOB.address,
        k1=K1.public,
        k2=K2.public,
        amount=amount,
        expires_ms=EXPIRES,
        challenge_ms=WINDOW,
        flags=flags,
        fee=0,
        nonce=name.to_bytes(16, "big"),
        service_ref=bytes(32),
    )
    t2 = ChannelRefund(channel=t1.channel_id(LEDGER), not_before_ms=EXPIRES)
    return VERIFIER.open_channel(
        t1.encode(),
        signer=ALICE.public.data,
        signature=sign(ALICE, t1, LEDGER),
        refund_signature=sign(K2, t2, LEDGER),
    )


def top_up(
    channel: bytes, amount: int = 50, *, name: int = 1, key: PrivateKey = ALICE, until: int = NOW + HOUR
) -> Operation:
    message = TopUp(channel=channel, amount=amount, request_id=name.to_bytes(16, "big"), valid_until_ms=until)
    return VERIFIER.top_up(message.encode(), signer=key.public.data, signature=sign(key, message, LEDGER))


def update(channel: bytes, cumulative: int, *, key: PrivateKey = K1) -> Operation:
    message = ChannelUpdate(channel=channel, cumulative=cumulative)
    return VERIFIER.update(message.encode(), k1=key.public.data, signature=sign(key, message, LEDGER))


def asking(
    channel: bytes, *, name: int = 2, key: PrivateKey = ALICE, until: int | None = None, now: int = NOW
) -> Operation:
    message = CloseRequest(
        channel=channel, request_id=name.to_bytes(16, "big"), valid_until_ms=until or now + HOUR
    )
    return VERIFIER.request_close(
        message.encode(), signer=key.public.data, signature=sign(key, message, LEDGER)
    )


def finalize(channel: bytes) -> Operation:
    return VERIFIER.finalize(ChannelFinalize(channel=channel).encode())


def closing(channel: bytes, capture: int, shown: int) -> Operation:
    message = ChannelClose(channel=channel, capture=capture)
    t3 = ChannelUpdate(channel=channel, cumulative=shown)
    return VERIFIER.close_channel(
        message.encode(),
        signer=K2.public.data,
        signature=sign(K2, message, LEDGER),
        cumulative=shown,
        update_signature=sign(K1, t3, LEDGER) if shown else b"",
        k1=K1.public.data,
    )


@pytest.fixture
def channel(ledger: Memory) -> bytes:
    """One that may not be closed early."""
    return ledger.run(opening()).request_digest


@pytest.fixture
def early(ledger: Memory) -> bytes:
    return ledger.run(opening(flags=EARLY_CLOSE, name=1)).request_digest


class TestTopUp:
    def test_locks_more(self, ledger: Memory, channel: bytes) -> None:
        ledger.run(top_up(channel, 50))
        assert ledger.channels[channel].deposit == 150
        assert ledger.of(ALICE) == 850
        assert ledger.locked() == (150, 1)
        ledger.run(update(channel, 150))
        ledger.run(closing(channel, 150, 150))
        assert (ledger.of(ALICE), ledger.of(BOB), ledger.locked()) == (850, 150, (0, 0))

    def test_counts_once(self, ledger: Memory, channel: bytes) -> None:
        first = ledger.run(top_up(channel))
        assert ledger.run(top_up(channel)) == first
        assert ledger.channels[channel].deposit == 150
        with pytest.raises(RequestConflict):
            ledger.run(top_up(channel, 51))
        ledger.run(closing(channel, 0, 0))
        assert ledger.run(top_up(channel)) == first

    def test_a_refusal_for_lack_of_funds_is_final(self, ledger: Memory, channel: bytes) -> None:
        with pytest.raises(InsufficientFunds):
            ledger.run(top_up(channel, 901))
        ledger.fund(ALICE, 1000)
        with pytest.raises(InsufficientFunds):
            ledger.run(top_up(channel, 901))
        assert ledger.channels[channel].deposit == 100

    @pytest.mark.parametrize("thief", [K1, K2, BOB, CAROL])
    def test_only_the_payers_account_key(self, ledger: Memory, channel: bytes, thief: PrivateKey) -> None:
        ledger.fund(thief, 100)
        with pytest.raises(SignerMismatch):
            ledger.run(top_up(channel, key=thief))
        assert ledger.of(thief) == 100

    def test_only_in_time_and_while_open(self, ledger: Memory, channel: bytes, early: bytes) -> None:
        for until in (NOW, NOW + 25 * HOUR):
            with pytest.raises(RequestExpired):
                ledger.run(top_up(channel, until=until))
        ledger.run(asking(early))
        with pytest.raises(ChannelClosing):
            ledger.run(top_up(early))
        ledger.now_ms = EXPIRES - 1
        ledger.run(top_up(channel, name=7, until=EXPIRES + HOUR))
        ledger.now_ms = EXPIRES
        with pytest.raises(ChannelExpired):
            ledger.run(top_up(channel, name=8, until=EXPIRES + HOUR))
        ledger.run(closing(channel, 0, 0))
        with pytest.raises(ChannelClosed):
            ledger.run(top_up(channel, name=9, until=EXPIRES + HOUR))
        with pytest.raises(ChannelUnknown):
            ledger.run(top_up(bytes(32)))
        with pytest.raises(InvalidRequest, match="at least one"):
            top_up(channel, 0)


class TestUpdate:
    def test_the_highest_is_kept_and_paid_at_the_end(self, ledger: Memory, channel: bytes) -> None:
        for cumulative in (1, 40, 100):
            ledger.run(update(channel, cumulative))
            assert ledger.channels[channel].best == cumulative
        assert ledger.of(BOB) == 0
        ledger.now_ms = GONE
        ledger.run(finalize(channel))
        assert (ledger.of(ALICE), ledger.of(BOB)) == (900, 100)

    def test_lower_or_equal_or_too_high(self, ledger: Memory, channel: bytes) -> None:
        first = ledger.run(update(channel, 40))
        assert ledger.run(update(channel, 40)) == first
        with pytest.raises(UpdateInvalid, match="40 base units already"):
            ledger.run(update(channel, 39))
        with pytest.raises(UpdateInvalid, match="exceeds"):
            ledger.run(update(channel, 101))
        ledger.run(update(channel, 41))
        assert ledger.run(update(channel, 40)) == first
        assert ledger.channels[channel].best == 41
        with pytest.raises(InvalidRequest):
            update(channel, 0)

    def test_signed_by_k1_of_this_channel(self, ledger: Memory, channel: bytes) -> None:
        for wrong in (ALICE, K2, CAROL):
            with pytest.raises(SignatureInvalid):
                ledger.run(update(channel, 40, key=wrong))
        t3 = ChannelUpdate(channel=channel, cumulative=40)
        for signature in (sign(K2, t3, LEDGER), sign(K1, t3, bytes(32)), bytes(65)):
            with pytest.raises(SignatureInvalid):
                VERIFIER.update(t3.encode(), k1=K1.public.data, signature=signature)
        assert ledger.channels[channel].best == 0

    def test_the_least_raise(self, ledger: Memory, early: bytes) -> None:
        ledger.terms = replace(TERMS, min_update_delta=20)
        with pytest.raises(UpdateInvalid, match="by 20"):
            ledger.run(update(early, 19))
        ledger.run(update(early, 90))
        with pytest.raises(UpdateInvalid, match="by 20"):
            ledger.run(update(early, 99))
        ledger.run(asking(early))
        ledger.run(update(early, 91))  # a challenge counts, however small
        assert ledger.channels[early].best == 91

    def test_the_last_unit_needs_no_least_raise(self, ledger: Memory, channel: bytes) -> None:
        ledger.terms = replace(TERMS, min_update_delta=20)
        ledger.run(update(channel, 90))
        ledger.run(update(channel, 100))

    def test_a_payee_that_lost_its_update_takes_the_stored_one(self, ledger: Memory, channel: bytes) -> None:
        ledger.run(update(channel, 70))
        with pytest.raises(InvalidRequest):
            ledger.run(closing(channel, 71, 0))
        ledger.run(closing(channel, 70, 0))
        assert ledger.of(BOB) == 70

    def test_a_higher_stored_update_stays_known_after_a_close(self, ledger: Memory, channel: bytes) -> None:
        ledger.run(update(channel, 70))
        ledger.run(closing(channel, 50, 50))
        closed = ledger.channels[channel]
        assert (closed.captured, closed.best) == (50, 70)


class TestRequestClose:
    def test_early_only_where_t1_allows_it(self, ledger: Memory, channel: bytes, early: bytes) -> None:
        with pytest.raises(ChannelLocked):
            ledger.run(asking(channel))
        entry = ledger.run(asking(early))
        assert ledger.channels[early].phase is Phase.CLOSING
        assert ledger.channels[early].deadline_ms == entry.time_ms + WINDOW
        assert (ledger.of(ALICE), ledger.of(BOB)) == (800, 0)

    def test_the_refund_is_due_at_the_lock_time(self, ledger: Memory, channel: bytes) -> None:
        ledger.now_ms = EXPIRES - 1
        with pytest.raises(ChannelLocked):
            ledger.run(asking(channel, now=EXPIRES))
        ledger.now_ms = EXPIRES
        ledger.run(asking(channel, now=EXPIRES))
        ledger.now_ms = EXPIRES + WINDOW - 1
        with pytest.raises(ChannelLocked):
            ledger.run(finalize(channel))
        ledger.now_ms = EXPIRES + WINDOW
        first = ledger.run(finalize(channel))
        assert ledger.run(finalize(channel)) == first
        assert (ledger.of(ALICE), ledger.of(BOB), ledger.locked()) == (1000, 0, (0, 0))

    @pytest.mark.parametrize("moment", ["before", "at"])
    @pytest.mark.parametrize("how", ["challenge", "close"])
    def test_a_payer_who_asks_with_an_old_state(
        self, ledger: Memory, early: bytes, moment: str, how: str
    ) -> None:
        ledger.run(update(early, 10))
        ledger.run(asking(early))
        ledger.now_ms += WINDOW - (moment == "before")
        answer = update(early, 60) if how == "challenge" else closing(early, 60, 60)
        if moment == "at":
            with pytest.raises(ChannelClosing):
                ledger.run(answer)
        else:
            ledger.run(answer)
        if not (moment == "before" and how == "close"):
            ledger.now_ms = NOW + WINDOW
            ledger.run(finalize(early))
        assert ledger.of(BOB) == (10 if moment == "at" else 60)
        assert ledger.of(ALICE) + ledger.of(BOB) == 1000

    def test_again_and_twice(self, ledger: Memory, early: bytes) -> None:
        first = ledger.run(asking(early))
        deadline = ledger.channels[early].deadline_ms
        ledger.now_ms += 5
        assert ledger.run(asking(early)) == first
        with pytest.raises(ChannelClosing):
            ledger.run(asking(early, name=3))
        assert ledger.channels[early].deadline_ms == deadline
        ledger.run(closing(early, 0, 0))
        with pytest.raises(ChannelClosed):
            ledger.run(asking(early, name=3))
        with pytest.raises(RequestConflict):
            ledger.run(asking(bytes(early), until=NOW + HOUR + 1))

    @pytest.mark.parametrize("thief", [K1, K2, BOB, CAROL])
    def test_only_the_payers_account_key(self, ledger: Memory, early: bytes, thief: PrivateKey) -> None:
        with pytest.raises(SignerMismatch):
            ledger.run(asking(early, key=thief))
        assert ledger.channels[early].phase is Phase.OPEN

    def test_a_late_request_does_not_hold_the_money_back(self, ledger: Memory, channel: bytes) -> None:
        ledger.now_ms = GONE - 1
        ledger.run(asking(channel, now=ledger.now_ms))
        assert ledger.channels[channel].deadline_ms == GONE
        ledger.now_ms = GONE
        ledger.run(finalize(channel))

    def test_a_clock_that_is_set_back_opens_no_window_again(self, ledger: Memory, early: bytes) -> None:
        ledger.run(asking(early))
        ledger.fund(CAROL, 1)
        ledger.now_ms = NOW + WINDOW
        ledger.fund(CAROL, 1)  # an entry with this time
        ledger.now_ms = NOW
        with pytest.raises(ChannelClosing):
            ledger.run(update(early, 60))


def test_both_vanished(ledger: Memory, channel: bytes) -> None:
    ledger.run(update(channel, 30))
    ledger.now_ms = GONE - 1
    with pytest.raises(ChannelLocked):
        ledger.run(finalize(channel))
    ledger.now_ms = GONE
    ledger.run(finalize(channel))
    assert (ledger.of(ALICE), ledger.of(BOB)) == (970, 30)
    with pytest.raises(ChannelClosed):
        ledger.run(closing(channel, 50, 50))
    with pytest.raises(ChannelUnknown):
        ledger.run(finalize(bytes(32)))


class TestCaps:
    def test_open_channels(self, ledger: Memory) -> None:
        ledger.terms = replace(TERMS, max_open_channels=2)
        first = ledger.run(opening(name=0)).request_digest
        ledger.run(opening(name=1))
        with pytest.raises(TermsRefused, match="2 channels open"):
            ledger.run(opening(name=2))
        ledger.run(closing(first, 0, 0))
        ledger.run(opening(name=2))

    def test_locked_funds(self, ledger: Memory) -> None:
        ledger.terms = replace(TERMS, max_locked=150)
        with pytest.raises(TermsRefused, match="151"):
            ledger.run(opening(amount=151))
        channel = ledger.run(opening(amount=100)).request_digest
        with pytest.raises(TermsRefused):
            ledger.run(opening(amount=51, name=1))
        with pytest.raises(TermsRefused):
            ledger.run(top_up(channel, 51))
        ledger.run(top_up(channel, 50, name=2))
        assert ledger.locked() == (150, 1)


def test_k1_moves_nothing_but_its_channel(ledger: Memory, channel: bytes) -> None:
    """A dApp holds K1; stolen, it is worth what T1 locked, and nothing from the account."""
    message = Transfer(
        sender=ALICE.address,
        recipient=CAROL.address,
        amount=10,
        request_id=bytes(16),
        valid_until_ms=NOW + HOUR,
        memo=bytes(32),
    )
    with pytest.raises(SignerMismatch):
        VERIFIER.transfer(message.encode(), signer=K1.public.data, signature=sign(K1, message, LEDGER))
    with pytest.raises(SignatureInvalid):
        VERIFIER.transfer(message.encode(), signer=ALICE.public.data, signature=sign(K1, message, LEDGER))
    for operation in (top_up(channel, key=K1), asking(channel, key=K1)):
        with pytest.raises(SignerMismatch):
            ledger.run(operation)
    close = ChannelClose(channel=channel, capture=0)
    operation = VERIFIER.close_channel(
        close.encode(),
        signer=K1.public.data,
        signature=sign(K1, close, LEDGER),
        cumulative=0,
        update_signature=b"",
        k1=K1.public.data,
    )
    with pytest.raises(SignerMismatch):
        ledger.run(operation)
    assert (ledger.of(ALICE), ledger.of(CAROL)) == (900, 0)


def test_a_signature_counts_for_one_kind_of_message_only() -> None:
    channel = bytes(32)
    until = NOW + HOUR
    ask = CloseRequest(channel=channel, request_id=bytes(16), valid_until_ms=until)
    more = TopUp(channel=channel, amount=1, request_id=bytes(16), valid_until_ms=until)
    for message in (ask, more):
        for other in (VERIFIER.top_up, VERIFIER.request_close):
            right = (other == VERIFIER.top_up) == (message is more)
            if right:
                continue
            body = (more if message is ask else ask).encode()
            with pytest.raises(SignatureInvalid):
                other(body, signer=ALICE.public.data, signature=sign(ALICE, message, LEDGER))
    close, t3 = ChannelClose(channel=channel, capture=5), ChannelUpdate(channel=channel, cumulative=5)
    assert close.encode() == t3.encode()
    with pytest.raises(SignatureInvalid):
        VERIFIER.update(t3.encode(), k1=K1.public.data, signature=sign(K1, close, LEDGER))
