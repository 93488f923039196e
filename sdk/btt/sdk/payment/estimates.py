"""What a call will cost, said before it is made: from its requests, its proto and a node's rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import Message

from btt.sdk.channel.prices import Line
from btt.sdk.errors import InvalidRequest
from btt.sdk.money import Amount, Rate, Unit
from btt.sdk.payment.charges import Bills, MethodCharge, total


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a call costs; one that is refused or broken off may cost less than `least`.

    Attributes:
        least: If it ends well, whatever comes back.
        most: Never more than that; None if neither the proto nor the request bounds what comes back.
        rates: What each unit costs that comes back.
    """

    least: Amount
    most: Amount | None
    rates: Mapping[Unit, Rate]


def estimate(charge: MethodCharge, rates: Mapping[Line, Rate], requests: Sequence[Message]) -> Estimate:
    """Computes what a call costs.

    Args:
        charge: Of the method.
        rates: Of the node's offer, for every line of the service.
        requests: What will be sent.

    Raises:
        InvalidRequest: The method does not take these requests, or not so large.
    """
    if charge.free:
        return Estimate(least=Amount(0), most=Amount(0), rates={})
    name = charge.path.rpartition("/")[2]
    if len(requests) != 1 and not charge.streams_requests:
        raise InvalidRequest(f"{name} takes one request, not {len(requests)}.")
    asked, bills = dict(charge.fee), Bills(charge)
    for request in requests:
        if request.DESCRIPTOR.full_name != charge.takes:
            raise InvalidRequest(f"{name} takes {charge.takes}, not {request.DESCRIPTOR.full_name}.")
        counted = charge.units_asked(request)
        if total(counted) > charge.largest_request:
            raise InvalidRequest(f"A request of {name} carries at most {charge.largest_request} units.")
        for line, units in counted:
            asked[line] = asked.get(line, 0) + units
        bills.allow(request)
    # A service may end a stream before it has read all of it, and a verifier may reject the response
    # that would bring the fee.
    certain = dict(charge.fee) if charge.streams_requests else asked
    if charge.verified and not charge.requests:
        certain = {}
    answered = bills.left() if charge.streams_responses else bills.next()
    is_bounded = all(units is not None or not rates[line].amount for line, units in answered.items())
    whole = {line: asked.get(line, 0) + (answered.get(line) or 0) for line in {**asked, **answered}}
    return Estimate(
        # Rounding is upwards on the sum of all calls, so that one may cost less than its share.
        least=Amount.capped(
            sum(units * rates[line].amount // rates[line].per for line, units in certain.items())
        ),
        most=Amount.capped(sum(rates[line].owed(units) for line, units in whole.items()))
        if is_bounded
        else None,
        rates={field.line.unit: rates[field.line] for field in charge.fields},
    )
