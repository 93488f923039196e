"""What is counted and what it costs: the price sheet of an offer, and running tallies.

Both sides keep a `Tally` of cumulative units per (offer, line). What is owed is
`ceil(units * amount / per)` of each such segment, so the way in which the units were
split into messages never matters, and both sides owe the same to the base unit. A
new offer begins new segments; the old ones stand still and stay owed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from btt.sdk.money import MAX_UNITS, Rate, Unit


class Line(NamedTuple):
    """What one price is for: a unit of a service."""

    service: str
    """Full name of the proto service."""
    unit: Unit


class Segment(NamedTuple):
    """A line under one offer."""

    offer_digest: bytes
    """SHA-256 of the offer's payload, 32 bytes."""
    line: Line


@dataclass(frozen=True, slots=True)
class Price:
    """The price of a line.

    Attributes:
        rate: Base units per units.
        verify_units: Units in one verify unit, the most that one message carries of this line.
    """

    rate: Rate
    verify_units: int


@dataclass(frozen=True, slots=True)
class PriceSheet:
    """The prices of one offer.

    Attributes:
        digest: SHA-256 of the offer's payload, 32 bytes.
        prices: Price of each line.
    """

    digest: bytes
    prices: Mapping[Line, Price]

    @property
    def unit_charge(self) -> int:
        """Most that one message costs, base units: the risk of one piece (paper, P6).

        A message carries at most a verify unit of each line of its service.
        """
        services: dict[str, int] = {}
        for line, price in self.prices.items():
            cost = price.rate.owed(price.verify_units)
            services[line.service] = services.get(line.service, 0) + cost
        return max(services.values(), default=0)

    def segments(self) -> Iterator[tuple[Segment, Rate]]:
        """Yields every segment of this offer with its rate."""
        for line, price in self.prices.items():
            yield Segment(self.digest, line), price.rate


Count = tuple[Segment, Rate, int]
"""Cumulative units of a segment, with its rate."""


class Tally:
    """Cumulative units per segment, and what they cost together.

    It knows which counts its owner has not saved yet (`changes`, `saved`): most segments stand still.
    """

    __slots__ = ("_changed", "_lines", "_owed", "_unsure", "_writes")

    def __init__(self) -> None:
        self._lines: dict[Segment, tuple[Rate, int, int]] = {}  # with what the units cost
        self._owed = 0
        self._changed: set[Segment] = set()
        self._unsure: set[Segment] = set()
        self._writes = 0

    def price(self, segment: Segment, rate: Rate) -> None:
        """Makes a segment known, at 0 units; its rate never changes afterwards.

        Raises:
            ValueError: The segment has another rate already.
        """
        if segment not in self._lines:
            self._lines[segment] = rate, 0, 0
            self._changed.add(segment)
        elif self._lines[segment][0] != rate:
            raise ValueError(f"{segment} already has a rate")

    def knows(self, segment: Segment) -> bool:
        """Says whether the segment has a rate."""
        return segment in self._lines

    def units(self, segment: Segment) -> int:
        """Returns the units of a segment so far; 0 for an unknown one."""
        return self._lines[segment][1] if segment in self._lines else 0

    def rate(self, segment: Segment) -> Rate:
        """Returns the rate of a known segment."""
        return self._lines[segment][0]

    def cost(self, segment: Segment, units: int) -> int:
        """Returns by how many base units `units` more of a segment would raise what is owed."""
        rate, have, owed = self._lines[segment]
        return rate.owed(have + units) - owed

    def holds(self, units: Iterable[tuple[Segment, int]]) -> bool:
        """Says whether so many more units, of known segments, could be counted."""
        return all(self._lines[segment][1] + count <= MAX_UNITS for segment, count in units)

    def add(self, segment: Segment, units: int) -> None:
        """Adds units, or takes some away again when negative.

        Raises:
            ValueError: The count would be none that every store holds: a defect of the caller.
        """
        rate, have, owed = self._lines[segment]
        have += units
        if have < 0:
            raise ValueError("a tally never falls below zero")
        if have > MAX_UNITS:
            raise ValueError(f"a tally never rises above {MAX_UNITS}")
        cost = rate.owed(have)
        self._owed += cost - owed
        self._lines[segment] = rate, have, cost
        self._changed.add(segment)

    @property
    def owed(self) -> int:
        """What all units together cost, base units."""
        return self._owed

    def refundable(self, segment: Segment, units: int, amount: int) -> int:
        """Returns how many of the last `units` can be taken away for at most `amount` base units."""
        rate, have, owed = self._lines[segment]
        floor = owed - amount
        least = 0 if floor <= 0 else rate.units_for(floor - 1) + 1
        return max(0, min(units, have, have - least))

    def changes(self) -> tuple[Count, ...]:
        """Returns the counts that may not be saved, as they are now, to be saved.

        Writes must happen in the order of these calls. One of which `saved` does not tell has
        failed: what it held comes again with every later one.
        """
        self._unsure |= self._changed
        self._changed.clear()
        self._writes += 1
        return tuple([(segment, *self._lines[segment][:2]) for segment in self._unsure])

    def saved(self) -> None:
        """Takes note that the changes of one call are saved."""
        if self._writes:
            self._writes -= 1
        if not self._writes:
            self._unsure.clear()

    def __iter__(self) -> Iterator[Count]:
        for segment, (rate, units, _) in self._lines.items():
            yield segment, rate, units

    def copy(self) -> Tally:
        """Returns an independent copy, of which nothing will be saved."""
        twin = Tally()
        twin._lines, twin._owed = self._lines.copy(), self._owed
        return twin
