"""Credit: what one payer may owe, what strangers may owe together, and what counts as saved."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from btt.sdk.channel import Durable, Standing, Strangers

HOUR = 3_600_000


@pytest.mark.parametrize(
    ("standing", "credit"),
    [
        (Standing(unit=100, limit=1000), 0),
        (Standing(unit=100, limit=1000, lease=100), 100),
        (Standing(unit=100, limit=60, lease=100), 60),
        (Standing(unit=100, limit=1000, paid=1999), 99),
        (Standing(unit=100, limit=1000, lease=100, paid=1999), 100),
        (Standing(unit=100, limit=1000, paid=10_000), 500),
        (Standing(unit=100, limit=1000, paid=100_000), 1000),
        (Standing(unit=100, limit=1000, paid=10_000, written_off=100), 400),
        (Standing(unit=100, limit=1000, paid=10_000, written_off=101), 0),
        (Standing(unit=100, limit=9000, paid=100_000, written_off=1000), 4000),
        (Standing(unit=100, limit=9000, paid=100_000, written_off=1001), 0),
        (Standing(unit=100, limit=1000, lease=100, written_off=100), 0),
    ],
)
def test_credit_of_a_standing(standing: Standing, credit: int) -> None:
    assert standing.credit == credit


def test_room_is_bounded_by_what_is_unpaid_and_by_the_allowance() -> None:
    assert Standing(unit=100, limit=1000, paid=10_000).room == 100
    assert Standing(unit=100, limit=1000, paid=10_000, written_off=30).room == 70
    assert Standing(unit=100, limit=1000, paid=10_000, unpaid=450).room == 50
    assert Standing(unit=100, limit=1000, paid=10_000, written_off=101).room == 0
    assert Standing(unit=100, limit=1000).room == 0  # a stranger who prepays gets nothing back


@settings(max_examples=200, deadline=None)
@given(*(st.integers(0, 5000) for _ in range(3)), st.integers(0, 10**6), st.integers(0, 10**5))
def test_credit_never_exceeds_its_bounds(unit: int, limit: int, lease: int, paid: int, lost: int) -> None:
    standing = Standing(unit=unit, limit=limit, lease=lease, paid=paid, written_off=lost)
    assert 0 <= standing.credit <= limit
    assert standing.credit == 0 or standing.credit + lost <= max(lease, paid // 20)
    assert standing.is_stranger == (paid * 5 // 100 < unit)


class TestStrangers:
    def test_each_network_and_all_together_have_a_budget(self) -> None:
        strangers = Strangers(total=250, per_network=100)
        assert strangers.lend("10.0.0.0/24", 100, 0)
        assert not strangers.lend("10.0.0.0/24", 1, 0)
        assert strangers.lend("10.0.1.0/24", 100, 0)
        assert not strangers.lend("10.0.2.0/24", 51, 0)
        # A refusal takes nothing from either bucket.
        assert strangers.lend("10.0.2.0/24", 50, 0)
        assert not strangers.lend("10.0.3.0/24", 1, 0)

    def test_the_refusal_of_a_network_leaves_the_total_whole(self) -> None:
        strangers = Strangers(total=100, per_network=60)
        assert not strangers.lend("a", 61, 0)
        assert strangers.lend("a", 60, 0)
        assert strangers.lend("b", 40, 0)

    def test_refill_is_exact_at_any_interval(self) -> None:
        strangers = Strangers(total=10**9, per_network=7)
        assert strangers.lend("a", 7, 1)
        due = -(-HOUR // 7)  # the first millisecond at which one base unit is back
        for now in range(2, due, 997):  # looking often must not lose the fractions
            assert not strangers.lend("a", 1, now)
        assert not strangers.lend("a", 1, due)
        assert strangers.lend("a", 1, due + 1)
        assert strangers.lend("a", 6, HOUR + 1)
        assert not strangers.lend("a", 1, HOUR + 1)

    def test_the_total_refills_too(self) -> None:
        strangers = Strangers(total=10, per_network=10)
        assert strangers.lend("a", 10, 0)
        assert not strangers.lend("b", 5, HOUR // 2 - 1)
        assert strangers.lend("b", 5, HOUR // 2)

    def test_a_bucket_never_holds_more_than_an_hour(self) -> None:
        strangers = Strangers(total=10, per_network=10)
        assert strangers.lend("a", 1, 0)
        assert not strangers.lend("a", 11, 1000 * HOUR)
        assert strangers.lend("a", 10, 1000 * HOUR)

    @pytest.mark.parametrize(("total", "each"), [(10, 1000), (1000, 10)])
    def test_a_clock_that_goes_back_gives_nothing(self, total: int, each: int) -> None:
        strangers = Strangers(total=total, per_network=each)
        assert strangers.lend("a", 10, 5 * HOUR)
        assert not strangers.lend("a", 1, 0)
        # From the highest time seen, not from the one it fell back to.
        assert not strangers.lend("a", 1, 5 * HOUR)
        assert not strangers.lend("a", 6, 5 * HOUR + HOUR // 2)
        assert strangers.lend("a", 5, 5 * HOUR + HOUR // 2)

    def test_what_is_given_back_can_be_lent_again_but_not_twice(self) -> None:
        strangers = Strangers(total=10, per_network=10)
        assert strangers.lend("a", 10, 0)
        strangers.give_back("a", 4)
        assert not strangers.lend("a", 5, 0)
        assert strangers.lend("a", 4, 0)
        strangers.give_back("a", 100)
        assert not strangers.lend("a", 11, 0)

    def test_networks_remembered_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Strangers, "MAX_NETWORKS", 3)
        strangers = Strangers(total=1000, per_network=10)
        for name in "abc":
            assert strangers.lend(name, 10, 0)
        assert not strangers.lend("d", 1, 0)
        assert not strangers.lend("a", 1, 0)  # and nobody's debt was forgotten to make room
        assert strangers.lend("d", 10, HOUR)  # the others are full again: nothing to remember
        assert strangers.lend("a", 10, HOUR)
        assert not strangers.lend("a", 1, HOUR)

    @example(318, 240, [(0, 78, 0), (1, 231, 0), (1, 11, 15_000), (1, 10, -1)])
    @settings(max_examples=80, deadline=None)
    @given(
        st.integers(1, 1000),
        st.integers(1, 300),
        st.lists(st.tuples(st.integers(0, 4), st.integers(1, 400), st.integers(-HOUR, HOUR)), max_size=40),
    )
    def test_an_exact_model_of_the_buckets(
        self, total: int, each: int, asks: list[tuple[int, int, int]]
    ) -> None:
        strangers = Strangers(total=total, per_network=each)
        now = 100 * HOUR
        level: dict[str, tuple[int, int]] = {}  # in base-unit milliseconds, at the highest time it saw
        for network, amount, step in asks:
            now += step
            sizes = {"all": total, str(network): each}
            for name, size in sizes.items():
                held, since = level.get(name, (size * HOUR, now))
                level[name] = min(size * HOUR, held + max(0, now - since) * size), max(now, since)
            lent = all(level[name][0] >= amount * HOUR for name in sizes)
            for name in sizes:
                level[name] = level[name][0] - lent * amount * HOUR, level[name][1]
            assert strangers.lend(str(network), amount, now) == lent


class TestDurable:
    def test_it_is_made_only_by_writing(self) -> None:
        disk: list[int] = []
        assert Durable.write(5, disk.append).value == 5
        assert disk == [5]
        with pytest.raises(TypeError):
            Durable(5, object())
        with pytest.raises(TypeError):
            Durable(5)  # type: ignore[call-arg]

    async def test_it_is_made_only_by_awaiting_the_write(self) -> None:
        disk: list[int] = []

        async def save(value: int) -> None:
            disk.append(value)

        assert (await Durable.awrite(5, save(5))).value == 5
        assert disk == [5]

    async def test_a_failed_write_makes_none(self) -> None:
        def fail(_: int) -> None:
            raise OSError("disk full")

        async def fail_later(_: int) -> None:
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            Durable.write(5, fail)
        with pytest.raises(OSError, match="disk full"):
            await Durable.awrite(5, fail_later(5))
