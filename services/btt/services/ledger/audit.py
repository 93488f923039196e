"""The offline audit: a journal is believed when its signed requests alone lead to every posting.

From the genesis on, each entry's request is verified again (signatures, layout), run through the
rules (`rules`, `machine`) on the state that the entries before it left, and must give exactly the
postings and the hash that stand there. Nothing is taken from the ledger's tables. Memory holds
accounts and open channels, not entries: digests, which must never repeat, go to files and are
compared at the end, one part at a time.

What it cannot see: limits that the operator sets (caps, windows) may change and are not judged,
and requests that the ledger refused or never took are not in a journal.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from btt.sdk.errors import BttError, InvalidRequest, InvariantBroken
from btt.sdk.keys import PublicKey
from btt.sdk.ledger.rotation import read_hand_over
from btt.sdk.money import SUPPLY
from btt.sdk.signing import LedgerRecovery, document_digest, verify
from btt.services.ledger import books, genesis, journal, rows, rules
from btt.services.ledger.books import Account, Effect, Request, Terms
from btt.services.ledger.digests import Digests
from btt.services.ledger.journal import NO_HASH, Entry, EntryRef, Head, Kind
from btt.services.ledger.machine import Channel, Phase
from btt.services.ledger.proving import ProvenVerifier, Provers
from btt.services.ledger.replay import operation_of
from btt.services.ledger.verify import OpenOperation

_ANY: Final = Terms(
    min_challenge_ms=0,
    max_challenge_ms=2**32,
    min_lifetime_ms=0,
    max_lifetime_ms=2**63,
    max_locked=SUPPLY,
    max_open_channels=2**62,
)
_SHORT: Final = 4096
"""Entries that one process has verified before others would have started."""


class AuditFailed(InvariantBroken):
    """The journal does not hold.

    Trust nothing from that entry on: keep the file, and compare it with a backup and with what
    others hold of this ledger (`btt ledger verify-receipts`).

    Args:
        seq: Number of the first entry that is wrong.
        why: What is wrong with it.
    """

    hint = ""

    def __init__(self, seq: int, why: str) -> None:
        super().__init__(f"Entry {seq} is wrong: {why}")
        self.seq = seq
        self.why = why


@dataclass(frozen=True, slots=True)
class Report:
    """What a journal that holds comes to.

    Args:
        ledger_id: 32 bytes.
        entries: How many.
        head: The last one.
        epoch: In force after it; a hand-over is the last entry of the epoch that it ends.
        operator_key: That signs for the ledger now, 33 bytes.
        issued: Base units in being.
        accounts: Accounts that hold something.
        open_channels: Channels that are not closed.
        locked: Base units in them.
    """

    ledger_id: bytes
    entries: int
    head: Head
    epoch: int
    operator_key: bytes
    issued: int
    accounts: int
    open_channels: int
    locked: int


class Auditor:
    """Replays a journal. It is the `books.View` that the rules look at.

    Args:
        description: The canonical description of the ledger, whose hash is its id.

    Raises:
        ConfigError: It is no such description.
    """

    def __init__(self, description: bytes) -> None:
        self.ledger_id = genesis.ledger_id(description)
        self.operator_key = genesis.operator_key(description)
        self.head = Head(1, 0, NO_HASH, 0)
        self.balances: dict[bytes, int] = {}
        self.channels: dict[bytes, Channel] = {}
        self._locked: dict[bytes, tuple[int, int]] = {}
        self._epoch = 1
        self._operators = {self.operator_key}
        self._verifier = ProvenVerifier(self.ledger_id)

    def account(self, account: bytes) -> Account | None:
        """Returns an account as the entries so far leave it."""
        balance = self.balances.get(account)
        if balance is None:
            return None
        locked, count = self._locked.get(account, (0, 0))
        return Account(0, account, balance, locked, None, count)

    def channel(self, channel_id: bytes) -> Channel | None:
        """Returns a channel that is not closed."""
        return self.channels.get(channel_id)

    def request(self, account: bytes, request_id: bytes) -> Request | None:
        """Returns nothing: that no digest repeats is checked apart."""
        return None

    def entry(self, request_digest: bytes) -> EntryRef | None:
        """Returns nothing: that no digest repeats is checked apart."""
        return None

    def k1_of(self, channel_id: bytes) -> bytes:
        """Returns the K1 of a channel that is not closed, 33 bytes; nothing when there is none."""
        channel = self.channels.get(channel_id)
        return channel.k1 if channel else b""

    def believe(self, proven: Iterable[bytes]) -> None:
        """Takes over what was verified ahead, for the entries that come next; see `proving`."""
        self._verifier.proven = frozenset(proven)

    def take(self, entry: Entry) -> None:
        """Checks the next entry and what it does.

        Raises:
            AuditFailed: It is wrong.
        """
        wrong = journal.broken(entry, self.head)
        if wrong is not None:
            raise AuditFailed(entry.seq, wrong.partition(": ")[2])
        if entry.epoch != self._epoch:
            raise AuditFailed(entry.seq, "its epoch did not begin.")
        try:
            effect = self._effect(entry)
        except BttError as error:
            raise AuditFailed(entry.seq, error.message) from error
        if (effect.kind, effect.postings) != (entry.kind, entry.postings):
            raise AuditFailed(entry.seq, "its postings are not what its request leads to.")
        for leg in entry.postings:
            after = self.balances.get(leg.account, 0) + books.change_of(leg)
            if not 0 <= after <= SUPPLY:
                raise AuditFailed(entry.seq, "an account would hold less than nothing, or too much.")
            if after or not books.is_channel(leg.account):
                self.balances[leg.account] = after
            else:
                del self.balances[leg.account]
        if effect.channel is not None:
            self._keep(effect.channel)
        self.head = Head(entry.epoch, entry.seq, entry.hash, entry.time_ms)

    def _keep(self, channel: Channel) -> None:
        old = self.channels.get(channel.id)
        payer = books.user(channel.payer)
        locked, count = self._locked.get(payer, (0, 0))
        closed = channel.phase is Phase.CLOSED
        locked += channel.held - (old.held if old else 0)
        count += (not closed) - (old is not None)
        if count:
            self._locked[payer] = locked, count
        else:
            self._locked.pop(payer, None)
        if closed:
            self.channels.pop(channel.id, None)
        else:
            self.channels[channel.id] = channel

    def _effect(self, entry: Entry) -> Effect:
        if entry.kind is Kind.GENESIS:
            return self._issue(entry)
        if entry.kind in (Kind.ROTATE_KEY, Kind.RECOVER):
            return self._hand_over(entry)
        operation = operation_of(
            self._verifier, entry.kind, entry.body, entry.signatures, channel=self.channels.get
        )
        if operation.digest != entry.request_digest:
            raise InvalidRequest("its digest is not that of its request.")
        if entry.kind is Kind.EXTEND and operation.signer not in self._operators:
            raise InvalidRequest("its window is extended by a key that never was the operator's.")
        if operation.signatures != entry.signatures:
            raise InvalidRequest("its signatures are not in their layout.")
        terms = replace(_ANY, open_fee=operation.fee) if isinstance(operation, OpenOperation) else _ANY
        decision = rules.decide(self, operation, now_ms=entry.time_ms, seq=entry.seq, terms=terms)
        if isinstance(decision, Effect):
            return decision
        raise InvalidRequest("its request should have been refused.")

    def _issue(self, entry: Entry) -> Effect:
        if entry.seq != 1 or len(entry.body) != 28:
            raise InvalidRequest("an issue is the first entry, and only that.")
        digest = document_digest(genesis.DOCUMENT, self.ledger_id, entry.body)
        if digest != entry.request_digest or entry.signatures[:33] != self.operator_key:
            raise InvalidRequest("it is not the issue of this ledger's operator.")
        if not PublicKey(self.operator_key).verify(digest, entry.signatures[33:]):
            raise InvalidRequest("the issue is not signed by the ledger's operator.")
        _, effect = genesis.issue(entry.body[:20], int.from_bytes(entry.body[20:], "big"))
        return effect

    def _hand_over(self, entry: Entry) -> Effect:
        message = read_hand_over(entry.body)
        if isinstance(message, LedgerRecovery):
            begins = entry.kind is Kind.RECOVER and message.epoch > self._epoch
            if (message.ended_seq, message.ended_hash) != (self.head.seq, self.head.hash):
                raise InvalidRequest("it goes on from another entry.")
        else:
            begins = entry.kind is Kind.ROTATE_KEY and message.epoch == self._epoch + 1
        if not begins or message.digest(self.ledger_id) != entry.request_digest:
            raise InvalidRequest("it does not begin the next epoch.")
        if entry.signatures[:33] != self.operator_key:
            raise InvalidRequest("the ledger is handed over by a key that is not its operator's.")
        verify(PublicKey(self.operator_key), message, self.ledger_id, entry.signatures[33:98])
        verify(message.next_key, message, self.ledger_id, entry.signatures[98:])
        self._epoch, self.operator_key = message.epoch, message.next_key.data
        self._operators.add(self.operator_key)
        return Effect(entry.kind, ())

    def report(self) -> Report:
        """Returns what the journal so far comes to."""
        return Report(
            self.ledger_id,
            self.head.seq,
            self.head,
            self._epoch,
            self.operator_key,
            self.balances.get(books.GENESIS, 0),
            sum(1 for owner, held in self.balances.items() if held and owner[:1] == b"\1"),
            len(self.channels),
            sum(channel.held for channel in self.channels.values()),
        )


def audit(description: bytes, entries: Iterable[Entry], *, workers: int = 0) -> tuple[Report, Auditor]:
    """Re-verifies a whole journal.

    Args:
        description: The canonical description of the ledger.
        entries: All of them, in order.
        workers: Processes that verify signatures ahead once the journal proves long; 0 for none.
            What is found is the same.

    Raises:
        AuditFailed: An entry is wrong; the first such.
        ConfigError: The description is none.
        StorageError: There is no room for temporary files.
    """
    auditor = Auditor(description)
    with Digests() as digests:
        try:
            for entry in _ahead(auditor, _Counted(entries), workers):
                auditor.take(entry)
                digests.add(entry.request_digest, entry.seq)
        except AuditFailed as failed:
            if (repeat := digests.first_repeat()) is not None and repeat < failed.seq:
                raise _repeated(repeat) from failed
            raise
        if (repeat := digests.first_repeat()) is not None:
            raise _repeated(repeat)
    if auditor.head.seq == 0:
        raise AuditFailed(1, "there is none.")
    return auditor.report(), auditor


def compare(auditor: Auditor, connection: sqlite3.Connection) -> None:
    """Compares the tables of a database with what its journal leads to.

    Raises:
        InvariantBroken: They say something else.
    """
    head, _ = rows.read_head(connection)
    if (head.seq, head.hash) != (auditor.head.seq, auditor.head.hash):
        raise InvariantBroken(f"The head is entry {head.seq}, the journal ends with {auditor.head.seq}.")
    count = 0
    for owner, balance in connection.execute("SELECT id, balance FROM accounts"):
        count += 1
        if auditor.balances.get(owner, 0) != balance:
            raise InvariantBroken(f"The balance of account {owner.hex()} is not what the journal leads to.")
    if count < len(auditor.balances):
        raise InvariantBroken("The journal leads to accounts that the books do not have.")
    found = connection.execute("SELECT id, deposit, best, phase, deadline_ms FROM channels WHERE phase <> 3")
    stored = {row[0]: row[1:] for row in found}
    said = {c.id: (c.deposit, c.best, c.phase, c.deadline_ms) for c in auditor.channels.values()}
    if stored != said:
        raise InvariantBroken("The open channels are not those that the journal leads to.")


def _repeated(seq: int) -> AuditFailed:
    return AuditFailed(seq, "its request was carried out before.")


def _ahead(auditor: Auditor, entries: _Counted, workers: int) -> Iterator[Entry]:
    """Yields the entries; those of a long journal when their signatures have been verified."""
    yield from islice(entries, _SHORT if workers else None)
    if workers and not entries.ended:
        with Provers(auditor.ledger_id, workers, auditor.k1_of) as provers:
            for part, proven in provers.over(entries):
                auditor.believe(proven)
                yield from part
    if entries.failed is not None:
        raise entries.failed


class _Counted:
    """Entries up to one that cannot even be read, which is named after those before it were judged."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = iter(entries)
        self._seq = 0
        self.ended = False
        self.failed: AuditFailed | None = None

    def __iter__(self) -> Iterator[Entry]:
        return self

    def __next__(self) -> Entry:
        if self.ended:
            raise StopIteration
        try:
            entry = next(self._entries)
        except StopIteration:
            self.ended = True
            raise
        except (ValueError, BttError) as error:
            self.ended = True
            self.failed = AuditFailed(self._seq + 1, f"it cannot be read: {error}")
            self.failed.__cause__ = error
            raise StopIteration from None
        self._seq = entry.seq
        return entry
