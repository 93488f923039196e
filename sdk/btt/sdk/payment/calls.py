"""Client interceptors: attach the session to metered calls and count what arrives.

grpc.aio registers one interceptor class for the first kind of call it matches, so each
kind has a class of its own. Units are counted on arrival, before the message is handed
over, because code behind a `yield` does not run when the reader breaks off.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from btt.sdk.channel import Segment
from btt.sdk.errors import BttError, ConfigError, CountsDiffer
from btt.sdk.payment.charges import MethodCharge, method_charge
from btt.sdk.rpc import to_error

if TYPE_CHECKING:
    from btt.sdk.payment.session import PaymentSession

TOKEN_KEY = "btt-session-bin"  # noqa: S105 - a header's name
CALL_KEY = "btt-call-bin"
PROOF_KEY = "btt-proof-bin"

Units = list[tuple[Segment, int]]

_VERDICTS: ContextVar[Verdicts | None] = ContextVar("btt_verdicts", default=None)


class Verdicts:
    """Says which messages of the calls made inside its `with` block are accepted.

    Methods that are paid on verification must be called inside one. A message that was
    not accepted when the block ends is rejected, and never paid; calls that still run
    are cancelled.

        with session.verdicts() as verdicts:
            async for message in stub.Fetch(request):
                if good(message):
                    verdicts.accept(message)
    """

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[Any, MeteredCall, Units]] = {}
        self._calls: list[MeteredCall] = []
        self._token: Token[Verdicts | None] | None = None

    def __enter__(self) -> Verdicts:
        self._token = _VERDICTS.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _VERDICTS.reset(self._token)
        self._waiting.clear()
        for call in self._calls:
            call.decide()

    def accept(self, message: Any) -> None:
        """Accepts a message: its units become payable.

        Raises:
            ValueError: The message came from no call of this block, or was decided before.
        """
        call, units = self._take(message)
        call.accepted(units)

    def reject(self, message: Any) -> None:
        """Rejects a message: it is not paid.

        Raises:
            ValueError: The message came from no call of this block, or was decided before.
        """
        self._take(message)

    def _take(self, message: Any) -> tuple[MeteredCall, Units]:
        kept = self._waiting.pop(id(message), None)
        if kept is None or kept[0] is not message:
            raise ValueError("this message waits for no verdict here")
        return kept[1], kept[2]

    def expect(self, message: Any, call: MeteredCall, units: Units) -> None:
        """Keeps a message until it is decided; called by the interceptors."""
        self._waiting[id(message)] = (message, call, units)

    def watch(self, call: MeteredCall) -> None:
        """Ties a call to this block; called by the interceptors."""
        self._calls.append(call)


class MeteredCall:
    """One metered call, from its first message to its report."""

    def __init__(self, session: PaymentSession, charge: MethodCharge, request: Any) -> None:
        verdicts = _VERDICTS.get()
        if charge.verified and verdicts is None:
            raise ConfigError(
                f"{charge.path} is paid on verification.", hint="Call it inside `with session.verdicts()`."
            )
        self.call_id = secrets.token_bytes(16)
        self._session = session
        self._charge = charge
        self._verdicts = verdicts if charge.verified else None
        self._caps = [(f, f.cap(request)) for f in charge.fields if f.cap is not None]
        self._sums = [0] * len(self._caps)
        self._rpc: grpc.aio.Call | None = None
        self._finished = False
        self._decided = self._verdicts is None
        self._reported = False
        session.begin_call(self)
        if self._verdicts is not None:
            self._verdicts.watch(self)

    def attach(self, rpc: grpc.aio.Call) -> None:
        """Follows the call under way to its end, however that comes."""
        self._rpc = rpc

        def ended(_: object) -> None:
            # At its natural end the reader has yet to take what arrived.
            if rpc.cancelled():
                self.finish()

        rpc.add_done_callback(ended)

    def cancel(self) -> None:
        """Ends the call."""
        if self._rpc is not None:
            self._rpc.cancel()
        self.finish()

    def arrived(self, message: Any) -> None:
        """Counts a message on arrival.

        Raises:
            CountsDiffer: It bills more than the request allowed; the session ends.
        """
        for index, (field, cap) in enumerate(self._caps):
            self._sums[index] += field.count(message)
            if self._sums[index] > cap:
                error = CountsDiffer(f"The node bills {self._sums[index]} units; the request allowed {cap}.")
                self._session.fail(error)
                raise error
        units = self._units(message)
        if sum(n for _, n in units) > self._charge.largest_message:
            error = CountsDiffer("The node sent a message with more units than its service allows.")
            self._session.fail(error)
            raise error
        for segment, count in units:
            self._session.payer.received(self.call_id, segment, count)
        if self._verdicts is None:
            self.accepted(units)
        elif not self._decided:
            self._verdicts.expect(message, self, units)

    def accepted(self, units: Units) -> None:
        """Counts the units of a message as payable."""
        for segment, count in units:
            self._session.payer.accepted(self.call_id, segment, count)
        self._session.nudge()

    def _units(self, message: Any) -> Units:
        digest = self._session.offer.digest
        return [(Segment(digest, line), count) for line, count in self._charge.units(message)]

    def finish(self) -> None:
        """The call has ended on the wire."""
        self._finished = True
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


def _with_session(
    details: grpc.aio.ClientCallDetails, session: PaymentSession, call: MeteredCall
) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata.add(TOKEN_KEY, session.token)
    metadata.add(CALL_KEY, call.call_id)
    metadata.add(PROOF_KEY, session.proof(call.call_id))
    return grpc.aio.ClientCallDetails(
        details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
    )


def _charge(details: grpc.aio.ClientCallDetails) -> MethodCharge:
    method = details.method
    return method_charge(method.decode() if isinstance(method, bytes) else method)


def _explain_cancel(session: PaymentSession) -> None:
    """Raises what ended the session, which cancels its calls; a cancelled caller stays cancelled."""
    task = asyncio.current_task()
    if session.error is not None and not (task and task.cancelling()):
        raise session.error from None


class PayUnaryStream(grpc.aio.UnaryStreamClientInterceptor):
    """Pays for calls with one request and many responses."""

    def __init__(self, session: PaymentSession) -> None:
        self._session = session

    async def intercept_unary_stream(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Any], Awaitable[Any]],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        """Attaches the session, and counts each response on arrival."""
        charge = _charge(client_call_details)
        if charge.free:
            return await continuation(client_call_details, request)
        await self._session.capacity.ready()
        call = MeteredCall(self._session, charge, request)
        try:
            rpc = await continuation(_with_session(client_call_details, self._session, call), request)
        except BaseException:
            call.finish()
            raise
        call.attach(rpc)
        return self._responses(rpc, call)

    async def _responses(self, rpc: Any, call: MeteredCall) -> AsyncIterator[Any]:
        try:
            async for message in rpc:
                call.arrived(message)
                yield message
        except grpc.aio.AioRpcError as failure:
            raise (self._session.error or to_error(failure)) from failure
        except BttError:
            call.cancel()
            raise
        except asyncio.CancelledError:
            _explain_cancel(self._session)
            raise
        finally:
            call.finish()


class PayUnaryUnary(grpc.aio.UnaryUnaryClientInterceptor):
    """Pays for calls with one request and one response."""

    def __init__(self, session: PaymentSession) -> None:
        self._session = session

    async def intercept_unary_unary(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Any], Awaitable[Any]],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        """Attaches the session, and counts the response on arrival."""
        charge = _charge(client_call_details)
        if charge.free:
            return await continuation(client_call_details, request)
        await self._session.capacity.ready()
        call = MeteredCall(self._session, charge, request)
        try:
            rpc = await continuation(_with_session(client_call_details, self._session, call), request)
            call.attach(rpc)
            response = await rpc
            call.arrived(response)
        except grpc.aio.AioRpcError as failure:
            raise (self._session.error or to_error(failure)) from failure
        except asyncio.CancelledError:
            _explain_cancel(self._session)
            raise
        finally:
            call.finish()
        return response


def end_on_break(channel: grpc.aio.Channel) -> grpc.aio.Channel:
    """Makes breaking off a loop over responses end the call, at once and not at some collection.

    An intercepted call of grpc.aio refers to itself, so that it would run on, and hold the
    session's credit, until the garbage collector comes by.
    """
    make = channel.unary_stream

    def unary_stream(*args: Any, **options: Any) -> Any:
        call = make(*args, **options)
        return lambda *a, **o: _Stream(call(*a, **o))

    channel.unary_stream = unary_stream  # type: ignore[method-assign]
    return channel


class _Stream:
    """A call whose iterator is referred to by nobody but the loop that runs over it."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for message in self._call:
                yield message
        finally:
            self._call.cancel()
