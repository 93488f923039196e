"""Reads a node's books beside the node, whether it runs or not; nothing is changed."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from btt.node.folder import BOOKS, CONFIG
from btt.node.payments.store import PayeeStore
from btt.sdk.errors import ConfigError, StorageError


@contextmanager
def reading(folder: Path) -> Iterator[sqlite3.Connection]:
    """Opens the books of a node's folder.

    Args:
        folder: Of the node.

    Raises:
        ConfigError: There is no node.
        StorageError: Its books cannot be read.
    """
    if not (folder / CONFIG).exists():
        raise ConfigError(f"There is no node in {folder}.", hint="Make one with `btt node init`.")
    path = folder / BOOKS
    PayeeStore(path).close()  # made if the node never ran, and of this version
    with reading_file(path) as db:
        yield db


@contextmanager
def reading_file(path: Path) -> Iterator[sqlite3.Connection]:
    """Opens books that are there, by a connection of its own: who reads long holds up no payment.

    Args:
        path: The SQLite file.

    Raises:
        StorageError: They cannot be read.
    """
    try:
        # Reading the write-ahead log needs its index, which a read-only connection may not make.
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=10)) as db:
            db.execute("PRAGMA query_only = ON")
            db.execute("BEGIN")  # one state of the books for all that is asked
            yield db
    except sqlite3.Error as error:
        raise StorageError(f"The node's books cannot be read ({error}).") from error
