"""Why a payment session cannot go on."""

from __future__ import annotations

from btt.sdk.errors._base import BttError


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


class AccountKeyNeeded(PaymentError):
    """This program has a grant: one channel to one node. What it asked for takes the wallet's key."""

    hint = "Ask the wallet's owner: `btt wallet grant` makes a new grant, `btt wallet transfer` sends money."
