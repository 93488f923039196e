"""Opens the SQLite books of payer and payee: durable, and quick to make durable.

What was committed survives a power cut (`synchronous=FULL`). Commits append to a
write-ahead log; while that file grows, every sync also writes the file system's own
journal, and with it the data of whatever file is being downloaded beside it. So the log
of books that are written to all the time is given its size when they are opened, and is written
over from then on.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from btt.sdk.errors import ConfigError, StorageError

_LOG_ROOM: Final = "CREATE TABLE log_room(times INTEGER NOT NULL);\nINSERT INTO log_room VALUES(0);\n"

_LOCKED_S: Final = 30.0
"""Seconds to wait for another process that writes."""
LOG_PAGES: Final = 256
"""Size that the write-ahead log is given, in pages of 4 KiB; at this size it is checkpointed."""


def open_books(
    path: Path,
    *,
    schema: str,
    version: int,
    upgrades: Mapping[int, str] = MappingProxyType({}),
    busy: bool = False,
) -> sqlite3.Connection:
    """Opens books for reading and writing; makes them if they are missing.

    Args:
        path: The SQLite file.
        schema: Statements that make the tables.
        version: Of the schema.
        upgrades: Statements that lead from a version to the next one.
        busy: They are written to while content is served or fetched.

    Returns:
        A connection without implicit transactions, usable from any thread under a lock.

    Raises:
        ConfigError: The books are of a version that no upgrade leads from.
        StorageError: They cannot be opened.
    """
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_LOCKED_S)
        _use_log(db)
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA foreign_keys=ON")
        _bring_to(db, version, {0: f"{schema}{_LOG_ROOM}", **upgrades}, path)
        db.execute(f"PRAGMA wal_autocheckpoint={LOG_PAGES}")
        if busy:
            _grow_log(db, path)
    except sqlite3.Error as error:
        raise StorageError(f"The books in {path} cannot be opened ({error}).") from error
    return db


def _use_log(db: sqlite3.Connection) -> None:
    # SQLite waits for no lock here, and another process may be making the same books.
    until = time.monotonic() + _LOCKED_S
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


def _bring_to(db: sqlite3.Connection, version: int, steps: Mapping[int, str], path: Path) -> None:
    if _version(db) == version:
        return
    db.execute("BEGIN IMMEDIATE")
    # Another process may have done it while we waited for the lock.
    while (found := _version(db)) != version:
        if found not in steps:
            db.execute("ROLLBACK")
            db.close()
            raise ConfigError(f"The books in {path} are of version {found}; update this program.")
        statement = ""
        for line in steps[found].splitlines(keepends=True):
            statement += line
            if sqlite3.complete_statement(statement):
                db.execute(statement)
                statement = ""
        db.execute(f"PRAGMA user_version={version if found == 0 else found + 1}")
    db.execute("COMMIT")


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _grow_log(db: sqlite3.Connection, path: Path) -> None:
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and log.stat().st_size >= LOG_PAGES * 4096:
        return
    # Each commit takes a page of the log; these promise nothing, so they are not synced.
    db.execute("PRAGMA synchronous=OFF")
    for _ in range(LOG_PAGES):
        db.execute("UPDATE log_room SET times = times + 1")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
