"""A real ledger process on a disk that is full, slow or lying: nothing acknowledged is lost.

Every error is typed and says whether to try again; what was refused happened not at all or once.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import pytest

from btt.sdk.errors import BttError, LedgerUnreachable, StorageError
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient, SignedReceipt
from btt.sdk.ledger import connection as connection_module
from btt.services.ledger.journal import Entry
from btt.services.ledger.reading import Reader
from btt.services.ledger.sequencer import IN_PLACE_S
from kit.faults import FULL_DISKS, Disk, SmallDisk, small_disk
from kit.ledgers import BANK, ISSUE, PRICE, SHOP, Errand, LedgerProcess, errands, every_receipt_is_in, same

ALICE = PrivateKey((31).to_bytes(32, "big"))
DATABASE = "ledger.sqlite3"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk" / "ledger"


@pytest.fixture(autouse=True)
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client tries again by itself; here each answer counts."""
    monkeypatch.setattr(connection_module, "TRIES", 1)


@asynccontextmanager
async def serving(process: LedgerProcess) -> AsyncIterator[LedgerClient]:
    try:
        address = await asyncio.to_thread(process.start)
        async with LedgerClient.connect(address) as ledger:
            yield ledger
    finally:
        process.kill()


def journal(home: Path) -> list[Entry]:
    with closing(Reader(home / DATABASE)) as reader:
        return reader.entries(0, 10**6)


async def all_done(ledger: LedgerClient, rounds: list[list[Errand]], known: dict[int, SignedReceipt]) -> None:
    """Asks for everything again: what had an answer gets it again, the rest happens now."""
    for errand in (errand for round_ in rounds for errand in round_):
        receipt = await errand.ask(ledger)
        assert id(errand) not in known or same(receipt, known[id(errand)])
        known[id(errand)] = receipt
    shop, totals = await ledger.account(SHOP), await ledger.totals()
    assert shop.available == PRICE * len(rounds)
    assert (totals.issued, totals.accounts, totals.open_channels) == (ISSUE, ISSUE, 0)


@contextmanager
def disk_of(kind: str, home: Path) -> Iterator[Disk | SmallDisk]:
    if kind == "tmpfs":
        with small_disk(home.parent, 8) as small:
            yield small
    else:
        with Disk(home.parent, home.parent.with_name("control")) as quota:
            yield quota


@pytest.mark.parametrize("kind", FULL_DISKS)
async def test_a_full_disk(home: Path, kind: str) -> None:
    with disk_of(kind, home) as disk:
        process = LedgerProcess.make(home, log=home.parent.with_name("log"))
        process.env = disk.env
        rounds: list[list[Errand]] = []
        known: dict[int, SignedReceipt] = {}
        failed: list[BttError] = []

        async def try_all(ledger: LedgerClient, wanted: list[Errand]) -> None:
            for errand in wanted:
                try:
                    known[id(errand)] = await errand.ask(ledger)
                except BttError as error:
                    failed.append(error)
                    return

        async with serving(process) as ledger:
            await ledger.transfer(BANK, ALICE.address, 10_000)
            disk.fill()
            # The log was given some room while it was not full; that is used up first.
            while not failed:
                rounds.append(errands(ledger, ALICE, len(rounds)))
                await try_all(ledger, rounds[-1])
            acknowledged = len(known)
            assert all(isinstance(error, StorageError) and error.retryable for error in failed)
            assert (await ledger.account(ALICE)).address == ALICE.address.data, "it can still be read"
            every_receipt_is_in(journal(home), list(known.values()))
        # It was killed; on a full disk it starts or says why not. With room again it goes on.
        try:
            async with serving(process) as ledger:
                await try_all(ledger, rounds[0])
        except AssertionError:
            assert "error: The ledger's database failed" in home.parent.with_name("log").read_text()
        disk.free()
        async with serving(process) as ledger:
            await all_done(ledger, rounds, known)
        assert len(known) > acknowledged
        every_receipt_is_in(journal(home), list(known.values()))
        assert process.audit()["ok"]


async def test_room_on_a_full_disk_is_used_without_a_restart(home: Path) -> None:
    with disk_of("quota", home) as disk:
        process = LedgerProcess.make(home, log=home.parent.with_name("log"))
        process.env = disk.env
        async with serving(process) as ledger:
            await ledger.transfer(BANK, ALICE.address, 10_000)
            disk.fill()
            known: dict[int, SignedReceipt] = {}
            rounds: list[list[Errand]] = []
            with pytest.raises(StorageError):
                while True:
                    rounds.append(errands(ledger, ALICE, len(rounds)))
                    for errand in rounds[-1]:
                        known[id(errand)] = await errand.ask(ledger)
            disk.free()
            await all_done(ledger, rounds, known)
            await asyncio.to_thread(process.stop)
        every_receipt_is_in(journal(home), list(known.values()))
        assert process.audit()["ok"]


async def test_a_failed_sync_stops_the_ledger_for_good(home: Path) -> None:
    process = LedgerProcess.make(home, log=home.parent.with_name("log"))
    with Disk(home / f"{DATABASE}-wal", home.parent / "control") as disk:
        process.env = disk.env
        known: dict[int, SignedReceipt] = {}
        async with serving(process) as ledger:
            await ledger.transfer(BANK, ALICE.address, 10_000)
            rounds = [errands(ledger, ALICE, 0)]
            wanted = rounds[0][0]
            disk.fail_syncs(1)
            with pytest.raises(StorageError) as failed:
                await wanted.ask(ledger)
            assert failed.value.retryable
            # The disk says it is fine again. That is what must not be believed.
            for again in (*rounds[0], Errand(wanted.kind, lambda to: to.account(ALICE))):
                with pytest.raises(StorageError, match="has stopped") as halted:
                    await again.ask(ledger)
                assert halted.value.retryable
        assert "The ledger has stopped" in home.parent.with_name("log").read_text()
        async with serving(process) as ledger:
            await all_done(ledger, rounds, known)
        every_receipt_is_in(journal(home), list(known.values()))
    assert process.audit()["ok"]


async def test_no_answer_before_the_disk_has_it(home: Path) -> None:
    process = LedgerProcess.make(home, log=home.parent.with_name("log"))
    with Disk(home / f"{DATABASE}-wal", home.parent / "control") as disk:
        process.env = disk.env
        known: dict[int, SignedReceipt] = {}
        async with serving(process) as ledger:
            await ledger.transfer(BANK, ALICE.address, 10_000)
            rounds = [errands(ledger, ALICE, 0)]
            for number, errand in enumerate(rounds[0]):
                before = (await ledger.totals()).head_seq
                disk.hold()
                waiting = asyncio.create_task(errand.ask(ledger))
                await asyncio.to_thread(disk.held)
                # The disk is asked, and has not said yes: nobody is told, and nobody sees it.
                asked = time.perf_counter()
                while time.perf_counter() - asked < 2 * IN_PLACE_S:
                    assert journal(home)[-1].seq == before
                # It had been quick, so the first commit may hold up everybody. Now it is known to be slow.
                if number:
                    assert (await ledger.totals()).head_seq == before
                assert not waiting.done()
                disk.go()
                known[id(errand)] = await waiting
                assert (await ledger.totals()).head_seq == before + 1
            await all_done(ledger, rounds, known)


async def test_killed_before_the_disk_has_it_and_the_log_torn(home: Path) -> None:
    """As a power cut may leave it: of what was not synced yet, any part is on the disk."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    process = LedgerProcess.make(home, log=home.parent.with_name("log"))
    log = home / f"{DATABASE}-wal"
    known: dict[int, SignedReceipt] = {}
    rounds: list[list[Errand]] = []
    with Disk(log, home.parent / "control") as disk:
        process.env = disk.env
        for number in range(8):
            async with serving(process) as ledger:
                if not rounds:
                    await ledger.transfer(BANK, ALICE.address, 10_000)
                    rounds.append(errands(ledger, ALICE, 0))
                every_receipt_is_in(journal(home), list(known.values()))
                synced = log.stat().st_size
                disk.hold()
                waiting = asyncio.create_task(rounds[0][number].ask(ledger))
                await asyncio.to_thread(disk.held)
                process.kill()
                with pytest.raises(LedgerUnreachable):
                    await waiting
            with log.open("r+b") as file:
                file.truncate(dice.randint(synced, log.stat().st_size))
            async with serving(process) as ledger:
                known[id(rounds[0][number])] = await rounds[0][number].ask(ledger)
        process.env = {}
        async with serving(process) as ledger:
            await all_done(ledger, rounds, known)
            assert await asyncio.to_thread(process.stop) == 0
    every_receipt_is_in(journal(home), list(known.values()))
    assert process.audit()["ok"]
