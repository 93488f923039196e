"""A copy of a ledger's books while it runs: consistent, checked, and one file.

A copy restores what it holds, and what came after it is missing: the high-water mark, which is not
part of the copy, makes a restored ledger refuse to start where it was known to be further.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from btt.sdk.errors import ConfigError
from btt.services.ledger import rows
from btt.services.ledger.check import check_books
from btt.services.ledger.export import existing_database, make_file
from btt.services.ledger.journal import Head
from btt.services.ledger.reading import connect, storage


def backup(place: Path, target: Path) -> Head:
    """Copies the books of a ledger, which may be running.

    Args:
        place: The ledger's folder.
        target: New file; it appears complete and checked, or not at all.

    Returns:
        The last entry in the copy.

    Raises:
        ConfigError: There is no ledger, or the target cannot be made.
        InvariantBroken: The books do not add up.
        StorageError: The disk failed.
    """
    database = existing_database(place)
    if target.exists():
        raise ConfigError(f"The file {target} exists already.")
    unfinished = target.with_name(target.name + ".new")
    with storage():
        unfinished.unlink(missing_ok=True)
        make_file(unfinished, mode=0o600).close()
        try:
            with closing(connect(database, read_only=True)) as source, closing(connect(unfinished)) as copy:
                source.backup(copy)  # in one step: one moment of the books, and no writer waits
                copy.execute("PRAGMA journal_mode = DELETE")
                check_books(copy)
                head, _ = rows.read_head(copy)
            _sync(unfinished)
            unfinished.rename(target)
            _sync(target.parent)
        except (OSError, sqlite3.Error):
            unfinished.unlink(missing_ok=True)
            raise
    return head


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
