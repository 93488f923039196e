"""What a ledger says, signed by its operator: receipts, and documents about itself and its books."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256

from google.protobuf.message import Message

from btt.proto.common.v1.document_pb2 import SignedDocument
from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.keys import PrivateKey
from btt.sdk.signing import Receipt, sign_document
from btt.sdk.signing.layout import preimage
from btt.services.ledger.genesis import Identity
from btt.services.ledger.journal import Entry, EntryRef, Head


class Voice:
    """Signs for one ledger.

    Args:
        identity: Of the ledger.
        operator_key: Its current key.
        certificates: SHA-256 of the DER certificates: current, then next.
        rotations: The entries that changed the operator's key, in order.
    """

    def __init__(
        self,
        identity: Identity,
        operator_key: PrivateKey,
        certificates: Sequence[bytes],
        rotations: Iterable[Entry],
    ) -> None:
        self._identity = identity
        self._key = operator_key
        self._certificates = tuple(certificates)
        self._rotations = [_rotation(entry) for entry in rotations]

    def receipt(self, entry: EntryRef) -> pb.LedgerReceipt:
        """Signs that an entry is durable; any thread may ask."""
        receipt = Receipt(
            request_digest=entry.request_digest,
            seq=entry.seq,
            entry_hash=entry.hash,
            time_ms=entry.time_ms,
            code=0,
            epoch=entry.epoch,
            operator_key_id=self._key.address,
        )
        body = receipt.encode()
        digest = sha256(preimage(Receipt.TAG, self._identity.ledger_id, body)).digest()
        return pb.LedgerReceipt(body=body, signature=self._key.sign(digest))

    def document(self, name: str, content: Message) -> SignedDocument:
        """Signs a message as a document of a type."""
        return sign_document(self._key, name, self._identity.ledger_id, content.SerializeToString())

    def info(self, head: Head, *, now_ms: int) -> SignedDocument:
        """Says what the ledger is, and how far it has come.

        Args:
            head: The end of its journal.
            now_ms: Ledger time.
        """
        identity, terms = self._identity, self._identity.terms
        info = pb.LedgerInfo(
            ledger_id=identity.ledger_id,
            name=identity.name,
            operator_key=self._key.public.data,
            epoch=head.epoch,
            certificate_sha256=self._certificates,
            unbacked=identity.unbacked,
            min_challenge_ms=terms.min_challenge_ms,
            max_challenge_ms=terms.max_challenge_ms,
            min_lifetime_ms=terms.min_lifetime_ms,
            max_lifetime_ms=terms.max_lifetime_ms,
            time_ms=now_ms,
            head_seq=head.seq,
            head_hash=head.hash,
            rotations=self._rotations,
            open_fee=terms.open_fee,
            max_locked=terms.max_locked,
            max_open_channels=terms.max_open_channels,
            min_update_delta=terms.min_update_delta,
        )
        return self.document("LedgerInfo", info)


def _rotation(entry: Entry) -> pb.OperatorRotation:
    proof = entry.signatures
    return pb.OperatorRotation(
        body=entry.body,
        old_key=proof[:33],
        old_signature=proof[33:98],
        new_signature=proof[98:],
        seq=entry.seq,
    )
