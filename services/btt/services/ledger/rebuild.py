"""The replay at the end of a recovery: an older copy of the books, and what holders show, in order."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from btt.sdk.errors import (
    BttError,
    EvidenceInvalid,
    SignatureInvalid,
    SignerMismatch,
    UpdateInvalid,
)
from btt.sdk.ledger.evidence import Evidence
from btt.sdk.ledger.keeping import EvidenceStore
from btt.sdk.signing import ChannelUpdate, LedgerRecovery, Receipt
from btt.services.ledger import mark, rows
from btt.services.ledger.books import Effect
from btt.services.ledger.folder import LedgerFolder
from btt.services.ledger.journal import Head, Kind
from btt.services.ledger.machine import Phase
from btt.services.ledger.replay import operation_of
from btt.services.ledger.store import Store
from btt.services.ledger.verify import Verifier


@dataclass(slots=True)
class Report:
    """What a recovery comes to with the evidence so far.

    Args:
        epoch: The new one.
        base_seq: Last entry of the older copy.
        ended_seq: Last entry of the history that stands as it was; the new epoch follows.
        reached_seq: How far the lost history is known to have come.
        restored: Entries restored as they were, with their numbers and hashes.
        repeated: Operations carried out again, as new entries; of a channel's updates the best alone.
        updates: Payments shown by their payees that the lost ledger was never shown.
        missing: First and last number of each run of entries that nobody showed.
        refused: Operations that the books cannot bear, and why.
        undone: Receipts that an earlier recovery went back behind.
        head: Last entry of the recovered books.
        finished: True when these are the ledger's books now.
    """

    epoch: int
    base_seq: int
    ended_seq: int
    reached_seq: int
    restored: int = 0
    repeated: int = 0
    updates: int = 0
    missing: list[tuple[int, int]] = field(default_factory=list)
    refused: list[tuple[str, BttError]] = field(default_factory=list)
    undone: int = 0
    head: Head | None = None
    finished: bool = False


def undone(said: Receipt, began: Iterable[tuple[int, int]]) -> bool:
    """Says whether a later epoch began before a receipt's entry: it was gone back behind already.

    Args:
        said: The receipt.
        began: Epochs, each with its first entry; the one before that handed the ledger over.
    """
    return any(epoch > said.epoch and first - 1 <= said.seq for epoch, first in began)


class Rebuilding:
    """Builds the recovered books from the copy and the pool; the same twice from the same.

    Args:
        folder: Of the ledger.
        base: The copy, open.
        pool: What was let in of the holders' evidence.
    """

    def __init__(self, folder: LedgerFolder, base: sqlite3.Connection, pool: EvidenceStore) -> None:
        self._folder = folder
        self._pool = pool
        self._identity = rows.read_identity(base)
        self._verifier = Verifier(self._identity.ledger_id)
        head, _ = rows.read_head(base)
        noted = mark.read(mark.path_of(folder.database))
        shown = pool.epochs(self._identity.ledger_id)
        self._first = {epoch: first for epoch, _, first in rows.read_epochs(base)}
        for epoch, (first, _) in shown.items():
            self._first[epoch] = min(first, self._first.get(epoch, first))
        seqs = [head.seq, noted.seq if noted else 0, *(last for _, last in shown.values())]
        epochs = [head.epoch, noted.epoch if noted else 0, *shown, *folder.recovered_epochs()]
        # A hand-over that the copy has forgotten takes an epoch when it is done again.
        again = folder.operator_key.public.data != rows.read_epochs(base)[-1][1]
        self._report = Report(max(*epochs, head.epoch + again) + 1, head.seq, head.seq, max(seqs))
        self._resumed = False

    def run(self, built: Path) -> Report:
        """Replays the pool.

        Args:
            built: The copy again, to be built upon; unsynced at the end.

        Raises:
            InvariantBroken: The books do not add up.
            StorageError: The disk failed.
        """
        report = self._report
        with Store.open(built, durable=False) as books:
            last = report.base_seq
            for versions in self._versions():
                if (signed := versions[0].receipt) is None:
                    continue
                said = signed.receipt
                if self._is_undone(said):
                    report.undone += 1
                    continue
                if said.seq > last + 1:
                    report.missing.append((last + 1, said.seq - 1))
                last = said.seq
                self._take(books, versions, said)
            if last < report.reached_seq:
                report.missing.append((last + 1, report.reached_seq))
            if not self._resumed:
                self._resume(books)
            self._judge_updates(books)
            report.head = books.head
        return report

    def _is_undone(self, said: Receipt) -> bool:
        return undone(said, self._first.items())

    def _versions(self) -> Iterator[list[Evidence]]:
        """Returns what was shown, with all its versions: updates without a receipt, then the entries."""

        def place(one: Evidence) -> tuple[int, int, bytes]:
            if one.receipt is None:
                return 0, 0, one.body
            said = one.receipt.receipt
            return said.seq, said.epoch, said.entry_hash

        for _, versions in groupby(self._pool.operations(self._identity.ledger_id), place):
            yield list(versions)

    def _take(self, books: Store, versions: Sequence[Evidence], said: Receipt) -> None:
        if not self._resumed:
            head = books.head
            follows = (said.seq, said.epoch) == (head.seq + 1, head.epoch)
            if follows and self._run_one(books, versions, said.time_ms, exactly=said.entry_hash) is None:
                self._report.restored += 1
                self._report.ended_seq = said.seq
                return
            self._resume(books)
        error = self._run_one(books, versions, said.time_ms)
        if error is not None and self._is_lost(books, versions[0], error):
            self._report.refused.append((str(versions[0]), error))
            return
        self._report.repeated += 1
        if versions[0].kind == Kind.OPEN_CHANNEL:
            self._show_best(books, said.request_digest)
        elif versions[0].kind != Kind.TRANSFER:
            self._show_best(books, versions[0].body[:32])

    def _show_best(self, books: Store, channel_id: bytes) -> None:
        """Carries out a channel's best update as soon as the books can take it, before they pay out.

        It was acknowledged later, or never, or nobody can tell; but it is signed, and may be shown.
        """
        channel = books.channel(channel_id)
        if channel is None or channel.phase is Phase.CLOSED:
            return
        ledger_id = self._identity.ledger_id
        best = self._pool.best_update(ledger_id, channel_id, channel.k1, most=channel.deposit)
        if best is None or ChannelUpdate.decode(best.body).cumulative <= channel.best:
            return
        if self._run(books, best, 0) is None and best.receipt is None:
            self._report.updates += 1

    def _is_lost(self, books: Store, one: Evidence, error: BttError) -> bool:
        """Says whether somebody loses by what was refused."""
        channel = books.channel(one.body[:32]) if one.kind == Kind.UPDATE else None
        if channel is None:
            return True
        if channel.closed_seq is not None and channel.closed_seq <= self._report.ended_seq:
            return False  # it came too late for the lost books, too
        # A higher one counts; or the raise is too small as yet, and the payee can still show it.
        most = channel.deposit if isinstance(error, UpdateInvalid) else channel.best
        return ChannelUpdate.decode(one.body).cumulative > most

    def _run_one(
        self, books: Store, versions: Sequence[Evidence], time_ms: int, *, exactly: bytes | None = None
    ) -> BttError | None:
        """Carries out the first version that stands; says why the true one does not, where none does."""
        errors = []
        for one in versions:
            error = self._run(books, one, time_ms, exactly=exactly)
            if error is None:
                return None
            errors.append(error)
        return min(errors, key=lambda error: isinstance(error, SignatureInvalid | SignerMismatch))

    def _judge_updates(self, books: Store) -> None:
        """Reports what does not count of the updates without a receipt."""
        for versions in self._versions():
            if versions[0].receipt is not None:
                return
            error = self._run_one(books, versions, 0)
            if error is not None and self._is_lost(books, versions[0], error):
                self._report.refused.append((str(versions[0]), error))

    def _run(
        self, books: Store, one: Evidence, time_ms: int, *, exactly: bytes | None = None
    ) -> BttError | None:
        """Carries out one operation at the time at which it was acknowledged; or leaves no trace."""
        batch = books.begin(time_ms)
        try:
            operation = operation_of(
                self._verifier, Kind(one.kind), one.body, one.signatures, channel=books.channel
            )
        except BttError as error:
            return error
        outcome = batch.run(operation)
        if isinstance(outcome, BttError):
            return outcome
        if exactly is not None and outcome.hash != exactly:
            return EvidenceInvalid("It does not come out as it was acknowledged.")
        if batch.entries:
            books.commit(batch)
        return None

    def _resume(self, books: Store) -> None:
        """Ends the old epoch and begins the new one, with a fresh key."""
        self._resumed = True
        current = self._folder.operator_key
        held = self._folder.key_of(books.operator_key)
        if held.public != current.public:
            books.rotate(current, held, clock_ms=0)
        following = self._folder.following_key()
        batch = books.begin(0)
        message = LedgerRecovery(
            epoch=self._report.epoch,
            next_key=following.public,
            ended_seq=batch.head.seq,
            ended_hash=batch.head.hash,
            reached_seq=max(batch.head.seq, self._report.reached_seq),
        )
        digest = message.digest(self._identity.ledger_id)
        batch.absorb(
            Effect(Kind.RECOVER, ()),
            digest=digest,
            body=message.encode(),
            signatures=current.public.data + current.sign(digest) + following.sign(digest),
        )
        batch.begin_epoch(message.epoch, following.public.data)
        books.commit(batch)
        for channel_id in self._pool.updated_channels(self._identity.ledger_id):
            self._show_best(books, channel_id)
