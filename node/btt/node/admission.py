"""Bounds the paid calls that run at once, and nothing else.

gRPC's own limits count every call. With all slots taken by calls that wait for payment, the
payment could then not come in; so the server has no such limit, and this interceptor refuses
paid calls alone. It also knows when none is running, which is when a node can stop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
import grpc.aio

from btt.sdk.errors import BttError, Draining, RateLimited
from btt.sdk.payment.calls import TOKEN_KEY
from btt.sdk.payment.charges import MethodCharge
from btt.sdk.rpc import abort


class Admission(grpc.aio.ServerInterceptor):
    """Admits paid calls; it must stand before the interceptor that meters them.

    Args:
        charges: Charge of each registered method.
        calls: Most paid calls at once.
        calls_per_session: Most of one session.
    """

    def __init__(self, charges: Mapping[str, MethodCharge], *, calls: int, calls_per_session: int) -> None:
        self._charges = charges
        self._calls = calls
        self._calls_per_session = calls_per_session
        self._running: dict[bytes | str, int] = {}
        self._total = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    def limit(self, *, calls: int, calls_per_session: int) -> None:
        """Takes other bounds from now on."""
        self._calls, self._calls_per_session = calls, calls_per_session

    @property
    def running(self) -> int:
        """Paid calls that run now."""
        return self._total

    async def idle(self) -> None:
        """Returns when no paid call runs."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handler of a paid call."""
        handler: Any = await continuation(handler_call_details)
        charge = self._charges.get(handler_call_details.method)
        if handler is None or charge is None or charge.free:
            return handler  # type: ignore[no-any-return]
        token = dict(handler_call_details.invocation_metadata or ()).get(TOKEN_KEY, b"")
        if handler.response_streaming:

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                try:
                    with self._admit(token):
                        async with aclosing(handler.unary_stream(request, context)) as messages:
                            async for message in messages:
                                yield message
                except BttError as error:
                    await abort(context, error)

            return grpc.unary_stream_rpc_method_handler(
                stream, handler.request_deserializer, handler.response_serializer
            )

        async def unary(request: Any, context: Any) -> Any:
            try:
                with self._admit(token):
                    return await handler.unary_unary(request, context)
            except BttError as error:
                await abort(context, error)

        return grpc.unary_unary_rpc_method_handler(
            unary, handler.request_deserializer, handler.response_serializer
        )

    @contextmanager
    def _admit(self, token: bytes | str) -> Iterator[None]:
        if self.draining:
            raise Draining("The node is stopping.")
        if self._total >= self._calls:
            raise RateLimited(f"The node serves {self._calls} paid calls at once, and no more.")
        running = self._running.get(token, 0)
        if running >= self._calls_per_session:
            raise RateLimited(f"A session may run {self._calls_per_session} paid calls at once.")
        self._running[token] = running + 1
        self._total += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._total -= 1
            self._running[token] -= 1
            if not self._running[token]:
                del self._running[token]
            if not self._total:
                self._idle.set()
