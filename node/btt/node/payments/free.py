"""Free methods: nothing is charged, so their number and size are bounded instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import grpc
import structlog

from btt.node.payments.network import network_of
from btt.sdk.errors import BttError, InternalError, RateLimited
from btt.sdk.payment.charges import MethodCharge
from btt.sdk.rpc import abort

log = structlog.get_logger(__name__)

_PAY: Final = "/btt.proto.payment.v1.PaymentService/Pay"
"""Lasts as long as a session, of which a channel has one."""


class FreeLimit:
    """Counts free calls, per method and network: as many may run at once as may begin in a minute.

    Args:
        clock: Unix milliseconds.
    """

    MAX_KEYS = 65536

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._minute = 0
        self._calls: dict[tuple[str, str], int] = {}
        self._running: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def enter(self, charge: MethodCharge, network: str) -> Iterator[None]:
        """Counts one call for the time of the block.

        Raises:
            RateLimited: There were too many this minute, or are now.
        """
        self.take(charge, network)
        key = (charge.path, network)
        most = charge.free_calls_per_minute
        if self._running[key] >= most and charge.path != _PAY:
            raise RateLimited(f"More than {most} calls of {charge.path} at once.")
        self._running[key] += 1
        try:
            yield
        finally:
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]

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


def bounded(
    handler: Any,
    charge: MethodCharge,
    limit: FreeLimit,
    enter: Callable[[Any], AbstractContextManager[None]],
) -> grpc.RpcMethodHandler[Any, Any]:
    """Wraps the handler of a free method, of any kind.

    Args:
        handler: What the service registered.
        charge: Of the method.
        limit: Counts the calls.
        enter: Admits one call, by its context.
    """
    if handler.response_streaming:
        inner = handler.stream_stream or handler.unary_stream

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            sent = 0
            try:
                with limit.enter(charge, network_of(context.peer())), enter(context):
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
            with limit.enter(charge, network_of(context.peer())), enter(context):
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


def _bound(sent: int, charge: MethodCharge) -> None:
    if sent > charge.free_bytes:
        log.error("service.free_bytes_exceeded", method=charge.path)
        raise InternalError(f"{charge.path} sent more than its free bytes.")
