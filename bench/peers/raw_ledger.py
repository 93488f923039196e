"""The peers `raw SQLite`: what storing the same transfers costs, and nothing else.

The same rows into the same tables of the same database (schema, constraints, indexes, foreign
keys, WAL, synchronous=FULL), as prepared tuples: for each operation one entry, two postings, two
changed accounts and one request id. No signature is checked, no rule looked at, nothing hashed,
no receipt made, nothing read back; no event loop, no second thread. `commit` makes one
transaction of each operation, `batched` one of 512, by `executemany`. `before` operations run before the
clock, as the contestants of the product have their accounts funded.

`plain` tables are what somebody would write who knows that the rows are right: the same columns
and keys, without constraints, triggers and the indexes that look-ups by account, channel and age
need.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from bench.operations import Clock, Operations
from bench.ours.ledger import make
from btt.services.ledger.reading import connect

BATCH = 512
PLAIN = """
CREATE TABLE accounts (acct INTEGER PRIMARY KEY, id BLOB UNIQUE, balance INTEGER, locked INTEGER);
CREATE TABLE entries (seq INTEGER PRIMARY KEY, time_ms INTEGER, epoch INTEGER, kind INTEGER,
    request_digest BLOB UNIQUE, body BLOB, signatures BLOB, prev_hash BLOB, hash BLOB);
CREATE TABLE postings (seq INTEGER, leg INTEGER, acct INTEGER, side INTEGER, amount INTEGER,
    PRIMARY KEY (seq, leg)) WITHOUT ROWID;
CREATE TABLE requests (acct INTEGER, request_id BLOB, digest BLOB, failure TEXT, keep_until_ms INTEGER,
    PRIMARY KEY (acct, request_id)) WITHOUT ROWID;
"""

_ENTRY = "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_POSTING = "INSERT INTO postings VALUES (?, ?, ?, ?, ?)"
_REQUEST = "INSERT INTO requests VALUES (?, ?, ?, ?, ?)"
_ACCOUNT = "UPDATE accounts SET balance = balance + ?, locked = ? WHERE acct = ?"
BODY, SIGNATURES = 104, 98
"""Bytes of a Transfer, and of a key with its signature."""


class _Rows:
    """The rows of one transfer after the other, made before the clock."""

    def __init__(self, first: int, count: int, numbers: list[int]) -> None:
        now = time.time_ns() // 1_000_000
        self.entries = []
        self.postings = []
        self.requests = []
        self.accounts = []
        for seq in range(first, first + count):
            source, to = numbers[seq % len(numbers)], numbers[(seq + 1) % len(numbers)]
            digest = os.urandom(32)
            body, proof = os.urandom(BODY), os.urandom(SIGNATURES)
            self.entries.append((seq, now, 1, 2, digest, body, proof, os.urandom(32), os.urandom(32)))
            self.postings += [(seq, 0, source, 0, 1), (seq, 1, to, 1, 1)]
            self.requests.append((source, seq.to_bytes(16, "big"), digest, "", now))
            self.accounts += [(-1, 0, source), (1, 0, to)]

    def store(self, connection: sqlite3.Connection, start: int, end: int) -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(_ACCOUNT, self.accounts[2 * start : 2 * end])
        connection.executemany(_ENTRY, self.entries[start:end])
        connection.executemany(_POSTING, self.postings[2 * start : 2 * end])
        connection.executemany(_REQUEST, self.requests[start:end])
        connection.execute("COMMIT")


def raw(
    path: Path, *, clients: int, operations: int, batch: int, before: int = 0, plain: bool = False
) -> Operations:
    """Stores the rows of transfers.

    Args:
        path: An empty folder.
        clients: How many accounts.
        operations: How many transfers.
        batch: Of how many a transaction is made.
        before: How many are stored before the clock, in transactions of 512.
        plain: Use plain tables.
    """
    database = path / "ledger" / "ledger.sqlite3"
    if plain:
        database.parent.mkdir()
        database.touch()
    else:
        make(path / "ledger", clients)
    clock = Clock()
    with closing(connect(database)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        if plain:
            connection.executescript(PLAIN)
            connection.executemany(
                "INSERT INTO accounts VALUES (?, ?, ?, 0)",
                [(n, os.urandom(21), 10**9) for n in range(clients)],
            )
        numbers = [
            row[0]
            for row in connection.execute("SELECT acct FROM accounts ORDER BY acct DESC LIMIT ?", (clients,))
        ]
        first = 1 + connection.execute("SELECT coalesce(max(seq), 0) FROM entries").fetchone()[0]
        rows = _Rows(first, before + operations, numbers)
        for start in range(0, before, BATCH):
            rows.store(connection, start, min(start + BATCH, before))
        times = []
        with clock.running():
            for start in range(before, before + operations, batch):
                began = time.perf_counter()
                rows.store(connection, start, min(start + batch, before + operations))
                times.append(time.perf_counter() - began)
    return clock.run(operations, times)
