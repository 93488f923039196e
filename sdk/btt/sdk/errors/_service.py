"""What a service refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from btt.sdk.errors._base import BttError, InternalError

if TYPE_CHECKING:
    from btt.sdk.selection import Rejection


class ServiceError(BttError):
    """The service refused."""


class AppRefused(ServiceError):
    """The application is not served here."""

    reason = "APP_REFUSED"
    hint = "Use a node that serves this application."


class Banned(ServiceError):
    """The node serves this payer no more for a while; the message says why and until when.

    Args:
        message: What happened, for a person.
        hint: What to do next.
        retry_after: Seconds after which the ban is over; 0 when nobody knows.
    """

    reason = "BANNED"
    hint = "Use another node, or wait; asking again before then changes nothing."

    def __init__(self, message: str, *, hint: str | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class RateLimited(ServiceError):
    """Too many calls.

    Args:
        message: What happened, for a person.
        hint: What to do next.
        retry_after: Seconds after which it can work; 0 when nobody knows.
    """

    reason = "RATE_LIMITED"
    retryable = True
    hint = "Wait a moment and try again."

    def __init__(self, message: str, *, hint: str | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class Draining(ServiceError):
    """The node is stopping."""

    reason = "DRAINING"
    retryable = True
    hint = "Try again later, or use another node."


class ServiceUnavailable(ServiceError):
    """The node is there, but this service of it has failed or is switched off."""

    reason = "SERVICE_UNAVAILABLE"
    retryable = True
    hint = "Try again later, or use another node."


class QuotaFull(ServiceError):
    """The service keeps as much as its operator lets it; nothing more was taken."""

    reason = "QUOTA_FULL"
    hint = "Use another node, or ask for less."


class DeadlineExceeded(ServiceError):
    """The call took longer than its caller or the service allows."""

    reason = "DEADLINE_EXCEEDED"
    retryable = True
    hint = "Ask for less at once, or set a longer deadline."


class ContentUnknown(ServiceError):
    """The node serves no such content."""

    reason = "CONTENT_UNKNOWN"
    hint = "Check the infohash, or ask another node."


class ContentUnavailable(ServiceError):
    """The published content is no longer readable, or has changed, at the node."""

    reason = "CONTENT_UNAVAILABLE"
    hint = "Ask another node."


class ContentMismatch(ServiceError):
    """Data did not verify against the infohash; it was not paid."""

    reason = "CONTENT_MISMATCH"
    hint = "Use another node."


class NoProviders(ServiceError):
    """No node could serve this.

    Args:
        message: What happened, for a person.
        hint: What to do next.
        rejections: Why not, for each node.
    """

    reason = "NO_PROVIDERS"
    hint = "Name other nodes, or change what rules them out."

    def __init__(
        self, message: str, *, hint: str | None = None, rejections: Sequence[Rejection] = ()
    ) -> None:
        super().__init__(message, hint=hint)
        self.rejections = tuple(rejections)

    @property
    def counts(self) -> dict[str, int]:
        """How many nodes were rejected for which reason, the most frequent first."""
        return dict(Counter(str(rejection.cause) for rejection in self.rejections).most_common())


class NodeBanned(NoProviders):
    """This wallet does not use the only node that is left, for a while; nobody was dialled.

    Args:
        message: What the node did, and until when it is left alone, for a person.
        hint: What to do next.
        until_ms: End of the ban, Unix milliseconds.
    """

    reason = ""  # it never travels
    hint = "Use another node; `btt wallet forgive` ends it early."

    def __init__(self, message: str, *, hint: str | None = None, until_ms: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.until_ms = until_ms


class Overbilled(InternalError):
    """The service billed more than its caller allows; that was neither sent nor charged."""

    reason = "OVERBILLED"
    hint = "Allow more in the request, or use another node; its operator should repair or remove the service."
