"""Health of a node, by the standard gRPC protocol, in a form that can be bounded like any free call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio


class HealthServicer(aio.HealthServicer):
    """The library's servicer; only Watch yields its answers instead of writing them."""

    async def Watch(  # type: ignore[override]  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Sends the status of a service whenever it changes."""
        written = _Written()
        # Its inner loop is the library's, which takes the context for nothing but to write.
        watching = asyncio.ensure_future(super().Watch(request, written))  # type: ignore[arg-type]
        try:
            while True:
                yield await written.messages.get()
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching


class _Written:
    def __init__(self) -> None:
        self.messages: asyncio.Queue[health_pb2.HealthCheckResponse] = asyncio.Queue()

    async def write(self, message: health_pb2.HealthCheckResponse) -> None:
        self.messages.put_nowait(message)
