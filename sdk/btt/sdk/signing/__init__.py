"""What gets signed, as canonical bytes: money messages and documents."""

from __future__ import annotations

from btt.sdk.errors import SignatureInvalid
from btt.sdk.keys import PrivateKey, PublicKey
from btt.sdk.signing.documents import document_digest, open_document, sign_document
from btt.sdk.signing.layout import LEDGER_ID_SIZE, Message
from btt.sdk.signing.messages import (
    APP_UNKNOWN,
    EARLY_CLOSE,
    MESSAGES,
    ChannelClose,
    ChannelCommit,
    ChannelExtension,
    ChannelFinalize,
    ChannelRefund,
    ChannelUpdate,
    CloseRequest,
    KeyRotation,
    LedgerRecovery,
    Query,
    Receipt,
    SessionCall,
    SessionOpen,
    TopUp,
    Transfer,
    service_reference,
)
from btt.sdk.signing.updates import Updates

__all__ = [
    "APP_UNKNOWN",
    "EARLY_CLOSE",
    "LEDGER_ID_SIZE",
    "MESSAGES",
    "ChannelClose",
    "ChannelCommit",
    "ChannelExtension",
    "ChannelFinalize",
    "ChannelRefund",
    "ChannelUpdate",
    "CloseRequest",
    "KeyRotation",
    "LedgerRecovery",
    "Message",
    "Query",
    "Receipt",
    "SessionCall",
    "SessionOpen",
    "TopUp",
    "Transfer",
    "Updates",
    "document_digest",
    "open_document",
    "service_reference",
    "sign",
    "sign_document",
    "verify",
]


def sign(key: PrivateKey, message: Message, ledger_id: bytes) -> bytes:
    """Signs a message for one ledger.

    Args:
        key: Of the signer.
        message: What is signed.
        ledger_id: 32 bytes.

    Returns:
        65 bytes, r || s || v; the same message always gives the same bytes.

    Raises:
        InvalidRequest: The ledger id is not 32 bytes.
    """
    return key.sign(message.digest(ledger_id))


def verify(public_key: PublicKey, message: Message, ledger_id: bytes, signature: bytes) -> None:
    """Checks the signature of a message.

    Args:
        public_key: Of the signer it must have.
        message: As decoded.
        ledger_id: The ledger it must belong to, 32 bytes, from one's own configuration.
        signature: 65 bytes.

    Raises:
        InvalidRequest: The ledger id is not 32 bytes.
        SignatureInvalid: The signature is not of this key over this message on this ledger.
    """
    if not public_key.verify(message.digest(ledger_id), signature):
        raise SignatureInvalid(f"The {type(message).__name__} is not signed by {public_key.address}.")
