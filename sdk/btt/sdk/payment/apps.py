"""An application is a key: it grants, for a time, that a channel key acts for it.

Operators allow and refuse by application. Who makes one keeps its key (on a server of theirs,
say) and gives each user's client a grant; a key inside a program that strangers run is anybody's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from btt.proto.common.v1.document_pb2 import SignedDocument
from btt.proto.payment.v1 import payment_pb2
from btt.sdk.errors import AppRefused, InvalidRequest
from btt.sdk.keys import Address, PrivateKey, PublicKey
from btt.sdk.signing import APP_UNKNOWN, open_document, sign_document

MAX_GRANT_MS = 30 * 86_400_000
"""No grant is good for longer, milliseconds."""
MAX_GRANT_BYTES = 1024

Granter = Callable[[PublicKey, bytes], Awaitable[SignedDocument]]
"""Gets a grant for a channel key (K1) and a ledger id, from wherever the app's key is."""


@dataclass(frozen=True, slots=True)
class AppGrant:
    """A grant that was checked.

    Attributes:
        app: Address of the app's key.
        valid_until_ms: Unix milliseconds.
    """

    app: Address
    valid_until_ms: int


NO_APP = AppGrant(APP_UNKNOWN, 2**63)
"""That of a session without one."""


def sign_grant(
    key: PrivateKey, *, channel_key: PublicKey, ledger_id: bytes, valid_until_ms: int
) -> SignedDocument:
    """Grants that a channel key acts for an application.

    Args:
        key: Of the application.
        channel_key: K1.
        ledger_id: 32 bytes.
        valid_until_ms: Unix milliseconds, at most MAX_GRANT_MS from now.
    """
    grant = payment_pb2.AppGrant(
        app_key=key.public.data, channel_key=channel_key.data, valid_until_ms=valid_until_ms
    )
    return sign_document(key, "AppGrant", ledger_id, grant.SerializeToString())


def open_grant(
    document: SignedDocument, *, channel_key: PublicKey, ledger_id: bytes, now_ms: int
) -> AppGrant:
    """Verifies a grant.

    Args:
        document: As received.
        channel_key: K1 of whoever shows it.
        ledger_id: 32 bytes.
        now_ms: Unix milliseconds.

    Raises:
        AppRefused: It is malformed, for another key or ledger, not signed by its app, or not current.
    """
    grant = payment_pb2.AppGrant()
    try:
        if len(document.payload) > MAX_GRANT_BYTES:
            raise AppRefused("The application's grant is too large.")
        grant.ParseFromString(document.payload)
        key = PublicKey(grant.app_key)
        open_document(document, "AppGrant", ledger_id, key)
    except (DecodeError, InvalidRequest):
        raise AppRefused("The application's grant is not valid.") from None
    if grant.channel_key != channel_key.data:
        raise AppRefused("The application's grant is for another channel.")
    if not now_ms <= grant.valid_until_ms <= now_ms + MAX_GRANT_MS:
        raise AppRefused("The application's grant has expired, or is for too long.")
    return AppGrant(key.address, grant.valid_until_ms)
