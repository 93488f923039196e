"""The full check of stored books, made at every start: the journal alone must explain every row."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from typing import Final

from btt.sdk.errors import InvariantBroken
from btt.sdk.signing import ChannelClose
from btt.sdk.signing.layout import preimage, tag
from btt.services.ledger import books, genesis, journal, rows
from btt.services.ledger.books import Phase
from btt.services.ledger.journal import NO_HASH, Entry, Head, Kind, Posting, Side

_NAMES: Final = {
    Kind.GENESIS: genesis.DOCUMENT,
    Kind.TRANSFER: "Transfer",
    Kind.OPEN_CHANNEL: "ChannelCommit",
    Kind.CLOSE_CHANNEL: "ChannelClose",
}


def entries(connection: sqlite3.Connection, *, after: int = 0) -> Iterator[Entry]:
    """Reads the journal in order.

    Args:
        connection: To the ledger's database.
        after: Number of the entry before the first one wanted.
    """
    found = connection.execute(
        "SELECT e.seq, time_ms, epoch, kind, request_digest, body, signatures, prev_hash, hash, "
        "a.id, p.side, p.amount FROM entries e LEFT JOIN postings p ON p.seq = e.seq "
        "LEFT JOIN accounts a ON a.acct = p.acct WHERE e.seq > ? ORDER BY e.seq, p.leg",
        (after,),
    )
    for _, group in groupby(found, key=itemgetter(0)):
        legs = list(group)
        seq, time_ms, epoch, kind, digest, body, signatures, prev_hash, own_hash = legs[0][:9]
        postings = tuple(Posting(leg[9], Side(leg[10]), leg[11]) for leg in legs if leg[9] is not None)
        yield Entry(seq, time_ms, epoch, Kind(kind), digest, body, signatures, postings, prev_hash, own_hash)


def check_books(connection: sqlite3.Connection) -> None:
    """Checks everything that must hold.

    The chain of hashes; each entry's digest is that of its body; debits equal credits; every
    balance is the sum of its postings and never was negative; channels hold what they say; the
    running sums are the sums; nothing exceeds the supply (by the tables).

    Args:
        connection: To the ledger's database.

    Raises:
        InvariantBroken: Something does not hold; the text says what.
    """
    identity = rows.read_identity(connection)
    if genesis.ledger_id(identity.genesis) != identity.ledger_id:
        raise InvariantBroken("The ledger's id is not the hash of its description.")
    balances: dict[bytes, int] = {}
    opened: dict[bytes, int] = {}
    closed: dict[bytes, tuple[int, int]] = {}
    last = Head(0, 0, NO_HASH, 0)
    for entry in entries(connection):
        wrong = journal.broken(entry, last)
        if wrong:
            raise InvariantBroken(wrong)
        signed = sha256(preimage(tag(_NAMES[entry.kind]), identity.ledger_id, entry.body)).digest()
        if signed != entry.request_digest:
            raise InvariantBroken(f"Entry {entry.seq}: its body is not what was signed.")
        if entry.kind is Kind.OPEN_CHANNEL:
            opened[entry.request_digest] = entry.seq
        elif entry.kind is Kind.CLOSE_CHANNEL:
            close = ChannelClose.decode(entry.body)
            closed[close.channel] = (entry.seq, int(close.capture))
        for leg in entry.postings:
            normal = Side.DEBIT if books.is_asset(leg.account) else Side.CREDIT
            change = leg.amount if leg.side is normal else -leg.amount
            balances[leg.account] = balances.get(leg.account, 0) + change
            if balances[leg.account] < 0:
                raise InvariantBroken(f"Entry {entry.seq}: it takes more than the account holds.")
        last = Head(entry.epoch, entry.seq, entry.hash, entry.time_ms)
    _check_channels(connection, identity.ledger_id, opened, closed)
    _check_sums(connection, balances, len(opened), len(closed))
    head, _ = rows.read_head(connection)
    if (head.seq, head.hash, head.time_ms) != (last.seq, last.hash, last.time_ms):
        raise InvariantBroken(f"The head is entry {head.seq}, but the journal ends with {last.seq}.")


def _check_sums(connection: sqlite3.Connection, balances: dict[bytes, int], opened: int, closed: int) -> None:
    issued = accounts = channels = locked = 0
    for owner, balance, held in connection.execute("SELECT id, balance, locked FROM accounts"):
        if balances.pop(owner, 0) != balance:
            raise InvariantBroken(f"The balance of account {owner.hex()} is not the sum of its postings.")
        locked += held
        if books.is_asset(owner):
            issued += balance
        elif books.is_channel(owner):
            channels += balance
        else:
            accounts += balance
    if balances:
        raise InvariantBroken("The journal names accounts that the books do not have.")
    if locked != channels:
        raise InvariantBroken("What accounts have locked is not what channels hold.")
    _, totals = rows.read_head(connection)
    if totals != rows.Totals(issued, accounts, channels, opened - closed, closed):
        raise InvariantBroken("The running sums are not the sums of the books.")


def _check_channels(
    connection: sqlite3.Connection,
    ledger_id: bytes,
    opened: dict[bytes, int],
    closed: dict[bytes, tuple[int, int]],
) -> None:
    count = 0
    locked: dict[bytes, int] = {}
    found = connection.execute(
        "SELECT c.id, commitment, payer, payee, k1, k2, deposit, captured, phase, balance, a.id, "
        "opened_seq, closed_seq "
        "FROM channels c JOIN accounts a USING (acct)"
    )
    for channel_id, commit, payer, payee, k1, k2, deposit, captured, phase, balance, account, *seqs in found:
        held = 0 if phase == Phase.CLOSED else deposit - captured
        if account != books.locked_in(channel_id) or balance != held:
            raise InvariantBroken(f"The account of channel {channel_id.hex()} does not hold what it says.")
        signed = sha256(preimage(tag("ChannelCommit"), ledger_id, commit)).digest()
        if signed != channel_id or not commit.startswith(payer + payee + k1 + k2):
            raise InvariantBroken(f"Channel {channel_id.hex()} is not what its T1 says.")
        close_seq, capture = closed.get(channel_id, (None, 0))
        if seqs != [opened.get(channel_id), close_seq] or captured != capture:
            raise InvariantBroken(f"Channel {channel_id.hex()} is not what the journal made of it.")
        locked[payer] = locked.get(payer, 0) + held
        count += 1
    if count != len(opened):
        raise InvariantBroken("The journal has channels that the books do not have.")
    for payer, sum_held in locked.items():
        row = connection.execute("SELECT locked FROM accounts WHERE id = ?", (books.user(payer),)).fetchone()
        if row is None or row[0] != sum_held:
            raise InvariantBroken(f"What account {payer.hex()} has locked is not what its channels hold.")
