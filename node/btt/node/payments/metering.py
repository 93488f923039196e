"""One metered call on the node: what is let in, what leaves, and what comes back if it fails.

Requests are counted before the service sees them and responses before they leave. Nothing
that the payer cannot owe yet is held while the call waits for payment, or two calls could
wait for each other for ever: a request is acknowledged before anything else is charged, and
a call with one request takes at the start all that its first response may cost.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import structlog

from btt.node.payments.session import Session
from btt.sdk.channel import Line, Segment, Units
from btt.sdk.errors import BttError, InternalError, InvalidRequest, Overbilled
from btt.sdk.payment.charges import Bills, Counted, MethodCharge, total

log = structlog.get_logger(__name__)


class Metering:
    """The count of one call; it begins with the call.

    Args:
        session: Who pays.
        call_id: 16 bytes.
        charge: Of the method.
        tell: Puts the number of acknowledged requests where the payer finds it when the call ends.

    Raises:
        CallRepeated: The id was used before.
        RateLimited: Too many calls were not reported on.
        SessionEnded: The session has ended.
    """

    __slots__ = (
        "__weakref__",
        "_acknowledged",
        "_bills",
        "_call",
        "_charge",
        "_due",
        "_fee",
        "_held",
        "_session",
        "_taken",
        "_tell",
        "failure",
    )

    def __init__(
        self, session: Session, call_id: bytes, charge: MethodCharge, tell: Callable[[int], None]
    ) -> None:
        session.begin(call_id)
        self._session = session
        self._call = call_id
        self._charge = charge
        self._tell = tell
        self._bills = Bills(charge)
        self._due: Counted = []
        self._fee: Counted = list(charge.fee)
        self._held: Units = ()
        self._taken = self._acknowledged = 0
        self.failure: BttError | None = None
        """What a service was told while it read requests, and might have swallowed."""

    # One request

    def allow(self, request: Any) -> None:
        """Takes what a request allows to be billed, before a service could change it."""
        self._bills.allow(request)

    async def hold(self, request: Any) -> None:
        """Takes, before the work is done, all that a request and its first response may cost.

        Raises:
            ChannelExhausted, PaymentRequired, SessionEnded: It cannot be paid.
            InvalidRequest: The request is larger than the method allows.
        """
        self._due = [*self._asked(request), *self._take_fee()]
        lines = self._bills.next()
        for line, units in self._due:
            lines[line] = lines.get(line, 0) + units
        held = self._segments(lines.items())
        await self._session.charge(self._call, held)
        self._held = held

    def answer(self, response: Counted) -> None:
        """Counts the first response instead of what was held for it; both are the payer's now."""
        charged: dict[Segment, int] = {}
        for line, units in (*self._due, *response):
            segment = self._segment(line)
            charged[segment] = charged.get(segment, 0) + units
        held, self._held = self._held, ()
        over = [(segment, units - charged.get(segment, 0)) for segment, units in held]
        self._session.take_back(self._call, [(segment, units) for segment, units in over if units])

    # Many requests

    async def let_in(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Gives the service its requests, each when it is covered; no more are read ahead."""
        try:
            async for request in requests:
                self._bills.allow(request)
                if self._charge.requests:
                    units = self._segments([*self._asked(request), *self._take_fee()])
                    if units:
                        await self._session.charge(self._call, units)
                    self._held = units
                    self._taken += 1
                yield request
                self.acknowledge()
        except BttError as error:
            self.failure = error
            raise

    def acknowledge(self) -> None:
        """Everything that the service has taken is the payer's now."""
        if self._acknowledged < self._taken:
            self._acknowledged = self._taken
            self._held = ()
            self._tell(self._taken)
            self._session.acknowledge(self._call, self._taken)

    # Responses

    def count(self, message: Any, wire: bytes | None = None) -> Counted:
        """Returns the units of a response, once it is known to be within bounds.

        Args:
            message: What the service made.
            wire: The same, if it is serialised here.

        Raises:
            InternalError: It is larger than its method declares.
            Overbilled: It bills more than the requests allow.
        """
        charge = self._charge
        counted = charge.units(message) if wire is None else charge.units_sent(message, wire)
        if total(counted) > charge.largest_message:
            self._too_large()
        try:
            self._bills.take(message)
        except Overbilled as error:
            log.error("service.overbilled", method=charge.path, error=error.message)  # noqa: TRY400
            raise
        return counted

    async def let_out(self, response: Counted) -> None:
        """Returns once a response may leave.

        Args:
            response: From `count`.

        Raises:
            ChannelExhausted, PaymentRequired, SessionEnded: It is not paid.
        """
        if self._fee and not self._charge.requests:
            response = [*response, *self._take_fee()]
        if response:
            await self._session.charge(self._call, self._segments(response))

    async def complete(self) -> None:
        """Counts what is due only because the call ends well."""
        if self._fee:
            await self._session.charge(self._call, self._segments(self._take_fee()))

    def refuse(self) -> None:
        """The service failed or refused: what it has not acknowledged is free."""
        held, self._held = self._held, ()
        self._session.take_back(self._call, held)

    def void(self) -> None:
        """The service broke its own rules: the call is taken back whole."""
        self._held = ()
        self._session.void(self._call)

    # Helpers

    def _take_fee(self) -> Counted:
        fee, self._fee = self._fee, []
        return fee

    def _asked(self, request: Any) -> Counted:
        asked = self._charge.units_asked(request)
        if total(asked) > self._charge.largest_request:
            raise InvalidRequest(
                f"A request of {self._charge.path} carries at most {self._charge.largest_request} units."
            )
        return asked

    def _too_large(self) -> NoReturn:
        log.error("service.message_too_large", method=self._charge.path)
        raise InternalError(f"{self._charge.path} made a larger message than it declares.")

    def _segment(self, line: Line) -> Segment:
        return Segment(self._session.offer.digest, line)

    def _segments(self, units: Any) -> Units:
        digest = self._session.offer.digest
        return [(Segment(digest, line), count) for line, count in units if count]
