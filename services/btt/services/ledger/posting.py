"""A batch to rows, and the sums that must hold before COMMIT.

Everything here happens in the one transaction of a batch: its rows are written, read back and added
up, and the head moves, if no other writer has moved it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import chain
from typing import Final

from btt.sdk.errors import InvariantBroken
from btt.services.ledger import books
from btt.services.ledger.journal import MOVES_NOTHING, NAMES_A_CHANNEL, Head, Kind, Side
from btt.services.ledger.machine import Channel, Phase
from btt.services.ledger.overlay import Batch
from btt.services.ledger.rows import CHANNEL_COLUMNS, Totals

_ROWS: Final = 16
"""Inserted in one step."""


def write(connection: sqlite3.Connection, batch: Batch) -> None:
    """Writes a batch into the open transaction.

    Raises:
        InvariantBroken: A row is not what the batch was computed from.
    """
    number = {account.id: account.number for account in batch.accounts.values()}
    new, changed = [], []
    for account in batch.accounts.values():
        old = batch.stored_account(account.id)
        values = (account.balance, account.locked, account.public_key, account.open_channels)
        if old is None:
            new.append((account.number, account.id, *values))
        else:
            changed.append((*values, account.number, old.balance, old.locked))
    connection.executemany(
        "INSERT INTO accounts (acct, id, balance, locked, public_key, open_channels) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        new,
    )
    _all_of(
        connection.executemany(
            "UPDATE accounts SET balance = ?, locked = ?, public_key = ?, open_channels = ? "
            "WHERE acct = ? AND balance = ? AND locked = ?",
            changed,
        ),
        len(changed),
    )
    _insert(
        connection,
        "entries",
        [
            (
                e.seq,
                e.time_ms,
                e.epoch,
                int(e.kind),  # to bind what is not exactly an int takes four times as long
                e.request_digest,
                e.body,
                e.signatures,
                e.prev_hash,
                e.hash,
            )
            for e in batch.entries
        ],
    )
    _insert(
        connection,
        "postings",
        [
            (entry.seq, leg, number[posting.account], int(posting.side), posting.amount)
            for entry in batch.entries
            for leg, posting in enumerate(entry.postings)
        ],
    )
    if batch.channels:
        _write_channels(connection, batch, number)
        _insert(connection, "concerns", list(_concerns(batch)))
    if batch.epochs:
        connection.executemany("INSERT INTO epochs VALUES (?, ?, ?)", batch.epochs)
    _insert(
        connection,
        "requests",
        [
            (batch.number_of(r.account), r.request_id, r.digest, r.failure, r.keep_until_ms)
            for r in batch.requests.values()
        ],
    )


def _insert(connection: sqlite3.Connection, table: str, rows: Sequence[tuple[object, ...]]) -> None:
    """Inserts whole rows, many in one step: the sqlite3 module gives the interpreter's lock away at each."""
    if not rows:
        return
    insert, row = f"INSERT INTO {table} VALUES ", f"({', '.join('?' * len(rows[0]))})"  # noqa: S608 (our own)
    whole = len(rows) - len(rows) % _ROWS
    if whole:
        groups = (tuple(chain.from_iterable(rows[start : start + _ROWS])) for start in range(0, whole, _ROWS))
        connection.executemany(insert + ", ".join([row] * _ROWS), groups)
    connection.executemany(insert + row, rows[whole:])


def _write_channels(connection: sqlite3.Connection, batch: Batch, number: dict[bytes, int]) -> None:
    new, changed = [], []
    for channel in batch.channels.values():
        old = batch.stored_channel(channel.id)
        if old is None:
            new.append(
                (number[books.locked_in(channel.id)], *(getattr(channel, f.name) for f in fields(Channel)))
            )
        else:
            changed.append(
                (
                    channel.deposit,
                    channel.captured,
                    channel.best,
                    channel.best_signature,
                    channel.phase,
                    channel.deadline_ms,
                    channel.closed_seq,
                    channel.id,
                    old.phase,
                    old.best,
                )
            )
    marks = ", ".join("?" * (1 + len(fields(Channel))))
    connection.executemany(
        f"INSERT INTO channels (acct, {CHANNEL_COLUMNS}) VALUES ({marks})",  # noqa: S608 (our own names)
        new,
    )
    _all_of(
        connection.executemany(
            "UPDATE channels SET deposit = ?, captured = ?, best = ?, best_signature = ?, phase = ?, "
            "deadline_ms = ?, closed_seq = ? WHERE id = ? AND phase = ? AND best = ?",
            changed,
        ),
        len(changed),
    )


def _concerns(batch: Batch) -> Iterator[tuple[bytes, int]]:
    """Yields each entry of a channel with everyone it concerns; see `schema.CONCERNS`."""
    for entry in batch.entries:
        if entry.kind is Kind.OPEN_CHANNEL or entry.kind in NAMES_A_CHANNEL:
            named = entry.request_digest if entry.kind is Kind.OPEN_CHANNEL else entry.body[:32]
            channel = batch.channels[named]
            for party in (channel.payer, channel.payee, channel.k2):
                yield party, entry.seq


def _all_of(cursor: sqlite3.Cursor, expected: int) -> None:
    if expected and cursor.rowcount != expected:
        raise InvariantBroken("A stored row is not what the ledger computed from.")


def add_up(connection: sqlite3.Connection, batch: Batch, before: Totals) -> Totals:
    """Reads back what a batch wrote and checks that it adds up.

    Entries balance; every balance moved by exactly its postings; a channel's account holds what
    the channel says; what users have locked is what channels hold. That no balance is negative,
    nothing is above the supply and the sums agree is checked by the tables themselves.

    Args:
        connection: In the transaction that wrote the batch.
        batch: What was written.
        before: The sums before it.

    Returns:
        The sums after it.

    Raises:
        InvariantBroken: Something does not add up.
    """
    by_entry: dict[int, int] = {}
    moved: dict[int, int] = {}
    found = connection.execute(
        "SELECT seq, acct, side, amount FROM postings WHERE seq > ?", (batch.before.seq,)
    )
    for seq, acct, side, amount in found:
        signed = amount if side == Side.CREDIT else -amount
        by_entry[seq] = by_entry.get(seq, 0) + signed
        moved[acct] = moved.get(acct, 0) + signed
    if len(by_entry) != sum(entry.kind not in MOVES_NOTHING for entry in batch.entries) or any(
        by_entry.values()
    ):
        raise InvariantBroken("The debits and credits of an entry differ.")
    issued = accounts = channels = locked = 0
    for account in batch.accounts.values():
        old = batch.stored_account(account.id)
        change = account.balance - (old.balance if old else 0)
        locked += account.locked - (old.locked if old else 0)
        asset = books.is_asset(account.id)
        if moved.pop(account.number, 0) != (-change if asset else change):
            raise InvariantBroken(f"The balance of account {account.number} is not the sum of its postings.")
        if asset:
            issued += change
        elif books.is_channel(account.id):
            channels += change
        else:
            accounts += change
    if moved or locked != channels:
        raise InvariantBroken("A posting or a lock belongs to no account of the batch.")
    wrong = (
        any(books.is_channel(account) for account in batch.accounts)
        and connection.execute(
            "SELECT 1 FROM postings p JOIN accounts a USING (acct) LEFT JOIN channels c USING (acct) "
            "WHERE p.seq > ? AND substr(a.id, 1, 1) = x'02' AND a.balance IS NOT "
            "CASE c.phase WHEN 3 THEN 0 ELSE c.deposit - c.captured END LIMIT 1",
            (batch.before.seq,),
        ).fetchone()
    )
    if wrong:
        raise InvariantBroken("A channel's account does not hold what the channel says.")
    opened = sum(batch.stored_channel(channel.id) is None for channel in batch.channels.values())
    closed = sum(
        channel.phase is Phase.CLOSED
        and ((was := batch.stored_channel(channel.id)) is None or was.phase is not Phase.CLOSED)
        for channel in batch.channels.values()
    )
    return Totals(
        before.issued + issued,
        before.accounts + accounts,
        before.channels + channels,
        before.open_channels + opened - closed,
        before.closed_channels + closed,
    )


def purge_requests(connection: sqlite3.Connection, now_ms: int, most: int) -> int:
    """Removes request ids that nobody can use any more; returns how many."""
    return connection.execute(
        "DELETE FROM requests WHERE (acct, request_id) IN "
        "(SELECT acct, request_id FROM requests WHERE keep_until_ms < ? ORDER BY keep_until_ms LIMIT ?)",
        (now_ms, most),
    ).rowcount


def move_head(
    connection: sqlite3.Connection, before: Head, after: Head, totals: Totals, writer: bytes
) -> None:
    """Moves the head, if this writer still owns it.

    Raises:
        InvariantBroken: Another writer has moved the head.
    """
    done = connection.execute(
        "UPDATE head SET epoch = ?, seq = ?, hash = ?, time_ms = ?, issued = ?, accounts = ?, channels = ?, "
        "open_channels = ?, closed_channels = ? WHERE writer = ? AND epoch = ? AND seq = ? AND hash = ?",
        (
            after.epoch,
            after.seq,
            after.hash,
            after.time_ms,
            totals.issued,
            totals.accounts,
            totals.channels,
            totals.open_channels,
            totals.closed_channels,
            writer,
            before.epoch,
            before.seq,
            before.hash,
        ),
    )
    if done.rowcount != 1:
        raise InvariantBroken("Another writer has moved the ledger's head; this one stops.")
