"""A ledger's disk dies for good; a backup and everybody's receipts bring back what everybody had."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from btt.sdk.budget import Budget
from btt.sdk.cli import main
from btt.sdk.client import Client, Wallet
from btt.sdk.ledger import LedgerAddress, LedgerClient
from btt.sdk.wallet import Keystore
from kit.chaos import Process

pytest.importorskip("libtorrent", reason="the node's parts are not installed")

from btt.node.folder import NodeFolder

BTT = ("-m", "btt.sdk.cli")
SIZE = (1 << 20) + 4321


class World:
    """A ledger and a node as processes of their own; a bank, Alice and Bob as wallets."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = root / "log"
        self.wallets = {name: root / name for name in ("bank", "alice", "bob")}
        for folder in self.wallets.values():
            Keystore.create(folder / "wallet.json", "")
        self.home, self.node_home = root / "ledger", root / "node"
        self.btt("ledger", "init", self.home, "--name", "e2e", "--supply-to", self.key("bank").address)
        serve = (*BTT, "ledger", "serve", str(self.home), "--stdin-lifeline", "--listen")
        self.ledger = Process(*serve, "127.0.0.1:0", log=self.log)
        self.node = Process(*BTT, "node", "start", str(self.node_home), "--stdin-lifeline", log=self.log)

    def start(self) -> None:
        self.address = self.ledger.ready()
        self.ledger._command[-1] = "127.0.0.1:" + self.address.split("@127.0.0.1:")[1].partition("/")[0]
        self.btt("node", "init", self.node_home, "--ledger", self.address, "--listen", "127.0.0.1:0")
        self.node_address = self.node.ready()

    def stop(self) -> None:
        self.node.kill()
        self.ledger.kill()

    def btt(self, *words: object) -> Any:
        """A command of somebody; run in this process, for the time it takes to start one."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
            raise SystemExit(main([*map(str, words), "--json"]))
        assert ended.value.code == 0, out.getvalue()
        return json.loads(out.getvalue())

    def recover(self, *words: object) -> Any:
        process = Process(*BTT, "ledger", "recover", *map(str, words), "--json", log=self.log).start()
        found = list(process.lines())
        assert process.wait() == 0, self.log.read_text()[-3000:]
        return found[-1]

    def as_(self, name: str, *words: object) -> Any:
        return self.btt(*words, "--ledger", self.address, "--wallet", self.wallets[name])

    def key(self, name: str):
        if name == "node":
            return NodeFolder.open(self.node_home).payee_key
        return Keystore.open(self.wallets[name] / "wallet.json", "").key()

    def publish(self, name: str) -> str:
        path = self.root / name
        path.write_bytes(random.Random(name).randbytes(SIZE))
        return str(self.btt("content", "publish", path, "--node", self.node_home)["infohash"])

    def fetch(self, infohash: str, *, keep: bool = False) -> int:
        """Alice fetches and pays; returns what she signed for."""

        async def run() -> int:
            wallet = Wallet.open(self.wallets["alice"], "")
            client = Client.connect(
                self.node_address,
                ledger=self.address,
                wallet=wallet,
                budget=Budget("1 BTT"),
                keep_channels=keep,
            )
            async with client as btt, btt.content.fetch(infohash, self.root / infohash) as transfer:
                pass
            return int(transfer.receipt.spent)

        return asyncio.run(run())

    def money(self) -> dict[str, tuple[int, int]]:
        async def run() -> dict[str, tuple[int, int]]:
            async with LedgerClient.connect(LedgerAddress.parse(self.address)) as ledger:
                found = {name: await ledger.account(self.key(name)) for name in (*self.wallets, "node")}
            return {name: (state.available, state.locked) for name, state in found.items()}

        return asyncio.run(run())


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def test_everybody_ends_with_what_they_had(world: World) -> None:
    first, second, third, fourth = (world.publish(name) for name in ("one", "two", "three", "four"))
    world.as_("bank", "wallet", "transfer", world.key("alice").address, "10 BTT", "--yes")
    earned = world.fetch(first)
    backup = world.root / "backup"
    world.btt("ledger", "backup", world.home, backup)

    # What the backup has not: a channel that was opened and closed, a transfer, a channel with money in it.
    earned += world.fetch(second)
    world.as_("alice", "wallet", "transfer", world.key("bob").address, "3 BTT", "--yes")
    unclosed = world.fetch(third, keep=True)
    before = world.money()
    assert before["node"] == (earned, 0)
    assert before["bob"] == (3_000_000, 0)
    assert before["alice"][1] > 0

    # Bob did nothing himself; he asks for what proves that he was paid.
    [paid] = world.as_("bob", "wallet", "receipts", "--update")
    assert "transfer of 3 BTT" in paid["what"]

    world.ledger.kill()
    for path in world.home.glob("ledger.sqlite3*"):
        if path.suffix != ".mark":
            path.unlink()
    files = [world.root / "alice-receipts", world.root / "node-receipts"]
    world.as_("alice", "wallet", "receipts", "--export", files[0])  # the ledger is not needed
    world.btt("node", "receipts", world.node_home, "--export", files[1])  # while the node runs
    verified = world.btt("ledger", "verify-receipts", *files, "--ledger", world.address)
    assert len(verified["acknowledged"]) > len(verified["unacknowledged"]) == 3
    assert verified["equivocations"] == []

    waiting = world.recover(world.home, "--from", backup, files[0])
    assert (waiting["finished"], waiting["missing"], waiting["refused"]) == (False, [], [])
    done = world.recover(world.home, files[1], "--finish")
    assert (done["finished"], done["missing"], done["refused"]) == (True, [], [])
    assert (done["restored"], done["repeated"], done["updates"]) == (waiting["restored"], 0, 1)
    assert world.btt("ledger", "audit", world.home)["ok"] is True

    assert world.ledger.ready() == world.address
    assert world.money() == before
    # What the node alone could prove of the open channel, the ledger now keeps for it.
    [left] = world.as_("alice", "channel", "list")
    assert (int(left["best"]), int(left["deposit"])) == (unclosed, before["alice"][1])
    # The node, which ran all the time, has seen nothing but an absence: it serves on in that channel.
    earned += unclosed + world.fetch(fourth)
    after = world.money()
    assert after["node"] == (earned, 0)
    assert sum(after["alice"]) == 10_000_000 - 3_000_000 - earned
    status = world.btt("ledger", "status", world.address)
    assert (status["epoch"], status["open_channels"]) == (2, 0)
    # Receipts of the new epoch join the old ones, and all of them are proven by the two keys.
    world.as_("alice", "wallet", "receipts", "--export", world.root / "later")
    later = world.btt("ledger", "verify-receipts", world.root / "later", "--ledger", world.address)
    assert len(later["acknowledged"]) > done["restored"]
    assert later["undone"] == later["equivocations"] == []
