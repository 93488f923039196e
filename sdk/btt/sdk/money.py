"""Amounts and prices of BTT, in integers only.

One base unit is 10^-6 BTT, the precision of the TRC-10 token. Every sum fits a signed 64-bit
integer; products do not, so they are made with Python integers and divided before they leave this
module. What is owed is always computed from a cumulative count, never added up per message:
then any split of the same units owes the same, and rounding costs at most one base unit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

DECIMALS: Final = 6
BTT: Final = 10**DECIMALS
"""Base units in one BTT."""
SUPPLY: Final = 990_000_000_000 * BTT
"""All base units that exist (white paper, token: 990,000,000,000 BTT)."""
KIB: Final = 2**10
MIB: Final = 2**20
GIB: Final = 2**30
MAX_UNITS: Final = 2**63 - 1
"""The highest count of units; every store and every wire format holds it."""

_LONGEST_TEXT: Final = 80
_AMOUNT = re.compile(r"([0-9]+)(?:\.([0-9]+))?\s*(btt|base units?)?", re.IGNORECASE)
_RATE = re.compile(r"(.*?)(?:/|\bper\b)\s*([0-9]+)?\s*([a-z]+)", re.IGNORECASE)


class Amount(int):
    """A sum of BTT in base units, 0 <= amount <= SUPPLY.

    It is an int: it compares, hashes, stores and serialises as one. Adding and subtracting give
    a checked Amount; every other operator gives a plain int. `str` is for people ("0.5 BTT").

    Args:
        value: Base units.

    Raises:
        TypeError: The value is not an integer (float and bool are refused).
        ValueError: The value is negative or more than SUPPLY.
    """

    __slots__ = ()

    def __new__(cls, value: int) -> Amount:
        """Checks the value."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"an amount is an integer number of base units, not {type(value).__name__}")
        if not 0 <= value <= SUPPLY:
            raise ValueError(f"an amount is between 0 and {SUPPLY} base units, not {int(value)}")
        return super().__new__(cls, value)

    @classmethod
    def parse(cls, text: str) -> Amount:
        """Reads what a person types: "0.5 BTT", "0.5" (BTT) or "12 base units".

        Args:
            text: The amount; at most six decimals, no thousands separators.

        Raises:
            ValueError: The text is not an amount, is finer than a base unit, or above SUPPLY.
        """
        match = _AMOUNT.fullmatch(text.strip()) if len(text) <= _LONGEST_TEXT else None
        if match is None:
            raise ValueError(f'"{text[:_LONGEST_TEXT]}" is not an amount; write it like "0.5 BTT"')
        whole, fraction, unit = match.group(1), match.group(2) or "", (match.group(3) or "btt").lower()
        if unit != "btt":
            if fraction:
                raise ValueError(f'"{text}" is finer than one base unit')
            return cls(int(whole))
        if len(fraction) > DECIMALS:
            raise ValueError(f'"{text}" has more than {DECIMALS} decimals; one base unit is 0.000001 BTT')
        return cls(int(whole) * BTT + int(fraction.ljust(DECIMALS, "0")))

    @classmethod
    def capped(cls, value: int) -> Amount:
        """Returns an amount, or all there is where a stranger's price asks for more.

        Args:
            value: Base units, not negative.
        """
        return cls(min(value, SUPPLY))

    def __str__(self) -> str:
        whole, rest = divmod(int(self), BTT)
        decimals = f".{rest:0{DECIMALS}d}".rstrip("0") if rest else ""
        return f"{whole}{decimals} BTT"

    def __repr__(self) -> str:
        return f"Amount({int(self)})"

    def __add__(self, other: int) -> Amount:
        return Amount(int(self) + _whole(other))

    def __radd__(self, other: int) -> Amount:
        return Amount(_whole(other) + int(self))

    def __sub__(self, other: int) -> Amount:
        return Amount(int(self) - _whole(other))

    def __rsub__(self, other: int) -> Amount:
        return Amount(_whole(other) - int(self))


def _whole(value: int) -> int:
    # Without this, int + float falls through to float's own operator and money becomes a float.
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"an amount and {type(value).__name__} cannot be added or subtracted")
    return int(value)


class Unit(IntEnum):
    """What a price is per; the numbers of btt.proto.common.v1.Unit."""

    BYTE = 1
    COUNT = 2
    CALL = 3


_BYTE_NAMES: Final = {
    "b": 1, "byte": 1, "bytes": 1,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 2**40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_COUNT_NAMES: Final = frozenset({"unit", "request", "item", "row", "tick"})
_SINGULAR: Final = {Unit.BYTE: "byte", Unit.COUNT: "unit", Unit.CALL: "call"}
_SHOWN_BYTES: Final = ((2**40, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))


@dataclass(frozen=True, slots=True)
class Rate:
    """A price: `amount` base units for every `per` units. An exact ratio.

    Args:
        amount: Base units, 0 <= amount <= SUPPLY.
        per: Number of units the amount buys, 1 <= per <= MAX_UNITS.
        unit: What is counted.

    Raises:
        TypeError: A value is not an integer.
        ValueError: A value is out of range.
    """

    amount: int
    per: int
    unit: Unit

    def __post_init__(self) -> None:
        Amount(self.amount)
        if not isinstance(self.per, int) or isinstance(self.per, bool):
            raise TypeError("a rate is per an integer number of units")
        if not 1 <= self.per <= MAX_UNITS:
            raise ValueError(f"a rate is per 1 to {MAX_UNITS} units, not {self.per}")
        object.__setattr__(self, "unit", Unit(self.unit))

    def owed(self, units: int) -> int:
        """Returns what a cumulative count costs: ceil(units * amount / per), base units.

        Args:
            units: All units so far, not those of one message.

        Raises:
            ValueError: The count is negative.
        """
        if units < 0:
            raise ValueError(f"a count of units is never negative, not {units}")
        return -(-units * self.amount // self.per)

    def units_for(self, amount: int) -> int:
        """Returns the most units whose cost is at most an amount, capped at MAX_UNITS.

        It is the inverse of `owed`: owed(units_for(a)) <= a < owed(units_for(a) + 1), below the cap.

        Args:
            amount: Base units.

        Raises:
            ValueError: The amount is negative.
        """
        if amount < 0:
            raise ValueError(f"an amount is never negative, not {amount}")
        if self.amount == 0:
            return MAX_UNITS
        return min(int(amount) * self.per // self.amount, MAX_UNITS)

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Reads a price: "1 BTT / GiB", "0.5 BTT per 10 MB", "0.001 BTT / call".

        Args:
            text: An amount, "/" or "per", an optional number, and a unit of bytes or a countable
                (unit, request, item, row, tick), or call.

        Raises:
            ValueError: The text is not a price.
        """
        match = _RATE.fullmatch(text.strip()) if len(text) <= _LONGEST_TEXT else None
        if match is None:
            raise ValueError(f'"{text[:_LONGEST_TEXT]}" is not a price; write it like "1 BTT / GiB"')
        amount, number, name = Amount.parse(match.group(1)), int(match.group(2) or 1), match.group(3).lower()
        if name in _BYTE_NAMES:
            return cls(amount, number * _BYTE_NAMES[name], Unit.BYTE)
        if name in ("call", "calls"):
            return cls(amount, number, Unit.CALL)
        if name.removesuffix("s") in _COUNT_NAMES:
            return cls(amount, number, Unit.COUNT)
        raise ValueError(f'a price cannot be per "{match.group(3)}"; use GiB, MiB, bytes, units or calls')

    def __str__(self) -> str:
        size, name = 1, _SINGULAR[self.unit]
        if self.unit is Unit.BYTE:
            size, name = next((pair for pair in _SHOWN_BYTES if self.per % pair[0] == 0), (size, name))
        number = self.per // size
        if number == 1:
            return f"{Amount(self.amount)} / {name}"
        return f"{Amount(self.amount)} / {number} {name}{'s' if size == 1 else ''}"
