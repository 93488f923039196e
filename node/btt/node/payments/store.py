"""The payee's books on disk: offers, channels, best updates, what was delivered.

One SQLite file per node, write-ahead log, `synchronous=FULL`. Sessions that write at the
same time share a transaction and its sync (`GroupCommit`).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btt.node.payments.days import DAYS_SCHEMA, TODAY_SCHEMA, tell_days
from btt.node.payments.lent import LENT_SCHEMA, load_lent
from btt.node.quota import QUOTA_SCHEMA
from btt.node.refusals import REFUSALS_SCHEMA
from btt.sdk.channel import Checked, Durable, Line, SignedUpdate, Tally
from btt.sdk.channel.prices import Count
from btt.sdk.clock import SYSTEM
from btt.sdk.database import open_books
from btt.sdk.group_commit import GroupCommit, Job
from btt.sdk.keys import Address
from btt.sdk.money import Unit
from btt.sdk.payment.bans import BANS_SCHEMA
from btt.sdk.payment.counts import COUNTS_SCHEMA, load_tally, save_counts

SCHEMA_VERSION = 5
OPEN, CLOSING, CLOSED = "open", "closing", "closed"

_SCHEMA = """
CREATE TABLE offers(
    digest BLOB PRIMARY KEY CHECK(length(digest) = 32),
    serial INTEGER NOT NULL UNIQUE,
    payload BLOB NOT NULL,
    signature BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE channels(
    channel_id BLOB PRIMARY KEY CHECK(length(channel_id) = 32),
    payer BLOB NOT NULL CHECK(length(payer) = 20),
    commit_body BLOB NOT NULL,
    deposit INTEGER NOT NULL,
    expires_ms INTEGER NOT NULL,
    epoch INTEGER NOT NULL DEFAULT 0,
    best INTEGER NOT NULL DEFAULT 0 CHECK(best >= 0 AND best <= deposit),
    best_signature BLOB,
    written_off INTEGER NOT NULL DEFAULT 0 CHECK(written_off >= 0),
    state TEXT NOT NULL DEFAULT 'open',
    capture INTEGER CHECK(capture >= 0 AND capture <= best),
    arrears INTEGER NOT NULL DEFAULT 0,
    receipt BLOB,
    receipt_signature BLOB
) STRICT, WITHOUT ROWID;
CREATE INDEX channels_payer ON channels(payer);
CREATE TRIGGER best_never_falls BEFORE UPDATE OF best ON channels WHEN new.best < old.best
BEGIN SELECT raise(ABORT, 'a best update never falls'); END;
"""
_UPGRADES = {
    1: BANS_SCHEMA,
    2: DAYS_SCHEMA + REFUSALS_SCHEMA,
    3: QUOTA_SCHEMA + LENT_SCHEMA,
    4: TODAY_SCHEMA,
}


@dataclass(frozen=True, slots=True)
class ChannelRecord:
    """A channel as the node remembers it; amounts in base units.

    Attributes:
        channel_id: 32 bytes.
        payer: Account that pays.
        commit: The canonical ChannelCommit (T1).
        deposit: What T1 locks.
        expires_ms: Lock time, Unix milliseconds.
        epoch: Sessions so far.
        best: The best update, if any.
        written_off: What was delivered here and not accepted.
        state: OPEN, CLOSING (the capture is fixed) or CLOSED.
        capture: What is taken at the close, once CLOSING.
        arrears: What stayed owed at the close.
    """

    channel_id: bytes
    payer: Address
    commit: bytes
    deposit: int
    expires_ms: int
    epoch: int
    best: SignedUpdate | None
    written_off: int
    state: str
    capture: int | None
    arrears: int


@dataclass(frozen=True, slots=True)
class Earnings:
    """What a node has served and earned; amounts in base units.

    Attributes:
        paid: Best updates of all channels.
        captured: Of that, taken on the ledger.
        written_off: Delivered, not accepted, and not owed.
        units: Units settled, per service and unit.
        open_channels: Channels that are not closed.
        closed_channels: Channels that are.
    """

    paid: int
    captured: int
    written_off: int
    units: dict[Line, int]
    open_channels: int
    closed_channels: int


_COLUMNS = (
    "channel_id, payer, commit_body, deposit, expires_ms, epoch, best, best_signature,"
    " written_off, state, capture, arrears"
)


class PayeeStore:
    """The payee's books of one node.

    Args:
        path: The SQLite file; made if missing.
        clock: Unix milliseconds.

    Raises:
        ConfigError: The books are of a newer version.
        StorageError: They cannot be opened.
    """

    def __init__(self, path: Path, *, clock: Callable[[], int] = SYSTEM) -> None:
        self._db = open_books(
            path,
            schema=_SCHEMA
            + COUNTS_SCHEMA
            + BANS_SCHEMA
            + DAYS_SCHEMA
            + REFUSALS_SCHEMA
            + QUOTA_SCHEMA
            + LENT_SCHEMA
            + TODAY_SCHEMA,
            version=SCHEMA_VERSION,
            upgrades=_UPGRADES,
            busy=True,
        )
        tell_days(self._db, clock)
        self.lent_before = load_lent(self._db)
        """What strangers had been lent when the books were opened."""
        self._group = GroupCommit(self._db, threading.Lock(), whose="The node's books")

    def close(self) -> None:
        """Commits what is queued and closes the books."""
        self._group.close()
        self._db.close()

    def run(self, job: Job) -> Awaitable[Any]:
        """Runs a job on the books; to be awaited for its result, which is there once it is committed.

        Args:
            job: Called with the connection, inside a transaction, in any thread.

        Raises:
            StorageError: The transaction failed, and nothing of it happened.
        """
        return self._group.run(job)

    # Offers

    async def add_offer(self, digest: bytes, serial: int, payload: bytes, signature: bytes) -> None:
        """Keeps an offer that was signed."""
        await self.run(
            lambda db: db.execute(
                "INSERT OR IGNORE INTO offers VALUES(?,?,?,?)", (digest, serial, payload, signature)
            )
        )

    async def last_serial(self) -> int:
        """Returns the highest offer serial that was ever signed; 0 before the first."""
        return int(
            await self.run(lambda db: db.execute("SELECT coalesce(max(serial), 0) FROM offers").fetchone()[0])
        )

    # Channels

    async def channel(self, channel_id: bytes) -> tuple[ChannelRecord, Tally] | None:
        """Returns a channel and what was delivered on it, or None."""

        def read(db: sqlite3.Connection) -> tuple[ChannelRecord, Tally] | None:
            row = db.execute(
                f"SELECT {_COLUMNS} FROM channels WHERE channel_id = ?",  # noqa: S608
                (channel_id,),
            ).fetchone()
            return (_record(row), load_tally(db, channel_id)) if row else None

        return await self.run(read)  # type: ignore[no-any-return]

    async def channels(
        self, *, payer: Address | None = None, closed: bool = False
    ) -> list[tuple[ChannelRecord, Tally]]:
        """Returns channels with what was delivered on them; closed ones only if asked for."""

        def read(db: sqlite3.Connection) -> list[tuple[ChannelRecord, Tally]]:
            rows = db.execute(
                f"SELECT {_COLUMNS} FROM channels WHERE (?1 IS NULL OR payer = ?1)"  # noqa: S608
                " AND (?2 OR state <> 'closed')",
                (payer.data if payer else None, closed),
            ).fetchall()
            return [(_record(row), load_tally(db, row[0])) for row in rows]

        return await self.run(read)  # type: ignore[no-any-return]

    async def add_channel(self, record: ChannelRecord) -> None:
        """Keeps a channel that the ledger has opened."""
        r = record
        await self.run(
            lambda db: db.execute(
                "INSERT OR IGNORE INTO channels(channel_id, payer, commit_body, deposit, expires_ms)"
                " VALUES(?,?,?,?,?)",
                (r.channel_id, r.payer.data, r.commit, r.deposit, r.expires_ms),
            )
        )

    async def raise_deposit(self, channel_id: bytes, deposit: int) -> None:
        """Takes note of what a channel holds since it was topped up, base units."""
        await self.run(
            lambda db: db.execute(
                "UPDATE channels SET deposit = ? WHERE channel_id = ? AND deposit < ?",
                (deposit, channel_id, deposit),
            )
        )

    async def next_epoch(self, channel_id: bytes, app: Address | None = None) -> int:
        """Counts a session of a channel, and returns its number.

        Args:
            channel_id: 32 bytes.
            app: The application that opened it; None if it is unknown.
        """
        return int(
            await self.run(
                lambda db: db.execute(
                    "UPDATE channels SET epoch = epoch + 1, app = ? WHERE channel_id = ? RETURNING epoch",
                    (app.data if app else None, channel_id),
                ).fetchone()[0]
            )
        )

    def save(self, checked: Checked, tally: Tally, written_off: int) -> Awaitable[Durable[Checked]]:
        """Writes an update that was checked, with the books of its channel; `Payee.accept` takes note.

        Raises:
            StorageError: It is not on disk, so it does not count.
        """
        return Durable.awrite(checked, self._group.put(_save, (checked, tally.changes(), written_off)))

    async def save_books(self, channel_id: bytes, tally: Tally, written_off: int) -> None:
        """Writes what was delivered and written off on a channel."""
        counts = tally.changes()
        await self.run(lambda db: _save_books(db, channel_id, counts, written_off))
        tally.saved()

    async def begin_close(self, channel_id: bytes, capture: int, arrears: int) -> int:
        """Fixes what will be captured, before the ledger is asked; the first call decides.

        Returns:
            The capture that stands, base units.
        """

        def write(db: sqlite3.Connection) -> int:
            db.execute(
                "UPDATE channels SET state = 'closing', capture = ?, arrears = ?"
                " WHERE channel_id = ? AND state = 'open'",
                (capture, arrears, channel_id),
            )
            row = db.execute("SELECT capture FROM channels WHERE channel_id = ?", (channel_id,)).fetchone()
            return int(row[0] or 0)

        return int(await self.run(write))

    async def end_close(self, channel_id: bytes, receipt: bytes, signature: bytes) -> None:
        """Keeps the ledger's receipt of a close."""
        await self.run(
            lambda db: db.execute(
                "UPDATE channels SET state = 'closed', receipt = ?, receipt_signature = ?"
                " WHERE channel_id = ?",
                (receipt, signature, channel_id),
            )
        )

    async def closed_elsewhere(self, channel_id: bytes, captured: int, arrears: int) -> None:
        """Takes note that the ledger closed a channel without us.

        Args:
            channel_id: 32 bytes.
            captured: What the ledger paid us, base units.
            arrears: What stayed owed beyond the best update, unless a close fixed it before.
        """
        await self.run(
            lambda db: db.execute(
                "UPDATE channels SET state = 'closed', capture = min(?, best), arrears = max(arrears, ?)"
                " WHERE channel_id = ?",
                (captured, arrears, channel_id),
            )
        )

    async def payers(self) -> dict[str, tuple[int, int, int]]:
        """Returns per payer what it paid, what was written off, and its channels that are not closed."""

        def read(db: sqlite3.Connection) -> dict[str, tuple[int, int, int]]:
            rows = db.execute(
                "SELECT payer, sum(best), sum(written_off + arrears), sum(state <> 'closed')"
                " FROM channels GROUP BY payer"
            )
            return {str(Address(payer)): (*sums,) for payer, *sums in rows}

        return await self.run(read)  # type: ignore[no-any-return]

    async def earnings(self) -> Earnings:
        """Returns what the node has served and earned."""
        return await self.run(read_earnings)  # type: ignore[no-any-return]


def read_best_updates(db: sqlite3.Connection) -> list[tuple[bytes, bytes, int, bytes]]:
    """Reads T1, channel id, amount in base units and signature of the best update of each channel."""
    return db.execute(
        "SELECT commit_body, channel_id, best, best_signature FROM channels "
        "WHERE best_signature IS NOT NULL ORDER BY channel_id"
    ).fetchall()


def read_earnings(db: sqlite3.Connection) -> Earnings:
    """Reads the sums of a node's books."""
    paid, captured, written_off, opened, closed = db.execute(
        "SELECT coalesce(sum(best), 0), coalesce(sum(CASE state WHEN 'closed' THEN capture END), 0),"
        " coalesce(sum(written_off), 0), coalesce(sum(state <> 'closed'), 0),"
        " coalesce(sum(state = 'closed'), 0) FROM channels"
    ).fetchone()
    units = {
        Line(service, Unit(unit)): total
        for service, unit, total in db.execute(
            "SELECT service, unit, sum(units) FROM counts GROUP BY service, unit"
        )
    }
    return Earnings(paid, captured, written_off, units, opened, closed)


def _save(db: sqlite3.Connection, updates: list[tuple[Checked, tuple[Count, ...], int]]) -> None:
    db.executemany(
        "UPDATE channels SET best_signature = iif(best < ?1, ?2, best_signature), best = max(best, ?1),"
        " written_off = ?3 WHERE channel_id = ?4",
        [(*update, written_off, channel_id) for (channel_id, update), _, written_off in updates],
    )
    save_counts(db, [(checked.channel_id, counts) for checked, counts, _ in updates])


def _save_books(
    db: sqlite3.Connection, channel_id: bytes, counts: tuple[Count, ...], written_off: int
) -> None:
    db.execute(
        "UPDATE channels SET written_off = ?1 WHERE channel_id = ?2 AND written_off <> ?1",
        (written_off, channel_id),
    )
    save_counts(db, [(channel_id, counts)])


def _record(row: tuple[Any, ...]) -> ChannelRecord:
    (
        channel_id,
        payer,
        commit,
        deposit,
        expires_ms,
        epoch,
        best,
        signature,
        written_off,
        state,
        capture,
        arrears,
    ) = row
    return ChannelRecord(
        channel_id=channel_id,
        payer=Address(payer),
        commit=commit,
        deposit=deposit,
        expires_ms=expires_ms,
        epoch=epoch,
        best=SignedUpdate(best, signature) if signature is not None else None,
        written_off=written_off,
        state=state,
        capture=capture,
        arrears=arrears,
    )
