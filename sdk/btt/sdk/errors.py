"""Every error a caller can act on.

BttError
 +-- ConfigError              what the user configured cannot work
 +-- TransportError           the other side could not be reached, or not trusted
 |    +-- ConnectError        no connection
 |    +-- IdentityError       the other side is not who it should be
 |    +-- RemoteError         the other side failed in a way it did not explain
 +-- InvalidRequest           a request is malformed or out of range
 |    +-- SignatureInvalid    a signature does not verify
 |    +-- SignerMismatch      the signer may not do this
 |    +-- WrongLedger         the message belongs to another ledger
 |    +-- RequestExpired      valid_until has passed
 |    +-- RequestConflict     the request id was used with another body
 |    +-- EvidenceInvalid     a receipt or a signed operation does not prove what it says
 +-- LedgerError              the ledger refused
 |    +-- AccountUnknown, InsufficientFunds
 |    +-- ChannelUnknown, ChannelClosed, ChannelClosing, ChannelExhausted,
 |    |   ChannelExpired, ChannelLocked, TermsRefused
 |    +-- InvariantBroken     the ledger stopped itself
 |    +-- LedgerRolledBack    the ledger's database is older than what it promised
 |    +-- LedgerEquivocated   the ledger signed two histories; its receipts prove it
 +-- PaymentError             a payment session cannot go on
 |    +-- BudgetExceeded      the budget does not cover it; nothing was requested
 |    +-- CaptureDisputed     a node took more than was signed or stated
 |    +-- UpdateInvalid, PaymentRequired, PriceChanged, SessionEnded,
 |        CallRepeated, CountsDiffer
 +-- ServiceError             the service refused
 |    +-- AppRefused, Banned, RateLimited, Draining
 |    +-- ServiceUnavailable  the node is there, but this service of it is not
 |    +-- QuotaFull           the service keeps as much as its operator lets it
 |    +-- ContentUnknown, ContentUnavailable
 |    +-- ContentMismatch     data did not verify; it was not paid
 |    +-- NoProviders         no node could serve this; says why for each
 |        +-- NodeBanned      the wallet leaves the only node alone for a while
 +-- StorageError             a disk or database failed; nothing was lost
 +-- LedgerUnreachable        the node cannot see the ledger and gives no credit
 +-- InternalError            a defect
      +-- Overbilled         the service billed more than its caller allows

Each class names its `reason` on the wire (btt.proto.common.v1.Reason without the
prefix), whether trying again as is can help (`retryable`), and a `hint`: what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from btt.sdk.selection import Rejection


class BttError(Exception):
    """Base of all errors of this platform.

    Args:
        message: What happened, for a person.
        hint: What to do next; the class has a default.

    Attributes:
        by: Who said it, "node" or "ledger"; empty for what this program found itself.
    """

    reason: ClassVar[str] = ""
    retryable: ClassVar[bool] = False
    hint: str = ""
    by: str = ""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        if hint is not None:
            self.hint = hint

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text} {self.hint}" if self.hint else text

    @property
    def message(self) -> str:
        """What happened, without the hint."""
        return super().__str__()


class ConfigError(BttError):
    """What the user configured cannot work.

    The message names the place and what to write there.
    """


class TransportError(BttError):
    """The other side could not be reached, or not trusted."""


class ConnectError(TransportError):
    """No connection."""

    retryable = True
    hint = "Check the address and that the other side is running."


class IdentityError(TransportError):
    """The other side is not who it should be; nothing was sent to it."""

    hint = "Do not go on unless you know why; ask the operator for the current address."


class RemoteError(TransportError):
    """The other side failed in a way it did not explain."""

    retryable = True
    hint = "Try again; if it stays, try another node."


class InvalidRequest(BttError):
    """A request is malformed or out of range.

    The message names the field; the same request is refused again.
    """

    reason = "INVALID_REQUEST"


class SignatureInvalid(InvalidRequest):
    """A signature does not verify."""

    reason = "SIGNATURE_INVALID"
    hint = "Check that the key is the right one and that nothing changed what was signed."


class SignerMismatch(InvalidRequest):
    """The signer may not do this."""

    reason = "SIGNER_MISMATCH"
    hint = "Sign with the key of the account or channel that the request is about."


class WrongLedger(InvalidRequest):
    """The message belongs to another ledger."""

    reason = "WRONG_LEDGER"
    hint = "Check that both sides are configured for the same ledger."


class RequestExpired(InvalidRequest):
    """The request's valid_until has passed, or lies too far ahead."""

    reason = "REQUEST_EXPIRED"
    hint = "Check this machine's clock, and sign a new request."


class RequestConflict(InvalidRequest):
    """The request id was used before with another body."""

    reason = "REQUEST_CONFLICT"
    hint = "Use a fresh request id for a new intent."


class EvidenceInvalid(InvalidRequest):
    """A receipt, or an operation kept with it, does not prove what it says."""

    reason = ""
    hint = "Export it again from the wallet or node that holds it."


class LedgerError(BttError):
    """The ledger refused; nothing moved."""


class AccountUnknown(LedgerError):
    """No such account on the ledger."""

    reason = "ACCOUNT_UNKNOWN"
    hint = "An account begins with the first BTT it receives."


class InsufficientFunds(LedgerError):
    """The account holds less than the amount."""

    reason = "INSUFFICIENT_FUNDS"
    hint = "Fund the wallet, or choose a smaller budget."


class ChannelUnknown(LedgerError):
    """No such channel on the ledger."""

    reason = "CHANNEL_UNKNOWN"
    hint = "Check the channel's id and the ledger."


class ChannelClosed(LedgerError):
    """The channel is closed."""

    reason = "CHANNEL_CLOSED"
    hint = "Open a new channel."


class ChannelClosing(LedgerError):
    """The channel is closing and takes no more payments."""

    reason = "CHANNEL_CLOSING"
    hint = "Open a new channel."


class ChannelExhausted(LedgerError):
    """The channel holds too little for what is asked."""

    reason = "CHANNEL_EXHAUSTED"
    hint = "Open a larger channel."


class ChannelExpired(LedgerError):
    """The channel's lock time is too near."""

    reason = "CHANNEL_EXPIRED"
    hint = "Open a new channel."


class ChannelLocked(LedgerError):
    """The refund of the channel is not due yet."""

    reason = "CHANNEL_LOCKED"
    hint = "Wait until the lock time has passed."


class TermsRefused(LedgerError):
    """The terms of the channel are outside what the other side accepts."""

    reason = "TERMS_REFUSED"
    hint = "Choose terms within what it states in its offer or its ledger information."


class InvariantBroken(LedgerError):
    """The ledger found its own books inconsistent and has stopped."""

    reason = "INVARIANT_BROKEN"
    hint = "Keep your receipts and tell the ledger's operator."


class LedgerRolledBack(LedgerError):
    """The ledger's database is older than what the ledger has promised; it does not start."""

    hint = (
        "Restore the newest database; an older one has forgotten receipts that people hold. "
        "If there is none, see `btt ledger recover`."
    )


class LedgerEquivocated(LedgerError):
    """The ledger's operator signed two histories; the two receipts prove it to anybody."""

    hint = "Keep both receipts. Two copies of the ledger ran, or its operator cheated."


class PaymentError(BttError):
    """A payment session cannot go on."""


class BudgetExceeded(PaymentError):
    """The budget does not cover it; nothing was requested.

    Args:
        message: What happened, for a person.
        hint: What to do next.
        missing: Base units that the budget lacks; 0 when nobody counted.
    """

    reason = "BUDGET_EXCEEDED"
    hint = "Raise the budget; what arrived is kept, and the transfer resumes there."

    def __init__(self, message: str, *, hint: str | None = None, missing: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.missing = missing


class CaptureDisputed(PaymentError):
    """A channel was closed with more for the node than was signed, or than its own statement says."""

    hint = "Leave this node; the evidence is kept in the wallet's folder, under evidence."


class UpdateInvalid(PaymentError):
    """A payment update is not valid for this channel."""

    reason = "UPDATE_INVALID"
    hint = "Open the session again; if it stays, leave this node."


class PaymentRequired(PaymentError):
    """The node stopped because payment did not come in time."""

    reason = "PAYMENT_REQUIRED"
    retryable = True
    hint = "Open the session again; what arrived is kept."


class PriceChanged(PaymentError):
    """The session pins another offer than the node's current one."""

    reason = "PRICE_CHANGED"
    hint = "Ask for a new quote and open a new session."


class SessionEnded(PaymentError):
    """The payment session is unknown, replaced or ended."""

    reason = "SESSION_ENDED"
    retryable = True
    hint = "Open the session again."


class CallRepeated(PaymentError):
    """The call id was used before in this session."""

    reason = "CALL_REPEATED"
    hint = "Use a fresh call id for each call."


class CountsDiffer(PaymentError):
    """The two sides' counts differ by more than is in flight; no more is paid."""

    reason = "COUNTS_DIFFER"
    hint = "Leave this node; the evidence is kept in the wallet."


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


class StorageError(BttError):
    """A disk or database failed; nothing happened, and nothing was lost."""

    reason = "STORAGE"
    retryable = True
    hint = "Check the disk's space and health, then try again."


class LedgerUnreachable(BttError):
    """The ledger could not be reached, so nothing is promised or given on credit."""

    reason = "LEDGER_UNREACHABLE"
    retryable = True
    hint = "Check the ledger's address and that it is running, then try again."


class InternalError(BttError):
    """A defect of the other side; the call was not charged."""

    reason = "INTERNAL"
    hint = "Use another node; tell the operator what the message says."


class Overbilled(InternalError):
    """The service billed more than its caller allows; that was neither sent nor charged."""

    reason = "OVERBILLED"
    hint = "Allow more in the request, or use another node; its operator should repair or remove the service."


def _tree(cls: type[BttError]) -> list[type[BttError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _tree(sub))]


BY_REASON: dict[str, type[BttError]] = {cls.reason: cls for cls in _tree(BttError) if cls.reason}
"""Maps a reason on the wire to its class."""
