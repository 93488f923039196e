"""The full check of stored books, made at every start: the journal alone must explain every row."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from typing import Final

from btt.sdk.errors import InvariantBroken
from btt.sdk.ledger.rotation import read_hand_over
from btt.sdk.signing import (
    ChannelClose,
    ChannelCommit,
    ChannelExtension,
    ChannelUpdate,
    TopUp,
)
from btt.sdk.signing.layout import preimage, tag
from btt.services.ledger import books, genesis, journal, rows, schema
from btt.services.ledger.journal import NO_HASH, Entry, Head, Kind, Posting, Side
from btt.services.ledger.machine import Phase

_NAMES: Final = {
    Kind.GENESIS: genesis.DOCUMENT,
    Kind.TRANSFER: "Transfer",
    Kind.OPEN_CHANNEL: "ChannelCommit",
    Kind.CLOSE_CHANNEL: "ChannelClose",
    Kind.TOP_UP: "TopUp",
    Kind.UPDATE: "ChannelUpdate",
    Kind.REQUEST_CLOSE: "CloseRequest",
    Kind.FINALIZE: "ChannelFinalize",
    Kind.EXTEND: "ChannelExtension",
    Kind.ROTATE_KEY: "KeyRotation",
    Kind.RECOVER: "LedgerRecovery",
}


@dataclass(slots=True)
class _Told:
    """What the journal says about a channel."""

    opened_seq: int
    deposit: int
    best: int = 0
    phase: Phase = Phase.OPEN
    deadline_ms: int = 0
    captured: int = 0
    closed_seq: int | None = None
    asked_ms: int = field(default=0, compare=False)

    def hear(self, entry: Entry) -> None:
        if entry.kind is Kind.TOP_UP:
            self.deposit += TopUp.decode(entry.body).amount
        elif entry.kind is Kind.UPDATE:
            self.best = int(ChannelUpdate.decode(entry.body).cumulative)
        elif entry.kind is Kind.REQUEST_CLOSE:
            self.phase = Phase.CLOSING
            self.asked_ms = entry.time_ms  # the deadline follows where T1 is at hand
        elif entry.kind is Kind.EXTEND:
            self.phase, self.asked_ms = Phase.CLOSING, 0
            self.deadline_ms = int(ChannelExtension.decode(entry.body).deadline_ms)
        else:
            if entry.kind is Kind.CLOSE_CHANNEL:
                shown = int.from_bytes(entry.signatures[98:106], "big")
                self.best = max(self.best, shown)
                self.captured = int(ChannelClose.decode(entry.body).capture)
            else:
                self.captured = self.best
            self.phase, self.deadline_ms, self.closed_seq = Phase.CLOSED, 0, entry.seq


def entries(connection: sqlite3.Connection, *, after: int = 0, upto: int = 2**63 - 1) -> Iterator[Entry]:
    """Reads the journal in order.

    Args:
        connection: To the ledger's database.
        after: Number of the entry before the first one wanted.
        upto: Number of the last one wanted.
    """
    found = connection.execute(
        "SELECT e.seq, time_ms, epoch, kind, request_digest, body, signatures, prev_hash, hash, "
        "a.id, p.side, p.amount FROM entries e LEFT JOIN postings p ON p.seq = e.seq "
        "LEFT JOIN accounts a ON a.acct = p.acct WHERE e.seq > ? AND e.seq <= ? ORDER BY e.seq, p.leg",
        (after, upto),
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
    channels: dict[bytes, _Told] = {}
    epochs = [(1, genesis.operator_key(identity.genesis), 1)]
    last = Head(1, 0, NO_HASH, 0)
    of_channels = 0
    for entry in entries(connection):
        wrong = journal.broken(entry, last)
        if wrong:
            raise InvariantBroken(wrong)
        signed = sha256(preimage(tag(_NAMES[entry.kind]), identity.ledger_id, entry.body)).digest()
        if signed != entry.request_digest:
            raise InvariantBroken(f"Entry {entry.seq}: its body is not what was signed.")
        if entry.epoch != epochs[-1][0]:
            raise InvariantBroken(f"Entry {entry.seq}: its epoch did not begin.")
        if entry.kind is Kind.OPEN_CHANNEL:
            commit = ChannelCommit.decode(entry.body)
            channels[entry.request_digest] = _Told(entry.seq, int(commit.amount))
            of_channels += 1
        elif entry.kind in (Kind.ROTATE_KEY, Kind.RECOVER):
            rotation = read_hand_over(entry.body)
            epochs.append((rotation.epoch, rotation.next_key.data, entry.seq + 1))
        elif entry.kind not in (Kind.GENESIS, Kind.TRANSFER):
            if (told := channels.get(entry.body[:32])) is None or told.phase is Phase.CLOSED:
                raise InvariantBroken(f"Entry {entry.seq}: its channel is not open.")
            told.hear(entry)
            of_channels += 1
        for leg in entry.postings:
            balances[leg.account] = balances.get(leg.account, 0) + books.change_of(leg)
            if balances[leg.account] < 0:
                raise InvariantBroken(f"Entry {entry.seq}: it takes more than the account holds.")
        last = Head(entry.epoch, entry.seq, entry.hash, entry.time_ms)
    if epochs != rows.read_epochs(connection):
        raise InvariantBroken("The operator keys are not those that the journal names.")
    _check_channels(connection, identity.ledger_id, channels)
    _check_concerns(connection, of_channels)
    closed = sum(told.phase is Phase.CLOSED for told in channels.values())
    _check_sums(connection, balances, len(channels), closed)
    head, _ = rows.read_head(connection)
    if (head.epoch, head.seq, head.hash, head.time_ms) != (epochs[-1][0], last.seq, last.hash, last.time_ms):
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


def _check_concerns(connection: sqlite3.Connection, of_channels: int) -> None:
    (count,) = connection.execute("SELECT count(*) FROM concerns").fetchone()
    missing = connection.execute(
        f"SELECT 1 FROM ({schema.CONCERNS}) AS wanted WHERE NOT EXISTS (SELECT 1 FROM concerns c "  # noqa: S608 (ours)
        "WHERE c.party = wanted.party AND c.seq = wanted.seq) LIMIT 1"
    ).fetchone()
    if missing or count != 3 * of_channels:
        raise InvariantBroken("Whom entries concern is not what the journal says.")


def _check_channels(
    connection: sqlite3.Connection, ledger_id: bytes, journal_says: dict[bytes, _Told]
) -> None:
    count = 0
    sums: dict[bytes, tuple[int, int]] = {}
    found = connection.execute(
        "SELECT c.id, commitment, payer, payee, k1, k2, expires_ms, challenge_ms, balance, a.id, "
        "opened_seq, deposit, best, phase, deadline_ms, captured, closed_seq "
        "FROM channels c JOIN accounts a USING (acct)"
    )
    for row in found:
        channel_id, commit, payer, payee, k1, k2, expires_ms, challenge_ms, balance, account, *state = row
        is_now = _Told(*state)
        closed = is_now.phase == Phase.CLOSED
        held = 0 if closed else is_now.deposit
        if account != books.locked_in(channel_id) or balance != held:
            raise InvariantBroken(f"The account of channel {channel_id.hex()} does not hold what it says.")
        signed = sha256(preimage(tag("ChannelCommit"), ledger_id, commit)).digest()
        terms = ChannelCommit.decode(commit)
        if (
            signed != channel_id
            or not commit.startswith(payer + payee + k1 + k2)
            or (terms.expires_ms, terms.challenge_ms) != (expires_ms, challenge_ms)
        ):
            raise InvariantBroken(f"Channel {channel_id.hex()} is not what its T1 says.")
        told = journal_says.get(channel_id)
        if told is not None and told.phase is Phase.CLOSING and (asked_ms := told.asked_ms):
            told.deadline_ms = max(asked_ms, min(asked_ms + challenge_ms, expires_ms + 2 * challenge_ms))
        if is_now != told:
            raise InvariantBroken(f"Channel {channel_id.hex()} is not what the journal made of it.")
        locked, channels = sums.get(payer, (0, 0))
        sums[payer] = locked + held, channels + (not closed)
        count += 1
    if count != len(journal_says):
        raise InvariantBroken("The journal has channels that the books do not have.")
    for payer, expected in sums.items():
        found_sums = connection.execute(
            "SELECT locked, open_channels FROM accounts WHERE id = ?", (books.user(payer),)
        ).fetchone()
        if found_sums != expected:
            raise InvariantBroken(f"What account {payer.hex()} has locked is not what its channels hold.")
