"""The updates of one channel, signed and verified at little more than the price of the curve.

A session signs or verifies thousands of updates that differ in one number. What they have in common
is encoded and checked once, by ChannelUpdate itself, so that its layout is stated in one place.
"""

from __future__ import annotations

import struct
from hashlib import sha256
from typing import Final

from btt.sdk.errors import InvalidRequest, SignatureInvalid
from btt.sdk.keys import PrivateKey, PublicKey
from btt.sdk.money import SUPPLY
from btt.sdk.signing.messages import ChannelUpdate

_MONEY: Final = struct.Struct(">Q")


class Updates:
    """What K1 signs on one channel, message by message.

    Args:
        ledger_id: 32 bytes.
        channel_id: 32 bytes.

    Raises:
        InvalidRequest: One of them is not 32 bytes.
    """

    __slots__ = ("_head",)

    def __init__(self, ledger_id: bytes, channel_id: bytes) -> None:
        first = ChannelUpdate(channel=channel_id, cumulative=0).preimage(ledger_id)
        self._head = first[: -_MONEY.size]  # the amount stands last

    def digest(self, cumulative: int) -> bytes:
        """Returns what is signed, as `ChannelUpdate.digest` does.

        Args:
            cumulative: Base units over the life of the channel.

        Raises:
            InvalidRequest: It is no amount of money.
        """
        if not isinstance(cumulative, int) or isinstance(cumulative, bool) or not 0 <= cumulative <= SUPPLY:
            raise InvalidRequest(f"An update is of 0 to {SUPPLY} base units.")
        return sha256(self._head + _MONEY.pack(cumulative)).digest()

    def sign(self, key: PrivateKey, cumulative: int) -> bytes:
        """Signs an update: 65 bytes, the same for the same amount.

        Args:
            key: K1.
            cumulative: Base units over the life of the channel.

        Raises:
            InvalidRequest: It is no amount of money.
        """
        return key.sign(self.digest(cumulative))

    def verify(self, key: PublicKey, cumulative: int, signature: bytes) -> None:
        """Checks the signature of an update.

        Args:
            key: K1.
            cumulative: Base units over the life of the channel.
            signature: 65 bytes.

        Raises:
            InvalidRequest: It is no amount of money.
            SignatureInvalid: The signature is not of this key over this update on this ledger.
        """
        if not key.verify(self.digest(cumulative), signature):
            raise SignatureInvalid(f"The ChannelUpdate is not signed by {key.address}.")
