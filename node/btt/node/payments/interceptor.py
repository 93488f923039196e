"""Server interceptor: what every call of a node passes, in this order.

A free call: its limits. A paid call: who calls (the session), whether it is admitted
(`Admission`), and the meter. Services contain no payment code: their handlers are wrapped when
they are looked up.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import structlog

from btt.node.payments.free import FreeLimit, bounded
from btt.node.payments.handlers import metered
from btt.node.payments.network import network_of
from btt.node.payments.session import Session
from btt.node.payments.sessions import Sessions
from btt.sdk.errors import SessionEnded, SignatureInvalid
from btt.sdk.payment.calls import CALL_KEY, PROOF_KEY, TOKEN_KEY
from btt.sdk.payment.charges import MethodCharge

Admit = Callable[[MethodCharge, Session, Any], AbstractContextManager[None]]
"""Admits one paid call of a session, in its context, for the time of the block, or raises why not."""

AdmitFree = Callable[[str, Any], AbstractContextManager[None]]
"""The same for a free call, by its proto service."""


class PaymentInterceptor(grpc.aio.ServerInterceptor):
    """Meters every call of a node.

    Args:
        sessions: The live sessions.
        charges: Charge of each registered method.
        admit: Admits paid calls.
        admit_free: Admits the others.
        clock: Unix milliseconds.
    """

    def __init__(
        self,
        *,
        sessions: Sessions,
        charges: dict[str, MethodCharge],
        admit: Admit,
        admit_free: AdmitFree,
        clock: Callable[[], int],
    ) -> None:
        self._sessions = sessions
        self._charges = charges
        self._admit = admit
        self._admit_free = admit_free
        self._limit = FreeLimit(clock)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handler of a call by what its method costs."""
        handler: Any = await continuation(handler_call_details)
        charge = self._charges.get(handler_call_details.method)
        if handler is None or charge is None:
            return handler  # type: ignore[no-any-return]
        if charge.free:
            return bounded(
                handler, charge, self._limit, lambda context: self._admit_free(charge.service, context)
            )
        metadata = dict(handler_call_details.invocation_metadata or ())
        ticket = tuple(metadata.get(key, b"") for key in (TOKEN_KEY, CALL_KEY, PROOF_KEY))
        return metered(handler, charge, lambda context: self._enter(charge, ticket, context))

    @asynccontextmanager
    async def _enter(
        self, charge: MethodCharge, ticket: tuple[str | bytes, ...], context: Any
    ) -> AsyncIterator[tuple[Session, bytes]]:
        token, call_id, proof = (part if isinstance(part, bytes) else b"" for part in ticket)
        if not token:
            raise SessionEnded("This method is paid: open a payment session first.")
        try:
            session = self._sessions.find(token, call_id, proof)
        except SignatureInvalid:
            await self._sessions.bans.network_failed(network_of(context.peer()))
            raise
        structlog.contextvars.bind_contextvars(channel=session.payee.channel_id.hex())
        with self._admit(charge, session, context):
            await session.until_attached()
            yield session, call_id
