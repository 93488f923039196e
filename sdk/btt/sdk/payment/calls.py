"""Client interceptors: attach the session to metered calls, and count what they send and take.

grpc.aio registers one interceptor class for the first kind of call it matches, so each
kind has a class of its own.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio

from btt.sdk.channel import Segment
from btt.sdk.errors import BttError, ConnectError, DeadlineExceeded
from btt.sdk.payment.charges import MethodCharge
from btt.sdk.payment.ending import in_time
from btt.sdk.payment.metered import ACKNOWLEDGED_KEY, MeteredCall
from btt.sdk.payment.options import method_charge
from btt.sdk.payment.verdicts import Verdicts
from btt.sdk.rpc import to_error

if TYPE_CHECKING:
    from btt.sdk.payment.session import PaymentSession

__all__ = [
    "ACKNOWLEDGED_KEY",
    "CALL_KEY",
    "PROOF_KEY",
    "TOKEN_KEY",
    "PayStreamStream",
    "PayStreamUnary",
    "PayUnaryStream",
    "PayUnaryUnary",
    "Verdicts",
    "end_on_break",
]

TOKEN_KEY = "btt-session-bin"  # noqa: S105 - a header's name
CALL_KEY = "btt-call-bin"
PROOF_KEY = "btt-proof-bin"
_MADE: ContextVar[list[MeteredCall] | None] = ContextVar("btt_made", default=None)
"""Where the loop over a call's responses finds what counts it."""
_CANCELLED_HERE = "Locally cancelled by application!"  # gRPC's words

Details = grpc.aio.ClientCallDetails
Continuation = Callable[[Details, Any], Awaitable[Any]]


def _with_session(details: Details, session: PaymentSession, call: MeteredCall) -> Details:
    timeout = None if details.timeout is None else call.deadline - asyncio.get_running_loop().time()
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata.add(TOKEN_KEY, session.token)
    metadata.add(CALL_KEY, call.call_id)
    metadata.add(PROOF_KEY, session.proof(call.call_id))
    return Details(details.method, timeout, metadata, details.credentials, details.wait_for_ready)


def _charge(details: Details) -> MethodCharge:
    method = details.method
    return method_charge(method.decode() if isinstance(method, bytes) else method)


async def _start(
    session: PaymentSession,
    charge: MethodCharge,
    continuation: Continuation,
    details: Details,
    request: Any,
) -> tuple[MeteredCall, Any]:
    """Begins one metered call; `request` is one, or what gives many."""
    deadline = math.inf
    if details.timeout is not None:
        deadline = asyncio.get_running_loop().time() + details.timeout
    await in_time(_afford(session, charge, request), deadline)
    call = MeteredCall(session, charge, None if charge.streams_requests else request, deadline=deadline)
    try:
        # What gRPC does with an iterator of requests takes an end of the call for a wish to cancel it.
        sent = None if charge.streams_requests else request
        rpc = await continuation(_with_session(details, session, call), sent)
    except BaseException:
        call.finish()
        raise
    if (made := _MADE.get()) is not None and not made:  # later ones are its own requests' calls
        made.append(call)
    call.attach(rpc, request if charge.streams_requests else None)
    return call, rpc


async def _afford(session: PaymentSession, charge: MethodCharge, request: Any) -> None:
    await session.capacity.ready()
    if charge.requests and not charge.streams_requests:
        asked = [*charge.units_asked(request), *charge.fee]
        digest = session.offer.digest
        await session.capacity.cover([(Segment(digest, line), units) for line, units in asked])


def _fail(session: PaymentSession, call: MeteredCall, failure: grpc.aio.AioRpcError) -> NoReturn:
    """Raises what a call that failed at the node means."""
    failure = call.ending.told(failure)
    call.learned(failure.trailing_metadata())
    error = session.error or to_error(failure)
    if isinstance(error, ConnectError) and call.is_late:
        # gRPC takes a request that it was sending at the deadline for a broken connection.
        error = DeadlineExceeded("The call took longer than its deadline.")
    raise error from failure


async def _explain_cancel(session: PaymentSession, rpc: Any, call: MeteredCall) -> None:
    """Raises what cancelled the call: its own request, the session's end, or the node.

    A cancelled caller stays cancelled, and so does whoever cancelled the call itself.
    """
    task = asyncio.current_task()
    if task is None or task.cancelling():
        return
    if (reason := session.error or call.failure) is not None:
        raise reason from None
    if rpc.cancelled() and await rpc.details() != _CANCELLED_HERE:
        # gRPC ends a call at its deadline on both sides; the node's word may come first.
        raise DeadlineExceeded("The node ended the call before it was done.") from None


async def _responses(session: PaymentSession, rpc: Any, call: MeteredCall) -> AsyncIterator[Any]:
    try:
        messages = aiter(rpc)
        while (message := await call.in_time(anext(messages, None))) is not None:
            await call.arrived(message)
            yield message
        await call.in_time(call.completed(rpc))
    except grpc.aio.AioRpcError as failure:
        _fail(session, call, failure)
    except BttError:
        call.cancel()
        raise
    except asyncio.CancelledError:
        await _explain_cancel(session, rpc, call)
        raise
    finally:
        call.finish()


async def _response(session: PaymentSession, rpc: Any, call: MeteredCall) -> Any:
    try:
        response = await call.in_time(rpc)
        await call.arrived(response)
        await call.in_time(call.completed(rpc))
    except grpc.aio.AioRpcError as failure:
        _fail(session, call, failure)
    except asyncio.CancelledError:
        await _explain_cancel(session, rpc, call)
        raise
    finally:
        call.finish()
    return response


class PayUnaryStream(grpc.aio.UnaryStreamClientInterceptor):
    """Pays for calls with one request and many responses."""

    def __init__(self, session: PaymentSession) -> None:
        self._session = session

    async def intercept_unary_stream(
        self, continuation: Continuation, client_call_details: Details, request: Any
    ) -> Any:
        """Attaches the session, and counts each response on arrival."""
        charge = _charge(client_call_details)
        if charge.free:
            return await continuation(client_call_details, request)
        call, rpc = await _start(self._session, charge, continuation, client_call_details, request)
        return _responses(self._session, rpc, call)


class PayUnaryUnary(grpc.aio.UnaryUnaryClientInterceptor):
    """Pays for calls with one request and one response."""

    def __init__(self, session: PaymentSession) -> None:
        self._session = session

    async def intercept_unary_unary(
        self, continuation: Continuation, client_call_details: Details, request: Any
    ) -> Any:
        """Attaches the session, and counts the response on arrival."""
        charge = _charge(client_call_details)
        if charge.free:
            return await continuation(client_call_details, request)
        call, rpc = await _start(self._session, charge, continuation, client_call_details, request)
        return await _response(self._session, rpc, call)


class PayStreamUnary(grpc.aio.StreamUnaryClientInterceptor):
    """Pays for calls with many requests and one response."""

    def __init__(self, session: PaymentSession) -> None:
        self._session = session

    async def intercept_stream_unary(
        self, continuation: Continuation, client_call_details: Details, request_iterator: Any
    ) -> Any:
        """Attaches the session, and counts each request as it is acknowledged."""
        charge = _charge(client_call_details)
        if charge.free:
            return await continuation(client_call_details, request_iterator)
        call, rpc = await _start(self._session, charge, continuation, client_call_details, request_iterator)
        # `write` waits for this interceptor to return, and the response for what is written.
        return _Answered(rpc, asyncio.ensure_future(_response(self._session, rpc, call)))


class PayStreamStream(grpc.aio.StreamStreamClientInterceptor):
    """Pays for calls with many requests and many responses."""

    def __init__(self, session: PaymentSession) -> None:
        self._session = session

    async def intercept_stream_stream(
        self, continuation: Continuation, client_call_details: Details, request_iterator: Any
    ) -> Any:
        """Attaches the session, and counts both ways."""
        charge = _charge(client_call_details)
        if charge.free:
            return await continuation(client_call_details, request_iterator)
        call, rpc = await _start(self._session, charge, continuation, client_call_details, request_iterator)
        return _responses(self._session, rpc, call)


class _Answered:
    """A call whose response has passed the meter, whether or not somebody waits for it."""

    def __init__(self, call: Any, response: asyncio.Future[Any]) -> None:
        self._call = call
        self._response = response
        response.add_done_callback(lambda done: done.cancelled() or done.exception())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._response.__await__()


def end_on_break(channel: grpc.aio.Channel) -> grpc.aio.Channel:
    """Makes breaking off a loop over responses end the call, at once and not at some collection.

    An intercepted call of grpc.aio refers to itself, so that it would run on, and hold the
    session's credit, until the garbage collector comes by. One that the node has ended meanwhile
    cannot be cancelled any more, and still has to be reported.
    """
    channel.unary_stream = _ending(channel.unary_stream)  # type: ignore[method-assign]
    channel.stream_stream = _ending(channel.stream_stream)  # type: ignore[method-assign]
    return channel


def _ending(make: Any) -> Any:
    def multi_callable(*args: Any, **options: Any) -> Any:
        call = make(*args, **options)

        def begin(*a: Any, **o: Any) -> _Stream:
            made: list[MeteredCall] = []
            token = _MADE.set(made)
            try:
                return _Stream(call(*a, **o), made)
            finally:
                _MADE.reset(token)

        return begin

    return multi_callable


class _Stream:
    """A call whose iterator is referred to by nobody but the loop that runs over it."""

    def __init__(self, call: Any, made: list[MeteredCall]) -> None:
        self._call = call
        self._made = made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for message in self._call:
                yield message
        finally:
            self._call.cancel()
            for metered in self._made:
                metered.cancel()
