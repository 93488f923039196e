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
 |    |   +-- LedgerForgot    its journal ends before an entry that it gave us a receipt for
 |    +-- LedgerEquivocated   the ledger signed two histories; its receipts prove it
 +-- PaymentError             a payment session cannot go on
 |    +-- BudgetExceeded      the budget does not cover it; nothing was requested
 |    +-- AccountKeyNeeded    a grant pays from one channel; this takes the wallet
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
 |    +-- OutcomeUnknown      no answer to a request that moves money: it may have happened
 +-- InternalError            a defect
      +-- Overbilled         the service billed more than its caller allows

Each class names its `reason` on the wire (btt.proto.common.v1.Reason without the
prefix), whether trying again as is can help (`retryable`), and a `hint`: what to do.
"""

from __future__ import annotations

from btt.sdk.errors._base import (
    BttError,
    ConfigError,
    ConnectError,
    EvidenceInvalid,
    IdentityError,
    InternalError,
    InvalidRequest,
    LedgerUnreachable,
    OutcomeUnknown,
    RemoteError,
    RequestConflict,
    RequestExpired,
    SignatureInvalid,
    SignerMismatch,
    StorageError,
    TransportError,
    WrongLedger,
)
from btt.sdk.errors._ledger import (
    AccountUnknown,
    ChannelClosed,
    ChannelClosing,
    ChannelExhausted,
    ChannelExpired,
    ChannelLocked,
    ChannelUnknown,
    InsufficientFunds,
    InvariantBroken,
    LedgerEquivocated,
    LedgerError,
    LedgerForgot,
    LedgerRolledBack,
    TermsRefused,
)
from btt.sdk.errors._payment import (
    AccountKeyNeeded,
    BudgetExceeded,
    CallRepeated,
    CaptureDisputed,
    CountsDiffer,
    PaymentError,
    PaymentRequired,
    PriceChanged,
    SessionEnded,
    UpdateInvalid,
)
from btt.sdk.errors._service import (
    AppRefused,
    Banned,
    ContentMismatch,
    ContentUnavailable,
    ContentUnknown,
    DeadlineExceeded,
    Draining,
    NodeBanned,
    NoProviders,
    Overbilled,
    QuotaFull,
    RateLimited,
    ServiceError,
    ServiceUnavailable,
)

__all__ = [
    "BY_REASON",
    "AccountKeyNeeded",
    "AccountUnknown",
    "AppRefused",
    "Banned",
    "BttError",
    "BudgetExceeded",
    "CallRepeated",
    "CaptureDisputed",
    "ChannelClosed",
    "ChannelClosing",
    "ChannelExhausted",
    "ChannelExpired",
    "ChannelLocked",
    "ChannelUnknown",
    "ConfigError",
    "ConnectError",
    "ContentMismatch",
    "ContentUnavailable",
    "ContentUnknown",
    "CountsDiffer",
    "DeadlineExceeded",
    "Draining",
    "EvidenceInvalid",
    "IdentityError",
    "InsufficientFunds",
    "InternalError",
    "InvalidRequest",
    "InvariantBroken",
    "LedgerEquivocated",
    "LedgerError",
    "LedgerForgot",
    "LedgerRolledBack",
    "LedgerUnreachable",
    "NoProviders",
    "NodeBanned",
    "OutcomeUnknown",
    "Overbilled",
    "PaymentError",
    "PaymentRequired",
    "PriceChanged",
    "QuotaFull",
    "RateLimited",
    "RemoteError",
    "RequestConflict",
    "RequestExpired",
    "ServiceError",
    "ServiceUnavailable",
    "SessionEnded",
    "SignatureInvalid",
    "SignerMismatch",
    "StorageError",
    "TermsRefused",
    "TransportError",
    "UpdateInvalid",
    "WrongLedger",
]


def _tree(cls: type[BttError]) -> list[type[BttError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _tree(sub))]


BY_REASON: dict[str, type[BttError]] = {cls.reason: cls for cls in _tree(BttError) if cls.reason}
"""Maps a reason on the wire to its class."""
