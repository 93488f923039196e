"""A ledger that was put back to an older copy, without its mark: who holds receipts finds out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.errors import BttError, LedgerEquivocated, LedgerForgot
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient
from btt.sdk.ledger.keeping import RECEIPTS, EvidenceStore
from btt.sdk.signing import open_document
from btt.services.ledger import backup, folder, mark
from btt.services.ledger.recovery import recover
from btt.services.ledger.server import LedgerConfig, serve

OWNER, OTHER = PrivateKey(b"\1" * 32), PrivateKey(b"\2" * 32)


class Books:
    """A ledger, its operator's backup, and a wallet's receipts."""

    def __init__(self, path: Path, keeper: EvidenceStore) -> None:
        self.folder = path / "ledger"
        self.keeper = keeper
        self._copy = path / "copy.sqlite3"
        self._now = 1_700_000_000_000
        folder.init(self.folder, name="test", supply_to=OWNER.public.address, clock=self.clock)

    def clock(self) -> int:
        self._now += 1
        return self._now

    def serve(self, port: int = 0):
        return serve(LedgerConfig(folder=self.folder, port=port, grace=0), clock=self.clock)

    def connect(self, address, *, kept: bool = True):
        return LedgerClient.connect(address, timeout=2, keeper=self.keeper if kept else None)

    def copy(self) -> None:
        backup.backup(self.folder, self._copy)

    def put_back(self) -> None:
        """What an operator does who knows no better: the mark goes, too."""
        database = self.folder / folder.DATABASE
        for end in ("-wal", "-shm"):
            database.with_name(database.name + end).unlink(missing_ok=True)
        shutil.copy(self._copy, database)
        mark.path_of(database).unlink()

    def recover(self) -> None:
        mark_of = mark.path_of(self.folder / folder.DATABASE)
        mark_of.unlink()
        (self.folder / folder.DATABASE).unlink()
        recover(self.folder, source=self._copy, finish=True)


@pytest.fixture
def books(tmp_path) -> Iterator[Books]:
    with closing(EvidenceStore(tmp_path / RECEIPTS)) as keeper:
        yield Books(tmp_path, keeper)


async def _pay(ledger: LedgerClient, amount: int = 1) -> int:
    return (await ledger.transfer(OWNER, OTHER.public.address, amount)).seq


async def test_a_ledger_below_a_receipt_that_we_hold_is_used_no_more_and_both_proofs_are_kept(books):
    async with books.serve() as running, books.connect(running.address) as ledger:
        await _pay(ledger)
        books.copy()
        last = await _pay(ledger)
    async with books.serve() as running, books.connect(running.address):
        pass  # nothing is forgotten
    books.put_back()
    async with books.serve() as running:
        with pytest.raises(
            LedgerForgot, match=f"ends with entry {last - 1} .* receipt for entry {last}"
        ) as told:
            async with books.connect(running.address):
                raise AssertionError("it was used")
        assert "btt wallet receipts --export" in str(told.value)
        [document] = books.keeper.heads(running.identity.ledger_id)
        async with books.connect(running.address, kept=False) as ledger:
            key = ledger.operator_key
            said = open_document(document, "LedgerInfo", ledger.ledger_id, key)
            assert pb.LedgerInfo.FromString(said).head_seq == last - 1
            kept = books.keeper.promised(ledger.ledger_id, ledger.operator_keys)
            kept.verify(key, ledger.ledger_id)
            assert kept.seq == last
            # Of the same length it is another history.
            await _pay(ledger, 2)
        with pytest.raises(LedgerForgot, match="not in it"):
            async with books.connect(running.address):
                pass


async def test_a_connection_that_lives_on_finds_out_before_it_pays(books):
    async with books.serve() as running:
        address = running.address
        context = books.connect(address)
        ledger = await context.__aenter__()
        books.copy()
        last = await _pay(ledger)
    try:
        books.put_back()
        with pytest.raises(BttError):
            await ledger.totals()
        async with books.serve(address.port) as running:
            with pytest.raises(LedgerForgot):
                await _pay(ledger)
            async with books.connect(address, kept=False) as other:
                assert (await other.info()).head_seq == last - 1, "nothing was asked of it"
    finally:
        await context.__aexit__(None, None, None)


async def test_a_receipt_that_contradicts_one_we_hold_is_no_receipt(books):
    async with books.serve() as running:
        async with books.connect(running.address, kept=False) as ledger:
            await _pay(ledger)
        books.copy()
        async with books.connect(running.address) as ledger:
            for _ in range(3):
                await _pay(ledger)
            kept = list(books.keeper.operations(ledger.ledger_id))
    books.put_back()
    async with books.serve() as running, books.connect(running.address, kept=False) as ledger:
        ledger._keeper = books.keeper  # as one whose ledger went back between two of its calls
        with pytest.raises(LedgerEquivocated, match="signed both"):
            await _pay(ledger)
        assert len(list(books.keeper.operations(ledger.ledger_id))) == len(kept) + 1, "both are kept"


async def test_a_number_that_comes_after_a_later_one_is_a_contradiction_too(books):
    async with books.serve() as running, books.connect(running.address, kept=False) as ledger:
        books.copy()
        await _pay(ledger)
        ledger._keeper = books.keeper
        await _pay(ledger)
    books.put_back()
    async with books.serve() as running, books.connect(running.address, kept=False) as ledger:
        ledger._keeper = books.keeper
        with pytest.raises(LedgerEquivocated, match="signed both"):
            await _pay(ledger)


async def test_what_a_recovery_went_back_behind_is_no_lie(books):
    async with books.serve() as running, books.connect(running.address) as ledger:
        books.copy()
        await _pay(ledger)
    books.recover()
    async with books.serve() as running, books.connect(running.address) as ledger:
        await _pay(ledger)
    async with books.serve() as running, books.connect(running.address):
        pass
