"""SQL of the ledger: rows to values, a batch to rows, and the sums that must hold before COMMIT."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Final

from btt.sdk.errors import InvariantBroken
from btt.services.ledger import books
from btt.services.ledger.books import Account, Request, Terms
from btt.services.ledger.genesis import Identity
from btt.services.ledger.journal import MOVES_NOTHING, EntryRef, Head, Side
from btt.services.ledger.machine import Channel, Phase
from btt.services.ledger.overlay import Batch

_CHANNEL_COLUMNS: Final = ", ".join(
    "commitment" if field.name == "commit" else field.name for field in fields(Channel)
)

_ROWS: Final = 16
"""Inserted in one step."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums of the books: base units, and numbers of channels. issued = accounts + channels."""

    issued: int
    accounts: int
    channels: int
    open_channels: int
    closed_channels: int


def read_identity(connection: sqlite3.Connection) -> Identity:
    """Reads what never changes about the ledger."""
    row = connection.execute(
        "SELECT ledger_id, genesis, name, unbacked, min_challenge_ms, max_challenge_ms, "
        "min_lifetime_ms, max_lifetime_ms, open_fee, max_locked, max_open_channels, min_update_delta "
        "FROM ledger"
    ).fetchone()
    return Identity(row[0], row[1], row[2], bool(row[3]), Terms(*row[4:]))


def read_head(connection: sqlite3.Connection) -> tuple[Head, Totals]:
    """Reads the end of the journal and the running sums."""
    row = connection.execute(
        "SELECT epoch, seq, hash, time_ms, issued, accounts, channels, open_channels, closed_channels "
        "FROM head"
    ).fetchone()
    return Head(*row[:4]), Totals(*row[4:])


def read_account(connection: sqlite3.Connection, account: bytes) -> Account | None:
    """Reads an account by id."""
    row = connection.execute(
        "SELECT acct, id, balance, locked, public_key, open_channels FROM accounts WHERE id = ?", (account,)
    ).fetchone()
    return Account(*row) if row else None


def read_channel(connection: sqlite3.Connection, channel_id: bytes) -> Channel | None:
    """Reads a channel."""
    row = connection.execute(
        f"SELECT {_CHANNEL_COLUMNS} FROM channels WHERE id = ?",  # noqa: S608 (names of our own fields)
        (channel_id,),
    ).fetchone()
    if row is None:
        return None
    values = dict(zip((field.name for field in fields(Channel)), row, strict=True))
    values["phase"] = Phase(values["phase"])
    return Channel(**values)


def read_requests(
    connection: sqlite3.Connection, wanted: Iterable[tuple[Account, bytes]]
) -> dict[tuple[bytes, bytes], Request]:
    """Reads what became of request ids, in one query.

    Args:
        connection: To the database.
        wanted: Account and request id of each.

    Returns:
        Those that were used, by id of the account and request id.
    """
    owners = {(owner.number, request_id): owner.id for owner, request_id in wanted}
    if not owners:
        return {}
    found = connection.execute(
        # A row value that is IN a list would make SQLite read the whole table.
        f"WITH wanted (owner, name) AS (VALUES {', '.join(['(?, ?)'] * len(owners))}) "  # noqa: S608 (marks)
        "SELECT acct, request_id, digest, failure, keep_until_ms "
        "FROM wanted CROSS JOIN requests ON acct = owner AND request_id = name",
        [value for pair in owners for value in pair],
    )
    requests = (Request(owners[row[:2]], *row[1:]) for row in found)
    return {(request.account, request.request_id): request for request in requests}


def read_entries(connection: sqlite3.Connection, digests: Sequence[bytes]) -> dict[bytes, EntryRef]:
    """Reads the parts of entries that their receipts name, in one query.

    Args:
        connection: To the database.
        digests: Of the requests, 32 bytes each.

    Returns:
        Those that there are, by digest.
    """
    if not digests:
        return {}
    found = connection.execute(
        "SELECT seq, time_ms, epoch, request_digest, hash FROM entries "  # noqa: S608 (marks only)
        f"WHERE request_digest IN ({', '.join('?' * len(digests))})",
        digests,
    )
    return {row[3]: EntryRef(*row) for row in found}


def read_epochs(connection: sqlite3.Connection) -> list[tuple[int, bytes, int]]:
    """Reads epoch, operator key and number of the first entry of each epoch, in order."""
    return connection.execute("SELECT epoch, operator_key, first_seq FROM epochs ORDER BY epoch").fetchall()


def read_due(connection: sqlite3.Connection, now_ms: int, most: int) -> list[bytes]:
    """Reads the ids of channels that anybody may pay out now, at most `most` of each phase."""
    found = connection.execute(
        "SELECT id FROM (SELECT id FROM channels WHERE phase = 2 AND deadline_ms <= ?1 LIMIT ?2) UNION ALL "
        "SELECT id FROM (SELECT id FROM channels WHERE phase = 1 AND expires_ms + 2 * challenge_ms <= ?1 "
        "LIMIT ?2)",
        (now_ms, most),
    )
    return [row[0] for row in found]


def read_running(connection: sqlite3.Connection, since_ms: int, now_ms: int) -> list[bytes]:
    """Reads the ids of channels in whose end an outage may have cut: closing, or expired and open."""
    found = connection.execute(
        "SELECT id FROM channels WHERE phase = 2 AND deadline_ms > ?1 UNION ALL "
        "SELECT id FROM channels WHERE phase = 1 AND expires_ms + 2 * challenge_ms > ?1 AND expires_ms < ?2 "
        "ORDER BY id",
        (since_ms, now_ms),
    )
    return [row[0] for row in found]


def read_events(
    connection: sqlite3.Connection,
    *,
    channel: bytes | None = None,
    address: bytes = b"",
    k2: bytes = b"",
    after: int,
    most: int,
) -> list[tuple[int, int, int, bytes, bytes, bytes]]:
    """Reads entries that concern a channel, or an account and the channels of its key.

    Args:
        connection: To the database.
        channel: Id of 32 bytes; None to ask for an account.
        address: Of the account, 20 bytes.
        k2: The account's key, 33 bytes: channels that it closes concern it too.
        after: Number of the entry before the first one wanted.
        most: How many at most.

    Returns:
        Number, time, kind, digest, hash and channel id (or nothing) of each, in order.
    """
    if channel is not None:
        which, values = "id = :channel", {"channel": channel}
        own = ""
    else:
        which = "payer = :address OR payee = :address OR k2 = :k2"
        own = (
            "SELECT seq FROM postings WHERE acct = (SELECT acct FROM accounts WHERE id = :user) "
            "AND seq > :after UNION "
        )
        values = {"address": address, "k2": k2, "user": books.user(address)}
    query = (
        "SELECT seq, time_ms, kind, request_digest, hash, "  # noqa: S608 (our own words)
        "CASE WHEN kind = 3 THEN request_digest WHEN kind IN (4, 5, 6, 7, 8, 11) THEN substr(body, 1, 32) "
        f"ELSE x'' END FROM entries WHERE seq IN ({own}"
        f"SELECT opened_seq FROM channels WHERE ({which}) AND opened_seq > :after UNION "
        "SELECT e.seq FROM channels c JOIN entries e ON substr(e.body, 1, 32) = c.id "
        f"AND e.kind IN (4, 5, 6, 7, 8, 11) WHERE ({which.replace('id =', 'c.id =')}) AND e.seq > :after "
        "ORDER BY 1 LIMIT :most) ORDER BY seq"
    )
    return connection.execute(query, {**values, "after": after, "most": most}).fetchall()


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
        f"INSERT INTO channels (acct, {_CHANNEL_COLUMNS}) VALUES ({marks})",  # noqa: S608 (our own names)
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
