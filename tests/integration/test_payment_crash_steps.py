"""A crash at each single step of paying, opening and closing; then everything starts again from disk.

The test runs this file as a program: a ledger, a node and a client that stop dead (`os._exit`) exactly
at one step, or whose disk fails there. What was signed, counted and told goes to a journal on the way,
so that it can be held against the books afterwards.
"""

from __future__ import annotations

import asyncio
import functools
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

from btt.node.payments import servicer
from btt.node.payments.sessions import CreditPolicy
from btt.node.payments.store import PayeeStore
from btt.sdk.budget import Budget
from btt.sdk.channel import Payee, Payer
from btt.sdk.client import Client, Wallet
from btt.sdk.content.feed import LINE
from btt.sdk.errors import BttError
from btt.sdk.identity import tls_name
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient
from btt.sdk.payment import store as payer_store
from btt.sdk.payment.session import PaymentSession
from btt.sdk.payment.store import PayerStore
from btt.sdk.tls import make_certificate
from btt.services.content.catalogue import Catalogue
from btt.services.content.publish import publish
from btt.services.content.service import ContentServicer, register
from btt.services.ledger import folder as ledger_folder
from btt.services.ledger.books import Terms
from btt.services.ledger.server import LedgerConfig, serve
from kit.economy import CONTENT_PRICE, RUN, Clock, TestNode, content
from kit.faults import Disk, Switch
from kit.steps import CRASHED, Step, act_at, hook, nothing, stop_at

RUNS = 12
DATA = content(RUNS * RUN)
OWED = CONTENT_PRICE[LINE].rate.owed
COST, UNIT = OWED(len(DATA)), OWED(RUN)
FUNDS = 10**7
ACCOUNT, FAUCET, IDENTITY, K2 = (PrivateKey(n.to_bytes(32, "big")) for n in (41, 42, 43, 44))

STEPS = {
    "a: before the intent is saved": Step(payer_store, "_save"),
    "b: saved, not signed": Step(Payer, "sign"),
    "c: signed, not sent": Step(Payer, "sign", after=True),
    "d: sent, no statement heard": Step(PaymentSession, "_take_statement", 1),
    "e: received, not checked": Step(Payee, "check"),
    "f: checked, not saved": Step(PayeeStore, "save"),
    "g: saved, not counted": Step(Payee, "accept"),
    "h: counted, not told": Step(servicer, "_statement", 1),
    "i: refund signed, channel not in the books": Step(PayerStore, "add_channel", 1),
    "j: in the books, the ledger not asked": Step(LedgerClient, "open_channel", 1),
    "k: open on the ledger, answer not noted": Step(LedgerClient, "open_channel", 1, after=True),
    "l: capture fixed, the ledger not asked": Step(LedgerClient, "close_channel", 1),
    "m: closed on the ledger, receipt not noted": Step(PayeeStore, "end_close", 1),
}

DISK_FAULTS = {"a full disk": Switch.fill_up, "a failed sync": Switch.fail_syncs}
BOOKS = {
    "wallet": ("wallet/payer.db", Step(Payer, "sign", after=True)),
    "node": ("node/payments.db", Step(Payee, "accept", after=True)),
}
"""Whose books the disk fails under, and when it begins to."""


# The program


def keep_journal(folder: Path) -> None:
    file = os.open(folder / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(kind: str, channel: bytes, amount: int, signature: bytes = b"") -> None:
        entry = {"kind": kind, "channel": channel.hex(), "amount": amount, "signature": signature.hex()}
        os.write(file, json.dumps(entry).encode() + b"\n")

    def signed(update, payer, *_):
        if update is not None:
            write("signed", payer.channel_id, update.cumulative, update.signature)

    def resent(update, payer, *_):
        if update is not None:
            write("resent", payer.channel_id, update.cumulative, update.signature)

    hook(Payer, "sign", nothing, signed)
    hook(Payer, "last", nothing, resent)
    hook(
        Payee,
        "accept",
        nothing,
        lambda _, payee, saved: write("counted", payee.channel_id, payee.best.cumulative),
    )
    hook(
        servicer,
        "_statement",
        nothing,
        lambda told, session: write("told", session.payee.channel_id, told.paid),
    )
    hook(PaymentSession, "_take_statement",
         lambda session, told: write("heard", session.payer.channel_id, told.paid), nothing)  # fmt: skip


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
        content_service = ContentServicer(catalogue)
        stack.callback(content_service.close)
        node = TestNode(
            folder=folder / "node", clock=clock, ledger_id=books.ledger_id, ledger=books,
            prices=CONTENT_PRICE,
            policy=CreditPolicy(UNIT, 64 * UNIT, 1000 * UNIT, 1000 * UNIT), port=state["node"],
            identity=IDENTITY, payee_key=K2, tls=(state["key"].encode(), state["certificate"].encode()),
            serial=time.time_ns() // 1_000_000,
        )  # fmt: skip
        await node.start(lambda r: register(content_service, r))
        stack.push_async_callback(node.stop)
        state |= {"ledger": ledger.address.port, "node": node.port}
        (folder / "state").write_text(json.dumps(state))
        await node.closer.sweep()  # as a node does when it starts
        async with Client.connect(
            str(node.address), budget=Budget("5 BTT"), ledger=str(ledger.address),
            wallet=Wallet(folder / "wallet", ACCOUNT), clock=clock,
        ) as btt:  # fmt: skip
            await btt.session(2 * COST)
            async with btt.content.fetch(bytes.fromhex(state["infohash"]), folder / "out") as transfer:
                pass
        totals = await books.totals()
        return {
            "fetched": transfer.receipt.fetched_bytes,
            "agree": [receipt.counts_agree for receipt in btt.receipts],
            "conserved": totals.issued == totals.accounts + totals.channels,
            "open": totals.open_channels,
            "closed": totals.closed_channels,
            "earned": (await books.account(K2)).available,
            "left": (await books.account(ACCOUNT)).available,
        }


def fail_disk(fault: str, whose: str) -> list[tuple[str, bool]]:
    """Lets the disk fail in the midst of paying, until somebody has noticed twice."""
    switch = Switch(Path(os.environ["FAULTS_CONTROL"]))
    act_at(BOOKS[whose][1], lambda: DISK_FAULTS[fault](switch))
    noticed: list[tuple[str, bool]] = []

    def watch(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        async def wrapped(*args, **options):
            try:
                return await inner(*args, **options)
            except BttError as error:
                noticed.append((type(error).__name__, error.retryable))
                if len(noticed) == 2:
                    switch.free()
                raise

        setattr(owner, name, wrapped)

    watch(PayerStore, "save")
    watch(PayeeStore, "run")
    watch(PayeeStore, "save")
    return noticed


def main(folder: Path, step: str) -> None:
    keep_journal(folder)
    noticed: list[tuple[str, bool]] = []
    if step in STEPS:
        stop_at(STEPS[step])
    elif step:
        noticed = fail_disk(*step.split(" of the "))
    print(json.dumps({**asyncio.run(economy(folder)), "noticed": noticed}))


# The tests


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


def run(folder: Path, step: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **env}
    return subprocess.run(
        [sys.executable, __file__, str(folder), step], env=environment, capture_output=True, text=True
    )


def journal(folder: Path) -> list[dict[str, Any]]:
    path = folder / "journal"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def most(entries: list[dict[str, Any]], kind: str, channel: str) -> int:
    return max((e["amount"] for e in entries if e["kind"] == kind and e["channel"] == channel), default=0)


def rows(path: Path, query: str) -> list[tuple]:
    if not path.exists():
        return []
    db = sqlite3.connect(path)
    try:
        return db.execute(query).fetchall()
    finally:
        db.close()


def wallet_books(folder: Path) -> dict[str, tuple[int, str]]:
    found = rows(folder / "wallet" / "payer.db", "SELECT channel_id, signed, state FROM channels")
    return {channel.hex(): (signed, state) for channel, signed, state in found}


def node_books(folder: Path) -> dict[str, tuple[int, str, int | None, int]]:
    found = rows(
        folder / "node" / "payments.db", "SELECT channel_id, best, state, capture, written_off FROM channels"
    )
    return {channel.hex(): (best, state, capture, off) for channel, best, state, capture, off in found}


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_at_any_step_loses_and_invents_nothing(world: Path, step: str) -> None:
    crashed = run(world, step)
    assert crashed.returncode == CRASHED, f"it did not come to this step\n{crashed.stderr[-3000:]}"
    letter = step[0]
    happened, ours, theirs = journal(world), wallet_books(world), node_books(world)
    for channel in {e["channel"] for e in happened}:
        signed, best = ours[channel][0], theirs[channel][0]
        assert most(happened, "signed", channel) <= signed, "something was signed that is not on disk"
        assert most(happened, "counted", channel) <= best, "something counts that is not on disk"
        assert most(happened, "told", channel) <= best, "the payer was told of what is not on disk"
        assert best <= signed
    if letter in "abcdefgh":
        [(channel, (signed, _))] = ours.items()
        best = theirs[channel][0]
        # Each crash is where it should be.
        if letter in "bcef":
            assert signed > best
        if letter == "g":
            assert signed == best > most(happened, "counted", channel)
        assert (most(happened, "signed", channel) < signed) == (letter == "b")
    if letter == "i":
        assert ours == {}
    if letter in "jk":
        [(_, state)] = ours.values()
        assert state == "opening"
        assert theirs == {}
    if letter in "lm":
        [(best, state, capture, _)] = theirs.values()
        assert (best, state, capture) == (COST, "closing", COST)

    again = run(world)
    assert again.returncode == 0, again.stderr[-3000:]
    end = json.loads(again.stdout.splitlines()[-1])
    assert (world / "out" / "film.bin").read_bytes() == DATA
    assert end["agree"] == [True], "the books of both sides are the same"
    assert end["conserved"]
    assert end["open"] == 0
    # One channel did it all, unless the first was closed already.
    assert end["closed"] == (2 if letter in "lm" else 1)
    final = node_books(world)
    paid = sum(capture for _, _, capture, _ in final.values())
    assert all(state == "closed" for _, state, _, _ in final.values())
    assert all(state == "closed" for _, state in wallet_books(world).values())
    assert end["earned"] == paid == FUNDS - end["left"]
    # Nothing is paid twice; the payer loses a prepaid unit at most, the node what it lent.
    assert COST - 2 * UNIT <= paid <= COST + UNIT
    if letter in "ijklm":
        assert paid == COST
    # What was sent again, or signed again, is the same to the byte.
    signatures: dict[tuple[str, int], set[str]] = {}
    for entry in journal(world):
        if entry["signature"]:
            signatures.setdefault((entry["channel"], entry["amount"]), set()).add(entry["signature"])
    assert all(len(found) == 1 for found in signatures.values())
    resent = [e for e in journal(world)[len(happened) :] if e["kind"] == "resent"]
    if letter in "abcdefgh":
        assert resent[0]["amount"] == ours[channel][0], "the session begins with what is on disk"
        assert most(journal(world), "counted", channel) >= ours[channel][0]


@pytest.mark.parametrize("fault", DISK_FAULTS)
@pytest.mark.parametrize("whose", BOOKS)
def test_a_disk_that_fails_while_paying_costs_nothing(world: Path, whose: str, fault: str) -> None:
    """Nothing is signed or counted that is not on disk; with the disk back, the same processes go on."""
    books, _ = BOOKS[whose]
    with Disk(world / books, world / "control") as disk:
        ended = run(world, f"{fault} of the {whose}", **disk.env)
    assert ended.returncode == 0, ended.stderr[-3000:]
    end = json.loads(ended.stdout.splitlines()[-1])
    assert end["noticed"]
    assert all(noticed == ["StorageError", True] for noticed in end["noticed"])
    happened, ours, theirs = journal(world), wallet_books(world), node_books(world)
    for channel in {e["channel"] for e in happened}:
        assert most(happened, "signed", channel) <= ours[channel][0]
        assert most(happened, "told", channel) <= theirs[channel][0] <= ours[channel][0]
    assert (world / "out" / "film.bin").read_bytes() == DATA
    assert end["agree"] == [True], "the books of both sides are the same"
    assert end["conserved"]
    assert end["open"] == 0
    assert end["earned"] == sum(capture for _, _, capture, _ in theirs.values()) == FUNDS - end["left"]
    assert COST - 2 * UNIT <= end["earned"] <= COST + UNIT


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
