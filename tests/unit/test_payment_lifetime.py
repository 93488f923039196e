"""How long a new channel lives: within the terms of node and ledger, by whoever's clock."""

from __future__ import annotations

import pytest

from btt.proto.ledger.v1.ledger_pb2 import LedgerInfo
from btt.sdk.identity import ChannelTerms
from btt.sdk.payment.opening import CLOCK_TOLERANCE_MS, LIFETIME_MS, _lifetime

HOUR = 3_600_000
YEAR = 366 * 24 * HOUR


def lifetime(node: tuple[int, int], ledger: tuple[int, int]) -> int:
    terms = ChannelTerms(min_amount=1, min_challenge_ms=1, min_lifetime_ms=node[0], max_lifetime_ms=node[1])
    return _lifetime(terms, LedgerInfo(min_lifetime_ms=ledger[0], max_lifetime_ms=ledger[1]))


def test_a_day_unless_the_terms_say_otherwise():
    assert lifetime((HOUR, YEAR), (HOUR, YEAR)) == LIFETIME_MS


@pytest.mark.parametrize(
    ("node", "ledger"),
    [
        ((HOUR, 2 * HOUR), (HOUR, YEAR)),  # shorter than a day
        ((48 * HOUR, YEAR), (HOUR, YEAR)),  # longer than a day
        ((HOUR, YEAR), (HOUR, 3 * HOUR)),
        ((HOUR, YEAR), (30 * HOUR, YEAR)),
    ],
)
def test_terms_hold_though_the_clocks_differ_and_the_request_takes_a_while(node, ledger):
    life = lifetime(node, ledger)
    for least, most in (node, ledger):
        assert least + CLOCK_TOLERANCE_MS <= life <= most - CLOCK_TOLERANCE_MS


def test_terms_without_room_for_the_tolerance_are_met_in_their_middle():
    assert lifetime((10_000, 20_000), (1, YEAR)) == 15_000
