"""K1, the key that signs a channel's updates, derived so that it can be found again.

K1 is not the account key: a dApp holds K1 alone, and K1 can sign neither transfers nor
withdrawals. It follows from the account key and the nonce in T1, which the ledger keeps, so a
wallet restored from its words can use every channel that is still open.
"""

from __future__ import annotations

from typing import Final

from btt.sdk.errors import InvalidRequest
from btt.sdk.keys import ORDER, PrivateKey

_INFO: Final = b"btt/v1/channel-key"
_NONCE_SIZE: Final = 16


def derive_channel_key(account: PrivateKey, nonce: bytes) -> PrivateKey:
    """Returns the key K1 of one channel: HKDF-SHA256 (RFC 5869), info = the name above || nonce.

    Args:
        account: Key of the payer's account.
        nonce: ChannelCommit.nonce, 16 bytes; a fresh one per channel.

    Raises:
        InvalidRequest: The nonce is not 16 bytes.
    """
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    if not isinstance(nonce, bytes) or len(nonce) != _NONCE_SIZE:
        raise InvalidRequest("A channel nonce is 16 bytes.")
    # 16 bytes more than needed, so that reducing to 1..n-1 leaves no bias and never fails.
    wide = HKDF(algorithm=SHA256(), length=48, salt=None, info=_INFO + nonce).derive(account.secret)
    return PrivateKey((int.from_bytes(wide, "big") % (ORDER - 1) + 1).to_bytes(32, "big"))
