"""Amounts and prices: exact, bounded, and the same however units are split."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btt.sdk.money import BTT, GIB, MAX_UNITS, SUPPLY, Amount, Rate, Unit

AMOUNTS = st.integers(0, SUPPLY)
RATES = st.builds(
    Rate,
    st.one_of(st.integers(1, 10 * BTT), st.integers(1, SUPPLY)),
    st.one_of(st.integers(1, 2 * GIB), st.integers(1, MAX_UNITS)),
    st.sampled_from(Unit),
)
UNITS = st.one_of(st.integers(0, 2**40), st.integers(0, MAX_UNITS))


def test_supply_is_that_of_the_paper_and_fits_a_signed_64_bit_integer() -> None:
    assert SUPPLY == 990_000_000_000_000_000
    assert SUPPLY < 2**63


@pytest.mark.parametrize("value", [-1, SUPPLY + 1, 2**63 - 1, 2**64])
def test_an_amount_outside_the_supply_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="between 0"):
        Amount(value)


@pytest.mark.parametrize("value", [0.5, 1.0, True, "1", None])
def test_only_integers_are_amounts(value: object) -> None:
    with pytest.raises(TypeError):
        Amount(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("0.5 BTT", 500_000),
        ("0.5", 500_000),
        ("5", 5_000_000),
        (" 1.000001btt ", 1_000_001),
        ("12 base units", 12),
        ("1 base unit", 1),
        ("990000000000 BTT", SUPPLY),
    ],
)
def test_amounts_are_read_as_people_type_them(text: str, units: int) -> None:
    assert Amount.parse(text) == units


@pytest.mark.parametrize(
    "text",
    [
        "", "BTT", "-1", "+1", "1e6", ".5", "5.", "1,000", "1 000", "0x10", "1_0", "inf", "nan", "٣", "1 USD",
        "1.0000001", "1.5 base units", "990000000000.000001", "9" * 79, "9" * 5000, "0" * 90 + "1",
        "1 BTT BTT", "1\n\n2",
    ],
)  # fmt: skip
def test_what_is_not_an_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Amount.parse(text)


@pytest.mark.parametrize(
    ("units", "text"),
    [(0, "0 BTT"), (1, "0.000001 BTT"), (500_000, "0.5 BTT"), (BTT, "1 BTT"), (10 * BTT, "10 BTT")],
)
def test_amounts_are_shown_in_btt(units: int, text: str) -> None:
    assert str(Amount(units)) == f"{Amount(units)}" == text


@given(AMOUNTS)
def test_what_is_shown_reads_back(units: int) -> None:
    assert Amount.parse(str(Amount(units))) == units


def test_sums_are_checked_amounts_and_never_floats() -> None:
    assert type(Amount(3) + 4) is Amount
    assert type(4 + Amount(3)) is Amount
    assert type(7 - Amount(3)) is Amount
    assert sum([Amount(1), Amount(2)]) == Amount(3)
    with pytest.raises(ValueError):
        Amount(3) - 4
    with pytest.raises(ValueError):
        2 - Amount(3)
    with pytest.raises(ValueError):
        Amount(SUPPLY) + 1
    for other in (0.5, True):
        with pytest.raises(TypeError):
            Amount(3) + other
        with pytest.raises(TypeError):
            Amount(3) - other


def test_an_amount_serialises_as_a_number() -> None:
    assert json.dumps({"paid": Amount(500_000)}) == '{"paid": 500000}'


@given(RATES, UNITS, UNITS)
def test_more_units_never_cost_less(rate: Rate, units: int, more: int) -> None:
    assert rate.owed(units) <= rate.owed(units + more)


@given(RATES, UNITS)
def test_the_cost_is_the_exact_one_rounded_up(rate: Rate, units: int) -> None:
    owed = rate.owed(units)
    assert (owed - 1) * rate.per < units * rate.amount <= owed * rate.per


@given(RATES, st.lists(st.integers(0, 2**32), max_size=20), st.randoms(use_true_random=False))
def test_any_split_of_units_owes_the_same(rate: Rate, split: list[int], random: object) -> None:
    parts = list(split)
    random.shuffle(parts)  # type: ignore[attr-defined]
    total = paid = 0
    for part in parts:
        total += part
        paid += rate.owed(total) - paid  # what one more payment adds
    assert paid == rate.owed(sum(split))


@given(RATES, AMOUNTS)
def test_units_for_is_the_inverse_of_owed(rate: Rate, amount: int) -> None:
    units = rate.units_for(amount)
    assert 0 <= units <= MAX_UNITS
    assert rate.owed(units) <= amount
    if units < MAX_UNITS:
        assert amount < rate.owed(units + 1)


@pytest.mark.parametrize("amount", [0, 1, SUPPLY])
@pytest.mark.parametrize("per", [1, GIB, MAX_UNITS])
@pytest.mark.parametrize("units", [0, 1, SUPPLY, MAX_UNITS])
def test_the_ends_of_every_range_stay_exact(amount: int, per: int, units: int) -> None:
    rate = Rate(amount, per, Unit.BYTE)
    whole, rest = divmod(units * amount, per)
    assert rate.owed(units) == whole + (rest > 0)
    assert rate.units_for(SUPPLY) == (MAX_UNITS if amount == 0 else min(SUPPLY * per // amount, MAX_UNITS))


def test_a_free_rate_buys_everything() -> None:
    free = Rate(0, GIB, Unit.BYTE)
    assert free.owed(MAX_UNITS) == 0
    assert free.units_for(0) == MAX_UNITS


def test_negative_counts_are_refused() -> None:
    rate = Rate(1, 1, Unit.COUNT)
    with pytest.raises(ValueError):
        rate.owed(-1)
    with pytest.raises(ValueError):
        rate.units_for(-1)


@pytest.mark.parametrize(
    ("amount", "per", "unit", "error"),
    [
        (-1, 1, 1, ValueError),
        (SUPPLY + 1, 1, 1, ValueError),
        (1, 0, 1, ValueError),
        (1, MAX_UNITS + 1, 1, ValueError),
        (1, 1, 0, ValueError),
        (1, 1, 4, ValueError),
        (0.5, 1, 1, TypeError),
        (1, 0.5, 1, TypeError),
        (1, True, 1, TypeError),
    ],
)
def test_a_rate_outside_its_ranges_is_refused(amount: int, per: int, unit: int, error: type) -> None:
    with pytest.raises(error):
        Rate(amount, per, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "rate", "shown"),
    [
        ("1 BTT / GiB", Rate(BTT, GIB, Unit.BYTE), "1 BTT / GiB"),
        ("0.001 BTT / 10 calls", Rate(1000, 10, Unit.CALL), "0.001 BTT / 10 calls"),
        ("0.001 BTT / row", Rate(1000, 1, Unit.COUNT), "0.001 BTT / unit"),
        ("2 per request", Rate(2 * BTT, 1, Unit.COUNT), "2 BTT / unit"),
        ("5 base units per 10 mib", Rate(5, 10 * 2**20, Unit.BYTE), "0.000005 BTT / 10 MiB"),
        ("1/GB", Rate(BTT, 10**9, Unit.BYTE), "1 BTT / 1000000000 bytes"),
        ("0 BTT / byte", Rate(0, 1, Unit.BYTE), "0 BTT / byte"),
    ],
)
def test_prices_are_read_and_shown(text: str, rate: Rate, shown: str) -> None:
    assert Rate.parse(text) == rate
    assert str(rate) == shown


@pytest.mark.parametrize(
    "text", ["", "1 BTT", "/ GiB", "1 BTT / 0 GiB", "1 / -1 GiB", "1 / 0.5 GiB", "1 / mile"]
)
def test_what_is_not_a_price_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Rate.parse(text)


@given(RATES)
def test_a_shown_price_reads_back(rate: Rate) -> None:
    assert Rate.parse(str(rate)) == rate
