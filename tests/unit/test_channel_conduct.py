"""The ladder of strikes and bans, the pauses between tries, and what counts against a node."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btt.sdk import errors
from btt.sdk.channel import BanPolicy, Conduct
from btt.sdk.errors import Banned, BttError, RateLimited
from btt.sdk.payment.backoff import LONGEST_S, pause_s
from btt.sdk.payment.faults import NODE_BANS, fault_of

POLICY = BanPolicy(after=3, first_ms=1000, longest_ms=5000, forget_ms=100, apart_ms=10)


def after(*times: int, policy: BanPolicy = POLICY) -> Conduct:
    conduct = Conduct()
    for at in times:
        conduct = conduct.strike("it did not pay in time", now_ms=at, policy=policy)
    return conduct


class TestStrikes:
    def test_the_third_begins_a_ban(self) -> None:
        assert not after(1000, 1020).is_banned(1020)
        banned = after(1000, 1020, 1040)
        assert banned.is_banned(1040)
        assert banned.is_banned(2039)
        assert not banned.is_banned(2040)
        assert banned.reason == "it did not pay in time"

    def test_failures_near_each_other_are_one(self) -> None:
        assert after(1000, 1005, 1009).strikes == 1
        assert after(1000, 1010).strikes == 2

    def test_one_is_forgotten_in_each_interval(self) -> None:
        assert after(1000, 1050).remaining(1149, POLICY).strikes == 2
        assert after(1000, 1050).remaining(1150, POLICY).strikes == 1
        assert after(1000, 1050).is_forgotten(1250, POLICY)
        assert not after(1000, 1050, 1300, 1350).is_banned(1350)

    def test_a_lie_weighs_as_much_as_it_takes(self) -> None:
        assert Conduct().strike("it lied", now_ms=1, policy=POLICY, weight=3).is_banned(1)
        assert not Conduct().strike("it lied", now_ms=1, policy=POLICY, weight=2).is_banned(1)

    def test_while_a_ban_lasts_nothing_prolongs_it(self) -> None:
        banned = after(1000, 1020, 1040)
        assert banned.strike("again", now_ms=1500, policy=POLICY) is banned


class TestBans:
    def test_each_is_twice_as_long_up_to_a_limit(self) -> None:
        conduct, now, lengths = Conduct(), 1000, []
        for _ in range(5):
            for _ in range(3):
                conduct = conduct.strike("x", now_ms=now, policy=POLICY)
                now += 20
            lengths.append(conduct.until_ms - conduct.at_ms)
            now = conduct.until_ms
        assert lengths == [1000, 2000, 4000, 5000, 5000]

    def test_a_doubling_is_forgotten_with_time(self) -> None:
        first = after(1000, 1020, 1040)
        late = first.until_ms + POLICY.longest_ms
        assert first.remaining(late - 1, POLICY).bans == 1
        assert first.remaining(late, POLICY).bans == 0
        assert first.is_forgotten(late, POLICY)

    @given(
        times=st.lists(st.integers(0, 10**7), max_size=60),
        weights=st.lists(st.integers(1, 5), min_size=60, max_size=60),
    )
    def test_no_ban_exceeds_the_limit_or_comes_early_whatever_the_clock_does(
        self, times: list[int], weights: list[int]
    ) -> None:
        conduct, points = Conduct(), 0
        for at, weight in zip(times, weights, strict=False):
            before = conduct
            conduct = conduct.strike("x", now_ms=at, policy=POLICY, weight=weight)
            if conduct is before:
                continue
            points += weight
            assert conduct.until_ms <= max(before.until_ms, at + POLICY.longest_ms)
            if conduct.bans > before.bans or conduct.until_ms > before.until_ms:
                assert points >= POLICY.after
                points = 0
            assert 0 <= conduct.strikes < POLICY.after

    def test_a_record_of_the_far_past_overflows_nothing(self) -> None:
        old = replace(Conduct(), bans=10**6, at_ms=10**12, until_ms=10**12)
        now = old
        for _ in range(3):
            now = now.strike("x", now_ms=10**12 + 50, policy=replace(POLICY, apart_ms=0))
        assert now.until_ms - now.at_ms == POLICY.longest_ms


class TestPauses:
    def test_they_double_within_bounds_and_differ(self) -> None:
        error = errors.SessionEnded("x")
        low = [pause_s(n, error, chance=lambda: 0.0) for n in range(1, 30)]
        high = [pause_s(n, error, chance=lambda: 0.999) for n in range(1, 30)]
        assert low[1] == 2 * low[0]
        assert all(a < b <= LONGEST_S for a, b in zip(low, high, strict=True))
        assert low[-1] == LONGEST_S / 2

    @pytest.mark.parametrize("kind", [RateLimited, Banned])
    def test_what_the_other_side_asks_for_is_waited(self, kind: type[RateLimited | Banned]) -> None:
        assert pause_s(1, kind("x", retry_after=30.0), chance=lambda: 0.0) > 30


def said(error: BttError, by: str) -> BttError:
    error.by = by
    return error


@pytest.mark.parametrize(
    ("error", "at_last", "weight"),
    [
        (errors.ContentMismatch("x"), False, NODE_BANS.after),
        (errors.CountsDiffer("x"), False, NODE_BANS.after),
        (said(errors.CountsDiffer("x"), "node"), True, 0),
        (said(errors.RateLimited("x"), "node"), False, 0),
        (said(errors.RateLimited("x"), "node"), True, 1),
        (said(errors.RateLimited("x"), "ledger"), True, 0),
        (said(errors.PaymentRequired("x"), "node"), True, 1),
        (errors.SessionEnded("x"), True, 0),
        (said(errors.ConnectError("x"), "node"), True, 0),
        (said(errors.Draining("x"), "node"), True, 0),
        (said(errors.Banned("x"), "node"), True, 0),
        (said(errors.LedgerUnreachable("x"), "node"), True, 0),
        (errors.BudgetExceeded("x"), True, 0),
        (errors.IdentityError("x"), True, 0),
    ],
)
def test_what_counts_against_a_node(error: BttError, at_last: bool, weight: int) -> None:
    fault = fault_of(error, at_last=at_last)
    assert (fault.weight if fault else 0) == weight
