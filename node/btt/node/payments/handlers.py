"""The four kinds of paid methods: each handler between what comes in and what leaves.

A service contains no payment code, whatever its kind. What it raises, or refuses by
`context.abort` or an error code, costs its caller nothing that was not acknowledged; a call that
its caller breaks off is settled by the caller's report.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from btt.node.payments.charged import begin
from btt.node.payments.context import MeteredContext
from btt.node.payments.metering import Metering
from btt.node.payments.session import Session
from btt.sdk.errors import BttError, InternalError
from btt.sdk.payment.charges import MethodCharge
from btt.sdk.rpc import abort

STORED_ANSWERS = 64
"""Answers of unary calls kept for each session, for a caller that lost one."""

Entry = Callable[[Any], AbstractAsyncContextManager[tuple[Session, bytes]]]
"""Authenticates and admits one call, by its context; yields who pays, and the call's id."""


def metered(handler: Any, charge: MethodCharge, enter: Entry) -> grpc.RpcMethodHandler[Any, Any]:
    """Wraps the handler of a paid method, of any kind.

    Args:
        handler: What the service registered.
        charge: Of the method.
        enter: For this call.
    """
    kinds = _Kinds(charge, enter, handler.response_serializer)
    if handler.response_streaming:
        # Responses are counted in the bytes that are sent, so they are serialised here.
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                kinds.stream_stream(handler.stream_stream), handler.request_deserializer, None
            )
        return grpc.unary_stream_rpc_method_handler(
            kinds.unary_stream(handler.unary_stream), handler.request_deserializer, None
        )
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(
            kinds.stream_unary(handler.stream_unary),
            handler.request_deserializer,
            handler.response_serializer,
        )
    return grpc.unary_unary_rpc_method_handler(
        kinds.unary_unary(handler.unary_unary), handler.request_deserializer, handler.response_serializer
    )


@dataclass(frozen=True, slots=True)
class _Kinds:
    charge: MethodCharge
    enter: Entry
    serialise: Callable[[Any], bytes]

    def unary_unary(
        self, inner: Callable[[Any, Any], Awaitable[Any]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def handle(request: Any, plain: Any) -> Any:
            context, metering = MeteredContext(plain), None
            try:
                async with self.enter(plain) as (session, call):
                    if call in session.answers:
                        return session.answers[call]
                    metering = begin(session, call, self.charge, context)
                    metering.allow(request)
                    await metering.hold(request)
                    message = await inner(request, context)
                    if context.failed:
                        metering.refuse()
                        return message
                    metering.answer(metering.count(message))
                    session.answers[call] = message
                    if len(session.answers) > STORED_ANSWERS:
                        del session.answers[next(iter(session.answers))]
                    return message
            except Exception as error:  # noqa: BLE001 - whatever a service raises
                await _fail(error, metering, context)

        return handle

    def unary_stream(
        self, inner: Callable[[Any, Any], AsyncIterator[Any]]
    ) -> Callable[[Any, Any], AsyncIterator[bytes]]:
        charge, serialise = self.charge, self.serialise

        async def handle(request: Any, plain: Any) -> AsyncIterator[bytes]:
            context, metering = MeteredContext(plain), None
            try:
                async with self.enter(plain) as (session, call):
                    metering = begin(session, call, charge, context)
                    metering.allow(request)
                    held = bool(charge.requests)
                    if held:
                        await metering.hold(request)
                    async with aclosing(inner(request, context)) as messages:  # type: ignore[type-var]
                        async for message in messages:
                            wire = serialise(message)
                            units = metering.count(message, wire)
                            if held:
                                metering.answer(units)
                                held = False
                            else:
                                await metering.let_out(units)
                            yield wire
                    if context.failed:
                        metering.refuse()
                    elif held:
                        metering.answer([])
                    else:
                        await metering.complete()
            except Exception as error:  # noqa: BLE001
                await _fail(error, metering, context)

        return handle

    def stream_unary(
        self, inner: Callable[[Any, Any], Awaitable[Any]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def handle(requests: Any, plain: Any) -> Any:
            context, metering = MeteredContext(plain), None
            try:
                async with self.enter(plain) as (session, call):
                    metering = begin(session, call, self.charge, context)
                    message = await inner(metering.let_in(requests), context)
                    if not self._ended_well(metering, context):
                        return message
                    await metering.let_out(metering.count(message))
                    await metering.complete()
                    return message
            except Exception as error:  # noqa: BLE001
                await _fail(error, metering, context)

        return handle

    def stream_stream(
        self, inner: Callable[[Any, Any], AsyncIterator[Any]]
    ) -> Callable[[Any, Any], AsyncIterator[bytes]]:
        charge, serialise = self.charge, self.serialise

        async def handle(requests: Any, plain: Any) -> AsyncIterator[bytes]:
            context, metering = MeteredContext(plain), None
            try:
                async with self.enter(plain) as (session, call):
                    metering = begin(session, call, charge, context)
                    async with aclosing(inner(metering.let_in(requests), context)) as messages:  # type: ignore[type-var]
                        async for message in messages:
                            # A response answers all that the service has taken.
                            metering.acknowledge()
                            wire = serialise(message)
                            await metering.let_out(metering.count(message, wire))
                            yield wire
                    if self._ended_well(metering, context):
                        await metering.complete()
            except Exception as error:  # noqa: BLE001
                await _fail(error, metering, context)

        return handle

    def _ended_well(self, metering: Metering, context: MeteredContext) -> bool:
        if metering.failure is not None:
            raise metering.failure
        if context.failed:
            metering.refuse()
            return False
        metering.acknowledge()
        return True


async def _fail(error: Exception, metering: Metering | None, context: MeteredContext) -> NoReturn:
    if metering is not None:
        if isinstance(error, InternalError):
            metering.void()
        else:
            metering.refuse()
    if isinstance(error, BttError):
        await abort(context, error)  # type: ignore[arg-type]
    raise error
