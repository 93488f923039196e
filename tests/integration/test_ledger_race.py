"""64 attempts at once, from several processes and of every kind that spends, spend a balance exactly once.

The test runs this file as a program: one of the owner's clients, which tries when it is told to.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from btt.sdk.errors import BttError
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerAddress, LedgerClient, SignedReceipt
from btt.sdk.signing import ChannelCommit, ChannelRefund, Receipt, sign
from btt.services.ledger.reading import Reader
from kit.chaos import Process
from kit.ledgers import BANK, HOUR, ISSUE, K1, K2, SHOP, LedgerProcess, every_receipt_is_in

OWNER = PrivateKey((41).to_bytes(32, "big"))
CLIENTS, TASKS = 4, 16
KINDS = ("transfer", "open", "top up")


def t1(amount: int, until_ms: int) -> ChannelCommit:
    return ChannelCommit(
        payer=OWNER.address,
        payee=SHOP.address,
        k1=K1.public,
        k2=K2.public,
        amount=amount,
        expires_ms=until_ms,
        challenge_ms=1000,
        flags=0,
        fee=0,
        nonce=secrets.token_bytes(16),
        service_ref=bytes(32),
    )


async def opened(ledger: LedgerClient, commit: ChannelCommit) -> SignedReceipt:
    refund = ChannelRefund(channel=commit.channel_id(ledger.ledger_id), not_before_ms=commit.expires_ms)
    return await ledger.open_channel(commit, OWNER, sign(K2, refund, ledger.ledger_id))


async def client(address: str, channel: bytes, first: int) -> None:
    async with LedgerClient.connect(LedgerAddress.parse(address)) as ledger:

        async def attempt(number: int, amount: int) -> tuple[str, str]:
            kind = KINDS[number % len(KINDS)]
            try:
                if kind == "transfer":
                    receipt = await ledger.transfer(OWNER, SHOP.address, amount)
                elif kind == "open":
                    receipt = await opened(ledger, t1(amount, ledger.now_ms() + HOUR))
                else:
                    receipt = await ledger.top_up(channel, OWNER, amount)
            except BttError as error:
                return type(error).__name__, ""
            return kind, receipt.encode().hex()

        print(json.dumps({"ready": True}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            tries = (attempt(first + task, int(line)) for task in range(TASKS))
            print(json.dumps(await asyncio.gather(*tries)), flush=True)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[LedgerProcess]:
    process = LedgerProcess.make(tmp_path / "ledger", log=tmp_path / "log")
    yield process
    process.kill()


async def test_a_balance_is_spent_exactly_once(ledger: LedgerProcess, tmp_path: Path) -> None:
    address = await asyncio.to_thread(ledger.start)
    clients: list[Process] = []
    receipts: list[Receipt] = []
    env = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    try:
        async with LedgerClient.connect(address) as bank:
            await bank.transfer(BANK, OWNER.address, 1)
            commit = t1(1, bank.now_ms() + HOUR)
            await opened(bank, commit)
            channel = commit.channel_id(bank.ledger_id)
            for number in range(CLIENTS):
                clients.append(
                    Process(
                        __file__,
                        str(address),
                        channel.hex(),
                        str(number * TASKS),
                        log=tmp_path / "log",
                        env=env,
                    )
                )
                clients[-1].start()
            answers = [client.lines() for client in clients]
            assert [await asyncio.to_thread(next, lines) for lines in answers] == [{"ready": True}] * CLIENTS
            for times, amount in ((1, 1000), (5, 200), (7, 140)):
                await bank.transfer(BANK, OWNER.address, 1000)
                spare = (await bank.account(OWNER)).available - times * amount
                assert spare < amount
                for each in clients:
                    each.tell(str(amount))
                outcomes = [one for lines in answers for one in await asyncio.to_thread(next, lines)]
                won = [Receipt.decode(bytes.fromhex(body)) for _, body in outcomes if body]
                assert len(outcomes) == CLIENTS * TASKS == 64
                assert len(won) == times
                assert {kind for kind, body in outcomes if not body} == {"InsufficientFunds"}
                account = await bank.account(OWNER)
                assert account.available == spare
                receipts += won
            shop, totals = await bank.account(SHOP), await bank.totals()
            assert shop.available + account.locked == 1 + 3000 - spare
            assert (totals.issued, totals.accounts + totals.channels) == (ISSUE, ISSUE)
            assert totals.channels == account.locked
    finally:
        for each in clients:
            each.kill()
    assert await asyncio.to_thread(ledger.stop) == 0
    with closing(Reader(ledger.home / "ledger.sqlite3")) as reader:
        every_receipt_is_in(reader.entries(0, 10**6), [SignedReceipt(receipt, b"") for receipt in receipts])
    assert ledger.audit()["ok"]


if __name__ == "__main__":
    asyncio.run(client(sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3])))
