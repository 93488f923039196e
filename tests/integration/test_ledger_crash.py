"""A real ledger process: killed at random moments under load, it forgets nothing it acknowledged."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from btt.sdk.errors import LedgerUnreachable
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerAddress, LedgerClient, SignedReceipt
from btt.sdk.signing import ChannelClose, ChannelCommit, ChannelRefund, ChannelUpdate, sign
from btt.services.ledger import check
from btt.services.ledger.books import user
from btt.services.ledger.journal import Entry, Kind
from btt.services.ledger.store import Store

BANK, SHOP, K1, K2 = (PrivateKey(n.to_bytes(32, "big")) for n in (11, 12, 21, 22))
PEOPLE = [PrivateKey(n.to_bytes(32, "big")) for n in range(31, 35)]
COMMAND = [sys.executable, "-m", "btt.sdk.cli", "ledger"]
HOUR = 3_600_000

Ask = Callable[[LedgerClient], Awaitable[SignedReceipt]]


class Process:
    """`btt ledger serve` on one folder; it keeps its port over restarts."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = 0
        self.popen: subprocess.Popen[str] | None = None
        self.address: LedgerAddress | None = None

    def start(self) -> LedgerAddress:
        self.popen = subprocess.Popen(
            [*COMMAND, "serve", str(self.home), "--listen", f"127.0.0.1:{self.port}", "--stdin-lifeline"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout is not None
        ready = json.loads(self.popen.stdout.readline())
        assert ready["ready"] is True
        self.address = LedgerAddress.parse(ready["address"])
        self.port = self.address.port
        return self.address

    def end(self, how: Callable[[subprocess.Popen[str]], None]) -> int:
        assert self.popen is not None
        how(self.popen)
        code = self.popen.wait(30)
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        if not self.popen.stdin.closed:
            self.popen.stdin.close()
        assert self.popen.stdout.read() == ""
        self.popen.stdout.close()
        self.popen = None
        return code


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    home = tmp_path / "ledger"
    made = subprocess.run(
        [
            *COMMAND,
            "init",
            str(home),
            "--name",
            "test",
            "--supply-to",
            str(BANK.address),
            "--supply",
            "1 BTT",
            "--min-challenge",
            "1",
            "--min-lifetime",
            "1",
            "--json",
        ],
        capture_output=True,
        check=True,
        text=True,
    )
    assert len(json.loads(made.stdout)["ledger_id"]) == 64
    process = Process(home)
    yield process
    if process.popen is not None:
        process.end(subprocess.Popen.kill)


def intents(ledger: LedgerClient, person: PrivateKey, number: int) -> list[Ask]:
    """A transfer, then a channel opened and closed; each can be asked any number of times."""
    until = ledger.now_ms() + HOUR
    nonce = number.to_bytes(16, "big")
    t1 = ChannelCommit(
        payer=person.address,
        payee=SHOP.address,
        k1=K1.public,
        k2=K2.public,
        amount=10,
        expires_ms=until,
        challenge_ms=1000,
        flags=0,
        fee=0,
        nonce=nonce,
        service_ref=bytes(32),
    )
    channel = t1.channel_id(ledger.ledger_id)
    t2 = sign(K2, ChannelRefund(channel=channel, not_before_ms=until), ledger.ledger_id)
    t3 = sign(K1, ChannelUpdate(channel=channel, cumulative=4), ledger.ledger_id)
    return [
        lambda to: to.transfer(person, SHOP.address, 1, nonce, valid_until_ms=until),
        lambda to: to.open_channel(t1, person, t2),
        lambda to: to.close_channel(ChannelClose(channel=channel, capture=4), K2, 4, t3),
    ]


async def insist(ledger: LedgerClient, ask: Ask) -> SignedReceipt:
    while True:
        try:
            return await ask(ledger)
        except LedgerUnreachable:
            continue


async def test_kill_at_random_moments(process: Process) -> None:
    rounds, kills = 20, 5
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # shown when the test fails
    dice = random.Random(seed)
    address = await asyncio.to_thread(process.start)
    acknowledged: list[tuple[Ask, SignedReceipt]] = []
    progress = asyncio.Condition()

    async def customer(ledger: LedgerClient, person: PrivateKey) -> None:
        for number in range(rounds):
            for ask in intents(ledger, person, number):
                acknowledged.append((ask, await insist(ledger, ask)))
                async with progress:
                    progress.notify_all()

    async def misfortune() -> None:
        total = rounds * 3 * len(PEOPLE)
        for threshold in sorted(dice.sample(range(1, total * 3 // 4), kills)):
            async with progress:
                await progress.wait_for(lambda wanted=threshold: len(acknowledged) >= wanted)
            await asyncio.to_thread(process.end, subprocess.Popen.kill)
            await asyncio.to_thread(process.start)

    async with LedgerClient.connect(address) as ledger:
        for person in PEOPLE:
            await ledger.transfer(BANK, person.address, 1000)
        await asyncio.gather(misfortune(), *(customer(ledger, person) for person in PEOPLE))
        for ask, receipt in dice.sample(acknowledged, 30):
            assert await insist(ledger, ask) == receipt
        totals = await ledger.totals()
        shop = await ledger.account(SHOP)
    assert await asyncio.to_thread(process.end, subprocess.Popen.terminate) == 0

    made = rounds * len(PEOPLE)
    assert (totals.issued, totals.accounts, totals.channels) == (1_000_000, 1_000_000, 0)
    assert (totals.open_channels, totals.closed_channels) == (0, made)
    assert shop.available == made * (1 + 4)
    with Store.open(process.home / "ledger.sqlite3") as store:  # checks chain, sums and rows
        journal = {entry.seq: entry for entry in check.entries(store._connection)}
        balances = [store.account(user(person.address.data)) for person in PEOPLE]
    assert [account.balance for account in balances if account] == [1000 - rounds * 5] * len(PEOPLE)
    _every_receipt_is_in(journal, [receipt for _, receipt in acknowledged])
    kinds = [entry.kind for entry in journal.values()]
    assert kinds.count(Kind.TRANSFER) == made + len(PEOPLE)
    assert kinds.count(Kind.OPEN_CHANNEL) == kinds.count(Kind.CLOSE_CHANNEL) == made


def _every_receipt_is_in(journal: dict[int, Entry], receipts: list[SignedReceipt]) -> None:
    assert len({receipt.seq for receipt in receipts}) == len(receipts)
    for signed in receipts:
        entry = journal[signed.seq]
        assert signed.receipt.entry_hash == entry.hash
        assert signed.receipt.request_digest == entry.request_digest


@pytest.mark.parametrize(
    "how",
    [
        lambda popen: popen.send_signal(signal.SIGTERM),
        lambda popen: popen.send_signal(signal.SIGINT),
        lambda popen: popen.stdin.close(),
    ],
    ids=["SIGTERM", "SIGINT", "lifeline"],
)
def test_it_stops_when_told(process: Process, how: Callable[[subprocess.Popen[str]], None]) -> None:
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


def test_a_second_process_is_refused(process: Process) -> None:
    address = process.start()
    second = subprocess.run(
        [*COMMAND, "serve", str(process.home)], capture_output=True, text=True, check=False, timeout=60
    )
    assert second.returncode == 3
    assert "Another process" in second.stderr
    shown = subprocess.run(
        [*COMMAND, "status", str(address), "--json"], capture_output=True, text=True, check=True, timeout=60
    )
    status = json.loads(shown.stdout)
    assert (status["issued"], status["accounts"], status["head_seq"]) == ("1000000", "1000000", 1)
