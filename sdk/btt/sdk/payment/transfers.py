"""A transfer from the wallet: written before the ledger is asked, gone once its answer is known.

The books hold the very request, so that it is sent again as the same bytes after a crash or a
lost answer: the ledger answers with the receipt of the first time, or says that it came too
late and can never happen. Until then the account begins no other one there.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from btt.sdk.errors import (
    AccountUnknown,
    BttError,
    InsufficientFunds,
    InvalidRequest,
    OutcomeUnknown,
)
from btt.sdk.money import Amount
from btt.sdk.payment import claims
from btt.sdk.signing import Transfer

if TYPE_CHECKING:
    from btt.sdk.keys import Address, PrivateKey
    from btt.sdk.ledger import LedgerClient, SignedReceipt
    from btt.sdk.payment.store import PayerStore

TRANSFERS_SCHEMA = """
CREATE TABLE transfers(
    ledger_id BLOB NOT NULL CHECK(length(ledger_id) = 32),
    sender BLOB NOT NULL CHECK(length(sender) = 20),
    body BLOB NOT NULL,
    PRIMARY KEY(ledger_id, sender)
) STRICT, WITHOUT ROWID;
"""
VALID_MS: Final = 60_000
"""How long the ledger may take a transfer: while that lasts, its outcome may be unknown."""
_REFUSALS: Final = (InsufficientFunds, AccountUnknown, InvalidRequest)
"""What the ledger answers only if it has not happened; unless these bytes are sent again, it never does."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """What became of a transfer that had been left without an answer.

    Attributes:
        request: The transfer.
        receipt: Of the ledger; None if it did not happen, and never will.
    """

    request: Transfer
    receipt: SignedReceipt | None


@contextmanager
def alone(store: PayerStore) -> Iterator[None]:
    """Waits until no other process transfers from this wallet, and keeps them waiting.

    Args:
        store: The wallet's books.

    Raises:
        StorageError: The wallet's folder does not let it.
    """
    claim = claims.take(store.folder, "transfers", wait=True)
    assert claim is not None, "it was waited for"
    try:
        yield
    finally:
        claim.release()


async def settle(store: PayerStore, ledger: LedgerClient, key: PrivateKey) -> Earlier | None:
    """Hears the outcome of a transfer that was left without an answer; one that can still happen does.

    Args:
        store: The wallet's books; the caller is `alone` there.
        ledger: Where it was asked for.
        key: Of the account.

    Returns:
        What became of it; None if there was none.

    Raises:
        OutcomeUnknown: Still no answer.
    """
    with store.books() as db:
        row = db.execute(
            "SELECT body FROM transfers WHERE ledger_id = ? AND sender = ?",
            (ledger.ledger_id, key.address.data),
        ).fetchone()
    if row is None:
        return None
    request = Transfer.decode(row[0])
    try:
        return Earlier(request, await _ask(store, ledger, key, request))
    except _REFUSALS:
        return Earlier(request, None)


async def send(
    store: PayerStore, ledger: LedgerClient, key: PrivateKey, to: Address, amount: int, memo: bytes
) -> SignedReceipt:
    """Moves money to another account, once.

    Args:
        store: The wallet's books; the caller is `alone` there, and `settle` found or left nothing.
        ledger: The ledger.
        key: Of the account it comes from.
        to: Account it goes to.
        amount: Base units, at least 1.
        memo: 32 bytes for the recipient.

    Raises:
        InsufficientFunds, AccountUnknown, InvalidRequest: It did not happen, and never will.
        OutcomeUnknown: No answer; `settle` asks again.
        StorageError: It could not be written, and was not asked for.
    """
    request = Transfer(
        sender=key.address,
        recipient=to,
        amount=amount,
        request_id=secrets.token_bytes(16),
        valid_until_ms=ledger.now_ms() + VALID_MS,
        memo=memo,
    )
    with store.books() as db:
        db.execute(
            "INSERT INTO transfers VALUES(?,?,?)", (ledger.ledger_id, key.address.data, request.encode())
        )
    return await _ask(store, ledger, key, request)


async def _ask(store: PayerStore, ledger: LedgerClient, key: PrivateKey, request: Transfer) -> SignedReceipt:
    try:
        receipt = await ledger.transfer(
            key,
            request.recipient,
            request.amount,
            request.request_id,
            valid_until_ms=request.valid_until_ms,
            memo=request.memo,
        )
        _forget(store, ledger, key)
    except BttError as error:
        if error.by == "ledger" and isinstance(error, _REFUSALS):
            _forget(store, ledger, key)
            raise
        raise OutcomeUnknown(
            f"It is not known whether {Amount(request.amount)} went to {request.recipient}. {error}",
            hint="Do the same again: it asks what became of that, and never pays it twice.",
            request_id=request.request_id,
            valid_until_ms=request.valid_until_ms,
        ) from error
    return receipt


def _forget(store: PayerStore, ledger: LedgerClient, key: PrivateKey) -> None:
    with store.books() as db:
        db.execute(
            "DELETE FROM transfers WHERE ledger_id = ? AND sender = ?", (ledger.ledger_id, key.address.data)
        )
