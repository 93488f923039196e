"""Rows of the ledger to values; `posting` writes them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Final

from btt.services.ledger import books
from btt.services.ledger.books import Account, Request, Terms
from btt.services.ledger.genesis import Identity
from btt.services.ledger.journal import EntryRef, Head
from btt.services.ledger.machine import Channel, Phase

CHANNEL_COLUMNS: Final = ", ".join(
    "commitment" if field.name == "commit" else field.name for field in fields(Channel)
)
"""In the order of the fields of `Channel`."""


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


def is_known(connection: sqlite3.Connection, address: bytes, k2: bytes) -> bool:
    """Says whether an address (20 bytes) or its key (33 bytes) has an account or a channel."""
    (found,) = connection.execute(
        "SELECT EXISTS (SELECT 1 FROM accounts WHERE id = ?) "
        "OR EXISTS (SELECT 1 FROM concerns WHERE party IN (?, ?))",
        (books.user(address), address, k2),
    ).fetchone()
    return bool(found)


def read_channel(connection: sqlite3.Connection, channel_id: bytes) -> Channel | None:
    """Reads a channel."""
    row = connection.execute(
        f"SELECT {CHANNEL_COLUMNS} FROM channels WHERE id = ?",  # noqa: S608 (names of our own fields)
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
        concerning = (
            "SELECT opened_seq FROM channels WHERE id = :channel AND opened_seq > :after UNION "
            "SELECT seq FROM entries WHERE substr(body, 1, 32) = :channel "
            "AND kind IN (4, 5, 6, 7, 8, 11) AND seq > :after"
        )
    else:
        # Each part comes in order from an index, so a page costs what is on it.
        concerning = (
            "SELECT seq FROM postings WHERE acct = (SELECT acct FROM accounts WHERE id = :user) "
            "AND seq > :after UNION "
            "SELECT seq FROM concerns WHERE party = :address AND seq > :after UNION "
            "SELECT seq FROM concerns WHERE party = :k2 AND seq > :after"
        )
    query = (
        "SELECT seq, time_ms, kind, request_digest, hash, "  # noqa: S608 (our own words)
        "CASE WHEN kind = 3 THEN request_digest WHEN kind IN (4, 5, 6, 7, 8, 11) THEN substr(body, 1, 32) "
        f"ELSE x'' END FROM entries WHERE seq IN ({concerning} ORDER BY 1 LIMIT :most) ORDER BY seq"
    )
    values = {
        "channel": channel,
        "address": address,
        "user": books.user(address),
        "k2": k2,
        "after": after,
        "most": most,
    }
    return connection.execute(query, values).fetchall()
