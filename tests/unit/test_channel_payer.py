"""The payer: counts what it accepts, signs what is saved, and a hostile node gets no more."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btt.sdk.channel import Durable, Intent, Line, Payer, Price, PriceSheet, Segment, SignedUpdate, Tally
from btt.sdk.errors import BudgetExceeded, CountsDiffer, UpdateInvalid
from btt.sdk.keys import PrivateKey, use_backend
from btt.sdk.money import MAX_UNITS, Rate, Unit
from btt.sdk.signing import ChannelUpdate, sign, verify

LEDGER, CHANNEL = b"L" * 32, b"C" * 32
KEY, STRANGER = PrivateKey(b"\x01" * 32), PrivateKey(b"\x02" * 32)
LINE = Line("test.Files", Unit.BYTE)
UNIT = 10
"""Units, and base units, of one verify unit of the plain sheet."""
PLAIN = PriceSheet(b"1" * 32, {LINE: Price(Rate(1, 1, Unit.BYTE), UNIT)})
SEGMENT = Segment(PLAIN.digest, LINE)
A, B = b"a" * 16, b"b" * 16


def make_payer(
    *,
    deposit: int = 1000,
    signed: int = 0,
    tally: Tally | None = None,
    sheet: PriceSheet = PLAIN,
    key: PrivateKey = KEY,
) -> Payer:
    payer = Payer(
        ledger_id=LEDGER,
        channel_id=CHANNEL,
        key=key,
        deposit=deposit,
        signed=signed,
        tally=tally or Tally(),
    )
    payer.pin(sheet)
    return payer


def pay(payer: Payer, cumulative: int) -> SignedUpdate:
    return payer.sign(Durable.write(payer.intend(cumulative), lambda _: None))


def pay_intent(payer: Payer, cumulative: int) -> Intent:
    intent = payer.intend(cumulative)
    payer.sign(Durable.write(intent, lambda _: None))
    return intent


def take(payer: Payer, call_id: bytes, units: int, *, accepted: int | None = None) -> None:
    payer.received(call_id, SEGMENT, units)
    payer.accepted(call_id, SEGMENT, units if accepted is None else accepted)


def update(cumulative: int, key: PrivateKey = KEY, channel: bytes = CHANNEL) -> SignedUpdate:
    message = ChannelUpdate(channel=channel, cumulative=cumulative)
    return SignedUpdate(cumulative, sign(key, message, LEDGER))


class TestCounting:
    def test_only_what_is_accepted_is_owed(self) -> None:
        payer = make_payer()
        payer.begin(A)
        take(payer, A, 10, accepted=4)
        assert payer.tally.owed == 4
        assert payer.end(A).received == {SEGMENT: 10}
        assert payer.end(A).accepted == {SEGMENT: 4}

    def test_more_than_was_received_cannot_be_accepted(self) -> None:
        payer = make_payer()
        payer.begin(A)
        payer.begin(B)
        take(payer, A, 10)
        payer.received(B, SEGMENT, 5)
        for call_id, units in ((A, 1), (B, 6), (B, -1)):
            with pytest.raises(ValueError, match="more accepted"):
                payer.accepted(call_id, SEGMENT, units)
        assert payer.tally.owed == 10

    def test_nothing_is_accepted_after_the_report(self) -> None:
        payer = make_payer()
        payer.begin(A)
        payer.received(A, SEGMENT, 10)
        payer.end(A)
        with pytest.raises(ValueError, match="after the report"):
            payer.accepted(A, SEGMENT, 10)
        assert payer.tally.owed == 0


class TestBudget:
    @settings(max_examples=150, deadline=None)
    @given(
        st.integers(1, 50),
        st.integers(1, 50),
        st.integers(0, 2000),
        st.integers(0, 500),
        st.integers(0, 500),
        st.integers(0, 50),
    )
    def test_what_is_affordable_can_be_reserved_and_no_more(
        self, amount: int, per: int, deposit: int, accepted: int, held: int, other: int
    ) -> None:
        extra = Line("test.Files", Unit.COUNT)
        sheet = PriceSheet(
            b"2" * 32,
            {LINE: Price(Rate(amount, per, Unit.BYTE), 1), extra: Price(Rate(3, 2, Unit.COUNT), 1)},
        )
        segment, second = Segment(sheet.digest, LINE), Segment(sheet.digest, extra)
        payer = make_payer(deposit=deposit, sheet=sheet)
        payer.begin(A)
        for where, units in ((second, other), (segment, held)):
            with suppress(BudgetExceeded):
                payer.reserve(where, units)
        payer.received(A, segment, accepted)
        payer.accepted(A, segment, accepted)
        units = payer.affordable(segment)
        if units:
            payer.reserve(segment, units)
        assert payer.affordable(segment) == 0
        with pytest.raises(BudgetExceeded):
            payer.reserve(segment, 50)  # at least one base unit, whatever the rounding left
        payer.release(segment, units)
        assert payer.affordable(segment) == units
        with pytest.raises(BudgetExceeded):
            payer.reserve(segment, units + 1)

    def test_a_refusal_reserves_nothing(self) -> None:
        payer = make_payer(deposit=10)
        with pytest.raises(BudgetExceeded):
            payer.reserve(SEGMENT, 11)
        payer.reserve(SEGMENT, 10)
        payer.release(SEGMENT, 4)
        assert payer.affordable(SEGMENT) == 4

    def test_more_than_is_reserved_cannot_be_released(self) -> None:
        payer = make_payer(deposit=10)
        payer.reserve(SEGMENT, 5)
        with pytest.raises(ValueError, match="more released"):
            payer.release(SEGMENT, 6)
        assert payer.affordable(SEGMENT) == 5
        with pytest.raises(ValueError, match="more released"):
            payer.release(Segment(b"?" * 32, LINE), 1)

    def test_what_is_free_is_never_refused(self) -> None:
        sheet = PriceSheet(b"2" * 32, {LINE: Price(Rate(0, 1, Unit.BYTE), 1)})
        payer = make_payer(deposit=0, sheet=sheet)
        assert payer.affordable(Segment(sheet.digest, LINE)) == MAX_UNITS
        payer.reserve(Segment(sheet.digest, LINE), 10**12)

    def test_reconcile_frees_what_was_reserved(self) -> None:
        payer = make_payer(deposit=10)
        payer.reserve(SEGMENT, 10)
        payer.reconcile(best=None, settled={})
        assert payer.affordable(SEGMENT) == 10


class TestSigning:
    def test_only_a_saved_intent_of_this_channel_is_signed(self) -> None:
        payer = make_payer()
        with pytest.raises(TypeError):
            payer.sign(payer.intend(5))  # type: ignore[arg-type]
        other = Durable.write(Intent(b"X" * 32, 5, ()), lambda _: None)
        with pytest.raises(TypeError):
            payer.sign(other)
        assert payer.signed == 0

    def test_a_failed_write_signs_nothing(self) -> None:
        payer = make_payer()

        def fail(_: Intent) -> None:
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            payer.sign(Durable.write(payer.intend(5), fail))
        assert payer.signed == 0
        assert payer.last() is None

    @pytest.mark.parametrize("backend", ["coincurve", "cryptography"])
    def test_signing_again_after_a_restart_gives_the_same_bytes(self, backend: str) -> None:
        first = pay(make_payer(), 7)
        with use_backend(backend):  # type: ignore[arg-type]
            restarted = make_payer(signed=7, key=PrivateKey(KEY.secret))
            assert restarted.last() == first
            # Crashed after the write and before the signature: the same again.
            saved = Durable.write(Intent(CHANNEL, 7, ()), lambda _: None)
            assert restarted.sign(saved) == first
        verify(KEY.public, ChannelUpdate(channel=CHANNEL, cumulative=7), LEDGER, first.signature)

    def test_an_old_intent_never_lowers_what_is_signed(self) -> None:
        payer = make_payer()
        old = Durable.write(payer.intend(3), lambda _: None)
        pay(payer, 7)
        payer.sign(old)
        assert payer.signed == 7
        last = payer.last()
        assert last is not None
        assert last.cumulative == 7

    def test_an_intent_holds_what_changed_up_to_it(self) -> None:
        payer = make_payer()
        first = payer.intend(5)
        payer.begin(A)
        take(payer, A, 4)
        assert [units for *_, units in first.counts] == [0]
        payer.sign(Durable.write(first, lambda _: None))
        assert [units for *_, units in payer.intend(5).counts] == [4]

    def test_what_an_unsaved_intent_held_comes_again(self) -> None:
        payer = make_payer()
        lost = payer.intend(5)
        assert pay_intent(payer, 5).counts == lost.counts != ()
        assert pay_intent(payer, 6).counts == lost.counts

    def test_an_intent_stays_within_the_rules(self) -> None:
        payer = make_payer(deposit=25)
        payer.begin(A)
        take(payer, A, 8)
        assert payer.intend(8 + UNIT).cumulative == 18
        with pytest.raises(ValueError, match="more than is owed"):
            payer.intend(8 + UNIT + 1)
        pay(payer, 18)
        with pytest.raises(ValueError, match="less than was signed"):
            payer.intend(17)
        take(payer, A, 16)
        assert payer.intend(25).cumulative == 25
        with pytest.raises(ValueError, match="more than is owed"):
            payer.intend(26)

    def test_when_to_pay(self) -> None:
        payer = make_payer(deposit=100)
        payer.begin(A)
        assert payer.due(credit=60, demand=0, flush=True) is None
        take(payer, A, 19)
        assert payer.due(credit=40, demand=0, flush=False) is None
        assert payer.due(credit=40, demand=0, flush=True) == 19
        take(payer, A, 6)
        assert payer.due(credit=40, demand=0, flush=False) == 25  # 40 less an eighth and one unit
        assert payer.due(credit=41, demand=0, flush=False) is None
        take(payer, A, 10)
        assert payer.due(credit=1000, demand=1, flush=False) == 35  # all that is owed, once asked
        assert payer.due(credit=1000, demand=40, flush=False) == 40
        assert payer.due(credit=1000, demand=10**9, flush=False) == 45  # one unit ahead
        take(payer, A, 64)
        assert payer.due(credit=0, demand=10**9, flush=False) == 100  # the deposit

    def test_what_has_arrived_hastens_the_payment_of_what_is_accepted(self) -> None:
        payer = make_payer(deposit=100)
        payer.begin(A)
        payer.begin(B)
        take(payer, A, 5)
        payer.received(B, SEGMENT, 19)
        assert payer.due(credit=40, demand=0, flush=False) is None
        payer.received(B, SEGMENT, 1)
        assert payer.due(credit=40, demand=0, flush=False) == 5
        payer.end(B)
        payer.settle(B, {})
        assert payer.due(credit=60, demand=0, flush=False) is None


class TestSettling:
    def test_what_was_prepaid_can_be_forfeited(self) -> None:
        payer = make_payer()
        payer.begin(A)
        pay(payer, 10)
        payer.end(A)
        payer.settle(A, {SEGMENT: 10})
        assert payer.tally.owed == 10

    def test_not_more_than_was_prepaid(self) -> None:
        payer = make_payer()
        payer.begin(A)
        pay(payer, 10)
        payer.end(A)
        with pytest.raises(CountsDiffer):
            payer.settle(A, {SEGMENT: 11})
        assert payer.tally.owed == 0

    def test_what_accepted_units_used_up_is_not_forfeited_again(self) -> None:
        payer = make_payer()
        payer.begin(A)
        pay(payer, 10)
        take(payer, A, 10)
        payer.end(A)
        with pytest.raises(CountsDiffer):
            payer.settle(A, {SEGMENT: 11})
        assert payer.tally.owed == 10

    def test_one_prepayment_is_forfeited_once(self) -> None:
        payer = make_payer()
        payer.begin(A)
        payer.begin(B)
        pay(payer, 10)
        payer.end(A)
        payer.end(B)
        payer.settle(A, {SEGMENT: 6})
        with pytest.raises(CountsDiffer):
            payer.settle(B, {SEGMENT: 5})
        payer.settle(B, {SEGMENT: 4})
        assert payer.tally.owed == 10

    def test_what_is_paid_after_the_report_is_not_forfeited(self) -> None:
        payer = make_payer()
        payer.begin(A)
        payer.end(A)
        pay(payer, 10)
        payer.end(A)  # reporting again changes nothing
        with pytest.raises(CountsDiffer):
            payer.settle(A, {SEGMENT: 1})

    def test_units_accepted_after_the_report_do_not_hide_what_was_prepaid(self) -> None:
        # The node settles A first and serves B on credit; B's units arrive before A's settlement.
        payer = make_payer()
        payer.begin(A)
        payer.begin(B)
        pay(payer, 10)
        payer.end(A)
        take(payer, B, 10)
        payer.settle(A, {SEGMENT: 10})
        assert payer.tally.owed == 20

    def test_no_more_free_units_are_forfeited_than_can_be_counted(self) -> None:
        free = Line("test.Files", Unit.COUNT)
        payer = make_payer(
            sheet=PriceSheet(b"2" * 32, {**PLAIN.prices, free: Price(Rate(0, 1, Unit.COUNT), 1)})
        )
        segment = Segment(b"2" * 32, free)
        payer.tally.add(segment, 1)
        payer.begin(A)
        pay(payer, 10)
        payer.end(A)
        with pytest.raises(CountsDiffer):
            payer.settle(A, {segment: MAX_UNITS})
        assert payer.tally.units(segment) == 1

    def test_a_unit_that_was_prepaid_in_part_is_forfeited_whole(self) -> None:
        sheet = PriceSheet(b"2" * 32, {LINE: Price(Rate(10, 1, Unit.BYTE), 1)})
        segment = Segment(sheet.digest, LINE)
        payer = make_payer(sheet=sheet)
        payer.begin(A)
        pay(payer, 5)
        payer.end(A)
        with pytest.raises(CountsDiffer):
            payer.settle(A, {segment: 2})
        payer.settle(A, {segment: 1})
        assert payer.tally.owed == 10
        payer.begin(B)
        payer.end(B)
        with pytest.raises(CountsDiffer):
            payer.settle(B, {segment: 1})

    @pytest.mark.parametrize(
        "settled",
        [
            {},
            {SEGMENT: 4},
            {SEGMENT: -1},
            {SEGMENT: 5, Segment(b"?" * 32, LINE): 1},
            {SEGMENT: 2**64},
        ],
    )
    def test_books_that_cannot_be_true_are_refused(self, settled: dict[Segment, int]) -> None:
        payer = make_payer()
        payer.begin(A)
        take(payer, A, 5)
        payer.end(A)
        with pytest.raises(CountsDiffer):
            payer.settle(A, settled)
        assert payer.tally.owed == 5

    def test_a_settlement_of_no_reported_call_is_refused(self) -> None:
        payer = make_payer()
        payer.begin(A)
        for call_id in (A, B):
            with pytest.raises(CountsDiffer):
                payer.settle(call_id, {})
        payer.end(A)
        payer.settle(A, {SEGMENT: 0, Segment(b"?" * 32, LINE): 0})
        with pytest.raises(CountsDiffer):
            payer.settle(A, {})


class TestReconcile:
    def test_a_restored_wallet_takes_its_own_update_back(self) -> None:
        payer = make_payer()
        payer.reconcile(best=update(70), settled={SEGMENT: 70})
        assert (payer.signed, payer.tally.owed) == (70, 70)

    @pytest.mark.parametrize(
        "best",
        [
            update(70, STRANGER),
            update(70, channel=b"X" * 32),
            update(1001),
            SignedUpdate(70, b""),
            SignedUpdate(70, b"\xff" * 65),
            SignedUpdate(71, update(70).signature),
            SignedUpdate(2**70, update(70).signature),
        ],
    )
    def test_a_forged_update_is_refused(self, best: SignedUpdate) -> None:
        payer = make_payer()
        with pytest.raises(UpdateInvalid):
            payer.reconcile(best=best, settled={})
        assert payer.signed == 0

    def test_an_update_that_is_not_higher_changes_nothing(self) -> None:
        payer = make_payer(signed=10)
        payer.reconcile(best=SignedUpdate(10, b"junk"), settled={})
        payer.reconcile(best=None, settled={})
        assert payer.signed == 10

    @pytest.mark.parametrize(
        "settled", [{SEGMENT: 11}, {SEGMENT: 2**64}, {SEGMENT: -1}, {Segment(b"?" * 32, LINE): 1}]
    )
    def test_units_neither_accepted_nor_paid_are_refused(self, settled: dict[Segment, int]) -> None:
        payer = make_payer()
        pay(payer, 10)
        with pytest.raises(CountsDiffer):
            payer.reconcile(best=None, settled=settled)
        assert payer.tally.owed == 0

    def test_free_units_are_bounded_too(self) -> None:
        sheet = PriceSheet(b"2" * 32, {LINE: Price(Rate(0, 1, Unit.BYTE), 1)})
        payer = make_payer(sheet=sheet, signed=1)
        with pytest.raises(CountsDiffer):
            payer.reconcile(best=None, settled={Segment(sheet.digest, LINE): MAX_UNITS + 1})

    def test_lower_books_of_the_node_do_not_lower_ours(self) -> None:
        payer = make_payer()
        payer.begin(A)
        take(payer, A, 5)
        payer.reconcile(best=None, settled={SEGMENT: 3, Segment(b"?" * 32, LINE): 0})
        assert payer.tally.owed == 5
        with pytest.raises(CountsDiffer):
            payer.settle(A, {SEGMENT: 5})


moves = st.one_of(
    st.tuples(st.just("begin")),
    st.tuples(st.just("data"), st.integers(0, 2), st.integers(1, 10), st.booleans()),
    st.tuples(st.just("end"), st.integers(0, 2)),
    st.tuples(st.just("demand"), st.integers(0, 300), st.integers(0, 60), st.booleans()),
    st.tuples(st.just("settle"), st.integers(0, 5), st.integers(-3, 15)),
    st.tuples(st.just("garbage"), st.binary(min_size=16, max_size=16), st.integers(-5, 2**64)),
    st.tuples(
        st.just("reconcile"), st.integers(-2, 12), st.sampled_from(["none", "forged", "above", "replayed"])
    ),
)


@settings(max_examples=250, deadline=None)
@given(st.lists(moves, max_size=60), st.integers(0, 200))
def test_a_hostile_node_gets_what_was_accepted_and_one_unit(moves: list[tuple], deposit: int) -> None:  # type: ignore[type-arg]
    """At one base unit a unit there is no rounding: the oracle is plain arithmetic.

    Each forfeit must be covered by what was prepaid and idle when its call was reported.
    """
    payer = make_payer(deposit=deposit)
    accepted = forfeited = calls = 0
    running: list[bytes] = []
    reported: dict[bytes, tuple[int, int]] = {}  # units accepted; base units idle, less forfeits since
    updates: list[SignedUpdate] = []
    for kind, *args in moves:
        if kind == "begin":
            calls += 1
            running.append(calls.to_bytes(16, "big"))
            payer.begin(running[-1])
        elif kind == "data" and running:
            good = args[2] and accepted + forfeited + args[1] <= deposit
            take(payer, running[args[0] % len(running)], args[1], accepted=args[1] if good else 0)
            accepted += args[1] if good else 0
        elif kind == "end" and running:
            call_id = running.pop(args[0] % len(running))
            took = payer.end(call_id).accepted.get(SEGMENT, 0)
            reported[call_id] = (took, payer.signed - accepted - forfeited)
        elif kind == "demand":
            due = payer.due(credit=args[1], demand=args[0], flush=args[2])
            if due is not None:
                updates.append(pay(payer, due))
                assert payer.signed == due
        elif kind == "settle" and (reported or running):
            known = list(reported) + running
            call_id = known[args[0] % len(known)]
            took, idle = reported.get(call_id, (0, 0))
            lost = args[1]
            if call_id in reported and lost >= 0 and (lost <= idle or lost == 0):
                payer.settle(call_id, {SEGMENT: took + lost})
                forfeited += lost
                del reported[call_id]
                reported = {k: (t, i - lost) for k, (t, i) in reported.items()}
            else:
                with pytest.raises(CountsDiffer):
                    payer.settle(call_id, {SEGMENT: took + lost})
        elif kind == "garbage":
            with pytest.raises(CountsDiffer):
                payer.settle(args[0], {SEGMENT: args[1]})
        elif kind == "reconcile":
            best = {
                "none": None,
                "forged": update(payer.signed + 1, STRANGER),
                "above": update(deposit + 1),
                "replayed": updates[0] if updates else None,
            }[args[1]]
            claimed = accepted + forfeited + args[0]
            lost = max(0, args[0])
            if best is not None and best.cumulative > payer.signed:
                with pytest.raises(UpdateInvalid):
                    payer.reconcile(best=best, settled={SEGMENT: claimed})
            elif claimed < 0 or (lost and claimed > payer.signed):
                with pytest.raises(CountsDiffer):
                    payer.reconcile(best=best, settled={SEGMENT: claimed})
            else:
                payer.reconcile(best=best, settled={SEGMENT: claimed})
                forfeited += lost
                running, reported = [], {}
        assert payer.tally.owed == accepted + forfeited
        assert payer.signed <= min(deposit, accepted + forfeited + UNIT)


def test_a_budget_below_the_deposit_limits_new_signatures_but_not_what_is_proven() -> None:
    payer = Payer(
        ledger_id=LEDGER, channel_id=CHANNEL, key=KEY, deposit=1000, signed=0, tally=Tally(), limit=100
    )
    earlier = Payer(ledger_id=LEDGER, channel_id=CHANNEL, key=KEY, deposit=1000, signed=500, tally=Tally())
    payer.reconcile(best=earlier.last(), settled={})
    assert payer.signed == 500
    assert payer.due(credit=0, demand=501, flush=True) is None
