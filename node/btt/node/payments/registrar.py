"""What stands between a service and the gRPC server: it takes only what can be charged for certain."""

from __future__ import annotations

import inspect
from typing import Any

import grpc
import grpc.aio

from btt.sdk.errors import ConfigError
from btt.sdk.payment.charges import MethodCharge
from btt.sdk.payment.options import method_charge


class Registrar:
    """Checks every method of a service by its options and its handler.

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
            if handler.request_streaming != charge.streams_requests and not charge.free:
                raise ConfigError(f"{charge.path} is of another kind than its proto says.")
            if handler.response_streaming:
                if not inspect.isasyncgenfunction(handler.unary_stream or handler.stream_stream):
                    raise ConfigError(
                        f"{charge.path} must yield its responses: what it writes is not metered."
                    )
            elif not charge.free and not inspect.iscoroutinefunction(
                handler.unary_unary or handler.stream_unary
            ):
                raise ConfigError(f"{charge.path} must be an `async def` that returns its response.")
            self.charges[charge.path] = charge
        self._server.add_registered_method_handlers(service, handlers)

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        """Registers the handlers whose methods were checked."""
        self._server.add_generic_rpc_handlers(handlers)
