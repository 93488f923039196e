"""Top-ups that are under way: written before the ledger is asked, gone once its answer is in the books.

A row holds the very request, so that it is sent again as the same bytes after a crash or a
lost answer, and it holds what the budget reserved for it until then. Whoever hears the
answer settles it; a second time changes nothing, so two processes may both hear it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from btt.sdk.errors import InvalidRequest
from btt.sdk.money import SUPPLY

if TYPE_CHECKING:
    from btt.sdk.payment.store import PayerStore

TOP_UPS_SCHEMA = """
CREATE TABLE top_ups(
    request_id BLOB PRIMARY KEY CHECK(length(request_id) = 16),
    channel_id BLOB NOT NULL CHECK(length(channel_id) = 32),
    ledger_id BLOB NOT NULL,
    amount INTEGER NOT NULL CHECK(amount > 0),
    valid_until_ms INTEGER NOT NULL,
    budget TEXT NOT NULL,
    reserved INTEGER NOT NULL CHECK(reserved IN (0, amount))
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class PendingTopUp:
    """A top-up that the ledger was asked for, or is about to be.

    Attributes:
        request_id: 16 bytes.
        channel_id: 32 bytes.
        amount: Base units.
        valid_until_ms: Ledger time after which it cannot happen.
        budget: Whose money it is; none when the user adds to a channel by hand.
    """

    request_id: bytes
    channel_id: bytes
    amount: int
    valid_until_ms: int
    budget: str = ""


def begin(
    store: PayerStore,
    channel_id: bytes,
    *,
    ledger_id: bytes,
    amount: int,
    valid_until_ms: int,
    budget: str = "",
    granted: int = 0,
) -> PendingTopUp:
    """Writes a top-up that is about to be asked for, and reserves it.

    Args:
        store: The wallet's books.
        channel_id: 32 bytes.
        ledger_id: 32 bytes.
        amount: Base units.
        valid_until_ms: Ledger time.
        budget: Whose money it will be; none when the user adds to a channel by hand.
        granted: Base units of that whole budget.

    Raises:
        BudgetExceeded: The budget does not cover it.
        InvalidRequest: The amount is none.
    """
    if not 0 < amount <= SUPPLY:
        raise InvalidRequest("A top-up adds at least one base unit, and no more than there is.")
    request = PendingTopUp(secrets.token_bytes(16), channel_id, amount, valid_until_ms, budget)
    with store.books() as db:
        if budget:
            store.check(budget, granted, amount)
        db.execute(
            "INSERT INTO top_ups VALUES(?,?,?,?,?,?,?)",
            (
                request.request_id, channel_id, ledger_id, amount, valid_until_ms, budget,
                amount if budget else 0,
            ),
        )  # fmt: skip
    return request


def pending(store: PayerStore, ledger_id: bytes, channel_id: bytes | None = None) -> list[PendingTopUp]:
    """Returns the top-ups under way, of one channel or of all."""
    with store.books() as db:
        rows = db.execute(
            "SELECT request_id, channel_id, amount, valid_until_ms, budget FROM top_ups"
            " WHERE ledger_id = ?1 AND (?2 IS NULL OR channel_id = ?2)",
            (ledger_id, channel_id),
        ).fetchall()
    return [PendingTopUp(*row) for row in rows]


def settle(store: PayerStore, request: PendingTopUp, *, happened: bool) -> None:
    """Takes the ledger's answer into the books: the channel holds more, or the reservation is free."""
    with store.books() as db:
        row = db.execute(
            "DELETE FROM top_ups WHERE request_id = ? RETURNING budget, reserved", (request.request_id,)
        ).fetchone()
        if row is not None and happened:
            budget, reserved = row
            db.execute(
                "UPDATE channels SET deposit = deposit + ?1,"
                " cap = cap + CASE budget WHEN ?2 THEN ?3 ELSE 0 END WHERE channel_id = ?4",
                (request.amount, budget, reserved, request.channel_id),
            )
