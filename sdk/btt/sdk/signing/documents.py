"""Signed documents: protobuf messages signed as the exact bytes they were serialised to.

Protobuf bytes are not canonical, so they travel as they were signed and are never made again: the
reader verifies first and parses afterwards.
"""

from __future__ import annotations

from hashlib import sha256

from btt.proto.common.v1.document_pb2 import SignedDocument
from btt.sdk.errors import SignatureInvalid
from btt.sdk.keys import PrivateKey, PublicKey
from btt.sdk.signing.layout import preimage, tag
from btt.sdk.signing.messages import MESSAGES

_MESSAGE_TAGS = frozenset(kind.TAG for kind in MESSAGES)


def document_digest(name: str, ledger_id: bytes, payload: bytes) -> bytes:
    """Returns the 32 bytes that are signed for a document.

    Args:
        name: The document type, such as "Offer"; it makes the tag.
        ledger_id: 32 bytes.
        payload: The serialised document.

    Raises:
        InvalidRequest: The ledger id is not 32 bytes.
        ValueError: The name cannot name a document; one of a money message is refused too, so that no
            payload can ever be taken for one.
    """
    document_tag = tag(name)
    if document_tag in _MESSAGE_TAGS:
        raise ValueError(f'"{name}" is a money message, not a document')
    return sha256(preimage(document_tag, ledger_id, payload)).digest()


def sign_document(key: PrivateKey, name: str, ledger_id: bytes, payload: bytes) -> SignedDocument:
    """Signs a document.

    Args:
        key: Of the signer.
        name: The document type.
        ledger_id: 32 bytes.
        payload: The serialised document; it is kept as it is.

    Raises:
        InvalidRequest: The ledger id is not 32 bytes.
        ValueError: The name cannot name a document.
    """
    return SignedDocument(payload=payload, signature=key.sign(document_digest(name, ledger_id, payload)))


def open_document(document: SignedDocument, name: str, ledger_id: bytes, public_key: PublicKey) -> bytes:
    """Verifies a document and returns its payload, to be parsed now and not before.

    Args:
        document: As received.
        name: The document type it must be.
        ledger_id: The ledger it must belong to, 32 bytes, from one's own configuration.
        public_key: Of the signer it must have.

    Raises:
        InvalidRequest: The ledger id is not 32 bytes.
        SignatureInvalid: The signature is not of this key over this type, ledger and payload.
        ValueError: The name cannot name a document.
    """
    payload = document.payload
    if not public_key.verify(document_digest(name, ledger_id, payload), document.signature):
        raise SignatureInvalid(f"The {name} is not signed by {public_key.address} for this ledger.")
    return payload
