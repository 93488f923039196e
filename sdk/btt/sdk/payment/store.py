"""The payer's books on disk: its channels, what it signed, what it counted, whom it met.

One SQLite file per wallet, write-ahead log, `synchronous=FULL`: what `save` returned
from survives a power cut. Budgets are reserved here, in one transaction with the
channel that uses them, so that several processes on one wallet share them safely. A
channel is used by one process at a time (`claim`); another opens its own.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from btt.sdk.channel import BanPolicy, Conduct, Durable, Intent, Tally
from btt.sdk.database import IN_PLACE_S, open_books
from btt.sdk.errors import BudgetExceeded, IdentityError, StorageError
from btt.sdk.keys import Address
from btt.sdk.money import Amount
from btt.sdk.payment.bans import BANS_SCHEMA, forget_conduct, load_conduct, save_strike
from btt.sdk.payment.counts import COUNTS_SCHEMA, load_tally, save_tally

SCHEMA_VERSION = 2
OPENING, OPEN, CLOSED = "opening", "open", "closed"

_SCHEMA = """
CREATE TABLE nodes(
    node BLOB PRIMARY KEY CHECK(length(node) = 20),
    serial INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE endpoints(
    endpoint TEXT PRIMARY KEY,
    node BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE budgets(
    name TEXT PRIMARY KEY,
    granted INTEGER NOT NULL CHECK(granted >= 0)
) STRICT, WITHOUT ROWID;
CREATE TABLE channels(
    channel_id BLOB PRIMARY KEY CHECK(length(channel_id) = 32),
    ledger_id BLOB NOT NULL,
    node BLOB NOT NULL,
    commit_body BLOB NOT NULL,
    refund_signature BLOB NOT NULL,
    deposit INTEGER NOT NULL,
    expires_ms INTEGER NOT NULL,
    signed INTEGER NOT NULL DEFAULT 0 CHECK(signed >= 0),
    budget TEXT NOT NULL,
    base INTEGER NOT NULL DEFAULT 0,
    cap INTEGER NOT NULL,
    state TEXT NOT NULL,
    statement BLOB,
    CHECK(base <= cap AND cap <= deposit AND signed <= deposit)
) STRICT, WITHOUT ROWID;
"""
_UPGRADES = {1: BANS_SCHEMA}


@dataclass(frozen=True, slots=True)
class StoredChannel:
    """A channel as the wallet remembers it.

    Attributes:
        channel_id: 32 bytes.
        ledger_id: 32 bytes.
        node: The node it pays.
        commit: The canonical ChannelCommit (T1).
        refund_signature: Of K2 over the refund (T2), 65 bytes.
        deposit: Base units that T1 locks.
        expires_ms: Lock time, Unix milliseconds.
        signed: Base units signed so far.
        budget: Name of the budget that pays now.
        base: Base units signed when that budget took over.
        cap: Most cumulative base units that budget allows.
        state: OPENING, OPEN or CLOSED.
    """

    channel_id: bytes
    ledger_id: bytes
    node: Address
    commit: bytes
    refund_signature: bytes
    deposit: int
    expires_ms: int
    signed: int
    budget: str
    base: int
    cap: int
    state: str


_CHANNEL_COLUMNS = (
    "channel_id, ledger_id, node, commit_body, refund_signature, deposit, expires_ms,"
    " signed, budget, base, cap, state"
)


class PayerStore:
    """The payer's books of one wallet.

    Args:
        folder: Where they are; made if missing.

    Raises:
        ConfigError: The books are of a newer version.
        StorageError: They cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "claims").mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = threading.RLock()
        self._commit_s = 0.0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="payer-store")
        self._db = open_books(
            folder / "payer.db",
            schema=_SCHEMA + COUNTS_SCHEMA + BANS_SCHEMA,
            version=SCHEMA_VERSION,
            upgrades=_UPGRADES,
        )

    def close(self) -> None:
        """Closes the books; claims are given up with the process or by `release`."""
        self._writer.shutdown()
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise StorageError(f"The wallet's books could not be written ({error}).") from error

    # Signing

    async def save(self, intent: Intent) -> Durable[Intent]:
        """Writes what is about to be signed, and what was counted with it.

        Raises:
            StorageError: It is not on disk, so nothing may be signed.
        """
        if self._commit_s < IN_PLACE_S:
            return Durable.write(intent, self._save)

        async def write(value: Intent) -> None:
            await asyncio.get_running_loop().run_in_executor(self._writer, self._save, value)

        return await Durable.awrite(intent, write)

    def _save(self, intent: Intent) -> None:
        start = time.perf_counter()
        with self._transaction():
            self._db.execute(
                "UPDATE channels SET signed = max(signed, ?) WHERE channel_id = ?",
                (intent.cumulative, intent.channel_id),
            )
            save_tally(self._db, intent.channel_id, intent.tally)
        self._commit_s = time.perf_counter() - start

    def tally(self, channel_id: bytes) -> Tally:
        """Returns what was counted on a channel when it was last saved."""
        return load_tally(self._db, channel_id)

    # Channels

    def add_channel(self, channel: StoredChannel, granted: int) -> None:
        """Writes a channel that is about to be opened, and reserves its deposit in its budget.

        Args:
            channel: In state OPENING.
            granted: Base units of the whole budget.

        Raises:
            BudgetExceeded: The budget does not cover the deposit.
        """
        with self._transaction():
            self._grant(channel.budget, granted)
            self._check(channel.budget, granted, channel.cap - channel.base)
            c = channel
            self._db.execute(
                f"INSERT INTO channels({_CHANNEL_COLUMNS}) VALUES(?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    c.channel_id, c.ledger_id, c.node.data, c.commit, c.refund_signature, c.deposit,
                    c.expires_ms, c.signed, c.budget, c.base, c.cap, c.state,
                ),
            )  # fmt: skip

    def adopt(self, channel_id: bytes, budget: str, granted: int) -> StoredChannel:
        """Lets a budget pay from a channel that is open already, as far as it reaches.

        Raises:
            BudgetExceeded: Nothing is left in the budget.
        """
        with self._transaction():
            self._grant(budget, granted)
            channel = self._one(channel_id)
            if channel.budget == budget:
                return channel
            left = granted - self._reserved(budget)
            cap = min(channel.deposit, channel.signed + left)
            if cap <= channel.signed:
                raise BudgetExceeded(f"The budget of {Amount(granted)} is used up.")
            self._db.execute(
                "UPDATE channels SET budget = ?, base = signed, cap = ? WHERE channel_id = ?",
                (budget, cap, channel_id),
            )
            return replace(channel, budget=budget, base=channel.signed, cap=cap)

    def _grant(self, budget: str, granted: int) -> None:
        self._db.execute(
            "INSERT INTO budgets VALUES(?, ?) ON CONFLICT DO UPDATE SET granted = excluded.granted",
            (budget, granted),
        )

    def _reserved(self, budget: str) -> int:
        query = (
            "SELECT coalesce(sum(CASE state WHEN 'closed' THEN max(signed - base, 0) ELSE cap - base END), 0)"
            " FROM channels WHERE budget = ?"
        )
        return int(self._db.execute(query, (budget,)).fetchone()[0])

    def _check(self, budget: str, granted: int, wanted: int) -> None:
        left = granted - self._reserved(budget)
        if wanted > left:
            raise BudgetExceeded(
                f"{Amount(wanted)} are needed, and {Amount(max(0, left))} of the budget of "
                f"{Amount(granted)} are left."
            )

    def left(self, budget: str, granted: int) -> int:
        """Returns the base units of a budget that no channel has reserved."""
        return max(0, granted - self._reserved(budget))

    def channels(self, *, node: Address | None = None, ledger_id: bytes | None = None) -> list[StoredChannel]:
        """Returns the channels that are not closed, those with the most left first."""
        rows = self._db.execute(
            f"SELECT {_CHANNEL_COLUMNS} FROM channels WHERE state <> 'closed'"  # noqa: S608
            " AND (?1 IS NULL OR node = ?1) AND (?2 IS NULL OR ledger_id = ?2)"
            " ORDER BY deposit - signed DESC",
            (node.data if node else None, ledger_id),
        )
        return [_channel(row) for row in rows]

    def _one(self, channel_id: bytes) -> StoredChannel:
        row = self._db.execute(
            f"SELECT {_CHANNEL_COLUMNS} FROM channels WHERE channel_id = ?",  # noqa: S608
            (channel_id,),
        ).fetchone()
        return _channel(row)

    def get(self, channel_id: bytes) -> StoredChannel:
        """Returns one channel."""
        return self._one(channel_id)

    def set_state(self, channel_id: bytes, state: str, statement: bytes | None = None) -> None:
        """Moves a channel on; a node's signed statement is kept with it."""
        with self._transaction():
            self._db.execute(
                "UPDATE channels SET state = ?, statement = coalesce(?, statement) WHERE channel_id = ?",
                (state, statement, channel_id),
            )

    def save_books(self, channel_id: bytes, signed: int, tally: Tally) -> None:
        """Writes what both sides agreed on when a session opened or ended."""
        # In the order of `save`: an older intent that is still queued must not overwrite this.
        self._writer.submit(self._save, Intent(channel_id, signed, tally.copy())).result()

    def paid_total(self, node: Address) -> int:
        """Returns the base units signed to a node over all channels."""
        row = self._db.execute("SELECT coalesce(sum(signed), 0) FROM channels WHERE node = ?", (node.data,))
        return int(row.fetchone()[0])

    def claim(self, channel_id: bytes) -> Claim | None:
        """Takes a channel for this process; None when another has it."""
        handle = os.open(
            self._folder / "claims" / channel_id.hex(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return Claim(handle)

    # Nodes

    def saw_offer(self, node: Address, serial: int) -> None:
        """Remembers the highest serial of a node.

        Raises:
            IdentityError: A higher one was seen before: an old offer is being replayed.
        """
        with self._transaction():
            row = self._db.execute("SELECT serial FROM nodes WHERE node = ?", (node.data,)).fetchone()
            if row is not None and serial < row[0]:
                raise IdentityError(f"The node shows offer {serial}, but offer {row[0]} was seen before.")
            self._db.execute(
                "INSERT INTO nodes VALUES(?, ?) ON CONFLICT DO UPDATE SET serial = excluded.serial",
                (node.data, serial),
            )

    def known_endpoint(self, endpoint: str) -> Address | None:
        """Returns who was met at a bare `host:port` before."""
        row = self._db.execute("SELECT node FROM endpoints WHERE endpoint = ?", (endpoint,)).fetchone()
        return Address(row[0]) if row else None

    def trust_endpoint(self, endpoint: str, node: Address) -> None:
        """Remembers who was met at a bare `host:port` on first use."""
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO endpoints VALUES(?, ?)", (endpoint, node.data))

    def conduct(self, node: Address) -> Conduct:
        """Returns what this wallet remembers against a node."""
        return load_conduct(self._db, str(node))

    def strike(
        self, node: Address, reason: str, *, now_ms: int, policy: BanPolicy, weight: int = 1
    ) -> Conduct:
        """Remembers a failure of a node; see `Conduct.strike`."""
        with self._transaction():
            return save_strike(self._db, str(node), reason, now_ms=now_ms, policy=policy, weight=weight)[0]

    def forgive(self, node: Address) -> bool:
        """Forgets what is remembered against a node; says whether there was anything."""
        with self._transaction():
            return forget_conduct(self._db, str(node))


class Claim:
    """A channel that this process uses; `release` gives it up."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def release(self) -> None:
        """Gives the channel up; more than once is fine."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _channel(
    row: tuple[bytes, bytes, bytes, bytes, bytes, int, int, int, str, int, int, str],
) -> StoredChannel:
    channel_id, ledger_id, node, commit, refund, deposit, expires_ms, signed, budget, base, cap, state = row
    return StoredChannel(
        channel_id=channel_id,
        ledger_id=ledger_id,
        node=Address(node),
        commit=commit,
        refund_signature=refund,
        deposit=deposit,
        expires_ms=expires_ms,
        signed=signed,
        budget=budget,
        base=base,
        cap=cap,
        state=state,
    )
