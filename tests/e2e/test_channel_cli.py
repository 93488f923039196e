"""`btt channel` and `btt wallet transfer` against a ledger that listens."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from btt.proto.ledger.v1.ledger_pb2 import ChannelState
from btt.sdk.clock import duration_text
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient
from btt.sdk.payment.store import PayerStore, StoredChannel
from btt.sdk.signing import ChannelCommit, ChannelRefund, sign
from btt.sdk.wallet import Keystore, derive_channel_key
from btt.services.ledger import folder, server
from btt.services.ledger.books import Terms

START, HOUR, WINDOW = 1_800_000_000_000, 3_600_000, 5000
K2, BOB = (PrivateKey(n.to_bytes(32, "big")) for n in (22, 12))


class World:
    """A ledger with a clock that the test sets, and a wallet with two channels."""

    running: server.RunningLedger

    def __init__(self, wallet: Path) -> None:
        self.wallet = wallet
        self.now_ms = START
        self.channels: list[str] = []

    async def run(self, *words: str, fails: int = 0) -> Any:
        said = await self.said(*words, "--json", fails=fails)
        return json.loads(said) if not fails else None

    async def said(self, *words: str, fails: int = 0) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "btt.sdk.cli",
            *words,
            env={**os.environ, "BTT_LEDGER": str(self.running.address), "BTT_WALLET": str(self.wallet)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode == fails, err.decode()
        return (err if fails else out or err).decode()

    async def state(self, channel_id: bytes) -> ChannelState:
        async with LedgerClient.connect(self.running.address) as ledger:
            return await ledger.channel(channel_id, K2)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    wallet = tmp_path / "wallet"
    key = Keystore.create(wallet / "wallet.json", "").key()
    folder.init(
        tmp_path / "ledger",
        name="test",
        supply_to=key.address,
        amount=10_000,
        terms=Terms(min_challenge_ms=1000, min_lifetime_ms=1000),
        clock=lambda: START,
    )
    config = server.LedgerConfig(folder=tmp_path / "ledger", sweep_every=3600.0)
    made = World(wallet)
    async with server.serve(config, clock=lambda: made.now_ms) as running:
        made.running = running
        async with LedgerClient.connect(running.address) as ledger:
            for name, flags in ((1, 1), (2, 0)):
                nonce = name.to_bytes(16, "big")
                t1 = ChannelCommit(
                    payer=key.address,
                    payee=BOB.address,
                    k1=derive_channel_key(key, nonce).public,
                    k2=K2.public,
                    amount=100,
                    expires_ms=START + HOUR,
                    challenge_ms=WINDOW,
                    flags=flags,
                    fee=0,
                    nonce=nonce,
                    service_ref=bytes(32),
                )
                channel = t1.channel_id(ledger.ledger_id)
                t2 = ChannelRefund(channel=channel, not_before_ms=t1.expires_ms)
                await ledger.open_channel(t1, key, sign(K2, t2, ledger.ledger_id))
                made.channels.append(channel.hex())
        yield made


async def test_the_life_of_channels(world: World) -> None:
    first, second = world.channels
    sent = await world.run("wallet", "transfer", str(BOB.address), "50 base units", "--yes")
    assert (sent["amount"], sent["to"]) == ("50", str(BOB.address))
    listed = await world.run("channel", "list")
    assert [(one["channel"], one["phase"]) for one in listed] == [(first, "open"), (second, "open")]
    assert (await world.run("channel", "topup", first[:12], "30 base units", "--yes"))["deposit"] == "130"
    assert (await world.run("channel", "show", first))["early_close"] is True
    shown = (await world.said("channel", "show", first)).splitlines()
    assert f"challenge    {duration_text(WINDOW)}" in shown
    assert "deadline     -" in shown
    await world.run("channel", "close", second, fails=1)  # its lock time has not come
    closing = await world.run("channel", "close", first)
    assert (closing["phase"], closing["deadline_ms"]) == ("closing", START + WINDOW)
    assert await world.run("channel", "close", first) == closing, "as after an answer that was lost"
    assert await world.run("channel", "refund") == []
    world.now_ms = START + HOUR
    due = await world.run("channel", "refund")
    assert [(one["channel"], one["phase"]) for one in due] == [(first, "closed"), (second, "closing")]
    world.now_ms += WINDOW
    assert [one["phase"] for one in await world.run("channel", "refund")] == ["closed"]
    assert await world.run("channel", "list") == []
    assert "is closed" in await world.said("channel", "close", first)
    assert len(await world.run("channel", "list", "--all")) == 2
    assert (await world.said("channel", "list", "--all")).count(" UTC, 0 BTT paid\n") == 2
    much = await world.said("wallet", "transfer", str(BOB.address), "1 BTT", "--yes", fails=5)
    assert "The account holds 0.00995 BTT, not 1 BTT." in much
    status = dict(line.split(None, 1) for line in (await world.said("ledger", "status")).splitlines())
    assert status["time"].endswith(" UTC")
    assert "min challenge     1s\n" in await world.said("ledger", "status")
    assert (await world.run("wallet", "balance"))["balance"] == "9950"


async def test_the_wallets_own_books_follow_the_commands(world: World) -> None:
    first, second = (bytes.fromhex(one) for one in world.channels)
    books = PayerStore(world.wallet)
    try:
        for channel_id in (first, second):
            state = await world.state(channel_id)
            books.add_channel(
                StoredChannel(
                    channel_id=channel_id, ledger_id=world.running.address.ledger_id, node=BOB.address,
                    commit=state.commit, refund_signature=bytes(65), deposit=100,
                    expires_ms=START + HOUR, signed=0, budget="films", base=0, cap=60, state="open",
                ),
                1000,
            )  # fmt: skip
        claim = books.claim(second)
        assert claim is not None
        assert (await world.run("channel", "topup", first.hex(), "30 base units", "--yes"))[
            "deposit"
        ] == "130"
        assert (books.get(first).deposit, books.get(first).cap) == (130, 60)
        assert await world.run("channel", "refund") == []
        [asked] = await world.run("channel", "refund", "--idle")
        assert (asked["channel"], asked["phase"]) == (first.hex(), "closing")
        assert books.get(first).state == "closing"
        world.now_ms += WINDOW
        [done] = await world.run("channel", "refund", "--all")
        assert (done["channel"], done["phase"]) == (first.hex(), "closed"), "the other one is in use"
        assert books.get(first).state == "closed"
        await world.run("channel", "refund", "--all", "--idle", fails=2)
        claim.release()
        assert (await world.run("channel", "refund", "--all")) == []  # T1 allows no early close
    finally:
        books.close()
