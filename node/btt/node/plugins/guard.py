"""Stands around the calls of a service: where it is missing or raises, callers get a typed answer.

It is also where the bytes of gRPC messages pass the node's limiter, if there is a limit.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import structlog

from btt.node.limits.limiter import Limiter
from btt.sdk.errors import BttError, InternalError

if TYPE_CHECKING:
    from btt.node.plugins.host import ServiceHost

log = structlog.get_logger(__name__)
Handler = Any  # grpc's handlers have no common type that could be called


def guarded(handler: Handler, host: ServiceHost, limiter: Limiter) -> Handler:
    """Wraps one method of a service.

    Args:
        handler: As the service registered it.
        host: Of the service.
        limiter: Of the node.
    """
    up, down, name = limiter.up, limiter.down, host.name

    async def taken(message: Any, context: Any) -> Any:
        if down.limits(name):
            await down.take(name, context.peer(), message.ByteSize())
        return message

    async def incoming(requests: Any, context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            yield await taken(request, context)

    def outgoing(inner: Callable[[Any, Any], Any], streamed: bool) -> Callable[[Any, Any], Any]:
        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            with _call(host):
                given = incoming(request, context) if streamed else await taken(request, context)
                async with aclosing(inner(given, context)) as messages:
                    async for message in messages:
                        if up.limits(name):
                            await up.take(name, context.peer(), _size(message))
                        yield message

        return stream

    def answering(
        inner: Callable[[Any, Any], Awaitable[Any]], streamed: bool
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def unary(request: Any, context: Any) -> Any:
            with _call(host):
                given = incoming(request, context) if streamed else await taken(request, context)
                message = await inner(given, context)
                if up.limits(name):
                    await up.take(name, context.peer(), _size(message))
                return message

        return unary

    coders = handler.request_deserializer, handler.response_serializer
    if handler.stream_stream:
        return grpc.stream_stream_rpc_method_handler(outgoing(handler.stream_stream, True), *coders)
    if handler.unary_stream:
        return grpc.unary_stream_rpc_method_handler(outgoing(handler.unary_stream, False), *coders)
    if handler.stream_unary:
        return grpc.stream_unary_rpc_method_handler(answering(handler.stream_unary, True), *coders)
    return grpc.unary_unary_rpc_method_handler(answering(handler.unary_unary, False), *coders)


def _size(message: Any) -> int:
    return len(message) if isinstance(message, bytes) else int(message.ByteSize())  # it may be serialised


@contextmanager
def _call(host: ServiceHost) -> Iterator[None]:
    begun = host.begin_call()
    try:
        yield
    except (BttError, grpc.aio.AbortError):
        raise
    except (Exception, SystemExit) as error:
        log.exception("service.raised", service=host.name)
        raise InternalError("The service failed at this call.") from error
    finally:
        host.end_call(begun)
