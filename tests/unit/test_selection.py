"""Which nodes are used: each policy alone, and that every rejection says why."""

from __future__ import annotations

import pytest

from btt.sdk import errors
from btt.sdk.errors import NoProviders
from btt.sdk.keys import Address
from btt.sdk.money import Rate
from btt.sdk.selection import (
    DEFAULT_POLICIES,
    Candidate,
    Cause,
    allow,
    cause_of,
    deny,
    max_price,
    near_cheapest,
    no_providers,
    prefer_known,
    select,
)


def node(number: int, price: str = "1 BTT / GiB", paid: int = 0) -> Candidate:
    return Candidate(Address(bytes([number]) * 20), f"node {number}", Rate.parse(price), paid)


def names(candidates):
    return [candidate.address for candidate in candidates]


def test_a_highest_price():
    kept, refused = select(
        [node(1), node(2, "1.000001 BTT / GiB"), node(3, "2 BTT / GiB")],
        [max_price(Rate.parse("1 BTT / GiB"))],
    )
    assert names(kept) == ["node 1"]
    assert [(r.node, r.cause) for r in refused] == [("node 2", Cause.DEAR), ("node 3", Cause.DEAR)]
    assert refused[0].detail == "It asks 1.000001 BTT / GiB, more than 1 BTT / GiB."


def test_far_above_the_cheapest_is_refused_and_twice_as_much_is_not():
    kept, refused = select(
        [node(1, "2 BTT / GiB"), node(2), node(3, "2.000001 BTT / GiB")], [near_cheapest()]
    )
    assert names(kept) == ["node 1", "node 2"]
    assert [r.cause for r in refused] == [Cause.DEAR]
    assert select([], [near_cheapest()]) == ([], [])


def test_nothing_is_dear_beside_itself_and_all_is_beside_what_is_free():
    assert names(select([node(1)], [near_cheapest()])[0]) == ["node 1"]
    assert names(select([node(1), node(2, "0 BTT / GiB")], [near_cheapest()])[0]) == ["node 2"]


def test_allowed_and_denied_nodes():
    nodes = [node(1), node(2), node(3)]
    kept, refused = select(nodes, [allow([nodes[0].node, nodes[1].node]), deny([nodes[1].node])])
    assert names(kept) == ["node 1"]
    assert [(r.node, r.cause) for r in refused] == [("node 3", Cause.DENIED), ("node 2", Cause.DENIED)]


def test_known_good_nodes_come_first_then_cheap_ones_and_no_more_than_are_needed():
    nodes = [node(1, "2 BTT / GiB"), node(2), node(3, "3 BTT / GiB", paid=5), node(4, "0.5 BTT / GiB")]
    kept, refused = select(nodes, [prefer_known(3)])
    assert names(kept) == ["node 3", "node 4", "node 2"]
    assert [(r.node, r.cause) for r in refused] == [("node 1", Cause.NOT_NEEDED)]
    assert len(select([node(n) for n in range(20)], DEFAULT_POLICIES)[0]) == 8


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (errors.ConnectError, Cause.UNREACHABLE),
        (errors.RemoteError, Cause.UNREACHABLE),
        (errors.IdentityError, Cause.UNTRUSTED),
        (errors.ContentUnknown, Cause.UNKNOWN),
        (errors.ContentMismatch, Cause.LIED),
        (errors.CountsDiffer, Cause.LIED),
        (errors.SignatureInvalid, Cause.NOT_OFFERED),
        (errors.Banned, Cause.REFUSED),
        (errors.Draining, Cause.BUSY),
        (errors.BudgetExceeded, Cause.BUDGET),
        (errors.InternalError, Cause.FAILED),
    ],
)
def test_an_error_says_something_about_its_node(error, cause):
    assert cause_of(error("why")) is cause


def test_the_error_counts_nodes_by_cause_the_most_frequent_first():
    refused = [node(1).reject(Cause.DEAR, "a"), *(node(n).reject(Cause.UNKNOWN, "b") for n in range(2, 5))]
    error = no_providers("No node can be used", refused)
    assert isinstance(error, NoProviders)
    assert error.message == "No node can be used: 3 without this content, 1 too dear."
    assert error.counts == {"without this content": 3, "too dear": 1}
    assert error.rejections == tuple(refused)
