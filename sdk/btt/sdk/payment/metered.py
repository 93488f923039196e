"""One paid call on the payer's side: what it sent, what arrived, and what of it is payable.

Units are counted on arrival, before the message is handed over, because code behind a
`yield` does not run when the reader breaks off. What a request will cost is set aside before
it is sent: what cannot be paid is not requested.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import grpc.aio

from btt.sdk.channel import Segment
from btt.sdk.errors import (
    BudgetExceeded,
    ConfigError,
    CountsDiffer,
    DeadlineExceeded,
    InvalidRequest,
    Overbilled,
)
from btt.sdk.payment.charges import Bills, MethodCharge, total
from btt.sdk.payment.ending import Ending, in_time
from btt.sdk.payment.verdicts import Units, current_verdicts

if TYPE_CHECKING:
    from btt.sdk.payment.session import PaymentSession

ACKNOWLEDGED_KEY = "btt-acknowledged"
LATE_S = 1.0
"""Seconds past the deadline of a call that gRPC may take to end it."""
T = TypeVar("T")


class MeteredCall:
    """One metered call, from its first message to its report.

    Args:
        session: Who pays.
        charge: Of the method.
        request: The only one; None if the method takes many, which come by `attach`.
        deadline: When the call is over, whatever gRPC says; seconds of the loop's clock.

    Raises:
        BudgetExceeded: The channel does not cover it.
        ConfigError: The method is paid on verification, and called outside `verdicts()`.
        InvalidRequest: The request is larger than the method allows.
    """

    def __init__(
        self,
        session: PaymentSession,
        charge: MethodCharge,
        request: Any = None,
        *,
        deadline: float = math.inf,
    ) -> None:
        verdicts = current_verdicts()
        if charge.verified and verdicts is None:
            raise ConfigError(
                f"{charge.path} is paid on verification.", hint="Call it inside `with session.verdicts()`."
            )
        self.call_id = secrets.token_bytes(16)
        self.deadline = deadline
        self.failure: BaseException | None = None
        """What ended the call from within: a request that could not be sent."""
        self._session = session
        self._charge = charge
        self._verdicts = verdicts if charge.verified else None
        self._bills = Bills(charge)
        self._fee: Units = []
        self._unacknowledged: deque[Units] = deque()
        self._acknowledged = 0
        self._rpc: grpc.aio.Call | None = None
        self._sender: asyncio.Task[Any] | None = None
        self._finished = False
        self._decided = self._verdicts is None
        self._reported = False
        session.begin_call(self)
        try:
            fee = self._units(charge.fee)
            session.capacity.reserve(fee)
            self._fee = fee
            if request is not None:
                self._sending(request)
        except BaseException:
            self._decided = True
            self.finish()
            raise
        if self._verdicts is not None:
            self._verdicts.watch(self)

    def attach(self, rpc: grpc.aio.Call, requests: AsyncIterable[Any] | Iterable[Any] | None = None) -> None:
        """Follows the call under way to its end, however that comes.

        Args:
            rpc: The call.
            requests: What to send in it, if it takes many.
        """
        self._rpc = rpc
        self.ending = Ending(rpc)

        def ended(_: object) -> None:
            # At its natural end the reader has yet to take what arrived.
            if rpc.cancelled():
                self.finish()

        rpc.add_done_callback(ended)
        if requests is not None:
            self._sender = asyncio.create_task(self._send(rpc, requests))

    @property
    def is_late(self) -> bool:
        """Its deadline has passed."""
        return asyncio.get_running_loop().time() >= self.deadline

    async def in_time(self, answer: Awaitable[T]) -> T:
        """Waits for gRPC, but not much longer than the call may take.

        Raises:
            DeadlineExceeded: The deadline has passed, and gRPC does not say so.
        """
        try:
            return await in_time(answer, self.deadline + LATE_S)
        except DeadlineExceeded:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends the call."""
        if self._rpc is not None:
            self._rpc.cancel()
        self.finish()

    # Requests

    async def _send(self, rpc: Any, requests: AsyncIterable[Any] | Iterable[Any]) -> None:
        """Sends the requests of a call with many, and counts each just before."""
        try:
            async for request in self._outgoing(requests):
                await rpc.write(request)
            await rpc.done_writing()
        except Exception:  # noqa: BLE001 - gRPC has many for one thing: the call has ended, and its status says why
            if self.failure is not None:
                self.cancel()

    async def _outgoing(self, requests: AsyncIterable[Any] | Iterable[Any]) -> AsyncIterator[Any]:
        try:
            async for request in _each(requests):
                if self._charge.requests:
                    await self._session.capacity.cover(self._units(self._charge.units_asked(request)))
                self._sending(request)
                yield request
        except Exception as error:
            self.failure = error
            raise

    def _sending(self, request: Any) -> None:
        self._bills.allow(request)
        if not self._charge.requests:
            return
        asked = self._charge.units_asked(request)
        if total(asked) > self._charge.largest_request:
            raise InvalidRequest(
                f"A request of {self._charge.path} carries at most {self._charge.largest_request} units."
            )
        units = self._units(asked)
        self._session.capacity.reserve(units)
        self._unacknowledged.append([*units, *self._fee])
        self._fee = []

    def acknowledged(self, messages: int) -> None:
        """The service has acknowledged so many requests since the call began.

        Raises:
            CountsDiffer: It never got so many; the session ends.
        """
        if self._finished:
            return  # it was reported on without them
        if messages > self._acknowledged + len(self._unacknowledged):
            self._differ("The node acknowledges requests that were not sent.")
        while self._acknowledged < messages:
            self._acknowledged += 1
            units = self._unacknowledged.popleft()
            self._session.capacity.release(units)
            self._received(units)
            self.accepted(units)

    # Responses

    async def arrived(self, message: Any) -> None:
        """Counts a message on arrival.

        Raises:
            BudgetExceeded: The node knows of more in the channel than may be paid; it is not accepted.
            CountsDiffer: It bills more than the request allowed; the session ends.
        """
        try:
            self._bills.take(message)
        except Overbilled as error:  # no honest node sends that
            self._differ(error.message)
        counted = self._charge.units(message)
        if total(counted) > self._charge.largest_message:
            self._differ("The node sent a message with more units than its service allows.")
        units = self._units(counted)
        if self._charge.requests:
            if not self._charge.streams_requests:
                self.acknowledged(1)
        elif self._fee:
            units += self._take_fee()
        self._received(units)
        if self._session.payer.is_over:
            await self._catch_up(units)
        if self._verdicts is None:
            self.accepted(units)
        elif not self._decided:
            self._verdicts.expect(message, self, units)

    async def _catch_up(self, units: Units) -> None:
        """Makes payable what a node sent because the channel was topped up elsewhere, too."""
        payer = self._session.payer
        if self._verdicts is not None and payer.is_reserved:
            return  # who sets aside what it asks for accepts no more
        await self._session.capacity.cover(units)
        if payer.is_over:
            raise BudgetExceeded("The channel is used up, as far as the budget reaches.")

    def accepted(self, units: Units) -> None:
        """Counts the units of a message as payable."""
        for segment, count in units:
            self._session.payer.accepted(self.call_id, segment, count)
        self._session.nudge()

    async def completed(self, rpc: Any) -> None:
        """The call has ended well; the fee is due even if nothing came.

        Raises:
            CountsDiffer: The service acknowledged requests that were not sent.
        """
        if self._charge.requests:
            if self._charge.streams_requests:
                self.learned(await rpc.trailing_metadata())
            else:
                self.acknowledged(1)
        if self._fee:
            units = self._take_fee()
            self._received(units)
            self.accepted(units)

    def learned(self, trailer: Any) -> None:
        """Takes from a call that has ended how many requests were acknowledged.

        Raises:
            CountsDiffer: More than were sent.
        """
        for key, value in trailer or ():
            if key == ACKNOWLEDGED_KEY and self._charge.streams_requests:
                if not (isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20):
                    self._differ("The node's count of acknowledged requests is malformed.")
                self.acknowledged(int(value))

    # The end

    def finish(self) -> None:
        """The call has ended on the wire."""
        if not self._finished:
            self._finished = True
            for units in self._unacknowledged:
                self._session.capacity.release(units)
            self._unacknowledged.clear()
            self._take_fee()
            if self._sender is not None and self._sender is not asyncio.current_task():
                self._sender.cancel()  # it may wait for the caller's next request for ever
        self._report()

    def decide(self) -> None:
        """No more verdicts will come."""
        self._decided = True
        if not self._finished:
            self.cancel()
        self._report()

    def _report(self) -> None:
        if self._finished and self._decided and not self._reported:
            self._reported = True
            self._session.report_call(self)

    # Helpers

    def _units(self, counted: Iterable[Any]) -> Units:
        digest = self._session.offer.digest
        return [(Segment(digest, line), count) for line, count in counted]

    def _take_fee(self) -> Units:
        fee, self._fee = self._fee, []
        self._session.capacity.release(fee)
        return fee

    def _received(self, units: Units) -> None:
        for segment, count in units:
            self._session.payer.received(self.call_id, segment, count)

    def _differ(self, text: str) -> None:
        error = CountsDiffer(text)
        self._session.fail(error)
        raise error


async def _each(requests: AsyncIterable[Any] | Iterable[Any]) -> AsyncIterator[Any]:
    if isinstance(requests, AsyncIterable):
        async for request in requests:
            yield request
    else:
        for request in requests:
            yield request
