"""Any damage to the end of the write-ahead log: the books open at a whole commit, or not at all.

What a crash can tear is what was not synced, so it was not acknowledged. Damage to what was
acknowledged is told by the mark beside the database: then the ledger refuses to start.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from btt.sdk.errors import LedgerRolledBack
from btt.sdk.keys import PrivateKey
from btt.sdk.signing import Transfer, sign
from btt.services.ledger import mark as marks
from btt.services.ledger import store
from btt.services.ledger.journal import Head
from btt.services.ledger.mark import MarkWriter
from btt.services.ledger.store import Store
from btt.services.ledger.verify import Verifier

NOW = 1_800_000_000_000
OPERATOR, ALICE, BOB = (PrivateKey(n.to_bytes(32, "big")) for n in (1, 11, 12))
HEADER, FRAME = 32, 24 + 4096
COMMITS = 8


def pay(ledger: Store, name: int) -> None:
    message = Transfer(
        sender=ALICE.address,
        recipient=BOB.address,
        amount=1,
        request_id=name.to_bytes(16, "big"),
        valid_until_ms=NOW + 1000,
        memo=bytes(32),
    )
    ledger_id = ledger.identity.ledger_id
    batch = ledger.begin(NOW)
    batch.run(
        Verifier(ledger_id).transfer(
            message.encode(), signer=ALICE.public.data, signature=sign(ALICE, message, ledger_id)
        )
    )
    ledger.commit(batch)


@pytest.fixture
def crashed(tmp_path: Path) -> tuple[Path, list[tuple[Head, int]]]:
    """A ledger as a crash leaves it; its head and the length of its log after each commit."""
    path = tmp_path / "ledger.sqlite3"
    store.create(
        path, name="test", operator_key=OPERATOR, supply_to=ALICE.address, amount=100, clock=lambda: NOW
    )
    left = tmp_path / "left"
    left.mkdir()
    with Store.open(path) as ledger:
        log = path.with_name(path.name + "-wal")
        commits = []
        for name in range(COMMITS):
            pay(ledger, name)
            commits.append((ledger.head, log.stat().st_size))
        for end in ("", "-wal"):
            shutil.copy(f"{path}{end}", left / f"{path.name}{end}")
    assert len({size for _, size in commits}) == COMMITS
    return left / path.name, commits


def open_copy(damaged: Path, folder: Path, *, acknowledged: Head) -> Head | None:
    """Opens a copy beside a mark; returns its head, or None where the ledger refuses to start."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(damaged.parent, folder)
    path = folder / damaged.name
    writer = MarkWriter(marks.path_of(path))
    writer.note(acknowledged)
    writer.close()
    try:
        with Store.open(path) as ledger:
            return ledger.head
    except LedgerRolledBack:
        return None


@pytest.mark.parametrize("damage", ["cut off", "changed"])
def test_whatever_is_torn_no_acknowledged_entry_is_missing(
    crashed: tuple[Path, list[tuple[Head, int]]], tmp_path: Path, damage: str
) -> None:
    path, commits = crashed
    log = path.with_name(path.name + "-wal")
    whole = log.read_bytes()
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    ends = [size for _, size in commits]
    places = {
        *(end + change for end in ends[:-1] for change in (-1, 0, 1)),
        *dice.sample(range(ends[0], len(whole)), 12),
    }
    for place in sorted(places):
        if damage == "cut off":
            log.write_bytes(whole[:place])
            intact = place
        else:
            torn = bytearray(whole)
            torn[place] ^= 1 << dice.randrange(8)
            log.write_bytes(torn)
            intact = HEADER + (place - HEADER) // FRAME * FRAME
        survived = [head for head, end in commits if end <= intact]
        for acknowledged in {commits[0][0], *survived[-1:], commits[min(len(survived), COMMITS - 1)][0]}:
            found = open_copy(path, tmp_path / "copy", acknowledged=acknowledged)
            if survived and survived[-1].seq >= acknowledged.seq:
                assert found == survived[-1], f"{damage} at {place}: the last whole commit"
            else:
                assert found is None, f"{damage} at {place}: entry {acknowledged.seq} was promised"


def test_what_a_crash_left_in_the_log_is_durable_before_anybody_is_told(
    crashed: tuple[Path, list[tuple[Head, int]]], tmp_path: Path
) -> None:
    """Its sync may have failed: then it is in this machine's memory only, and no later sync writes it."""
    path, commits = crashed
    with Store.open(path) as ledger:
        assert ledger.head == commits[-1][0]
        # As it would be on the disk without anything that is in the log alone.
        shutil.copy(path, tmp_path / "alone.sqlite3")
    with closing(sqlite3.connect(tmp_path / "alone.sqlite3")) as alone:
        assert alone.execute("SELECT seq, hash FROM head").fetchone() == (
            commits[-1][0].seq,
            commits[-1][0].hash,
        )
