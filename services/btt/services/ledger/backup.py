"""A copy of a ledger's books while it runs: consistent, checked, and one file.

A copy restores what it holds, and what came after it is missing: the high-water mark, which is not
part of the copy, makes a restored ledger refuse to start where it was known to be further.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from btt.sdk.disk import appearing
from btt.sdk.errors import StorageError
from btt.services.ledger import rows
from btt.services.ledger.check import check_books
from btt.services.ledger.export import existing_database
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
    with (
        storage(),
        appearing(target, mode=0o600) as unfinished,
        closing(connect(database, read_only=True)) as source,
        closing(connect(unfinished)) as copy,
    ):
        try:
            source.backup(copy)  # in one step: one moment of the books, and no writer waits
            copy.execute("PRAGMA journal_mode = DELETE")
        except sqlite3.Error as error:
            raise StorageError(
                f"The books could not be copied to {target}: {error}.",
                hint="Make room, or choose another place for it.",
            ) from error
        check_books(copy)
        head, _ = rows.read_head(copy)
    return head
