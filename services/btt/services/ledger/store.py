"""The books on disk: one SQLite file, one writer, nothing acknowledged before COMMIT.

WAL with synchronous=FULL: a commit that returned is on the disk. A batch is one transaction, and
before it commits the rows it touched are read back and must add up; if they do not, it is rolled
back and the ledger stops, because it is better to stop than to be wrong. A second process is kept
out by a lock file, and a writer that lost its lease cannot commit.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import astuple
from pathlib import Path
from typing import Final

from btt.sdk.disk import sync
from btt.sdk.errors import (
    ConfigError,
    LedgerRolledBack,
    SignerMismatch,
    StorageError,
)
from btt.sdk.keys import Address, PrivateKey
from btt.sdk.money import SUPPLY
from btt.sdk.signing import KeyRotation, document_digest
from btt.services.ledger import genesis, mark, posting, rows, schema
from btt.services.ledger.books import Effect, Terms
from btt.services.ledger.check import check_books
from btt.services.ledger.committed import Committed
from btt.services.ledger.genesis import Identity
from btt.services.ledger.journal import NO_HASH, EntryRef, Head, Kind
from btt.services.ledger.mark import MarkWriter
from btt.services.ledger.overlay import Batch
from btt.services.ledger.reading import connect, storage
from btt.services.ledger.verify import Operation

_log = logging.getLogger(__name__)
RECOVERY: Final = "recovery"
"""Folder, beside the books, of a recovery that has not ended; until then nothing is served."""
_PURGE_EVERY_MS: Final = 60_000
_MOST_PURGED: Final = 1_000


def create(
    path: Path,
    *,
    name: str,
    operator_key: PrivateKey,
    supply_to: Address,
    amount: int,
    clock: Callable[[], int],
    random: Callable[[int], bytes] = secrets.token_bytes,
    terms: Terms | None = None,
) -> Identity:
    """Makes the database of a new ledger, with an issue that nothing backs.

    Args:
        path: Of the new file; it appears complete or not at all.
        name: Of the ledger, for people.
        operator_key: Signs receipts and documents.
        supply_to: Gets the issue.
        amount: Base units, 1 to the supply.
        clock: Unix milliseconds.
        random: Makes n random bytes.
        terms: What the ledger accepts in a T1.

    Raises:
        ConfigError: The file exists, or an argument does not do.
        StorageError: The disk failed.
    """
    if path.exists():
        raise ConfigError(f"There is a ledger at {path} already.")
    if not 0 < amount <= SUPPLY:
        raise ConfigError(f"The issue is between 1 and {SUPPLY} base units.")
    terms = terms or Terms()
    description = genesis.describe(name, operator_key=operator_key.public.data, nonce=random(32))
    identity = Identity(genesis.ledger_id(description), description, name, True, terms)
    unfinished = path.with_name(path.name + ".new")
    for leftover in (unfinished, *(unfinished.with_name(unfinished.name + end) for end in ("-wal", "-shm"))):
        leftover.unlink(missing_ok=True)
    try:
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with closing(connect(unfinished)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(schema.TABLES)
            _migrate(connection)
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(
                "INSERT INTO ledger VALUES (1, ?, ?, ?, 1, ?, ?, ?, ?, ?, ?, ?, ?)",
                (identity.ledger_id, description, name, *astuple(terms)),
            )
            connection.execute("INSERT INTO epochs VALUES (1, ?, 1)", (operator_key.public.data,))
            connection.execute("INSERT INTO head VALUES (1, 1, x'', 0, ?, 0, 0, 0, 0, 0, 0)", (NO_HASH,))
            connection.execute("COMMIT")
        with Store.open(unfinished) as store:
            batch = Batch(store, clock_ms=clock(), terms=terms)
            body, effect = genesis.issue(supply_to.data, amount)
            digest = document_digest(genesis.DOCUMENT, identity.ledger_id, body)
            proof = operator_key.public.data + operator_key.sign(digest)
            batch.absorb(effect, digest=digest, body=body, signatures=proof)
            store.commit(batch)
        if unfinished.with_name(unfinished.name + "-wal").exists():
            raise StorageError(f"The new ledger's database {unfinished} did not close cleanly.")
        unfinished.rename(path)
        sync(path.parent)
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"The ledger at {path} could not be made: {error}.") from error
    finally:
        unfinished.with_name(unfinished.name + ".lock").unlink(missing_ok=True)
    return identity


class Store(Committed):
    """The writer's side of the books. Not thread-safe: one thread at a time uses it.

    Use `Store.open`; close it, or use it as a context manager.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: int) -> None:
        self.path = path
        self._mark: MarkWriter | None = None
        super().__init__(connection)
        self._lock = lock
        self._next_account = 1
        self._writer = secrets.token_bytes(16)
        self._next_purge_ms = 0
        self._stale = True
        self.commit_s = math.inf
        """Seconds that the last COMMIT took with its sync; infinite if it failed, or before the first."""
        self.identity = rows.read_identity(connection)

    @classmethod
    def open(cls, path: Path, *, durable: bool = True) -> Store:
        """Opens the books, after checking all of them.

        Args:
            path: Of the database.
            durable: False for a scratch copy, whose maker syncs it as a whole at the end.

        Raises:
            ConfigError: There is no ledger, another process has it, or it is being recovered.
            InvariantBroken: The books do not add up.
            StorageError: The disk failed.
        """
        if path.with_name(RECOVERY).exists():
            raise ConfigError(
                f"The recovery of the ledger at {path} has not ended.",
                hint=f"Go on with it, or end it: btt ledger recover {path.parent} --finish",
            )
        if not path.is_file():
            lost = f"btt ledger recover {path.parent} --help"
            raise ConfigError(
                f"There is no ledger at {path}.",
                hint=f"A ledger was there, and its database is lost: see {lost}."
                if mark.path_of(path).exists()
                else f"Make one with `btt ledger init`; if its database was lost, see {lost}.",
            )
        lock = take_lock(path)
        connection = None
        try:
            connection = connect(path)
            with storage():
                connection.execute("PRAGMA journal_mode = WAL")  # a restored backup is not in it
                if not durable:
                    connection.execute("PRAGMA synchronous = OFF")
                _migrate(connection)
                check_books(connection)
                store = cls(path, connection, lock)
                _check_mark(connection, path)
                connection.execute("UPDATE head SET writer = ?", (store._writer,))
                _write_back(connection)
                store.reload()
            if store.head.seq:
                store._mark = MarkWriter(mark.path_of(path))
                store._mark.note(store.head)
        except BaseException:
            if connection is not None:
                connection.close()
            os.close(lock)
            raise
        return store

    def close(self) -> None:
        """Closes the books and gives up the lock.

        Raises:
            StorageError: The mark could not be written.
        """
        try:
            if self._mark is not None:
                self._mark.close()
        finally:
            self._connection.close()
            os.close(self._lock)

    @property
    def mark(self) -> MarkWriter | None:
        """The high-water mark; None while the ledger is being made."""
        return self._mark

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def head(self) -> Head:
        """The end of the journal."""
        return self._head

    @property
    def next_account(self) -> int:
        """Number of the next new account."""
        return self._next_account

    def reload(self) -> None:
        """Forgets everything cached and reads the committed state again.

        Raises:
            StorageError: The database cannot be read.
        """
        self._forget()
        with storage():
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            self._head, self._totals = rows.read_head(self._connection)
            self._next_account = (
                1 + self._connection.execute("SELECT coalesce(max(acct), 0) FROM accounts").fetchone()[0]
            )
        self._stale = False

    def begin(self, clock_ms: int, upcoming: Sequence[Operation] = ()) -> Batch:
        """Starts a batch on the committed state.

        Args:
            clock_ms: What the clock says.
            upcoming: What the batch is going to run; what it will ask for is read at once.

        Raises:
            StorageError: The state had to be read again, and could not be.
        """
        if self._stale:
            self.reload()
        self._look_up(upcoming)
        return Batch(self, clock_ms=clock_ms, terms=self.identity.terms)

    def commit(self, batch: Batch) -> None:
        """Makes a batch durable, all of it or nothing.

        A StorageError means that nothing was acknowledged. After a failed fsync the disk may still
        hold the batch after a crash; a retry with the same request then gets its receipt.

        Args:
            batch: Begun on this store, with the store unchanged since.

        Raises:
            InvariantBroken: The books would not add up; the ledger must stop.
            StorageError: The disk or the database failed; the state is read again.
        """
        connection = self._connection
        self._stale = True
        self.commit_s = math.inf
        try:
            with storage():
                connection.execute("BEGIN IMMEDIATE")
                posting.write(connection, batch)
                totals = posting.add_up(connection, batch, self._totals)
                self._purge(batch.now_ms)
                posting.move_head(connection, batch.before, batch.head, totals, self._writer)
                start = time.perf_counter()
                connection.execute("COMMIT")
                self.commit_s = time.perf_counter() - start
        except BaseException:
            with suppress(sqlite3.Error):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            raise
        self._remember(batch)
        self._head, self._totals = batch.head, totals
        self._next_account = batch.next_account
        self._stale = False
        if self._mark is not None:
            try:
                self._mark.note(self._head)
            except StorageError as error:
                # The batch is durable, so it is no failure of it; the next commit tries again.
                _log.warning("%s", error.message)

    def running(self, since_ms: int, now_ms: int) -> list[bytes]:
        """Returns the ids of channels in whose end an outage may have cut; times as ledger time."""
        with storage():
            return rows.read_running(self._connection, since_ms, now_ms)

    def rotate(self, next_key: PrivateKey, operator_key: PrivateKey, *, clock_ms: int) -> EntryRef:
        """Hands the ledger to a new operator key; what follows belongs to a new epoch.

        Args:
            next_key: Signs from now on.
            operator_key: The current one.
            clock_ms: What the clock says.

        Returns:
            The entry that says so, the last one of the old key.

        Raises:
            SignerMismatch: `operator_key` is not the ledger's current key.
            StorageError: The disk failed.
        """
        batch = self.begin(clock_ms)
        if operator_key.public.data != self.operator_key:
            raise SignerMismatch("A ledger is handed over by its current operator key.")
        message = KeyRotation(epoch=self.head.epoch + 1, next_key=next_key.public)
        digest = message.digest(self.identity.ledger_id)
        entry = batch.absorb(
            Effect(Kind.ROTATE_KEY, ()),
            digest=digest,
            body=message.encode(),
            signatures=operator_key.public.data + operator_key.sign(digest) + next_key.sign(digest),
        )
        batch.begin_epoch(message.epoch, next_key.public.data)
        self.commit(batch)
        if self._mark is not None:
            self._mark.flush()
        return entry

    @property
    def operator_key(self) -> bytes:
        """The key that signs for the ledger now, 33 bytes."""
        with storage():
            return rows.read_epochs(self._connection)[-1][1]

    def _purge(self, now_ms: int) -> None:
        if now_ms < self._next_purge_ms:
            return
        purged = posting.purge_requests(self._connection, now_ms, _MOST_PURGED)
        if purged < _MOST_PURGED:
            self._next_purge_ms = now_ms + _PURGE_EVERY_MS


def _write_back(connection: sqlite3.Connection) -> None:
    """Moves the write-ahead log into the database, and syncs that.

    After a crash or a failed sync the log may hold commits that are in this machine's memory and
    not on its disk. They count from now on, so they are made durable before anybody is told.
    """
    busy, _, _ = connection.execute("PRAGMA wal_checkpoint(FULL)").fetchone()
    if busy:
        raise StorageError("Another program reads an old state of the ledger's database; let it end.")


def _check_mark(connection: sqlite3.Connection, path: Path) -> None:
    """Refuses books that are older than what the mark remembers, or another history than its."""
    noted = mark.read(mark.path_of(path))
    if noted is None:
        return
    found = connection.execute("SELECT hash FROM entries WHERE seq = ?", (noted.seq,)).fetchone()
    if found is not None and found[0] == noted.hash:
        return
    head, _ = rows.read_head(connection)
    raise LedgerRolledBack(
        f"The database at {path} ends with entry {head.seq}, but this ledger had come to entry {noted.seq}."
        if head.seq < noted.seq
        else f"The database at {path} tells another history than the one that came to entry {noted.seq}."
    )


def is_newest(path: Path) -> bool:
    """Says whether the books are known to be the newest: they hold what their mark remembers.

    Args:
        path: Of the database, which may be missing or damaged.

    Raises:
        StorageError: The mark cannot be read.
    """
    noted = mark.read(mark.path_of(path))
    if noted is None or not path.is_file():
        return False
    try:
        with closing(connect(path, read_only=True)) as connection:
            found = connection.execute("SELECT hash FROM entries WHERE seq = ?", (noted.seq,)).fetchone()
    except (StorageError, sqlite3.Error):
        return False
    return found is not None and found[0] == noted.hash


def _migrate(connection: sqlite3.Connection) -> None:
    """Brings the tables to this program's version, or leaves them as they are."""
    while (version := connection.execute("PRAGMA user_version").fetchone()[0]) != schema.VERSION:
        if version not in schema.MIGRATIONS:
            raise ConfigError(
                f"The ledger's database has schema {version}; this program knows {schema.VERSION}.",
                hint="Use the program that wrote it, or a newer one.",
            )
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in schema.MIGRATIONS[version]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version + 1}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def take_lock(path: Path) -> int:
    """Makes this process the only one that may write a ledger's books.

    Args:
        path: Of the database, which need not exist.

    Returns:
        A descriptor that holds the lock until it is closed.

    Raises:
        ConfigError: Another process has it.
        StorageError: The lock cannot be made.
    """
    place, lock = path.with_name(path.name + ".lock"), -1
    try:
        lock = os.open(place, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if lock >= 0:
            os.close(lock)
        if isinstance(error, BlockingIOError):
            raise ConfigError(
                f"Another process runs the ledger at {path}.",
                hint="A ledger has one writer; stop the other one.",
            ) from None
        raise StorageError(f"The ledger's lock {place} cannot be taken: {error.strerror}.") from error
    return lock
