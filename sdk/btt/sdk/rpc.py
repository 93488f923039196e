"""Errors across gRPC: one class on both sides, `google.rpc.Status` between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from btt.sdk.errors import (
    BY_REASON,
    Banned,
    BttError,
    ConnectError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    LedgerUnreachable,
    PaymentError,
    QuotaFull,
    RateLimited,
    RemoteError,
    ServiceUnavailable,
    SignatureInvalid,
    SignerMismatch,
    StorageError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    import grpc.aio

DOMAIN = "btt"
MAX_WAIT_S = 60.0
"""Longest that a stranger can make us wait before we ask again, seconds."""
BROKEN_WRITE = "Internal error from Core"
"""What gRPC says when the connection goes while it sends a request of a stream."""

_CODES: tuple[tuple[type[BttError], int], ...] = (
    (SignatureInvalid, code_pb2.UNAUTHENTICATED),
    (SignerMismatch, code_pb2.PERMISSION_DENIED),
    (InvalidRequest, code_pb2.INVALID_ARGUMENT),
    (RateLimited, code_pb2.RESOURCE_EXHAUSTED),
    (QuotaFull, code_pb2.RESOURCE_EXHAUSTED),
    (DeadlineExceeded, code_pb2.DEADLINE_EXCEEDED),
    (ServiceUnavailable, code_pb2.UNAVAILABLE),
    (StorageError, code_pb2.UNAVAILABLE),
    (LedgerUnreachable, code_pb2.UNAVAILABLE),
    (InternalError, code_pb2.INTERNAL),
    (PaymentError, code_pb2.FAILED_PRECONDITION),
)


def _status(error: BttError) -> status_pb2.Status:
    reason = error.reason or InternalError.reason
    code = next((code for cls, code in _CODES if isinstance(error, cls)), code_pb2.FAILED_PRECONDITION)
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    details = [detail]
    if isinstance(error, Banned | RateLimited) and error.retry_after > 0:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after * 1e9))
        packed = any_pb2.Any()
        packed.Pack(retry)
        details.append(packed)
    return status_pb2.Status(code=code, message=error.message[:1024], details=details)


async def abort(context: grpc.aio.ServicerContext[object, object], error: BttError) -> NoReturn:
    """Ends the call on the server with an error the caller's SDK raises again.

    Args:
        context: The call.
        error: What to tell; its reason travels as ErrorInfo.
    """
    status = rpc_status.to_status(_status(error))
    await context.abort(status.code, status.details or "", _trailing(status.trailing_metadata))
    raise AssertionError("abort returned")


def _trailing(metadata: Iterable[tuple[str, str | bytes]] | None) -> tuple[tuple[str, str | bytes], ...]:
    return tuple((key, value) for key, value in metadata or ())


def to_error(failure: grpc.aio.AioRpcError, *, by: str = "node") -> BttError:
    """Turns a failed call into the error its server named.

    Args:
        failure: What gRPC raised.
        by: Who was called.

    Returns:
        The error of the server's reason; ConnectError when nobody answered, RemoteError
        when the server gave no reason we know.
    """
    error = _named(failure)
    error.by = by
    return error


def reason_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Returns the reason that an aborted call is answered with; empty if it has none of ours.

    Args:
        metadata: The trailing metadata of the call.
    """
    for key, value in metadata or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
                    return str(info.reason)
    return ""


def _named(failure: grpc.aio.AioRpcError) -> BttError:
    for key, value in failure.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            status = status_pb2.Status()
            try:
                status.ParseFromString(value)
            except ValueError:
                break
            for detail in status.details:
                info = error_details_pb2.ErrorInfo()
                if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
                    cls = BY_REASON.get(info.reason)
                    if cls is RateLimited:
                        wait = min(MAX_WAIT_S, _retry_after(status))
                        return RateLimited(_printable(status.message), retry_after=wait)
                    if cls is Banned:
                        return Banned(_printable(status.message), retry_after=_retry_after(status))
                    if cls is not None:
                        return cls(_printable(status.message))
    details = _printable(failure.details() or "")
    if failure.code() is grpc.StatusCode.UNAVAILABLE or details == BROKEN_WRITE:
        return ConnectError(f"The connection failed: {details}.")
    if failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded("The call took longer than its deadline.")
    return RemoteError(f"The call failed with {failure.code().name}: {details}.")


def _retry_after(status: status_pb2.Status) -> float:
    """Seconds, as a stranger says."""
    for detail in status.details:
        retry = error_details_pb2.RetryInfo()
        if detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
            delay = retry.retry_delay
            return float(max(0.0, delay.seconds + delay.nanos / 1e9))
    return 0.0


def _printable(text: str) -> str:
    """A stranger's text is shown on a terminal: no control characters, bounded."""
    return "".join(c if c.isprintable() else "?" for c in text[:1024])
