"""What a ledger refuses."""

from __future__ import annotations

from btt.sdk.errors._base import BttError


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


class LedgerForgot(LedgerRolledBack):
    """The ledger's journal ends before an entry of which it gave us a receipt; nothing is paid there.

    Both are kept: the receipt, and the description in which its operator signed the lower end.
    """

    hint = (
        "Pay nothing there. Write what proves it to a file, btt wallet receipts --export FILE (a node's: "
        "btt node receipts), and give it to the ledger's operator, who puts the newest books back or takes "
        "it to btt ledger recover; then try again."
    )


class LedgerEquivocated(LedgerError):
    """The ledger's operator signed two histories; the two receipts prove it to anybody."""

    hint = "Keep both receipts. Two copies of the ledger ran, or its operator cheated."
