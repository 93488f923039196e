"""A crash at each step of a top-up; then everything starts again from disk, and it happens once.

The test runs this file as a program, as `test_payment_crash_steps` does: a ledger, a node and a client
that stop dead at one step. The budget reaches for the whole fetch exactly, so that a top-up that was
forgotten, or made twice, leaves too little.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from btt.node.payments.deposits import Deposits
from btt.node.payments.sessions import CreditPolicy
from btt.node.payments.store import PayeeStore
from btt.sdk.budget import Budget
from btt.sdk.client import Client, Wallet
from btt.sdk.content.feed import LINE
from btt.sdk.identity import tls_name
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient
from btt.sdk.payment import pending
from btt.sdk.payment.capacity import Capacity
from btt.sdk.tls import make_certificate
from btt.services.content.catalogue import Catalogue
from btt.services.content.publish import publish
from btt.services.content.service import ContentServicer, register
from btt.services.ledger import folder as ledger_folder
from btt.services.ledger.books import Terms
from btt.services.ledger.server import LedgerConfig, serve
from kit.economy import CONTENT_PRICE, RUN, Clock, TestNode, content
from kit.steps import CRASHED, Step, stop_at

DATA = content(4 * RUN)
OWED = CONTENT_PRICE[LINE].rate.owed
COST, UNIT = OWED(len(DATA)), OWED(RUN)
FUNDS = 10**7
ACCOUNT, FAUCET, IDENTITY, K2 = (PrivateKey(n.to_bytes(32, "big")) for n in (51, 52, 53, 54))
STEPS = {
    "a: before it is reserved": Step(pending, "begin", 1),
    "b: reserved, the ledger not asked": Step(LedgerClient, "top_up", 1),
    "c: locked, the answer not noted": Step(LedgerClient, "top_up", 1, after=True),
    "d: noted, the node not told": Step(Capacity, "_tell", 1),
    "e: told, the ledger not asked": Step(Deposits, "check", 1),
    "f: asked, not noted by the node": Step(PayeeStore, "raise_deposit", 1),
    "g: noted, the client not told": Step(PayeeStore, "raise_deposit", 1, after=True),
    "h: everybody knows": Step(Capacity, "_tell", 1, after=True),
}


async def economy(folder: Path) -> dict[str, Any]:
    state = json.loads((folder / "state").read_text())
    clock = Clock()
    async with AsyncExitStack() as stack:
        ledger = await stack.enter_async_context(
            serve(LedgerConfig(folder=folder / "ledger", port=state["ledger"]))
        )
        books = await stack.enter_async_context(LedgerClient.connect(ledger.address))
        if not state["ledger"]:
            await books.transfer(FAUCET, ACCOUNT.address, FUNDS)
        catalogue = Catalogue(folder / "catalogue")
        stack.callback(catalogue.close)
        service = ContentServicer(catalogue)
        stack.callback(service.close)
        node = TestNode(
            folder=folder / "node", clock=clock, ledger_id=books.ledger_id, ledger=books,
            prices=CONTENT_PRICE, policy=CreditPolicy(UNIT, 64 * UNIT, 1000 * UNIT, 1000 * UNIT),
            port=state["node"], identity=IDENTITY, payee_key=K2,
            tls=(state["key"].encode(), state["certificate"].encode()),
            serial=time.time_ns() // 1_000_000,
        )  # fmt: skip
        await node.start(lambda r: register(service, r))
        stack.push_async_callback(node.stop)
        state |= {"ledger": ledger.address.port, "node": node.port}
        (folder / "state").write_text(json.dumps(state))
        async with Client.connect(
            str(node.address), budget=Budget(f"{COST} base units", name="films"),
            ledger=str(ledger.address), wallet=Wallet(folder / "wallet", ACCOUNT), clock=clock,
        ) as btt:  # fmt: skip
            session = await btt.session(UNIT)
            async with btt.content.fetch(bytes.fromhex(state["infohash"]), folder / "out"):
                pass
            channel = await books.channel(session.payer.channel_id, ACCOUNT)
        totals = await books.totals()
        return {
            "agree": [receipt.counts_agree for receipt in btt.receipts],
            "deposit": channel.deposit,
            "channels": (totals.open_channels, totals.closed_channels),
            "earned": (await books.account(K2)).available,
            "left": (await books.account(ACCOUNT)).available,
        }


@pytest.fixture
def world(tmp_path: Path) -> Path:
    terms = Terms(min_challenge_ms=1000, min_lifetime_ms=10_000)
    ledger_folder.init(
        tmp_path / "ledger", name="crash", supply_to=FAUCET.address, amount=10**12, terms=terms
    )
    (tmp_path / "film.bin").write_bytes(DATA)
    (tmp_path / "wallet").mkdir()
    catalogue = Catalogue(tmp_path / "catalogue")
    infohash = publish(tmp_path / "film.bin", catalogue).infohash
    catalogue.close()
    key, certificate = make_certificate(tls_name(IDENTITY.address))
    state = {"ledger": 0, "node": 0, "infohash": infohash.hex(), "key": key.decode(),
             "certificate": certificate.decode()}  # fmt: skip
    (tmp_path / "state").write_text(json.dumps(state))
    return tmp_path


def run(folder: Path, step: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run(
        [sys.executable, __file__, str(folder), step], env=environment, capture_output=True, text=True
    )


def rows(folder: Path, query: str) -> list[tuple]:
    db = sqlite3.connect(folder / "wallet" / "payer.db")
    try:
        return db.execute(query).fetchall()
    finally:
        db.close()


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_at_any_step_of_a_top_up_makes_it_happen_once(world: Path, step: str) -> None:
    crashed = run(world, step)
    assert crashed.returncode == CRASHED, f"it did not come to this step\n{crashed.stderr[-3000:]}"
    letter = step[0]
    [(cap, deposit)] = rows(world, "SELECT cap, deposit FROM channels")
    under_way = rows(world, "SELECT amount FROM top_ups")
    # Each crash is where it should be, and what may be signed is at no step more than is locked.
    assert under_way == ([(COST - UNIT,)] if letter in "bc" else [])
    assert cap == deposit == (UNIT if letter in "abc" else COST)

    again = run(world)
    assert again.returncode == 0, again.stderr[-3000:]
    end = json.loads(again.stdout.splitlines()[-1])
    assert (world / "out" / "film.bin").read_bytes() == DATA
    assert end["agree"] == [True]
    assert end["channels"] == [0, 1], "one channel did it all"
    assert end["deposit"] == COST, "it was topped up once"
    assert end["earned"] == COST == FUNDS - end["left"]
    assert rows(world, "SELECT * FROM top_ups") == []
    assert rows(world, "SELECT deposit, signed, state FROM channels") == [(COST, COST, "closed")]


if __name__ == "__main__":
    if sys.argv[2]:
        stop_at(STEPS[sys.argv[2]])
    print(json.dumps(asyncio.run(economy(Path(sys.argv[1])))))
