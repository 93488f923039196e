"""Brings a ledger back from an older copy and from what the holders of its receipts show.

The newest books are lost. An older copy is sound, and has forgotten; but every operation since was
signed by somebody, who keeps it with the ledger's receipt. A recovery collects these files until
the operator ends it. Until then nothing is served, so no money leaves any account: which account a
missing entry had emptied, nobody can know. The end is one deterministic replay of copy and
evidence, each operation at its own time and under the rules as always:

* As long as the next entry was shown and comes out with the very hash that was acknowledged, the
  old history is restored as it was, and its receipts stand.
* At the first entry that nobody showed, the old epoch ends. A RECOVER entry, signed by the old and
  by a fresh operator key, says where, and how far the lost history had come.
* What was shown beyond is carried out again, in the order in which it was acknowledged. What the
  books cannot bear without the missing entries is refused, and reported.

Everything is in the folder `recovery` and can be broken off anywhere; `docs/decisions/0009` says why.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.disk import sync
from btt.sdk.errors import (
    ConfigError,
    EvidenceInvalid,
    InvalidRequest,
    LedgerEquivocated,
)
from btt.sdk.keys import Address, PublicKey
from btt.sdk.ledger import evidence as files
from btt.sdk.ledger.evidence import Evidence
from btt.sdk.ledger.keeping import EvidenceStore
from btt.services.ledger import mark, rows
from btt.services.ledger.backup import backup
from btt.services.ledger.export import database_of
from btt.services.ledger.folder import RECOVERED, LedgerFolder
from btt.services.ledger.journal import Head
from btt.services.ledger.reading import connect, storage
from btt.services.ledger.rebuild import Rebuilding, Report, undone
from btt.services.ledger.store import RECOVERY, is_newest, take_lock

_BASE: Final = "base.sqlite3"
_POOL: Final = "evidence.db"
_BUILT: Final = "built.sqlite3"
_REPLACED: Final = "replaced.sqlite3"
_EXTEND: Final = int(pb.ENTRY_KIND_EXTEND)
_ASIDE: Final = ("-wal", "-shm", "")
"""Ends of a database's files, the database last: a log that is left behind is replayed over the next one."""


def recover(
    path: Path, *, source: Path | None = None, evidence: Sequence[Path] = (), finish: bool = False
) -> Report | None:
    """Begins, goes on with, or ends a recovery; the same call again does no harm.

    Args:
        path: The ledger's folder, with its keys.
        source: The older copy: a backup, a database, or the folder of one. Needed once, unless the
            older copy lies in the ledger's folder.
        evidence: Files that holders exported; one with anything wrong in it is refused as a whole.
        finish: Make the result the ledger's books. Whoever comes later with evidence comes too late.

    Returns:
        What it comes to; None when this recovery had been finished before.

    Raises:
        ConfigError: There is nothing to recover, no older copy, or it is another ledger's.
        EvidenceInvalid: A file holds something forged, foreign or damaged.
        LedgerEquivocated: Two receipts, or a receipt and the copy, contradict each other.
        InvariantBroken: The copy's books do not add up.
        StorageError: The disk failed; the same call again goes on.
    """
    folder = LedgerFolder.open(path)
    place = path / RECOVERY
    lock = take_lock(folder.database)
    try:
        with storage():
            if is_newest(folder.database):
                _finished_before(folder)
                return None
            _begin(folder, source)
            with (
                closing(connect(place / _BASE, read_only=True)) as base,
                closing(EvidenceStore(place / _POOL)) as pool,
            ):
                gate = _Gate(folder, base, pool)
                for file in evidence:
                    gate.admit(file)
                _remove(place / _BUILT)
                shutil.copy(place / _BASE, place / _BUILT)
                report = Rebuilding(folder, base, pool).run(place / _BUILT)
            if finish:
                _install(folder, report)
            else:
                _remove(place / _BUILT)
        return report
    finally:
        os.close(lock)


def _finished_before(folder: LedgerFolder) -> None:
    """Ends what the end of a recovery left undone; there is nothing else to recover."""
    if not (folder.path / RECOVERY).exists():
        raise ConfigError(
            "The ledger's newest database is in its place; there is nothing to recover.",
            hint=f"Run it: btt ledger serve {folder.path}",
        )
    with closing(connect(folder.database, read_only=True)) as books:
        epoch, operator_key, _ = rows.read_epochs(books)[-1]
    _put_away(folder, epoch, operator_key)


def _begin(folder: LedgerFolder, source: Path | None) -> None:
    place, base = folder.path / RECOVERY, folder.path / RECOVERY / _BASE
    if not base.exists():
        if source is None and not folder.database.is_file():
            raise ConfigError("A recovery begins with an older copy of the books.", hint="Name it: --from.")
        place.mkdir(mode=0o700, exist_ok=True)
        try:
            backup(source or folder.database, base)
        except BaseException:
            with suppress(OSError):  # it holds more than was made here
                place.rmdir()
            raise
    elif source is not None and _head(database_of(source)) != _head(base):
        raise ConfigError(
            f"The recovery in {place} began with another copy.",
            hint="Leave out --from to go on with it, or remove that folder to begin anew.",
        )


def _head(database: Path) -> Head:
    with closing(connect(database, read_only=True)) as connection:
        return rows.read_head(connection)[0]


class _Gate:
    """Lets evidence into a recovery's pool, file by file."""

    def __init__(self, folder: LedgerFolder, base: sqlite3.Connection, pool: EvidenceStore) -> None:
        self._base = base
        self._pool = pool
        self._identity = rows.read_identity(base)
        self._head, _ = rows.read_head(base)
        epochs = rows.read_epochs(base)
        folder.key_of(epochs[-1][1])
        self._recovered = frozenset(folder.recovered_epochs())
        self._began = [(epoch, first_seq) for epoch, _, first_seq in epochs]
        # A key that the copy does not know yet was handed the ledger in what is lost.
        self._keys: dict[Address, tuple[PublicKey, int | None]] = {
            key.public.address: (key.public, None) for key in folder.operator_keys()
        }
        for epoch, data, _ in epochs:
            key = PublicKey(data)
            self._keys[key.address] = (key, epoch)

    def admit(self, file: Path) -> None:
        """Takes over what a file adds, all of it or nothing."""
        ledger_id = self._identity.ledger_id
        try:
            _, found = files.load(file, ledger_id)
            self._pool.keep(pb.EvidenceHeader(ledger_id=ledger_id), self._new(found))
        except (EvidenceInvalid, LedgerEquivocated) as error:
            raise type(error)(f"{file}: {error.message}") from error

    def _new(self, found: Iterator[Evidence]) -> Iterator[Evidence]:
        for one in found:
            one.check_request(self._identity.ledger_id)
            if one.receipt is None:
                yield one
            elif not self._is_held(one):
                if (rival := self._pool.rival(self._identity.ledger_id, one)) is not None:
                    raise LedgerEquivocated(f"The ledger signed both of these: {one}; {rival}.")
                yield one

    def _is_held(self, one: Evidence) -> bool:
        """Checks a receipt; says whether its entry is in the copy already."""
        assert one.receipt is not None
        said = one.receipt.receipt
        key, epoch = self._keys.get(said.operator_key_id, (None, None))
        if key is None:
            raise EvidenceInvalid(f"The receipt of entry {said.seq} is not of this ledger's operator.")
        try:
            one.receipt.verify(key, self._identity.ledger_id)
        except InvalidRequest as error:
            raise EvidenceInvalid(f"The receipt of entry {said.seq} is forged: {error.message}") from error
        # A recovery from an older copy than the last one's may have given a key another epoch.
        if epoch is not None and said.epoch > epoch and said.epoch not in self._recovered:
            raise EvidenceInvalid(
                f"The receipt of entry {said.seq} is of epoch {said.epoch}, which did not begin with its key."
            )
        if one.kind == _EXTEND and one.signer.address not in self._keys:
            raise EvidenceInvalid(f"Entry {said.seq} extends a window without the operator's signature.")
        if said.seq > self._head.seq or undone(said, self._began):
            return False
        held = self._base.execute("SELECT hash FROM entries WHERE seq = ?", (said.seq,)).fetchone()
        if held[0] != said.entry_hash and said.epoch > self._head.epoch:
            raise ConfigError(
                f"This copy is no backup any more: epoch {said.epoch} began before its entry {said.seq}.",
                hint="Begin with a copy that was made since then, or with an older one.",
            )
        if held[0] != said.entry_hash:
            raise LedgerEquivocated(f"The copy tells another history than this receipt: {one}.")
        return True


def _install(folder: LedgerFolder, report: Report) -> None:
    """Makes the built books the ledger's; broken off anywhere, the next call ends it."""
    place, database = folder.path / RECOVERY, folder.database
    assert report.head is not None
    sync(place / _BUILT)
    for end in _ASIDE:
        old, kept = database.with_name(database.name + end), place / (_REPLACED + end)
        if kept.exists():  # the lost books' own; what stands in its place came after a call that broke off
            old.unlink(missing_ok=True)
        elif old.exists():
            old.rename(kept)
    sync(folder.path)
    (place / _BUILT).rename(database)
    sync(folder.path)
    # From here on neither the copy nor the lost books can be started in this folder.
    writer = mark.MarkWriter(mark.path_of(database))
    writer.note(report.head)
    writer.close()
    _put_away(folder, report.epoch, folder.following_key().public.data)
    report.finished = True


def _put_away(folder: LedgerFolder, epoch: int, operator_key: bytes) -> None:
    """Keeps what a finished recovery was made of, and takes the new key."""
    (folder.path / RECOVERY).rename(folder.path / f"{RECOVERED}{epoch}")
    sync(folder.path)
    folder.settled(operator_key)


def _remove(database: Path) -> None:
    for end in (*_ASIDE, ".mark", ".lock"):
        database.with_name(database.name + end).unlink(missing_ok=True)
