"""Server interceptor: counts what leaves, and lets it leave only while credit lasts.

Services contain no payment code: their handlers are wrapped when they are looked up.
What cannot be metered is refused when it is registered (`Registrar`).
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import structlog

from btt.node.payments.network import network_of
from btt.node.payments.session import Session
from btt.node.payments.sessions import Sessions
from btt.sdk.channel import Line, Segment
from btt.sdk.errors import BttError, ConfigError, InternalError, RateLimited, SessionEnded, SignatureInvalid
from btt.sdk.payment.calls import CALL_KEY, PROOF_KEY, TOKEN_KEY
from btt.sdk.payment.charges import MethodCharge, method_charge
from btt.sdk.rpc import abort

log = structlog.get_logger(__name__)

STORED_ANSWERS = 64
"""Answers of unary calls kept for each session, for a caller that lost one."""


class Registrar:
    """Stands between a service and the gRPC server, and refuses what cannot be charged.

    Pass it where generated `add_...Servicer_to_server` functions expect a server.

    Args:
        server: Where what is accepted goes.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server
        self.charges: dict[str, MethodCharge] = {}

    def add_registered_method_handlers(
        self, service: str, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Checks and registers the methods of one service.

        Raises:
            ConfigError: A method does not say how it is charged, or cannot be metered.
        """
        for name, handler in handlers.items():
            charge = method_charge(f"/{service}/{name}")
            if handler.request_streaming and not charge.free:
                raise ConfigError(f"{charge.path} streams requests, which this version cannot meter.")
            if handler.response_streaming and not inspect.isasyncgenfunction(
                handler.unary_stream or handler.stream_stream
            ):
                raise ConfigError(f"{charge.path} must yield its responses: what it writes is not metered.")
            self.charges[charge.path] = charge
        self._server.add_registered_method_handlers(service, handlers)

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        """Registers the handlers whose methods were checked."""
        self._server.add_generic_rpc_handlers(handlers)


class FreeLimit:
    """Counts free calls a minute, per method and network.

    Args:
        clock: Unix milliseconds.
    """

    MAX_KEYS = 65536

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._minute = 0
        self._calls: dict[tuple[str, str], int] = {}

    def take(self, charge: MethodCharge, network: str) -> None:
        """Counts one call.

        Raises:
            RateLimited: There were too many this minute.
        """
        minute = self._clock() // 60_000
        if minute != self._minute:
            self._minute, self._calls = minute, {}
        key = (charge.path, network)
        calls = self._calls.get(key, 0) + 1
        if calls > charge.free_calls_per_minute or (calls == 1 and len(self._calls) >= self.MAX_KEYS):
            raise RateLimited(f"More than {charge.free_calls_per_minute} calls of {charge.path} this minute.")
        self._calls[key] = calls


class PaymentInterceptor(grpc.aio.ServerInterceptor):
    """Meters every call of a node.

    Args:
        sessions: The live sessions.
        charges: Charge of each registered method.
        clock: Unix milliseconds.
    """

    def __init__(
        self, *, sessions: Sessions, charges: dict[str, MethodCharge], clock: Callable[[], int]
    ) -> None:
        self._sessions = sessions
        self._charges = charges
        self._limit = FreeLimit(clock)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handler of a call by what its method costs."""
        handler: Any = await continuation(handler_call_details)
        charge = self._charges.get(handler_call_details.method)
        if handler is None:
            return None
        if charge is None:
            return handler  # type: ignore[no-any-return]
        if charge.free:
            return self._free(handler, charge)
        metadata = dict(handler_call_details.invocation_metadata or ())
        ticket = tuple(metadata.get(key, b"") for key in (TOKEN_KEY, CALL_KEY, PROOF_KEY))
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._metered_stream(handler.unary_stream, charge, ticket, handler.response_serializer),
                handler.request_deserializer,
                None,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._metered_unary(handler.unary_unary, charge, ticket),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _begin(self, ticket: tuple[str | bytes, ...]) -> tuple[Session, bytes]:
        token, call_id, proof = (part if isinstance(part, bytes) else b"" for part in ticket)
        if not token:
            raise SessionEnded("This method is paid: open a payment session first.")
        session = self._sessions.find(token, call_id, proof)
        if not session.attached:
            raise SessionEnded("The payment session has no payment stream.")
        return session, call_id

    def _metered_stream(
        self,
        inner: Callable[[Any, Any], AsyncIterator[Any]],
        charge: MethodCharge,
        ticket: tuple[str | bytes, ...],
        serialise: Callable[[Any], bytes],
    ) -> Callable[[Any, Any], AsyncIterator[bytes]]:
        async def metered(request: Any, context: Any) -> AsyncIterator[bytes]:
            session: Session | None = None
            try:
                session, call = self._begin(ticket)
                session.begin(call)
                async for message in inner(request, context):
                    wire = serialise(message)
                    for segment, units in _segments(session, charge, charge.units_sent(message, wire)):
                        await session.charge(call, segment, units)
                    yield wire
            except BttError as error:
                if isinstance(error, InternalError) and session is not None:
                    session.void(call)
                if isinstance(error, SignatureInvalid) and session is None:
                    await self._sessions.bans.network_failed(network_of(context.peer()))
                await abort(context, error)

        return metered

    def _metered_unary(
        self,
        inner: Callable[[Any, Any], Awaitable[Any]],
        charge: MethodCharge,
        ticket: tuple[str | bytes, ...],
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def metered(request: Any, context: Any) -> Any:
            session: Session | None = None
            try:
                session, call = self._begin(ticket)
                if call in session.answers:
                    return session.answers[call]
                session.begin(call)
                # The work is done only once it could be paid.
                for field in charge.fields:
                    await session.reserve(Segment(session.offer.digest, field.line), charge.largest_message)
                message = await inner(request, context)
                for segment, units in _segments(session, charge, charge.units(message)):
                    await session.charge(call, segment, units)
                session.answers[call] = message
                if len(session.answers) > STORED_ANSWERS:
                    del session.answers[next(iter(session.answers))]
            except BttError as error:
                if isinstance(error, SignatureInvalid) and session is None:
                    await self._sessions.bans.network_failed(network_of(context.peer()))
                await abort(context, error)
            return message

        return metered

    def _free(self, handler: Any, charge: MethodCharge) -> grpc.RpcMethodHandler[Any, Any]:
        if handler.response_streaming:
            inner = handler.stream_stream or handler.unary_stream

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                sent = 0
                try:
                    self._limit.take(charge, network_of(context.peer()))
                    async for message in inner(request, context):
                        sent += message.ByteSize()
                        _bound(sent, charge)
                        yield message
                except BttError as error:
                    await abort(context, error)

            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(stream, handler.request_deserializer, handler.response_serializer)
        inner_unary = handler.stream_unary or handler.unary_unary

        async def unary(request: Any, context: Any) -> Any:
            try:
                self._limit.take(charge, network_of(context.peer()))
                message = await inner_unary(request, context)
                _bound(message.ByteSize(), charge)
            except BttError as error:
                await abort(context, error)
            return message

        make_unary = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make_unary(unary, handler.request_deserializer, handler.response_serializer)


def _segments(
    session: Session, charge: MethodCharge, units: list[tuple[Line, int]]
) -> list[tuple[Segment, int]]:
    if sum(count for _, count in units) > charge.largest_message:
        log.error("service.message_too_large", method=charge.path)
        raise InternalError(f"{charge.path} made a larger message than it declares.")
    return [(Segment(session.offer.digest, line), count) for line, count in units]


def _bound(sent: int, charge: MethodCharge) -> None:
    if sent > charge.free_bytes:
        log.error("service.free_bytes_exceeded", method=charge.path)
        raise InternalError(f"{charge.path} sent more than its free bytes.")
