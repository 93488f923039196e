"""Which of the nodes one knows to use: small policies, each a pure function that says why it says no.

A policy takes the candidates in the order of preference so far, and returns those it keeps, in its
own order, and a rejection for every other one. They are applied one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from btt.sdk import errors
from btt.sdk.errors import BttError, NoProviders
from btt.sdk.keys import Address
from btt.sdk.money import SUPPLY, Rate


class Cause(StrEnum):
    """Why a node is not used; the value is what people read."""

    UNREACHABLE = "unreachable"
    LATE = "too late with an answer"
    UNTRUSTED = "not trusted"
    NOT_OFFERED = "without this service"
    UNKNOWN = "without this content"
    UNAVAILABLE = "unable to read this content"
    REFUSED = "refusing us"
    BUSY = "busy or stopping"
    LIED = "caught with a lie"
    SHUNNED = "left alone for what it did before"
    DENIED = "denied by you"
    DEAR = "too dear"
    NOT_NEEDED = "not needed"
    BUDGET = "beyond the budget"
    FAILED = "failing"


_CAUSES: tuple[tuple[type[BttError], Cause], ...] = (
    (errors.NodeBanned, Cause.SHUNNED),
    (errors.ContentUnknown, Cause.UNKNOWN),
    (errors.ContentUnavailable, Cause.UNAVAILABLE),
    (errors.ContentMismatch, Cause.LIED),
    (errors.CountsDiffer, Cause.LIED),
    (errors.Banned, Cause.REFUSED),
    (errors.AppRefused, Cause.REFUSED),
    (errors.RateLimited, Cause.BUSY),
    (errors.Draining, Cause.BUSY),
    (errors.PriceChanged, Cause.DEAR),
    (errors.BudgetExceeded, Cause.BUDGET),
    (errors.IdentityError, Cause.UNTRUSTED),
    (errors.InvalidRequest, Cause.NOT_OFFERED),
    (errors.SessionEnded, Cause.UNREACHABLE),
    (errors.TransportError, Cause.UNREACHABLE),
)


def cause_of(error: BttError) -> Cause:
    """Returns what an error says about the node that it is about."""
    return next((cause for kind, cause in _CAUSES if isinstance(error, kind)), Cause.FAILED)


@dataclass(frozen=True, slots=True)
class Rejection:
    """A node that is not used.

    Attributes:
        node: Its address, as configured.
        cause: Why, in a word.
        detail: Why, in a sentence.
    """

    node: str
    cause: Cause
    detail: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that could be used.

    Attributes:
        node: Who.
        address: As configured.
        rate: What it asks.
        paid: Base units that this wallet has paid it, over all channels.
    """

    node: Address
    address: str
    rate: Rate
    paid: int

    def reject(self, cause: Cause, detail: str) -> Rejection:
        """Makes a rejection of this node."""
        return Rejection(self.address, cause, detail)


Selection = tuple[list[Candidate], list[Rejection]]
Policy = Callable[[Sequence[Candidate]], Selection]


def max_price(rate: Rate) -> Policy:
    """Refuses nodes that ask more than a rate."""

    def policy(candidates: Sequence[Candidate]) -> Selection:
        return _split(
            candidates,
            lambda c: _dearer(c.rate, rate),
            Cause.DEAR,
            lambda c: f"It asks {c.rate}, more than {rate}.",
        )

    return policy


def near_cheapest(times: int = 2) -> Policy:
    """Refuses nodes that ask more than so many times what the cheapest asks."""

    def policy(candidates: Sequence[Candidate]) -> Selection:
        cheapest: Rate | None = None
        for candidate in candidates:
            if cheapest is None or _dearer(cheapest, candidate.rate):
                cheapest = candidate.rate
        if cheapest is None:
            return [], []
        limit = Rate(min(cheapest.amount * times, SUPPLY), cheapest.per, cheapest.unit)
        return _split(
            candidates,
            lambda c: _dearer(c.rate, limit),
            Cause.DEAR,
            lambda c: f"It asks {c.rate}, more than {times} times what another one asks, {cheapest}.",
        )

    return policy


def allow(nodes: Collection[Address]) -> Policy:
    """Refuses all nodes but these."""
    return lambda candidates: _split(
        candidates,
        lambda c: c.node not in nodes,
        Cause.DENIED,
        lambda c: "It is not among the allowed nodes.",
    )


def deny(nodes: Collection[Address]) -> Policy:
    """Refuses these nodes."""
    return lambda candidates: _split(
        candidates, lambda c: c.node in nodes, Cause.DENIED, lambda c: "It is among the denied nodes."
    )


def prefer_known(most: int = 8) -> Policy:
    """Puts nodes first that this wallet has paid before, cheaper ones among equals, and keeps so many."""

    def policy(candidates: Sequence[Candidate]) -> Selection:
        ordered = sorted(candidates, key=lambda c: (c.paid == 0, c.rate.amount / c.rate.per))
        return ordered[:most], [
            c.reject(Cause.NOT_NEEDED, f"{most} other nodes were preferred.") for c in ordered[most:]
        ]

    return policy


DEFAULT_POLICIES: tuple[Policy, ...] = (near_cheapest(), prefer_known())
"""Nobody who asks far more than others, known good nodes first, and no more than are of use."""


def select(candidates: Sequence[Candidate], policies: Sequence[Policy]) -> Selection:
    """Applies policies one after the other.

    Args:
        candidates: Whom to choose from.
        policies: What decides.

    Returns:
        Those to use, the preferred ones first, and why not the others.
    """
    kept, rejections = list(candidates), []
    for policy in policies:
        kept, refused = policy(kept)
        rejections += refused
    return kept, rejections


def no_providers(what: str, rejections: Sequence[Rejection]) -> NoProviders:
    """Makes the error that says how many nodes were rejected for which reason.

    Args:
        what: What is impossible, a clause without a full stop.
        rejections: All of them.
    """
    error = NoProviders(what, rejections=rejections)
    counts = ", ".join(f"{count} {cause}" for cause, count in error.counts.items())
    return NoProviders(f"{what}: {counts or 'no node is configured'}.", rejections=rejections)


def _dearer(rate: Rate, limit: Rate) -> bool:
    return rate.amount * limit.per > limit.amount * rate.per


def _split(
    candidates: Sequence[Candidate],
    is_refused: Callable[[Candidate], bool],
    cause: Cause,
    detail: Callable[[Candidate], str],
) -> Selection:
    kept = [c for c in candidates if not is_refused(c)]
    return kept, [c.reject(cause, detail(c)) for c in candidates if is_refused(c)]
