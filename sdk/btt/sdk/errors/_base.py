"""The base of all errors, and what can go wrong with any call."""

from __future__ import annotations

from typing import ClassVar


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


class OutcomeUnknown(LedgerUnreachable):
    """A request that moves money got no answer: it may have happened, and it may not.

    Args:
        message: What happened, for a person.
        hint: What to do next.
        request_id: 16 bytes that name the request; with `valid_until_ms` it asks again.
        valid_until_ms: Ledger time after which it cannot happen any more.
    """

    reason = ""
    retryable = False
    hint = (
        "Ask again with the same request_id and valid_until_ms, which never pays twice; a new request would."
    )

    def __init__(
        self, message: str, *, hint: str | None = None, request_id: bytes = b"", valid_until_ms: int = 0
    ) -> None:
        super().__init__(message, hint=hint)
        self.request_id = request_id
        self.valid_until_ms = valid_until_ms


class InternalError(BttError):
    """A defect of the other side; the call was not charged."""

    reason = "INTERNAL"
    hint = "Use another node; tell the operator what the message says."
