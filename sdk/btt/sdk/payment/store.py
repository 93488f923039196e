"""The payer's books on disk: its channels, what it signed, what it counted, whom it met.

One SQLite file per wallet, write-ahead log, `synchronous=FULL`: what `save` returned
from survives a power cut. Budgets are reserved here, in one transaction with the
channel that uses them, so that several processes on one wallet share them safely. A
channel is used by one process at a time (`claim`); another opens its own.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btt.sdk.channel import BanPolicy, Conduct, Durable, Intent, Tally
from btt.sdk.database import open_books
from btt.sdk.errors import BudgetExceeded, StorageError
from btt.sdk.group_commit import GroupCommit
from btt.sdk.keys import Address
from btt.sdk.money import SUPPLY, Amount
from btt.sdk.payment import budgets, claims
from btt.sdk.payment.bans import BANS_SCHEMA, forget_conduct, load_conduct, save_strike
from btt.sdk.payment.budgets import BUDGETS_SCHEMA
from btt.sdk.payment.claims import Claim
from btt.sdk.payment.counts import COUNTS_SCHEMA, load_tally, save_counts
from btt.sdk.payment.history import HISTORY_SCHEMA
from btt.sdk.payment.pending import TOP_UPS_SCHEMA
from btt.sdk.payment.transfers import TRANSFERS_SCHEMA

if TYPE_CHECKING:
    from btt.sdk.budget import Budget

SCHEMA_VERSION = 5
OPENING, OPEN, CLOSING, CLOSED = "opening", "open", "closing", "closed"

_SCHEMA = """
CREATE TABLE nodes(
    node BLOB PRIMARY KEY CHECK(length(node) = 20),
    serial INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE endpoints(
    endpoint TEXT PRIMARY KEY,
    node BLOB NOT NULL
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
    kept_ms INTEGER NOT NULL DEFAULT 0,
    CHECK(base <= cap AND cap <= deposit AND signed <= deposit)
) STRICT, WITHOUT ROWID;
"""
_UPGRADES = {
    1: BANS_SCHEMA,
    2: "ALTER TABLE budgets ADD COLUMN spent INTEGER NOT NULL DEFAULT 0;\n"
    "ALTER TABLE channels ADD COLUMN kept_ms INTEGER NOT NULL DEFAULT 0;\n" + TOP_UPS_SCHEMA + HISTORY_SCHEMA,
    3: "ALTER TABLE budgets ADD COLUMN within TEXT;",
    4: TRANSFERS_SCHEMA,
}


@dataclass(frozen=True, slots=True)
class StoredChannel:
    """A channel as the wallet remembers it.

    Attributes:
        channel_id: 32 bytes.
        ledger_id: 32 bytes.
        node: The node it pays.
        commit: The canonical ChannelCommit (T1).
        refund_signature: Of K2 over the refund (T2), 65 bytes.
        deposit: Base units that T1 and its top-ups lock.
        expires_ms: Lock time, Unix milliseconds.
        signed: Base units signed so far.
        budget: Name of the budget that pays now.
        base: Base units signed when that budget took over.
        cap: Most cumulative base units that budget allows.
        state: OPENING, OPEN, CLOSING (used no more, its outcome not known yet), CLOSED.
        kept_ms: When it was left open on purpose, with a statement, Unix milliseconds; 0 while a
            session uses it and after one that broke.
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
    kept_ms: int = 0


_CHANNEL_COLUMNS = (
    "channel_id, ledger_id, node, commit_body, refund_signature, deposit, expires_ms,"
    " signed, budget, base, cap, state, kept_ms"
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
        claims.make_room(folder)
        self._lock = threading.RLock()
        self._db = open_books(
            folder / "payer.db",
            schema=_SCHEMA
            + BUDGETS_SCHEMA
            + COUNTS_SCHEMA
            + BANS_SCHEMA
            + TOP_UPS_SCHEMA
            + HISTORY_SCHEMA
            + TRANSFERS_SCHEMA,
            version=SCHEMA_VERSION,
            upgrades=_UPGRADES,
            busy=True,
        )
        self._group = GroupCommit(self._db, self._lock, whose="The wallet's books")

    def close(self) -> None:
        """Closes the books; claims are given up with the process or by `release`."""
        self._group.close()
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

    @contextmanager
    def books(self) -> Iterator[sqlite3.Connection]:
        """Gives one durable transaction to what keeps tables of its own in these books.

        Raises:
            StorageError: It failed, and nothing of it happened.
        """
        with self._transaction():
            yield self._db

    @property
    def folder(self) -> Path:
        """The wallet's folder."""
        return self._folder

    # Signing

    def save(self, intent: Intent) -> Awaitable[Durable[Intent]]:
        """Writes what is about to be signed, and what was counted with it.

        Raises:
            StorageError: It is not on disk, so nothing may be signed.
        """
        return Durable.awrite(intent, self._group.put(_save, intent))

    def tally(self, channel_id: bytes) -> Tally:
        """Returns what was counted on a channel when it was last saved."""
        return load_tally(self._db, channel_id)

    # Channels

    def declare(self, budget: Budget) -> None:
        """Writes what a budget is within; see `budgets.declare`."""
        with self._transaction():
            budgets.declare(self._db, budget)

    def add_channel(self, channel: StoredChannel, granted: int) -> None:
        """Writes a channel that is about to be opened, and reserves its deposit in its budget.

        Args:
            channel: In state OPENING.
            granted: Base units of the whole budget.

        Raises:
            BudgetExceeded: The budget does not cover the deposit.
        """
        with self._transaction():
            budgets.grant(self._db, channel.budget, granted)
            self.check(channel.budget, granted, channel.cap - channel.base)
            c = channel
            self._db.execute(
                f"INSERT INTO channels({_CHANNEL_COLUMNS}) VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?)"
                " ON CONFLICT DO NOTHING",  # programs that share a grant all begin its books
                (
                    c.channel_id, c.ledger_id, c.node.data, c.commit, c.refund_signature, c.deposit,
                    c.expires_ms, c.signed, c.budget, c.base, c.cap, c.state, c.kept_ms,
                ),
            )  # fmt: skip

    def adopt(self, channel_id: bytes, budget: str, granted: int, used: int = 0) -> StoredChannel:
        """Lets a budget pay from a channel that is open already, as far as it reaches.

        What the budget before it spent there stays spent; what is locked and not signed is free
        again. Called again, it lets the budget use what was added to the channel, or no more than
        is left of it since it was lowered.

        Args:
            channel_id: 32 bytes.
            budget: Its name.
            granted: Base units of the whole budget.
            used: Cumulative base units that are owed or set aside: what was allowed once stays payable.
        """
        with self._transaction():
            budgets.grant(self._db, budget, granted)
            channel = self.get(channel_id)
            base = channel.base
            if channel.budget != budget:
                base = channel.signed
                self._db.execute(
                    "UPDATE budgets SET spent = spent + ? WHERE name = ?",
                    (channel.signed - channel.base, channel.budget),
                )
                self._db.execute(
                    "UPDATE channels SET budget = ?, base = signed, cap = signed WHERE channel_id = ?",
                    (budget, channel_id),
                )
                channel = self.get(channel_id)
            left, _ = budgets.tightest(self._db, budget, granted)
            kept = min(channel.cap, max(channel.signed, used))
            cap = max(kept, min(channel.deposit, channel.cap + left))
            self._db.execute(
                "UPDATE channels SET cap = ?, kept_ms = 0 WHERE channel_id = ?", (cap, channel_id)
            )
            return replace(channel, budget=budget, base=base, cap=cap, kept_ms=0)

    def check(self, budget: str, granted: int, wanted: int) -> None:
        """Checks, inside a transaction, that a budget covers something more.

        Raises:
            BudgetExceeded: It does not.
        """
        left, which = self.tightest(budget, granted)
        wanted = min(wanted, SUPPLY)  # by a hostile price it may be more than there is
        if wanted > left:
            raise BudgetExceeded(
                f"{Amount(wanted)} are needed, and {Amount(left)} of {which} are"
                f" left: {Amount(wanted - left)} are missing.",
                missing=wanted - left,
            )

    def left(self, budget: str, granted: int) -> int:
        """Returns the base units that are free of a budget and of those that it is within."""
        return self.tightest(budget, granted)[0]

    def tightest(self, budget: str, granted: int) -> tuple[int, str]:
        """Returns what `left` does, and which budget has no more, for people."""
        left, which = budgets.tightest(self._db, budget, granted)
        return max(0, left), which

    def channels(self, *, node: Address | None = None, ledger_id: bytes | None = None) -> list[StoredChannel]:
        """Returns the channels that are not closed, those with the most left first."""
        rows = self._db.execute(
            f"SELECT {_CHANNEL_COLUMNS} FROM channels WHERE state <> 'closed'"  # noqa: S608
            " AND (?1 IS NULL OR node = ?1) AND (?2 IS NULL OR ledger_id = ?2)"
            " ORDER BY deposit - signed DESC",
            (node.data if node else None, ledger_id),
        )
        return [_channel(row) for row in rows]

    def get(self, channel_id: bytes) -> StoredChannel:
        """Returns one channel."""
        row = self._db.execute(
            f"SELECT {_CHANNEL_COLUMNS} FROM channels WHERE channel_id = ?",  # noqa: S608
            (channel_id,),
        ).fetchone()
        return _channel(row)

    def find(self, channel_id: bytes) -> StoredChannel | None:
        """Returns one channel, or None if this wallet's books have none of that id."""
        query = "SELECT 1 FROM channels WHERE channel_id = ?"
        return self.get(channel_id) if self._db.execute(query, (channel_id,)).fetchone() else None

    def set_state(self, channel_id: bytes, state: str, statement: bytes | None = None) -> None:
        """Moves a channel on; a node's signed statement is kept with it."""
        with self._transaction():
            self._db.execute(
                "UPDATE channels SET state = ?, statement = coalesce(?, statement) WHERE channel_id = ?",
                (state, statement, channel_id),
            )

    def keep(self, channel_id: bytes, now_ms: int) -> None:
        """Takes note that a channel was left open on purpose, after its statement."""
        with self._transaction():
            self._db.execute("UPDATE channels SET kept_ms = ? WHERE channel_id = ?", (now_ms, channel_id))

    def statement(self, channel_id: bytes) -> bytes | None:
        """Returns the node's last signed statement on a channel, serialised."""
        query = "SELECT statement FROM channels WHERE channel_id = ?"
        return (self._db.execute(query, (channel_id,)).fetchone() or (None,))[0]

    def learn_deposit(self, channel_id: bytes, deposit: int) -> None:
        """Takes over what the ledger says a channel holds, unless a top-up of ours is still under way."""
        with self._transaction():
            self._db.execute(
                "UPDATE channels SET deposit = max(deposit, ?1) WHERE channel_id = ?2"
                " AND NOT EXISTS (SELECT 1 FROM top_ups WHERE channel_id = ?2)",
                (deposit, channel_id),
            )

    def learn_signed(self, channel_id: bytes, signed: int) -> StoredChannel:
        """Takes over what the ledger says was signed on a channel that others sign on."""
        with self._transaction():
            change = "deposit = max(deposit, ?1), signed = max(signed, ?1)"
            self._db.execute(f"UPDATE channels SET {change} WHERE channel_id = ?2", (signed, channel_id))  # noqa: S608
            return self.get(channel_id)

    def save_books(self, channel_id: bytes, signed: int, tally: Tally) -> None:
        """Writes what both sides agreed on when a session opened or ended."""
        # In the order of `save`: an older intent that is still queued must not overwrite this.
        intent = Intent(channel_id, signed, tally.changes())
        self._group.run_now(lambda db: _save(db, [intent]))
        tally.saved()

    def paid_total(self, node: Address) -> int:
        """Returns the base units signed to a node over all channels."""
        query = "SELECT coalesce(sum(signed), 0) FROM channels WHERE node = ?"
        return int(self._db.execute(query, (node.data,)).fetchone()[0])

    def claim(self, channel_id: bytes) -> Claim | None:
        """Takes a channel for this process; None when another has it."""
        return claims.take(self._folder, channel_id.hex())

    # Nodes

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


def _save(db: sqlite3.Connection, intents: list[Intent]) -> None:
    db.executemany(
        "UPDATE channels SET signed = max(signed, ?) WHERE channel_id = ?",
        [(cumulative, channel_id) for channel_id, cumulative, _ in intents],
    )
    save_counts(db, [(channel_id, counts) for channel_id, _, counts in intents])


def _channel(row: tuple[Any, ...]) -> StoredChannel:
    channel_id, ledger_id, node, *rest = row
    return StoredChannel(channel_id, ledger_id, Address(node), *rest)
