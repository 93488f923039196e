"""Gives every call an id, and names it in whatever is logged while the call runs.

The id of a paid call is the one that its caller made for it, so that both sides can look for the
same; it says nothing about who pays.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import structlog

from btt.sdk.payment.calls import CALL_KEY

log = structlog.get_logger(__name__)

_ID_BYTES: Final = 16
_DEFECT: Final = "INTERNAL"


def begin_request(service: str, method: str, metadata: Mapping[str, Any], peer: str) -> Callable[[str], None]:
    """Names a call in the log from here on; it runs in a task of its own.

    Args:
        service: Name of the node's service.
        method: Without the service's name.
        metadata: What the caller sent before its messages.
        peer: Address of the caller, as gRPC writes it.

    Returns:
        What is called when it ends, with SERVED, CANCELLED or the reason of a refusal.
    """
    given = metadata.get(CALL_KEY)
    is_id = isinstance(given, bytes) and len(given) == _ID_BYTES
    structlog.contextvars.bind_contextvars(
        request_id=(given if is_id else secrets.token_bytes(_ID_BYTES)).hex(),  # type: ignore[union-attr]
        service=service,
        method=method,
        peer=peer,
    )
    began = time.perf_counter()

    def ended(code: str) -> None:
        tell = log.warning if code == _DEFECT else log.debug
        tell("call.ended", code=code, ms=round((time.perf_counter() - began) * 1000, 3))

    return ended
