"""Tallies: both sides owe the same whatever the messages were, and old offers stand still."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btt.sdk.channel import Line, Payee, Payer, Price, PriceSheet, Segment, Standing, Tally
from btt.sdk.keys import PrivateKey
from btt.sdk.money import MAX_UNITS, Rate, Unit

LEDGER, CHANNEL = b"L" * 32, b"C" * 32
KEY = PrivateKey(b"\x01" * 32)
BYTES, CALLS = Line("test.Files", Unit.BYTE), Line("test.Files", Unit.COUNT)

rates = st.builds(Rate, st.integers(0, 10**7), st.integers(1, 2**31), st.just(Unit.BYTE))


def make_sheet(name: bytes, byte_rate: Rate, call_rate: Rate) -> PriceSheet:
    return PriceSheet(name * 32, {BYTES: Price(byte_rate, 1000), CALLS: Price(call_rate, 1)})


def make_pair(deposit: int = 10**15) -> tuple[Payer, Payee]:
    payer = Payer(ledger_id=LEDGER, channel_id=CHANNEL, key=KEY, deposit=deposit, signed=0, tally=Tally())
    payee = Payee(
        ledger_id=LEDGER,
        channel_id=CHANNEL,
        key=KEY.public,
        deposit=deposit,
        best=None,
        tally=Tally(),
        standing=Standing(unit=1, limit=0),
    )
    return payer, payee


def ceil_cost(rate: Rate, units: int) -> int:
    whole, rest = divmod(units * rate.amount, rate.per)
    return whole + (1 if rest else 0)


@settings(max_examples=80, deadline=None)
@given(rates, rates, st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 10**6))), st.data())
def test_any_split_over_any_calls_owes_the_same(
    byte_rate: Rate, call_rate: Rate, messages: list[tuple[int, bool, int]], data: st.DataObject
) -> None:
    call_rate = Rate(call_rate.amount, call_rate.per, Unit.COUNT)
    sheet = make_sheet(b"1", byte_rate, call_rate)
    payer, payee = make_pair()
    payer.pin(sheet)
    payee.pin(sheet)
    for number in range(4):
        payer.begin(bytes([number]) * 16)
        payee.begin(bytes([number]) * 16)
    totals = {BYTES: 0, CALLS: 0}
    for number, is_call, units in messages:
        line = CALLS if is_call else BYTES
        totals[line] += units
        payee.deliver(bytes([number]) * 16, Segment(sheet.digest, line), units)
    # The calls race: the payer sees the same messages in another order, cut up further.
    for number, is_call, units in data.draw(st.permutations(messages)):
        call_id, segment = bytes([number]) * 16, Segment(sheet.digest, CALLS if is_call else BYTES)
        cut = data.draw(st.integers(0, units))
        for part in (cut, units - cut):
            payer.received(call_id, segment, part)
            payer.accepted(call_id, segment, part)
    expected = ceil_cost(byte_rate, totals[BYTES]) + ceil_cost(call_rate, totals[CALLS])
    assert payer.tally.owed == payee.meter.owed == expected


def test_a_new_offer_freezes_the_old_segments() -> None:
    payer, payee = make_pair()
    first = make_sheet(b"1", Rate(1, 3, Unit.BYTE), Rate(5, 1, Unit.COUNT))
    second = make_sheet(b"2", Rate(2, 3, Unit.BYTE), Rate(5, 1, Unit.COUNT))
    payer.begin(b"a" * 16)
    payee.begin(b"a" * 16)
    for sheet in (first, second):
        payer.pin(sheet)
        payee.pin(sheet)
        segment = Segment(sheet.digest, BYTES)
        payee.deliver(b"a" * 16, segment, 4)
        payer.received(b"a" * 16, segment, 4)
        payer.accepted(b"a" * 16, segment, 4)
    # ceil(4/3) + ceil(8/3): each segment is rounded by itself, and the old one keeps its rate.
    assert payer.tally.owed == payee.meter.owed == 2 + 3
    assert payer.tally.units(Segment(first.digest, BYTES)) == 4


def test_a_segment_never_changes_its_rate() -> None:
    tally = Tally()
    segment = Segment(b"1" * 32, BYTES)
    tally.price(segment, Rate(1, 3, Unit.BYTE))
    tally.add(segment, 2)
    tally.price(segment, Rate(1, 3, Unit.BYTE))
    assert tally.units(segment) == 2
    with pytest.raises(ValueError, match="already has a rate"):
        tally.price(segment, Rate(2, 3, Unit.BYTE))
    with pytest.raises(ValueError, match="below zero"):
        tally.add(segment, -3)
    with pytest.raises(ValueError, match="above"):
        tally.add(segment, MAX_UNITS - 1)
    assert (tally.units(segment), tally.owed) == (2, 1)
    tally.add(segment, MAX_UNITS - 2)
    assert tally.units(segment) == MAX_UNITS


def test_a_copy_is_independent() -> None:
    tally = Tally()
    segment = Segment(b"1" * 32, BYTES)
    tally.price(segment, Rate(1, 3, Unit.BYTE))
    twin = tally.copy()
    tally.add(segment, 4)
    assert (twin.units(segment), twin.owed, tally.owed) == (0, 0, 2)
    assert list(twin) == [(segment, Rate(1, 3, Unit.BYTE), 0)]


@settings(max_examples=150, deadline=None)
@given(
    st.builds(Rate, st.integers(0, 20), st.integers(1, 20), st.just(Unit.BYTE)),
    st.integers(0, 60),
    st.integers(0, 80),
    st.integers(0, 40),
)
def test_refundable_takes_the_most_units_for_an_amount(
    rate: Rate, have: int, units: int, amount: int
) -> None:
    tally = Tally()
    segment = Segment(b"1" * 32, BYTES)
    tally.price(segment, rate)
    tally.add(segment, have)
    best = max(
        n for n in range(min(units, have) + 1) if ceil_cost(rate, have) - ceil_cost(rate, have - n) <= amount
    )
    assert tally.refundable(segment, units, amount) == best


@settings(max_examples=100, deadline=None)
@given(rates, st.integers(0, 10**9), st.integers(0, 1000))
def test_no_message_costs_more_than_the_dearest_unit(rate: Rate, have: int, units: int) -> None:
    sheet = make_sheet(b"1", rate, Rate(0, 1, Unit.COUNT))
    tally = Tally()
    for segment, price in sheet.segments():
        tally.price(segment, price)
    segment = Segment(sheet.digest, BYTES)
    tally.add(segment, have)
    assert tally.cost(segment, units) <= sheet.unit_charge == ceil_cost(rate, 1000)


def test_unit_charge_is_of_the_dearest_message_of_a_service() -> None:
    assert make_sheet(b"1", Rate(1, 3, Unit.BYTE), Rate(5, 1, Unit.COUNT)).unit_charge == 339
    other = Line("other.Service", Unit.CALL)
    for dear, most in ((333, 339), (340, 340)):
        sheet = make_sheet(b"1", Rate(1, 3, Unit.BYTE), Rate(5, 1, Unit.COUNT))
        prices = {**sheet.prices, other: Price(Rate(dear, 1, Unit.CALL), 1)}
        assert PriceSheet(sheet.digest, prices).unit_charge == most
    assert PriceSheet(b"1" * 32, {}).unit_charge == 0


def test_a_tally_names_each_change_until_it_is_saved() -> None:
    tally = Tally()
    sheet = make_sheet(b"1", Rate(1, 3, Unit.BYTE), Rate(5, 1, Unit.COUNT))
    (first, byte_rate), (second, call_rate) = sheet.segments()
    tally.price(first, byte_rate)
    tally.price(second, call_rate)
    assert set(tally.changes()) == {(first, byte_rate, 0), (second, call_rate, 0)}
    tally.saved()
    assert tally.changes() == ()
    tally.saved()
    tally.price(first, byte_rate)  # nothing new
    tally.add(first, 7)
    assert tally.changes() == ((first, byte_rate, 7),)
    tally.add(first, -2)
    tally.saved()
    assert tally.changes() == ((first, byte_rate, 5),)  # it changed while the write was under way


def test_what_a_failed_write_held_comes_with_every_later_one() -> None:
    tally = Tally()
    sheet = make_sheet(b"1", Rate(1, 3, Unit.BYTE), Rate(5, 1, Unit.COUNT))
    (first, byte_rate), (second, call_rate) = sheet.segments()
    tally.price(first, byte_rate)
    lost = tally.changes()
    tally.price(second, call_rate)
    for _ in range(2):
        assert set(tally.changes()) == {*lost, (second, call_rate, 0)}
        tally.saved()
