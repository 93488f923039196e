"""The context that a metered service gets: everything but the ways around the meter."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import grpc.aio

from btt.sdk.errors import InternalError
from btt.sdk.payment.calls import ACKNOWLEDGED_KEY

Trailer = tuple[tuple[str, str | bytes], ...]


class MeteredContext:
    """Passes everything on to the context of gRPC, and adds what the payer needs at the end.

    Args:
        context: Of gRPC.
    """

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context: Any = context
        self._own: Trailer = ()
        self._ours: Trailer = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def read(self) -> NoReturn:
        """Refuses: what is read here is not metered."""
        raise InternalError("A metered method takes its requests from the iterator it is given.")

    async def write(self, message: Any) -> NoReturn:
        """Refuses: what is written here is not metered."""
        raise InternalError("A metered method yields its responses.")

    def set_trailing_metadata(self, metadata: Any) -> None:
        """Sets the service's own trailing metadata."""
        self._own = tuple(metadata)
        self._context.set_trailing_metadata((*self._own, *self._ours))

    def tell(self, acknowledged: int) -> None:
        """Lets the payer know, when the call ends, how many requests are acknowledged."""
        self._ours = ((ACKNOWLEDGED_KEY, str(acknowledged)),)
        self._context.set_trailing_metadata((*self._own, *self._ours))

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """Ends the call with an error."""
        await self._context.abort(code, details, (*(trailing_metadata or self._own), *self._ours))
        raise AssertionError("abort returned")

    async def abort_with_status(self, status: Any) -> NoReturn:
        """Ends the call with an error."""
        await self.abort(status.code, status.details, status.trailing_metadata)

    @property
    def failed(self) -> bool:
        """The service has set an error code, which is what the caller will see."""
        code = self._context.code()
        return bool(code) and code is not grpc.StatusCode.OK
