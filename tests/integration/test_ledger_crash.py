"""A real ledger process: killed at random moments under load, it forgets nothing it acknowledged."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient, SignedReceipt
from btt.services.ledger.journal import Kind
from btt.services.ledger.reading import Reader
from kit.ledgers import (
    BANK,
    ISSUE,
    LEDGER,
    PRICE,
    SHOP,
    Errand,
    LedgerProcess,
    btt_ledger,
    errands,
    every_receipt_is_in,
    insist,
    same,
)

PEOPLE = [PrivateKey(n.to_bytes(32, "big")) for n in range(31, 35)]
ROUNDS, KILLS, HAND_OVERS = 8, 6, 2


@pytest.fixture
def process(tmp_path: Path) -> Iterator[LedgerProcess]:
    process = LedgerProcess.make(tmp_path / "ledger", log=tmp_path / "log")
    yield process
    process.kill()


def hand_over(home: Path, dice: random.Random) -> int:
    """Hands the ledger to a new key; the command itself is killed at a random moment first."""
    command = subprocess.Popen(
        [sys.executable, *LEDGER, "rotate-key", str(home)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        command.wait(dice.uniform(0, 1))
    except subprocess.TimeoutExpired:
        command.kill()
        command.wait()
    return btt_ledger("rotate-key", str(home))["entry"]


async def test_kill_at_random_moments(process: LedgerProcess) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown when the test fails
    dice = random.Random(seed)
    address = await asyncio.to_thread(process.start)
    acknowledged: list[tuple[Errand, SignedReceipt]] = []
    rotations: list[int] = []
    progress = asyncio.Condition()
    per_round = 8
    total = per_round * ROUNDS * len(PEOPLE)

    async def customer(ledger: LedgerClient, person: PrivateKey) -> None:
        for number in range(ROUNDS):
            for errand in errands(ledger, person, number):
                acknowledged.append((errand, await insist(ledger, errand)))
                async with progress:
                    progress.notify_all()

    async def misfortune() -> None:
        for count, threshold in enumerate(sorted(dice.sample(range(1, total * 3 // 4), KILLS))):
            async with progress:
                await progress.wait_for(lambda wanted=threshold: len(acknowledged) >= wanted)
            await asyncio.to_thread(process.kill)
            if count < HAND_OVERS:
                rotations.append(await asyncio.to_thread(hand_over, process.home, dice))
            await asyncio.to_thread(process.start)

    async with LedgerClient.connect(address) as ledger:
        for person in PEOPLE:
            await ledger.transfer(BANK, person.address, 1000)
        await asyncio.gather(misfortune(), *(customer(ledger, person) for person in PEOPLE))
        for errand, receipt in acknowledged:
            assert same(await insist(ledger, errand), receipt)
        totals = await ledger.totals()
        shop = await ledger.account(SHOP)
        balances = [(await ledger.account(person)).available for person in PEOPLE]
    assert await asyncio.to_thread(process.stop) == 0

    made = ROUNDS * len(PEOPLE)
    assert (totals.issued, totals.accounts, totals.channels) == (ISSUE, ISSUE, 0)
    assert (totals.open_channels, totals.closed_channels) == (0, 2 * made)
    assert shop.available == made * PRICE
    assert balances == [1000 - ROUNDS * PRICE] * len(PEOPLE)
    with closing(Reader(process.home / "ledger.sqlite3")) as reader:
        journal = reader.entries(0, 10**6)
    every_receipt_is_in(journal, [receipt for _, receipt in acknowledged])
    kinds = Counter(entry.kind for entry in journal)
    asked = Counter(errand.kind for errand, _ in acknowledged)
    assert kinds - asked == Counter(
        {Kind.GENESIS: 1, Kind.TRANSFER: len(PEOPLE), Kind.ROTATE_KEY: kinds[Kind.ROTATE_KEY]}
    ) | Counter({Kind.EXTEND: kinds[Kind.EXTEND]})  # windows that ran when it was killed
    assert HAND_OVERS <= kinds[Kind.ROTATE_KEY] <= 2 * HAND_OVERS, "one that was killed may have happened"
    assert set(rotations) <= {entry.seq for entry in journal if entry.kind is Kind.ROTATE_KEY}
    found = process.audit()
    assert (found["entries"], found["epoch"]) == (len(journal), 1 + kinds[Kind.ROTATE_KEY])


@pytest.mark.parametrize(
    "how",
    [
        lambda popen: popen.send_signal(signal.SIGTERM),
        lambda popen: popen.send_signal(signal.SIGINT),
        lambda popen: popen.stdin.close(),
    ],
    ids=["SIGTERM", "SIGINT", "lifeline"],
)
def test_it_stops_when_told(process: LedgerProcess, how: Callable[[subprocess.Popen[str]], None]) -> None:
    process.start()
    assert process.end(how) == 0
    assert sorted(path.name for path in process.home.iterdir()) == [
        "ledger.sqlite3",
        "ledger.sqlite3.lock",
        "ledger.sqlite3.mark",
        "operator.key",
        "tls.key",
        "tls.pem",
    ]


def test_a_second_process_is_refused(process: LedgerProcess) -> None:
    address = process.start()
    second = subprocess.run(
        [sys.executable, *LEDGER, "serve", str(process.home)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert second.returncode == 3
    assert "Another process" in second.stderr
    status = btt_ledger("status", str(address))
    assert (status["issued"], status["accounts"], status["head_seq"]) == (str(ISSUE), str(ISSUE), 1)
