"""The ledger's word, kept with the signature that proves it offline."""

from __future__ import annotations

from dataclasses import dataclass

from btt.sdk.keys import PublicKey
from btt.sdk.signing import Receipt, verify


@dataclass(frozen=True, slots=True)
class SignedReceipt:
    """A verified receipt with the signature that proves it to others.

    Args:
        receipt: What the ledger did.
        signature: Of the operator over it, 65 bytes.
    """

    receipt: Receipt
    signature: bytes

    @property
    def seq(self) -> int:
        """Number of the journal entry."""
        return self.receipt.seq

    @property
    def time_ms(self) -> int:
        """Ledger time of the entry, Unix milliseconds."""
        return self.receipt.time_ms

    def encode(self) -> bytes:
        """Returns the canonical Receipt, without the signature."""
        return self.receipt.encode()

    def verify(self, operator_key: PublicKey, ledger_id: bytes) -> None:
        """Checks the receipt again, for instance years later.

        Raises:
            SignatureInvalid: The operator's key did not sign it for this ledger.
        """
        verify(operator_key, self.receipt, ledger_id, self.signature)
