"""The table in which a node remembers payers and networks, and a wallet remembers nodes.

Both open their books through `open_books`; every function here runs inside a transaction
of the caller. The table is bounded: whoever makes failures by the thousand displaces what
is over, never a ban that an operator set.
"""

from __future__ import annotations

import sqlite3

from btt.sdk.channel.conduct import BanPolicy, Conduct

MAX_SUBJECTS = 20_000
ROOM = 256
"""Freed at a time, so that making room is rare."""

BANS_SCHEMA = """
CREATE TABLE bans(
    subject TEXT PRIMARY KEY,
    strikes INTEGER NOT NULL,
    bans INTEGER NOT NULL,
    at_ms INTEGER NOT NULL,
    until_ms INTEGER NOT NULL,
    reason TEXT NOT NULL,
    by_operator INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""
_COLUMNS = "strikes, bans, at_ms, until_ms, reason, by_operator"


def load_conduct(db: sqlite3.Connection, subject: str) -> Conduct:
    """Returns what is remembered against somebody."""
    row = db.execute(f"SELECT {_COLUMNS} FROM bans WHERE subject = ?", (subject,)).fetchone()  # noqa: S608
    return _conduct(row) if row else Conduct()


def all_conduct(db: sqlite3.Connection) -> dict[str, Conduct]:
    """Returns everybody that something is remembered against, by name."""
    rows = db.execute(f"SELECT subject, {_COLUMNS} FROM bans")  # noqa: S608
    return {row[0]: _conduct(row[1:]) for row in rows}


def save_conduct(db: sqlite3.Connection, subject: str, conduct: Conduct, *, now_ms: int) -> None:
    """Writes what is remembered against somebody, and makes room for it if it must."""
    c = conduct
    [count] = db.execute("SELECT count(*) FROM bans").fetchone()
    if count >= MAX_SUBJECTS:
        db.execute(
            "DELETE FROM bans WHERE subject IN (SELECT subject FROM bans"
            " WHERE NOT (by_operator AND until_ms > ?1) ORDER BY until_ms > ?1, at_ms LIMIT ?2)",
            (now_ms, count - MAX_SUBJECTS + ROOM),
        )
    db.execute(
        "INSERT OR REPLACE INTO bans VALUES(?,?,?,?,?,?,?)",
        (subject, c.strikes, c.bans, c.at_ms, c.until_ms, c.reason, c.by_operator),
    )


def save_strike(
    db: sqlite3.Connection, subject: str, reason: str, *, now_ms: int, policy: BanPolicy, weight: int = 1
) -> tuple[Conduct, bool]:
    """Counts a failure; returns the record, and whether it is a new strike."""
    before = load_conduct(db, subject)
    after = before.strike(reason, now_ms=now_ms, policy=policy, weight=weight)
    if after is not before:
        save_conduct(db, subject, after, now_ms=now_ms)
    return after, after is not before


def forget_conduct(db: sqlite3.Connection, subject: str) -> bool:
    """Forgets what is remembered against somebody; says whether there was anything."""
    return db.execute("DELETE FROM bans WHERE subject = ?", (subject,)).rowcount > 0


def _conduct(row: tuple[int, int, int, int, str, int]) -> Conduct:
    strikes, bans, at_ms, until_ms, reason, by_operator = row
    return Conduct(strikes, bans, at_ms, until_ms, reason, bool(by_operator))
