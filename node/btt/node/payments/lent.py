"""What strangers have been lent, on disk: a node that is started again lends them nothing twice.

Written before the credit is given. What comes back is written too, but nobody waits for it: lost
in a crash it only lends less, until the hour has refilled it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Final

LENT_SCHEMA: Final = """
CREATE TABLE lent(
    network TEXT PRIMARY KEY,
    used INTEGER NOT NULL CHECK(used >= 0),
    at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""
_REFILLED_MS: Final = 3_600_000

Lent = tuple[str, int, int]
"""A network (all together: ""), base units lent to it, and when that was, Unix milliseconds."""


def load_lent(db: sqlite3.Connection) -> list[Lent]:
    """Returns what was lent when it was last written."""
    return db.execute("SELECT network, used, at_ms FROM lent").fetchall()


def save_lent(db: sqlite3.Connection, lent: Iterable[Lent], now_ms: int) -> None:
    """Writes what is lent now, and forgets what has refilled; runs in a transaction of the caller."""
    db.execute("DELETE FROM lent WHERE at_ms < ?", (now_ms - _REFILLED_MS,))
    db.executemany("INSERT OR REPLACE INTO lent VALUES(?, ?, ?)", lent)
