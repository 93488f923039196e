"""The outermost interceptor: names every call in the log, and sees how it ends, whatever refused it.

A call meets, in this order and each in a module of its own: its name in the log (`requests`), the
bound on connections (`connections`), who pays (`payments.interceptor`), whether the node drains,
the application, the rate, the number at once, the deadline (`admission`), the meter
(`payments.metering`), the service's guard (`plugins.guard`); on the way out the refusals and the
metrics.

It is the one place where refusals and requests are counted, so that no part of the chain can
forget to. It reads the reason from what the call is answered with, which costs nothing for calls
that are served.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

import grpc
import grpc.aio

from btt.node.connections import Connections
from btt.node.refusals import CANCELLED, SERVED
from btt.node.requests import begin_request
from btt.sdk.errors import RateLimited
from btt.sdk.rpc import abort, reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PLATFORM: Final = {
    "btt.proto.payment.v1.PaymentService": "payments",
    "btt.proto.offer.v1.OfferService": "offers",
}


_GOOD_END: Final = ("payments", "Pay", "SESSION_ENDED")
"""How the payment stream of a session ends when its channel is closed: nobody was refused."""


class Watcher(Protocol):
    """Hears how calls end."""

    def __call__(self, service: str, method: str, reason: str) -> None:
        """Takes note of one call: its service's name, its method, and SERVED, CANCELLED or a reason."""


class Observer(grpc.aio.ServerInterceptor):
    """Tells watchers how each call ended.

    Args:
        owners: Name of the node's service by proto service; it may grow.
        watchers: Who wants to know.
        connections: Bounds the connections that have calls.
    """

    def __init__(self, owners: Mapping[str, str], *watchers: Watcher, connections: Connections) -> None:
        self._owners = owners
        self._watchers = watchers
        self._connections = connections

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handlers of all services but health and reflection."""
        handler: Any = await continuation(handler_call_details)
        proto, _, method = handler_call_details.method.lstrip("/").partition("/")
        service = self._owners.get(proto) or PLATFORM.get(proto)
        if handler is None or service is None:
            return handler  # type: ignore[no-any-return]
        name: str = service
        metadata = dict(handler_call_details.invocation_metadata or ())
        if handler.response_streaming:
            inner = handler.stream_stream or handler.unary_stream

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                with self._watched(name, method, metadata, context):
                    await self._enter(context)
                    async with aclosing(inner(request, context)) as messages:
                        async for message in messages:
                            yield message

            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(stream, handler.request_deserializer, handler.response_serializer)
        inner_unary = handler.stream_unary or handler.unary_unary

        async def unary(request: Any, context: Any) -> Any:
            with self._watched(name, method, metadata, context):
                await self._enter(context)
                return await inner_unary(request, context)

        make_unary = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make_unary(unary, handler.request_deserializer, handler.response_serializer)

    async def _enter(self, context: Any) -> None:
        try:
            self._connections.enter(context)
        except RateLimited as error:
            await abort(context, error)

    @contextmanager
    def _watched(
        self, service: str, method: str, metadata: Mapping[str, Any], context: Any
    ) -> Iterator[None]:
        ended = begin_request(service, method, metadata, context.peer())
        reason = SERVED
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            reason = CANCELLED
            raise
        except BaseException:
            reason = reason_of(context.trailing_metadata()) or "INTERNAL"
            raise
        finally:
            if (service, method, reason) == _GOOD_END:
                reason = SERVED
            ended(reason)
            for watcher in self._watchers:
                watcher(service, method, reason)
