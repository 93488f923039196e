"""What a wallet remembers of the world: its nodes and their offers, and how far it has read its ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from btt.sdk.errors import IdentityError
from btt.sdk.identity import NodeAddress
from btt.sdk.keys import Address

if TYPE_CHECKING:
    from btt.sdk.payment.store import PayerStore

HISTORY_SCHEMA = """
CREATE TABLE watched(
    ledger_id BLOB NOT NULL,
    account BLOB NOT NULL,
    recovered INTEGER NOT NULL,
    seen_seq INTEGER NOT NULL,
    PRIMARY KEY(ledger_id, account, recovered)
) STRICT, WITHOUT ROWID;
CREATE TABLE places(
    node BLOB PRIMARY KEY,
    address TEXT NOT NULL
) STRICT, WITHOUT ROWID;
"""


def seen_seq(store: PayerStore, ledger_id: bytes, account: Address, recovered: int) -> int:
    """Returns the last journal entry up to which this wallet has handled what concerns an account.

    Args:
        store: The wallet's books.
        ledger_id: 32 bytes.
        account: Whose.
        recovered: Epoch of the ledger's last recovery; the numbers of before name other entries.
    """
    with store.books() as db:
        row = db.execute(
            "SELECT seen_seq FROM watched WHERE ledger_id = ? AND account = ? AND recovered = ?",
            (ledger_id, account.data, recovered),
        ).fetchone()
    return int(row[0]) if row else 0


def saw_seq(store: PayerStore, ledger_id: bytes, account: Address, recovered: int, seq: int) -> None:
    """Remembers how far what concerns an account is handled; never goes back."""
    with store.books() as db:
        db.execute(
            "INSERT INTO watched VALUES(?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET seen_seq = max(seen_seq, excluded.seen_seq)",
            (ledger_id, account.data, recovered, seq),
        )


def met_at(store: PayerStore, address: NodeAddress) -> None:
    """Remembers where a node was met last."""
    assert address.node is not None
    with store.books() as db:
        db.execute(
            "INSERT INTO places VALUES(?1, ?2) ON CONFLICT DO UPDATE SET address = ?2 WHERE address <> ?2",
            (address.node.data, str(address)),
        )


def place_of(store: PayerStore, node: Address) -> NodeAddress | None:
    """Returns where a node was met last."""
    with store.books() as db:
        row = db.execute("SELECT address FROM places WHERE node = ?", (node.data,)).fetchone()
    return NodeAddress.parse(row[0]) if row else None


def saw_offer(store: PayerStore, node: Address, serial: int) -> None:
    """Remembers the highest serial of a node.

    Raises:
        IdentityError: A higher one was seen before: an old offer is being replayed.
    """
    with store.books() as db:
        row = db.execute("SELECT serial FROM nodes WHERE node = ?", (node.data,)).fetchone()
        if row is not None and serial < row[0]:
            raise IdentityError(f"The node shows offer {serial}, but offer {row[0]} was seen before.")
        db.execute(
            "INSERT INTO nodes VALUES(?, ?) ON CONFLICT DO UPDATE SET serial = excluded.serial",
            (node.data, serial),
        )


def known_endpoint(store: PayerStore, endpoint: str) -> Address | None:
    """Returns who was met at a bare `host:port` before."""
    with store.books() as db:
        row = db.execute("SELECT node FROM endpoints WHERE endpoint = ?", (endpoint,)).fetchone()
    return Address(row[0]) if row else None


def trust_endpoint(store: PayerStore, endpoint: str, node: Address) -> None:
    """Remembers who was met at a bare `host:port` on first use."""
    with store.books() as db:
        db.execute("INSERT OR IGNORE INTO endpoints VALUES(?, ?)", (endpoint, node.data))
