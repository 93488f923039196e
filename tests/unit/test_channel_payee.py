"""The payee: checks updates, meters deliveries, and a hostile payer costs no more than the bounds."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btt.sdk.channel import (
    Checked,
    Durable,
    Line,
    Payee,
    Payer,
    Price,
    PriceSheet,
    Segment,
    SignedUpdate,
    Standing,
    Strangers,
    Tally,
)
from btt.sdk.channel.payee import REMEMBERED_CALLS
from btt.sdk.errors import CallRepeated, CountsDiffer, RateLimited, SessionEnded, UpdateInvalid
from btt.sdk.keys import PrivateKey
from btt.sdk.money import MAX_UNITS, Rate, Unit
from btt.sdk.signing import ChannelUpdate, sign

LEDGER, CHANNEL = b"L" * 32, b"C" * 32
KEY, STRANGER = PrivateKey(b"\x01" * 32), PrivateKey(b"\x02" * 32)
LINE, FREE = Line("test.Files", Unit.BYTE), Line("test.Files", Unit.COUNT)
UNIT = 10
SHEET = PriceSheet(
    b"1" * 32, {LINE: Price(Rate(1, 1, Unit.BYTE), UNIT), FREE: Price(Rate(0, 1, Unit.COUNT), 1)}
)
SEGMENT, NOTHING = Segment(SHEET.digest, LINE), Segment(SHEET.digest, FREE)
A, B = b"a" * 16, b"b" * 16


def make_payee(
    standing: Standing | None = None,
    *,
    channel: bytes = CHANNEL,
    deposit: int = 10_000,
    paid: int = 0,
    tally: Tally | None = None,
) -> Payee:
    payee = Payee(
        ledger_id=LEDGER,
        channel_id=channel,
        key=KEY.public,
        deposit=deposit,
        best=update(paid, channel=channel) if paid else None,
        tally=tally or Tally(),
        standing=standing or Standing(unit=UNIT, limit=1000, lease=UNIT),
    )
    payee.pin(SHEET)
    return payee


def update(cumulative: int, key: PrivateKey = KEY, channel: bytes = CHANNEL) -> SignedUpdate:
    message = ChannelUpdate(channel=channel, cumulative=cumulative)
    return SignedUpdate(cumulative, sign(key, message, LEDGER))


def pay(payee: Payee, cumulative: int) -> None:
    checked = payee.check(update(cumulative, channel=payee.channel_id))
    if checked is not None:
        payee.accept(Durable.write(checked, lambda _: None))


def deliver(payee: Payee, call_id: bytes, units: int) -> bool:
    """Sends a message if the meter lets it go."""
    if not payee.meter.fits([(SEGMENT, units)]) or not payee.meter.affordable([(SEGMENT, units)]):
        return False
    credit, before = payee.standing.credit, payee.standing.unpaid
    payee.deliver(call_id, SEGMENT, units)
    # Where credit was lost meanwhile, only what this channel prepaid leaves: arrears never grow.
    assert payee.standing.unpaid <= max(credit, before)
    return True


class TestUpdates:
    def test_a_higher_update_counts_once_it_is_saved(self) -> None:
        payee = make_payee()
        checked = payee.check(update(7))
        assert checked == Checked(payee.channel_id, update(7))
        assert (payee.best, payee.meter.paid) == (None, 0)
        with pytest.raises(TypeError):
            payee.accept(checked)  # type: ignore[arg-type]
        unchecked = Durable.write(update(7), lambda _: None)
        with pytest.raises(TypeError):
            payee.accept(unchecked)  # type: ignore[arg-type]
        foreign = Durable.write(Checked(b"X" * 32, update(7)), lambda _: None)
        with pytest.raises(TypeError):
            payee.accept(foreign)
        payee.accept(Durable.write(checked, lambda _: None))
        assert (payee.best, payee.meter.paid, payee.standing.paid) == (update(7), 7, 7)

    def test_a_repeated_or_lower_update_is_no_error_and_changes_nothing(self) -> None:
        payee = make_payee()
        pay(payee, 7)
        assert payee.check(update(7)) is None
        assert payee.check(update(6)) is None
        assert make_payee().check(update(0)) is None
        late = Durable.write(Checked(payee.channel_id, update(5)), lambda _: None)
        payee.accept(late)
        assert (payee.best, payee.meter.paid, payee.standing.paid) == (update(7), 7, 7)

    @pytest.mark.parametrize(
        "forged",
        [
            update(7, STRANGER),
            update(7, channel=b"X" * 32),
            SignedUpdate(8, update(7).signature),
            SignedUpdate(7, b""),
            SignedUpdate(7, b"\xff" * 65),
            SignedUpdate(-1, update(7).signature),
            SignedUpdate(2**70, update(7).signature),
            update(10_001),
        ],
    )
    def test_a_forged_update_is_refused(self, forged: SignedUpdate) -> None:
        with pytest.raises(UpdateInvalid):
            make_payee().check(forged)

    def test_the_whole_deposit_can_be_paid(self) -> None:
        payee = make_payee()
        pay(payee, 10_000)
        assert payee.meter.paid == 10_000


class TestMeter:
    def test_a_message_leaves_while_it_fits_the_credit(self) -> None:
        payee = make_payee()
        payee.begin(A)
        assert payee.meter.fits([(SEGMENT, 10)])
        assert not payee.meter.fits([(SEGMENT, 11)])
        payee.deliver(A, SEGMENT, 4)
        assert payee.meter.fits([(SEGMENT, 6)])
        assert not payee.meter.fits([(SEGMENT, 7)])
        assert payee.meter.demand([(SEGMENT, 7)]) == 1
        pay(payee, 1)
        assert payee.meter.fits([(SEGMENT, 7)])

    def test_what_is_larger_than_the_credit_is_prepaid(self) -> None:
        payee = make_payee()
        assert payee.meter.demand([(SEGMENT, 500)]) == 490
        pay(payee, 490)
        assert payee.meter.fits([(SEGMENT, 500 + 14)])  # and what was paid earned 24 of credit
        assert not payee.meter.fits([(SEGMENT, 500 + 15)])

    def test_the_deposit_is_never_exceeded(self) -> None:
        payee = make_payee(deposit=5)
        assert payee.meter.affordable([(SEGMENT, 5)])
        assert not payee.meter.affordable([(SEGMENT, 6)])

    def test_credit_is_one_over_all_channels(self) -> None:
        standing = Standing(unit=UNIT, limit=1000, lease=UNIT)
        first, second = make_payee(standing), make_payee(standing, channel=b"D" * 32)
        first.begin(A)
        second.begin(B)
        assert deliver(first, A, 6)
        assert not deliver(second, B, 5)
        assert deliver(second, B, 4)
        assert standing.unpaid == 10
        # Ahead on one channel is no payment for the other: each update is money of its own channel.
        pay(first, 50)
        assert standing.unpaid == 4
        assert second.meter.demand([(SEGMENT, 6)]) == 0

    def test_a_restarted_payee_takes_arrears_up_again(self) -> None:
        tally = Tally()
        for segment, rate in SHEET.segments():
            tally.price(segment, rate)
        tally.add(SEGMENT, 15)
        standing = Standing(unit=UNIT, limit=1000, lease=UNIT, paid=9)
        payee = make_payee(standing, paid=9, tally=tally)
        assert (standing.unpaid, standing.paid) == (6, 9)
        assert payee.meter.fits([(SEGMENT, 4)])
        assert not payee.meter.fits([(SEGMENT, 5)])

    def test_arrears_outlive_the_channel(self) -> None:
        standing = Standing(unit=UNIT, limit=1000, lease=UNIT)
        for number in range(5):
            payee = make_payee(standing, channel=bytes([number]) * 32)
            payee.begin(A)
            assert deliver(payee, A, 10) == (number == 0)
            payee.meter.leave()
            payee.meter.leave()
        assert (standing.unpaid, standing.written_off, standing.credit) == (0, 10, 0)

    @pytest.mark.parametrize("late", ["handler", "report", "update"])
    def test_a_channel_that_left_is_counted_once(self, late: str) -> None:
        standing = Standing(unit=UNIT, limit=1000, paid=1000)
        payee = make_payee(standing)
        payee.begin(A)
        payee.deliver(A, SEGMENT, 30)
        payee.meter.leave()
        assert (standing.unpaid, standing.written_off) == (0, 30)
        if late == "handler":
            payee.take_back(A, SEGMENT, 5)
        elif late == "report":
            payee.settle(A, {SEGMENT: 12})
        else:
            pay(payee, 20)
        payee.meter.leave()
        assert (standing.paid, standing.unpaid, standing.written_off) == (1000, 0, 30)


class TestCalls:
    def test_an_id_is_used_once(self) -> None:
        payee = make_payee()
        payee.begin(A)
        with pytest.raises(CallRepeated):
            payee.begin(A)
        payee.settle(A, {})
        with pytest.raises(CallRepeated):
            payee.begin(A)

    def test_a_call_reported_before_it_arrives_is_refused(self) -> None:
        payee = make_payee()
        assert payee.settle(A, {SEGMENT: 0}) == {}
        with pytest.raises(CallRepeated):
            payee.begin(A)

    def test_the_memory_of_ended_calls_is_bounded(self) -> None:
        payee = make_payee()
        for number in range(REMEMBERED_CALLS + 1):
            payee.settle(number.to_bytes(16, "big"), {})
        payee.begin(bytes(16))
        with pytest.raises(CallRepeated):
            payee.begin((1).to_bytes(16, "big"))

    def test_so_is_that_of_calls_that_are_not_reported_on(self) -> None:
        payee = make_payee()
        for number in range(REMEMBERED_CALLS):
            payee.begin(number.to_bytes(16, "big"))
        with pytest.raises(RateLimited):
            payee.begin(A)
        payee.settle(bytes(16), {})
        payee.begin(A)

    def test_nothing_leaves_in_an_ended_call(self) -> None:
        payee = make_payee()
        payee.begin(A)
        payee.settle(A, {})
        payee.begin(B)
        payee.reconcile({})
        for call_id in (A, B):
            with pytest.raises(SessionEnded):
                payee.deliver(call_id, SEGMENT, 1)
        assert payee.meter.owed == 0
        assert payee.open_calls == 0

    def test_a_voided_call_owes_nothing_and_is_no_write_off(self) -> None:
        payee = make_payee()
        payee.begin(A)
        payee.deliver(A, SEGMENT, 8)
        payee.void(A)
        assert (payee.meter.owed, payee.standing.unpaid, payee.standing.written_off) == (0, 0, 0)
        payee.void(A)  # again, or after its caller settled it: nothing more to take back
        with pytest.raises(CallRepeated):
            payee.begin(A)
        assert payee.settle(A, {}) == {}
        payee.void(A)
        assert (payee.meter.owed, payee.standing.unpaid, payee.standing.written_off) == (0, 0, 0)

    def test_what_a_payer_used_of_a_voided_call_is_counted(self) -> None:
        payee = make_payee()
        payee.begin(A)
        payee.deliver(A, SEGMENT, 8)
        payee.void(A)
        with pytest.raises(CountsDiffer):
            payee.settle(A, {SEGMENT: 9})
        assert payee.settle(A, {SEGMENT: 5}) == {SEGMENT: 5}
        assert (payee.meter.owed, payee.standing.unpaid, payee.standing.written_off) == (5, 5, 0)
        with pytest.raises(CountsDiffer):
            payee.settle(A, {SEGMENT: 5})

    @pytest.mark.parametrize("accepted", [{SEGMENT: 9}, {SEGMENT: -1}, {Segment(b"?" * 32, LINE): 1}])
    def test_a_report_that_cannot_be_true_is_refused(self, accepted: dict[Segment, int]) -> None:
        payee = make_payee()
        payee.begin(A)
        payee.deliver(A, SEGMENT, 8)
        with pytest.raises(CountsDiffer):
            payee.settle(A, accepted)
        with pytest.raises(CountsDiffer):
            payee.settle(B, {SEGMENT: 1})
        assert (payee.meter.owed, payee.standing.written_off) == (8, 0)

    def test_unpaid_units_are_written_off_and_end_the_credit(self) -> None:
        payee = make_payee()
        payee.begin(A)
        payee.deliver(A, SEGMENT, 10)
        assert payee.settle(A, {SEGMENT: 3}) == {SEGMENT: 3}
        assert (payee.meter.owed, payee.standing.written_off, payee.standing.credit) == (3, 7, 3)

    def test_prepaid_units_are_forfeited_beyond_the_allowance(self) -> None:
        payee = make_payee(Standing(unit=UNIT, limit=1000))
        pay(payee, 10)
        payee.begin(A)
        payee.deliver(A, SEGMENT, 10)
        assert payee.settle(A, {SEGMENT: 3}) == {SEGMENT: 10}
        assert (payee.meter.owed, payee.standing.written_off) == (10, 0)

    def test_a_known_payer_gets_prepaid_units_back_within_its_allowance(self) -> None:
        standing = Standing(unit=UNIT, limit=1000, paid=1000)
        payee = make_payee(standing)
        pay(payee, 30)
        payee.begin(A)
        payee.deliver(A, SEGMENT, 30)
        assert payee.settle(A, {SEGMENT: 0}) == {SEGMENT: 20}
        assert (payee.meter.owed, standing.written_off, standing.room) == (20, 10, 0)


class TestReconcile:
    def test_what_a_payee_forgot_is_owed_again(self) -> None:
        payee = make_payee()
        assert payee.reconcile({SEGMENT: 25, Segment(b"?" * 32, LINE): 5})[SEGMENT] == 25
        assert payee.meter.owed == 25

    @pytest.mark.parametrize("units", [10_001, MAX_UNITS + 1, -1])
    def test_claims_beyond_the_deposit_are_refused(self, units: int) -> None:
        payee = make_payee()
        with pytest.raises(CountsDiffer):
            payee.reconcile({SEGMENT: units})
        assert payee.meter.owed == 0
        assert payee.reconcile({SEGMENT: 10_000})[SEGMENT] == 10_000

    def test_free_units_are_bounded_too(self) -> None:
        with pytest.raises(CountsDiffer):
            make_payee().reconcile({NOTHING: MAX_UNITS + 1})

    def test_of_free_units_the_count_of_the_payee_stands(self) -> None:
        payee = make_payee()
        payee.begin(A)
        payee.deliver(A, NOTHING, 5)
        payer = Payer(ledger_id=LEDGER, channel_id=CHANNEL, key=KEY, deposit=9, signed=0, tally=Tally())
        payer.pin(SHEET)
        payer.tally.add(NOTHING, MAX_UNITS)
        settled = payee.reconcile({segment: units for segment, _, units in payer.tally})
        assert settled[NOTHING] == 5
        payer.reconcile(best=None, settled=settled)
        assert list(payer.tally) == list(payee.meter.tally), "an honest payer goes on with equal books"
        assert payee.reconcile({NOTHING: 3})[NOTHING] == 3

    def test_a_channel_that_has_counted_all_it_can_delivers_no_more(self) -> None:
        cheap = PriceSheet(b"2" * 32, {LINE: Price(Rate(1, MAX_UNITS, Unit.BYTE), UNIT)})
        segment = Segment(cheap.digest, LINE)
        payee = make_payee()
        payee.pin(cheap)
        payee.reconcile({segment: MAX_UNITS - 4})
        assert payee.meter.owed == 1
        assert payee.meter.affordable([(segment, 4)])
        assert not payee.meter.affordable([(segment, 5)])

    def test_claims_are_counted_before_anything_is_written_off(self) -> None:
        # The payee forgot 20 of one line; 20 of another were never accepted. 20 are paid: whichever
        # line comes first, what is owed stays within what is accepted and paid.
        other = Segment(b"2" * 32, LINE)
        payee = make_payee(Standing(unit=UNIT, limit=0))
        payee.pin(PriceSheet(b"2" * 32, {LINE: Price(Rate(1, 1, Unit.BYTE), UNIT)}))
        pay(payee, 20)
        payee.begin(A)
        payee.deliver(A, SEGMENT, 20)
        assert payee.reconcile({other: 20})[SEGMENT] == 0
        assert payee.meter.owed == 20


actions = st.lists(
    st.one_of(
        st.tuples(st.just("get"), st.integers(0, 1), st.integers(0, 1), st.integers(1, 200)),
        st.tuples(st.just("get"), st.integers(0, 1), st.integers(0, 1), st.integers(1, 10)),
        st.tuples(st.just("pay"), st.integers(0, 1), st.integers(1, 400)),
        st.tuples(st.just("report"), st.integers(0, 1), st.integers(0, 1), st.sampled_from([0, 0, 1, 5])),
        st.tuples(st.just("reopen"), st.integers(0, 2), st.integers(0, 12)),
        st.tuples(st.just("leave"), st.integers(0, 2)),
    ),
    min_size=20,
    max_size=60,
)


class Thief:
    """One identity with several channels, and what it really got for what it really paid."""

    def __init__(self, standing: Standing) -> None:
        self.standing = standing
        self.channels = [make_payee(standing, channel=bytes([n]) * 32, deposit=2000) for n in range(3)]
        self.opened = 3
        self.received = self.paid = 0

    def act(self, action: tuple[Any, ...]) -> None:
        kind, index, *args = action
        payee = self.channels[index]
        if kind == "get":
            call_id, units = bytes([args[0]]) * 16, args[1]
            if not payee.is_open(call_id):
                payee._ended.pop(call_id, None)  # under a fresh name
                payee.begin(call_id)
            with suppress(SessionEnded):
                self.received += units if deliver(payee, call_id, units) else 0
        elif kind == "pay":
            before = payee.meter.paid
            pay(payee, min(2000, before + args[0]))
            self.paid += payee.meter.paid - before
        elif kind == "report":
            with suppress(CountsDiffer):
                payee.settle(bytes([args[0]]) * 16, {SEGMENT: args[1]})
        elif kind == "reopen":
            payee.reconcile({SEGMENT: payee.meter.tally.units(SEGMENT) * args[0] // 12})
        else:
            payee.meter.leave()
            self.opened += 1
            self.channels[index] = make_payee(
                self.standing, channel=self.opened.to_bytes(32, "big"), deposit=2000
            )


@settings(max_examples=200, deadline=None)
@given(actions, st.sampled_from([0, UNIT]), st.sampled_from([5, 50, 10_000]))
def test_a_hostile_payer_costs_no_more_than_its_exposure(
    actions: list[tuple[Any, ...]], lease: int, limit: int
) -> None:
    standing = Standing(unit=UNIT, limit=limit, lease=lease)
    thief = Thief(standing)
    for action in actions:
        thief.act(action)
        assert standing.unpaid + standing.written_off <= standing.exposure
        assert thief.received - thief.paid <= standing.exposure <= max(lease, thief.paid * 5 // 100)


@settings(max_examples=25, deadline=None)
@given(st.lists(actions, min_size=2, max_size=4), st.integers(0, 4))
def test_fresh_identities_cost_the_strangers_budget_and_five_percent(
    lives: list[list[tuple[Any, ...]]], leases: int
) -> None:
    budget = leases * UNIT + UNIT // 2
    strangers = Strangers(total=budget, per_network=budget)
    loss = earned = 0
    for life in lives:
        lease = UNIT if strangers.lend("10.0.0.0/24", UNIT, 0) else 0
        thief = Thief(Standing(unit=UNIT, limit=10_000, lease=lease))
        for action in life:
            thief.act(action)
        loss += max(0, thief.received - thief.paid)
        earned += thief.paid * 5 // 100
    assert loss <= budget + earned
