"""Reads the committed books beside the writer: what front ends, auditors and backups see."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from btt.sdk.errors import BttError, InvariantBroken, StorageError
from btt.sdk.keys import PublicKey
from btt.services.ledger import books, rows
from btt.services.ledger.books import Account
from btt.services.ledger.check import entries
from btt.services.ledger.journal import BY_THE_LEDGER, Entry, Head
from btt.services.ledger.machine import Channel
from btt.services.ledger.rows import Totals

_PRAGMAS: Final = (
    "PRAGMA synchronous = FULL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA busy_timeout = 5000",
    "PRAGMA trusted_schema = OFF",
)
_SYNC_ERRORS: Final = (sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC)


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Opens a ledger's database.

    Raises:
        StorageError: It cannot be opened.
    """
    uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rw'}"
    try:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        for pragma in _PRAGMAS:
            connection.execute(pragma)
    except sqlite3.Error as error:
        raise StorageError(f"The ledger's database {path} cannot be opened: {error}.") from error
    return connection


class Reader:
    """Reads the committed books beside the writer. Not thread-safe.

    Args:
        path: Of the database.
    """

    def __init__(self, path: Path) -> None:
        self._connection = connect(path, read_only=True)

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    def head(self) -> tuple[Head, Totals]:
        """Returns the end of the journal and the sums of the books at that moment."""
        with storage():
            return rows.read_head(self._connection)

    def account(self, address: bytes) -> Account | None:
        """Returns the account of an address (20 bytes)."""
        with storage():
            return rows.read_account(self._connection, books.user(address))

    def knows(self, key: PublicKey) -> bool:
        """Says whether a key has an account or a channel."""
        with storage():
            return rows.is_known(self._connection, key.address.data, key.data)

    def channel(self, channel_id: bytes) -> Channel | None:
        """Returns a channel (id of 32 bytes)."""
        with storage():
            return rows.read_channel(self._connection, channel_id)

    def events(
        self, *, channel: bytes | None, key: PublicKey, after: int, most: int
    ) -> tuple[list[tuple[int, int, int, bytes, bytes, bytes]], int]:
        """Returns what concerns a channel, or a key, after an entry; see `rows.read_events`.

        Returns:
            The events, and the number of the entry up to which they are complete.
        """
        with storage():
            self._connection.execute("BEGIN")
            try:
                head, _ = rows.read_head(self._connection)
                address = key.address.data
                found = rows.read_events(
                    self._connection, channel=channel, address=address, k2=key.data, after=after, most=most
                )
            finally:
                self._connection.execute("COMMIT")
        return found, found[-1][0] if len(found) == most else head.seq

    def operations(
        self, *, channel: bytes | None, key: PublicKey, after: int, most: int
    ) -> tuple[list[Entry], int, bool]:
        """Returns the entries of `events` that a user's request made.

        Returns:
            The entries, the number of the entry up to which they are complete, and whether there
            may be more.
        """
        found, seen_seq = self.events(channel=channel, key=key, after=after, most=most)
        with storage():
            told = [
                next(entries(self._connection, after=seq - 1, upto=seq))
                for seq, _, kind, *_ in found
                if kind not in BY_THE_LEDGER
            ]
        return told, seen_seq, len(found) == most

    def entries(self, after: int, most: int) -> list[Entry]:
        """Returns a page of the journal."""
        with storage():
            return list(entries(self._connection, after=after, upto=after + most))

    def rotations(self) -> list[Entry]:
        """Returns the entries that changed the operator's key, in order."""
        with storage():
            seqs = [first_seq - 1 for _, _, first_seq in rows.read_epochs(self._connection)[1:]]
            return [next(entries(self._connection, after=seq - 1, upto=seq)) for seq in seqs]

    def due(self, now_ms: int, most: int) -> list[bytes]:
        """Returns ids of channels that anybody may pay out now."""
        with storage():
            return rows.read_due(self._connection, now_ms, most)


class SyncFailed(StorageError):
    """The disk would not confirm a write.

    What it holds is unknown, and it may say "done" to the next sync without having written what
    this one was for. So the ledger stops; at its next start it reads what is there.
    """


@contextmanager
def storage() -> Iterator[None]:
    """Turns what a database raises into our errors; a database error is never a business error."""
    try:
        yield
    except BttError:
        raise
    except sqlite3.IntegrityError as error:
        raise InvariantBroken(f"The books would be inconsistent: {error}.") from error
    except (sqlite3.Error, OSError) as error:
        if getattr(error, "sqlite_errorcode", 0) in _SYNC_ERRORS:
            raise SyncFailed("The ledger's disk did not confirm a write; the ledger has stopped.") from error
        raise StorageError(f"The ledger's database failed: {error}.") from error
