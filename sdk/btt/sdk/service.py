"""Any paid service as a dApp uses it: `client.service(XStub, budget=...)`.

    async with client.service(QueryServiceStub, budget="0.5 BTT") as query:
        async for row in query.Select(request):
            ...

The generated stub runs on the paid channel of a node that offers the service; neither side has
payment code. What the calls of the block may cost together is bounded by counting, above the
payment, with the same charges: what the next step could cost is set aside before it is asked for,
so that calls that run at once cannot exceed the bound together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from btt.sdk.channel.prices import Line, Price
from btt.sdk.errors import BttError, BudgetExceeded, InvalidRequest
from btt.sdk.money import Amount, Rate, Unit
from btt.sdk.payment.charges import Bills, MethodCharge
from btt.sdk.payment.estimates import Estimate
from btt.sdk.payment.estimates import estimate as _estimate
from btt.sdk.payment.options import method_charge
from btt.sdk.payment.verdicts import Verdicts
from btt.sdk.rpc import to_error
from btt.sdk.selection import Rejection, cause_of, no_providers

if TYPE_CHECKING:
    from btt.sdk.client import Client
    from btt.sdk.payment.session import PaymentSession
    from btt.sdk.provider import Provider

StubT = TypeVar("StubT")
Steps = Iterable[tuple[Line, int]]


class Bound:
    """What some calls may cost together, and have cost at most.

    Args:
        limit: Base units.
        rates: Of the node's offer.
        what: For the error's text.
    """

    def __init__(self, limit: int, rates: Mapping[Line, Rate], what: str) -> None:
        self.limit = limit
        self._rates = rates
        self._what = what
        self._counted: Counter[Line] = Counter()
        self._held: Counter[Line] = Counter()

    @property
    def spent(self) -> int:
        """What was counted, base units; no less than what is paid for it."""
        return sum(self._rates[line].owed(units) for line, units in self._counted.items())

    def hold(self, steps: Steps) -> None:
        """Sets aside what the next step costs at most.

        Raises:
            BudgetExceeded: The bound does not cover it.
        """
        wanted = self._counted + self._held + Counter(dict(steps))
        cost = sum(self._rates[line].owed(units) for line, units in wanted.items())
        if cost > self.limit:
            raise BudgetExceeded(
                f"{self._what} is {Amount(self.limit)}; its next message could bring that to"
                f" {Amount.capped(cost)}.",
                hint="Allow more, or ask for less.",
            )
        self._held.update(dict(steps))

    def settle(self, held: Steps, used: Steps) -> None:
        """Takes back what was set aside, and counts what the step did cost."""
        self._held.subtract(dict(held))
        self._counted.update(dict(used))


class Service(Generic[StubT]):
    """A third party's or a built-in service; made by `Client.service`.

    Args:
        client: Who pays.
        stub: Generated stub class.
        budget: What the calls of the block may cost together; such as "0.5 BTT".
        per_call: What one of them may.

    Raises:
        InvalidRequest: That is no stub of one service, or no amount.
    """

    def __init__(
        self,
        client: Client,
        stub: Callable[[grpc.aio.Channel], StubT],
        *,
        budget: Amount | str,
        per_call: Amount | str | None,
    ) -> None:
        self._client = client
        self._stub = stub
        self._budget = _amount(budget)
        self._per_call = self._budget if per_call is None else _amount(per_call)
        self._charges = _charges(stub)
        self._bound: Bound | None = None

    @property
    def name(self) -> str:
        """Full name of the proto service."""
        return next(iter(self._charges.values())).service

    async def rates(self) -> dict[Unit, Rate]:
        """Returns what the node of the next block asks, per unit; free of charge.

        Raises:
            NoProviders: No node can be used; `rejections` says why for each.
        """
        _, rates = await self._choose()
        return {line.unit: rate for line, rate in rates.items()}

    async def estimate(self, units: Mapping[Unit, int]) -> Amount:
        """Returns what some units will cost; free of charge.

        Args:
            units: How many of each, such as `{Unit.COUNT: 500}`.

        Raises:
            InvalidRequest: The service does not charge such a unit.
            NoProviders: No node can be used; `rejections` says why for each.
        """
        rates = await self.rates()
        if unknown := units.keys() - rates.keys():
            raise InvalidRequest(f"{self.name} does not charge per {unknown.pop().name}.")
        return Amount.capped(sum(rates[unit].owed(count) for unit, count in units.items()))

    async def estimate_call(self, method: str, *requests: Message) -> Estimate:
        """Returns what one call will cost; free of charge.

        With its `most` as the budget of a block, or of each call, such a call goes through.

        Args:
            method: Name of the method, such as "Select".
            requests: What will be sent: one, or all of a stream.

        Raises:
            InvalidRequest: There is no such method, or it does not take these requests.
            NoProviders: No node can be used; `rejections` says why for each.
        """
        charge = self._charges.get(f"/{self.name}/{method}")
        if charge is None:
            names = ", ".join(sorted(path.rpartition("/")[2] for path in self._charges))
            raise InvalidRequest(f"{self.name} has no method {method!r}; it has {names}.")
        _, rates = await self._choose()
        return _estimate(charge, rates, requests)

    @property
    def spent(self) -> Amount:
        """What the calls of this block have cost at most."""
        return Amount(self._bound.spent if self._bound is not None else 0)

    def verdicts(self) -> Verdicts:
        """Returns a block for methods that are paid on verification; see `Verdicts`."""
        return Verdicts()

    async def __aenter__(self) -> StubT:
        """Opens a session that covers the budget, and returns the stub.

        Raises:
            BudgetExceeded: The client's budget does not reach for it.
            NoProviders: No node can be used; `rejections` says why for each.
            BttError: The node or the ledger refused, or did not answer.
        """
        provider, _ = await self._choose()
        session = await provider.session(int(self._budget))
        rates = self._offered(session.offer.sheet.prices)
        self._bound = Bound(int(self._budget), rates, "The budget of this block")
        channel = _BoundChannel(session, self._charges, self._bound, int(self._per_call), rates)
        # What a stub uses of a channel, it has.
        return self._stub(cast(grpc.aio.Channel, channel))

    async def __aexit__(self, *_: object) -> None:
        """The session stays, for the client's next work."""

    async def _choose(self) -> tuple[Provider, dict[Line, Rate]]:
        """Returns the first node, in the order the client knows them, that offers the service."""
        rejections = []
        for provider in self._client.providers:
            try:
                return provider, self._offered((await provider.node()).offer.sheet.prices)
            except BttError as error:
                rejections.append(Rejection(provider.name, cause_of(error), error.message))
        raise no_providers(f"No node can be used for {self.name}", rejections)

    def _offered(self, prices: Mapping[Line, Price]) -> dict[Line, Rate]:
        lines = {line for charge in self._charges.values() for line in charge.largest()}
        if lines - prices.keys():
            raise InvalidRequest(f"The node does not offer {self.name}.")
        return {line: prices[line].rate for line in lines}


def _amount(text: Amount | str) -> Amount:
    try:
        return Amount.parse(text) if isinstance(text, str) else Amount(text)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{text!r} is no amount: write it like 0.5 BTT.") from error


class _Recorder:
    """Stands for a channel to learn which methods a stub has."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def _note(self, path: str, *_: object, **__: object) -> None:
        self.paths.append(path)

    unary_unary = unary_stream = stream_unary = stream_stream = _note


def stub_methods(stub: Callable[[Any], object]) -> list[str]:
    """Returns the paths of the methods of a generated stub class."""
    recorder = _Recorder()
    stub(recorder)
    return recorder.paths


def _charges(stub: Callable[[Any], object]) -> dict[str, MethodCharge]:
    charges = {path: method_charge(path) for path in stub_methods(stub)}
    if len({charge.service for charge in charges.values()}) != 1:
        raise InvalidRequest(f"{stub!r} is not the generated stub of a service.")
    return charges


class _BoundChannel:
    """The paid channel as a stub sees it, with the bounds of a block."""

    def __init__(
        self,
        session: PaymentSession,
        charges: Mapping[str, MethodCharge],
        bound: Bound,
        per_call: int,
        rates: Mapping[Line, Rate],
    ) -> None:
        self._session = session
        self._charges = charges
        self._bound = bound
        self._per_call = per_call
        self._rates = rates

    def _call(self, path: str) -> _Call:
        own = Bound(self._per_call, self._rates, "The budget of a call")
        return _Call(self._charges[path], [own, self._bound])

    def unary_unary(self, path: str, *args: Any, **options: Any) -> Any:
        """As of grpc.aio.Channel."""
        make = self._session.channel.unary_unary(path, *args, **options)
        return lambda request, **o: self._call(path).one(make, request, o)

    def unary_stream(self, path: str, *args: Any, **options: Any) -> Any:
        """As of grpc.aio.Channel."""
        make = self._session.channel.unary_stream(path, *args, **options)
        return lambda request, **o: self._call(path).many(make, request, o)

    def stream_unary(self, path: str, *args: Any, **options: Any) -> Any:
        """As of grpc.aio.Channel; requests are given as an iterable."""
        make = self._session.channel.stream_unary(path, *args, **options)
        return lambda requests, **o: self._call(path).one(make, requests, o)

    def stream_stream(self, path: str, *args: Any, **options: Any) -> Any:
        """As of grpc.aio.Channel; requests are given as an iterable."""
        make = self._session.channel.stream_stream(path, *args, **options)
        return lambda requests, **o: self._call(path).many(make, requests, o)


class _Call:
    """One call within its bounds: the call's own, and the block's."""

    def __init__(self, charge: MethodCharge, bounds: list[Bound]) -> None:
        self._charge = charge
        self._bounds = bounds
        self._bills = Bills(charge)
        self._step: dict[Line, int] | None = None
        """Set aside for the response that is waited for."""

    def _hold(self, steps: Steps) -> None:
        steps = list(steps)
        for number, bound in enumerate(self._bounds):
            try:
                bound.hold(steps)
            except BudgetExceeded:
                for earlier in self._bounds[:number]:
                    earlier.settle(steps, ())
                raise

    def _settle(self, held: Steps, used: Steps) -> None:
        for bound in self._bounds:
            bound.settle(held, used)

    def _spend(self, used: Steps) -> None:
        self._hold(used)
        self._settle(used, used)

    def _await(self) -> None:
        """Sets aside what the next response may cost, as far as that is not done."""
        step, held = self._bills.next(), self._step or {}
        self._hold([(line, units - held.get(line, 0)) for line, units in step.items()])
        self._step = step

    def _take(self, message: Any) -> None:
        """Counts the response that was waited for; None if none came."""
        step, self._step = self._step or {}, None
        if message is not None:
            self._bills.take(message)
        self._settle(step.items(), self._charge.units(message) if message is not None else ())

    def _send(self, request: Any) -> None:
        self._spend(self._charge.units_asked(request))
        self._bills.allow(request)
        if self._step is not None:
            self._await()  # the response may bill more now

    async def _requests(self, requests: Any) -> AsyncIterator[Any]:
        async for request in _each(requests):
            self._send(request)
            yield request

    def _begin(self, request: Any) -> Any:
        self._spend(self._charge.fee)
        if self._charge.streams_requests:
            return self._requests(request)
        self._send(request)
        return request

    async def one(self, make: Any, request: Any, options: dict[str, Any]) -> Any:
        """A call with one response."""
        sending = self._begin(request)
        self._await()
        response = None
        try:
            response = await make(sending, **options)
        except grpc.aio.AioRpcError as failure:
            raise to_error(failure) from failure
        finally:
            self._take(response)
        return response

    async def many(self, make: Any, request: Any, options: dict[str, Any]) -> AsyncIterator[Any]:
        """A call with many responses; leaving the loop ends it."""
        call = make(self._begin(request), **options)
        responses = aiter(call)
        try:
            while True:
                self._await()
                message = None
                try:
                    message = await anext(responses, None)
                finally:
                    self._take(message)
                if message is None:
                    return
                yield message
        except grpc.aio.AioRpcError as failure:
            raise to_error(failure) from failure
        finally:
            call.cancel()


async def _each(requests: AsyncIterable[Any] | Iterable[Any]) -> AsyncIterator[Any]:
    if isinstance(requests, AsyncIterable):
        async for request in requests:
            yield request
    else:
        for request in requests:
            yield request
