"""Where a wallet or a node keeps its evidence: one SQLite file, written before the receipt is used.

Nothing is ever replaced: a second receipt for the same entry that says something else is not an
update but a proof against the ledger, and both stay. The same request with other signatures stays
beside the first, too: which of them stands, those know who know whose keys they are.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from btt.proto.common.v1.document_pb2 import SignedDocument
from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.database import open_books
from btt.sdk.errors import StorageError
from btt.sdk.ledger.evidence import Evidence
from btt.sdk.ledger.receipt import SignedReceipt
from btt.sdk.ledger.rotation import OperatorKey, undone_by
from btt.sdk.signing import ChannelUpdate, Receipt

RECEIPTS: Final = "receipts.db"
"""Name of the file in the folder of a wallet or node."""
_VERSION: Final = 3
_OPERATIONS: Final = """
CREATE TABLE operations(
    ledger_id BLOB NOT NULL,
    seq INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    entry_hash BLOB NOT NULL,
    digest BLOB NOT NULL,
    kind INTEGER NOT NULL,
    body BLOB NOT NULL,
    signatures BLOB NOT NULL,
    receipt BLOB,
    receipt_signature BLOB,
    PRIMARY KEY(ledger_id, seq, epoch, entry_hash, signatures)
) STRICT, WITHOUT ROWID;
CREATE INDEX operations_by_digest ON operations(ledger_id, digest);
CREATE INDEX updates ON operations(ledger_id, body) WHERE kind = 6;
"""
_SCHEMA: Final = """
CREATE TABLE ledgers(
    ledger_id BLOB PRIMARY KEY CHECK(length(ledger_id) = 32),
    header BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE seen(
    ledger_id BLOB NOT NULL,
    subject BLOB NOT NULL,
    recovered INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY(ledger_id, subject)
) STRICT, WITHOUT ROWID;
"""
_HEADS: Final = """
CREATE TABLE heads(
    ledger_id BLOB NOT NULL,
    document BLOB NOT NULL,
    PRIMARY KEY(ledger_id, document)
) STRICT, WITHOUT ROWID;
"""
_VERSIONS: Final = f"""
ALTER TABLE operations RENAME TO operations_before;
DROP INDEX operations_by_digest;
{_OPERATIONS}
INSERT INTO operations SELECT * FROM operations_before;
DROP TABLE operations_before;
"""  # noqa: S608 (our own words)
_PAGE: Final = 256
_COLUMNS: Final = "kind, body, signatures, receipt, receipt_signature"
# Each by its index: however much is kept, and however many versions of one operation, it takes no longer.
_RIVAL: Final = " UNION ALL ".join(
    f"SELECT {_COLUMNS} FROM operations {where}"  # noqa: S608
    for where in (
        "WHERE ledger_id = ?1 AND epoch = ?2 AND seq = ?3 AND entry_hash < ?4",
        "WHERE ledger_id = ?1 AND epoch = ?2 AND seq = ?3 AND entry_hash > ?4",
        "INDEXED BY operations_by_digest WHERE ledger_id = ?1 AND digest = ?5 AND seq < ?3 AND epoch = ?2",
        "INDEXED BY operations_by_digest WHERE ledger_id = ?1 AND digest = ?5 AND seq > ?3 AND epoch = ?2",
    )
)


class EvidenceStore:
    """Evidence about any number of ledgers; safe to use from several threads and processes.

    Args:
        path: The SQLite file; made if missing.

    Raises:
        ConfigError: It is of a newer version.
        StorageError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._db = open_books(
            path, schema=_SCHEMA + _OPERATIONS + _HEADS, version=_VERSION, upgrades={1: _HEADS, 2: _VERSIONS}
        )

    def close(self) -> None:
        """Closes the file; whoever still reads it is waited for."""
        with self._lock:
            self._db.close()

    def keep(
        self,
        header: pb.EvidenceHeader,
        operations: Iterable[Evidence],
        *,
        seen: tuple[bytes, int, int] | None = None,
    ) -> None:
        """Keeps operations; what is kept already stays as it is.

        Args:
            header: Who signs for the ledger now.
            operations: Checked by the caller.
            seen: A subject (32 bytes), the epoch of the ledger's last recovery, and the entry up to
                which it has told all that concerns the subject.

        Raises:
            StorageError: Nothing was kept.
        """
        ledger_id = header.ledger_id
        with self._transaction() as db:
            db.execute(
                "INSERT INTO ledgers VALUES(?, ?) ON CONFLICT DO UPDATE SET header = excluded.header "
                "WHERE header <> excluded.header",
                (ledger_id, header.SerializeToString(deterministic=True)),
            )
            db.executemany(
                "INSERT OR IGNORE INTO operations VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (_row(ledger_id, operation) for operation in operations),
            )
            if seen is not None:
                db.execute("INSERT OR REPLACE INTO seen VALUES(?, ?, ?, ?)", (ledger_id, *seen))

    def seen(self, ledger_id: bytes, subject: bytes, recovered: int) -> int:
        """Returns the entry up to which all about a subject is kept; 0 after a recovery new to us."""
        row = self._one(
            "SELECT seq FROM seen WHERE ledger_id = ? AND subject = ? AND recovered = ?",
            (ledger_id, subject, recovered),
        )
        return int(row[0]) if row else 0

    def header(self, ledger_id: bytes) -> pb.EvidenceHeader | None:
        """Returns who signed for a ledger when it was last heard of; None if it never was."""
        row = self._one("SELECT header FROM ledgers WHERE ledger_id = ?", (ledger_id,))
        return pb.EvidenceHeader.FromString(row[0]) if row else None

    def operations(self, ledger_id: bytes) -> Iterator[Evidence]:
        """Returns all that is kept about a ledger: what has no receipt, then the rest by its entries.

        Versions of the same follow one another, in an order that does not depend on who came first.
        """
        query = (
            f"SELECT {_COLUMNS} FROM operations WHERE ledger_id = ? "  # noqa: S608
            "ORDER BY seq, epoch, entry_hash, signatures"
        )
        with self._reading() as db:
            cursor = db.execute(query, (ledger_id,))
        while True:
            with self._reading():
                rows = cursor.fetchmany(_PAGE)
            if not rows:
                return
            yield from map(_evidence, rows)

    def updated_channels(self, ledger_id: bytes) -> list[bytes]:
        """Returns the ids of the channels of which an update is kept, with a receipt or without."""
        query = "SELECT DISTINCT substr(body, 1, 32) FROM operations WHERE ledger_id = ? AND kind = 6"
        return [row[0] for row in self._all(query, (ledger_id,))]

    def best_update(self, ledger_id: bytes, channel: bytes, k1: bytes, *, most: int) -> Evidence | None:
        """Returns the highest update of a channel that is kept; None without one.

        Args:
            ledger_id: 32 bytes.
            channel: Its id, 32 bytes.
            k1: The key that must have signed it, 33 bytes.
            most: What it must not exceed, base units.
        """
        # A body is the channel and the amount, big-endian: they sort by what they pay.
        ends = (ChannelUpdate(channel=channel, cumulative=amount).encode() for amount in (0, most))
        row = self._one(
            f"SELECT {_COLUMNS} FROM operations WHERE ledger_id = ? AND kind = 6 AND body > ? "  # noqa: S608
            "AND body <= ? AND substr(signatures, 1, 33) = ? ORDER BY body DESC, seq DESC LIMIT 1",
            (ledger_id, *ends, k1),
        )
        return _evidence(row) if row else None

    def promised(self, ledger_id: bytes, keys: Sequence[OperatorKey]) -> SignedReceipt | None:
        """Returns the receipt of the highest entry that must still be in a ledger's journal.

        Args:
            ledger_id: 32 bytes.
            keys: Of its operator: what a recovery of theirs went back behind, need not be there.

        Raises:
            StorageError: It could not be read.
        """
        with self._reading() as db:
            found = db.execute(
                "SELECT receipt, receipt_signature FROM operations WHERE ledger_id = ? AND seq > 0 "
                "ORDER BY seq DESC, epoch DESC",
                (ledger_id,),
            )
            told = (SignedReceipt(Receipt.decode(body), signature) for body, signature in found)
            return next((one for one in told if undone_by(one, keys) is None), None)

    def keep_head(self, ledger_id: bytes, document: SignedDocument) -> None:
        """Keeps what a ledger said about the end of its journal, against a receipt that is kept, too.

        Raises:
            StorageError: It was not kept.
        """
        with self._transaction() as db:
            data = document.SerializeToString(deterministic=True)
            db.execute("INSERT OR IGNORE INTO heads VALUES(?, ?)", (ledger_id, data))

    def heads(self, ledger_id: bytes) -> list[SignedDocument]:
        """Returns what `keep_head` kept about a ledger."""
        rows = self._all("SELECT document FROM heads WHERE ledger_id = ?", (ledger_id,))
        return [SignedDocument.FromString(row[0]) for row in rows]

    def epochs(self, ledger_id: bytes) -> dict[int, tuple[int, int]]:
        """Returns the first and the last entry that is kept of each epoch of a ledger."""
        found = self._all(
            "SELECT epoch, min(seq), max(seq) FROM operations WHERE ledger_id = ? AND epoch > 0 "
            "GROUP BY epoch ORDER BY epoch",
            (ledger_id,),
        )
        return {epoch: (first, last) for epoch, first, last in found}

    def rival(self, ledger_id: bytes, operation: Evidence) -> Evidence | None:
        """Returns what is kept and cannot be true beside an operation with its receipt."""
        if operation.receipt is None:
            return None
        said = operation.receipt.receipt
        row = self._one(
            f"{_RIVAL} LIMIT 1", (ledger_id, said.epoch, said.seq, said.entry_hash, said.request_digest)
        )
        return _evidence(row) if row else self._overtaken(ledger_id, said)

    def _overtaken(self, ledger_id: bytes, said: Receipt) -> Evidence | None:
        """Returns what has a higher number than a receipt, and an earlier time."""
        row = self._one(
            f"SELECT {_COLUMNS} FROM operations WHERE ledger_id = ? AND epoch = ? AND seq > ? "  # noqa: S608
            "ORDER BY seq LIMIT 1",
            (ledger_id, said.epoch, said.seq),
        )
        found = _evidence(row) if row else None
        assert found is None or found.receipt is not None
        return found if found and found.receipt and found.receipt.receipt.time_ms < said.time_ms else None

    def equivocations(self, ledger_id: bytes) -> list[tuple[Evidence, Evidence]]:
        """Returns pairs of receipts that one honest ledger cannot both have signed.

        In one epoch an entry has one hash, and a request has one entry.
        """
        pairs = (
            "a.seq = b.seq AND a.entry_hash < b.entry_hash",
            "a.digest = b.digest AND a.seq < b.seq",
        )
        columns = ", ".join(f"{side}.{name}" for side in "ab" for name in _COLUMNS.split(", "))
        found: list[tuple[Evidence, Evidence]] = []
        for differ in pairs:
            rows = self._all(
                f"SELECT {columns} FROM operations a JOIN operations b "  # noqa: S608 (our own words)
                f"ON a.ledger_id = b.ledger_id AND a.epoch = b.epoch AND {differ} "
                "WHERE a.ledger_id = ? AND a.epoch > 0 "
                "GROUP BY a.epoch, a.seq, a.entry_hash, b.seq, b.entry_hash ORDER BY a.seq",
                (ledger_id,),
            )
            found += [(_evidence(row[:5]), _evidence(row[5:])) for row in rows]
        return found

    def _one(self, query: str, values: tuple[object, ...]) -> Any:
        with self._reading() as db:
            return db.execute(query, values).fetchone()

    def _all(self, query: str, values: tuple[object, ...]) -> list[Any]:
        with self._reading() as db:
            return db.execute(query, values).fetchall()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        # SQLite does not survive that a connection is closed while another thread steps through it.
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                raise StorageError(f"The kept receipts could not be read ({error}).") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except Exception as error:
                with suppress(sqlite3.Error):
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise StorageError(f"The receipts could not be kept ({error}).") from error
                raise


def _row(ledger_id: bytes, operation: Evidence) -> tuple[object, ...]:
    digest = operation.digest(ledger_id)
    signed = operation.receipt
    place: tuple[object, ...] = (0, 0, digest, digest)
    proof: tuple[object, ...] = (None, None)
    if signed is not None:
        receipt = signed.receipt
        place = (receipt.seq, receipt.epoch, receipt.entry_hash, digest)
        proof = (signed.encode(), signed.signature)
    return (ledger_id, *place, operation.kind, operation.body, operation.signatures, *proof)


def _evidence(row: tuple[Any, ...]) -> Evidence:
    kind, body, signatures, receipt, signature = row
    signed = SignedReceipt(Receipt.decode(receipt), signature) if receipt is not None else None
    return Evidence(kind, body, signatures, signed)
