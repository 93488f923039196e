"""From the key that a ledger began with to the key that signs for it now.

A ledger's address and id name its first operator key for ever. Each hand-over is signed by the old
and by the new key, so nobody else can put himself into the chain; a key signs nothing after its
last entry, so one that leaks later cannot invent newer receipts. A hand-over may be a recovery: the
ledger went back to an older entry, and receipts of what came after it stand no longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from btt.proto.ledger.v1.ledger_pb2 import OperatorRotation
from btt.sdk.errors import IdentityError, InvalidRequest
from btt.sdk.keys import Address, PublicKey
from btt.sdk.ledger.receipt import SignedReceipt
from btt.sdk.signing import KeyRotation, LedgerRecovery, verify


@dataclass(frozen=True, slots=True)
class OperatorKey:
    """A key that signs, or signed, for the ledger.

    Args:
        key: Public.
        epoch: That began with it.
        last_seq: Number of the last entry it may sign for; None for the current one.
        resumed_after: Entry that a recovery went back to when this key took over; None when the
            key took over without a loss.
    """

    key: PublicKey
    epoch: int
    last_seq: int | None
    resumed_after: int | None = None


def read_hand_over(body: bytes) -> KeyRotation | LedgerRecovery:
    """Reads what hands a ledger to another key; its length says which message it is.

    Raises:
        InvalidRequest: It is neither.
    """
    if len(body) == LedgerRecovery.SIZE:
        return LedgerRecovery.decode(body)
    return KeyRotation.decode(body)


def follow(
    first: Address, current: PublicKey, rotations: Iterable[OperatorRotation], *, ledger_id: bytes
) -> tuple[OperatorKey, ...]:
    """Follows a chain of hand-overs.

    Args:
        first: Of the key that the ledger began with, from one's own configuration.
        current: The key it should lead to.
        rotations: In order.
        ledger_id: 32 bytes.

    Returns:
        All keys in order; the last one is `current`.

    Raises:
        IdentityError: The chain is broken, or leads elsewhere.
    """
    keys: list[OperatorKey] = []
    expected, epoch, after = first, 1, 0
    resumed_after: int | None = None
    for hand_over in rotations:
        try:
            message = read_hand_over(hand_over.body)
            old = PublicKey(hand_over.old_key)
            verify(old, message, ledger_id, hand_over.old_signature)
            verify(message.next_key, message, ledger_id, hand_over.new_signature)
        except InvalidRequest as error:
            raise IdentityError(f"A hand-over of the ledger's key does not verify: {error}") from error
        went_back = message.ended_seq if isinstance(message, LedgerRecovery) else None
        if (
            old.address != expected
            or message.epoch <= epoch
            or hand_over.seq <= after
            or went_back not in (None, hand_over.seq - 1)
        ):
            raise IdentityError("The hand-overs of the ledger's key do not follow one another.")
        last_seq = hand_over.seq if went_back is None else went_back
        keys.append(OperatorKey(old, epoch, last_seq, resumed_after))
        resumed_after = went_back
        expected, epoch, after = message.next_key.address, message.epoch, hand_over.seq
    if current.address != expected:
        raise IdentityError(f"The ledger is run by {current.address}, not by the expected operator.")
    return (*keys, OperatorKey(current, epoch, None, resumed_after))


def undone_by(receipt: SignedReceipt, keys: Sequence[OperatorKey]) -> OperatorKey | None:
    """Returns the key that began with a recovery which went back to before a receipt, if there is one.

    Args:
        receipt: Of any age.
        keys: From `follow`.
    """
    for later in keys:
        if (
            later.resumed_after is not None
            and later.resumed_after < receipt.seq
            and later.epoch > receipt.receipt.epoch
        ):
            return later
    return None


def signer_of(receipt: SignedReceipt, keys: Sequence[OperatorKey], ledger_id: bytes) -> OperatorKey:
    """Returns the key that signed a receipt, after checking that it did and could.

    Args:
        receipt: Of any age; one that a recovery undid is refused.
        keys: From `follow`.
        ledger_id: 32 bytes.

    Raises:
        IdentityError: No key of the ledger could have signed it, or it stands no longer.
    """
    found = key_named(receipt, keys)
    if undone_by(receipt, keys) is not None:
        raise IdentityError("The ledger's receipt is of an entry that a recovery went back behind.")
    if found.last_seq is not None and receipt.seq > found.last_seq:
        raise IdentityError("The ledger's receipt is signed with a key that was handed over before.")
    if receipt.receipt.epoch > found.epoch:
        raise IdentityError("The ledger's receipt is of an epoch that did not begin with its key.")
    try:
        receipt.verify(found.key, ledger_id)
    except InvalidRequest as error:
        raise IdentityError("The ledger's receipt is not signed by its operator.") from error
    return found


def key_named(receipt: SignedReceipt, keys: Sequence[OperatorKey]) -> OperatorKey:
    """Returns the key that a receipt names.

    Raises:
        IdentityError: It is none of the ledger's.
    """
    for found in keys:
        if found.key.address == receipt.receipt.operator_key_id:
            return found
    raise IdentityError("The ledger's receipt names another operator.")
