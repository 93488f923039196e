"""What a method costs: how the interceptors of both sides count the same units from the same messages.

`options` reads these values from the proto; here is only counting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from btt.sdk.channel.prices import Line
from btt.sdk.errors import Overbilled
from btt.sdk.money import Unit

Count = Callable[[Any], int]
Counted = list[tuple[Line, int]]
"""Units per line, without those at 0."""


@dataclass(frozen=True, slots=True)
class FieldCharge:
    """One charged field of a message.

    Attributes:
        line: What is counted.
        payable: A btt.proto.common.v1.Payable.
        count: Returns the units of one message.
        cap: Returns the caller's cap on their sum from a request; None for bytes.
        number: Field number of single bytes that stand in the message itself, else 0.
    """

    line: Line
    payable: int
    count: Count
    cap: Count | None = None
    number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodCharge:
    """What a method costs.

    Attributes:
        path: "/package.Service/Method".
        free: Nothing is charged, within the two bounds that follow.
        free_bytes: Most bytes of responses of one call.
        free_calls_per_minute: Most calls a minute from one network.
        fee: What one call costs besides; empty if nothing.
        requests: Charged fields of a request; payable when acknowledged.
        largest_request: Most units that one request may carry.
        takes: Full name of the type of its requests.
        streams_requests: The method takes many.
        streams_responses: It gives many.
        fields: Charged fields of a response.
        largest_message: Most units that one response may carry.
        verified: Units of responses become payable when the caller's verifier accepts the message.
    """

    path: str
    free: bool = False
    free_bytes: int = 0
    free_calls_per_minute: int = 0
    fee: tuple[tuple[Line, int], ...] = ()
    requests: tuple[FieldCharge, ...] = ()
    largest_request: int = 0
    takes: str = ""
    streams_requests: bool = False
    streams_responses: bool = False
    fields: tuple[FieldCharge, ...] = ()
    largest_message: int = 0
    verified: bool = False

    @property
    def service(self) -> str:
        """Full name of the proto service."""
        return self.path[1:].rpartition("/")[0]

    def largest(self) -> dict[Line, int]:
        """Returns the most units per line that are ever counted in one step, for the node to offer."""
        request = {field.line: self.largest_request for field in self.requests}
        response = {field.line: self.largest_message for field in self.fields}
        # One request holds what its first response may cost: the work is done once it could be paid.
        together = not self.streams_requests
        return {
            line: request.get(line, 0) + response.get(line, 0)
            if together
            else max(request.get(line, 0), response.get(line, 0))
            for line in {**request, **response}
        } | dict(self.fee)

    def units_asked(self, request: Message) -> Counted:
        """Returns the units of a request."""
        return _units(self.requests, request)

    def units(self, message: Message) -> Counted:
        """Returns the units of a response."""
        return _units(self.fields, message)

    def units_sent(self, message: Message, wire: bytes) -> Counted:
        """Returns the same as `units`, and spares the copy that reading a bytes field makes.

        Args:
            message: A response.
            wire: The same, as we have serialised it.
        """
        if len(self.fields) == 1 and self.fields[0].number:
            units = _length_on_wire(wire, self.fields[0].number)
            return [(self.fields[0].line, units)] if units else []
        return self.units(message)


class Bills:
    """What one call may bill by integers in its responses: the sum of what its requests allow.

    Both sides keep it: the node sends nothing beyond, and the caller, who trusts no node, takes nothing.

    Args:
        charge: Of the method.
    """

    __slots__ = ("_allowed", "_billed", "_charge", "_is_bound")

    def __init__(self, charge: MethodCharge) -> None:
        self._charge = charge
        self._is_bound = any(field.cap is not None for field in charge.fields)
        self._allowed = [0] * len(charge.fields)
        self._billed = [0] * len(charge.fields)

    def allow(self, request: Message) -> None:
        """Takes what a request allows, before the service sees it."""
        for index, field in enumerate(self._charge.fields):
            if field.cap is not None:
                self._allowed[index] += field.cap(request)

    def take(self, message: Message) -> None:
        """Counts what a response bills.

        Raises:
            Overbilled: It is more than the requests allow.
        """
        if not self._is_bound:
            return
        for index, field in enumerate(self._charge.fields):
            if field.cap is not None:
                self._billed[index] += field.count(message)
                if self._billed[index] > self._allowed[index]:
                    raise Overbilled(
                        f"{self._charge.path} bills {self._billed[index]} units; the request allowed"
                        f" {self._allowed[index]}."
                    )

    def left(self) -> dict[Line, int | None]:
        """Returns the most units per line that the responses to come may carry; None without a bound."""
        lines: dict[Line, int | None] = {}
        for field, allowed, billed in zip(self._charge.fields, self._allowed, self._billed, strict=True):
            before = lines.get(field.line, 0)
            if field.cap is None or before is None:
                lines[field.line] = None
            else:
                lines[field.line] = before + allowed - billed
        return lines

    def next(self) -> dict[Line, int]:
        """Returns the most units per line that the next response may carry."""
        most = self._charge.largest_message
        return {line: most if left is None else min(most, left) for line, left in self.left().items()}


def total(counted: Iterable[tuple[object, int]]) -> int:
    """Returns the sum of units over all lines."""
    return sum([units for _, units in counted])


def _units(fields: tuple[FieldCharge, ...], message: Message) -> Counted:
    if len(fields) == 1:
        field = fields[0]
        units = field.count(message)
        return [(field.line, units)] if units else []
    sums: dict[Line, int] = {}
    for field in fields:
        sums[field.line] = sums.get(field.line, 0) + field.count(message)
    return [(line, units) for line, units in sums.items() if units]


def fee_line(service: str) -> Line:
    """Returns the line of the fees of a service."""
    return Line(service, Unit.CALL)


def _length_on_wire(wire: bytes, number: int) -> int:
    """Returns the length of a bytes field of a message that was serialised here."""
    at = length = 0
    while at < len(wire):
        tag, at = _varint(wire, at)
        match tag & 7:
            case 0:
                _, at = _varint(wire, at)
            case 1:
                at += 8
            case 2:
                size, at = _varint(wire, at)
                at += size
                if tag >> 3 == number:
                    length = size
            case 5:
                at += 4
            case kind:
                raise ValueError(f"wire type {kind} is in no message of ours")
    return length


def _varint(wire: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while wire[at] >= 0x80:
        value |= (wire[at] & 0x7F) << shift
        at += 1
        shift += 7
    return value | wire[at] << shift, at + 1
