"""A ledger that tells two people two histories signs the proof of it itself."""

from __future__ import annotations

import shutil
from pathlib import Path

from btt.sdk.ledger import LedgerClient, SignedReceipt
from btt.services.ledger import folder, server
from kit.attack import ALICE, BOB, ISSUE


async def pay(home: Path, amount: int) -> tuple[SignedReceipt, LedgerClient]:
    async with (
        server.serve(server.LedgerConfig(folder=home)) as running,
        LedgerClient.connect(running.address) as ledger,
    ):
        return await ledger.transfer(ALICE, BOB.address, amount), ledger


async def test_two_receipts_of_one_number_convict_a_forked_ledger(tmp_path: Path) -> None:
    folder.init(tmp_path / "one", name="test", supply_to=ALICE.address, amount=ISSUE)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    (mine, ledger), (theirs, _) = await pay(tmp_path / "one", 1), await pay(tmp_path / "other", 2)
    for receipt in (mine, theirs):
        receipt.verify(ledger.operator_key, ledger.ledger_id)
    # An honest ledger has one entry of each number.
    assert (mine.seq, mine.receipt.epoch) == (theirs.seq, theirs.receipt.epoch)
    assert mine.receipt.entry_hash != theirs.receipt.entry_hash
    # The same payment told twice convicts nobody, though each is a receipt of its own.
    shutil.copytree(tmp_path / "one", tmp_path / "again")
    async with (
        server.serve(server.LedgerConfig(folder=tmp_path / "again")) as running,
        LedgerClient.connect(running.address) as ledger,
    ):
        entry = mine.receipt
        state = await ledger.info()
        assert (state.head_seq, state.head_hash) == (entry.seq, entry.entry_hash)
