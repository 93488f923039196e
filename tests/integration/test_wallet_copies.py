"""A wallet's folder is restored from an old copy, or used in two places: nothing is paid twice.

No penalty waits for who comes back with old books: updates are cumulative, so the highest counts,
and the node shows what was signed. What the old books have forgotten to have accepted, the node
writes off within the allowance that everybody has: one unit, or 1 % of what was paid.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from btt.sdk.client import Client, Wallet
from btt.sdk.errors import SessionEnded
from kit.economy import RUN
from kit.probe import BYTES, PRICES, Probe, pb, rpc

OWED = PRICES[BYTES].rate.owed
UNIT = OWED(RUN)


@pytest.fixture
async def node(economy):
    return await economy.node(
        lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), {BYTES: PRICES[BYTES]}
    )


def copy_of(wallet: Wallet, name: str) -> Wallet:
    folder = wallet.folder.with_name(name)
    with closing(sqlite3.connect(wallet.folder / "payer.db")) as books:
        folder.mkdir()
        books.execute("VACUUM INTO ?", (str(folder / "payer.db"),))
    return Wallet(folder, wallet.account)


def signed(wallet: Wallet) -> int:
    with closing(sqlite3.connect(wallet.folder / "payer.db")) as books:
        [(most,)] = books.execute("SELECT signed FROM channels").fetchall()
    return most


async def buy(btt: Client, runs: int) -> bytes:
    """Takes and pays for some runs; returns the channel that paid."""
    session = await btt.session(100 * UNIT)
    for _ in range(runs):
        await rpc.ProbeServiceStub(session.channel).One(pb.Ask(size=RUN))
    await session.settle()
    return session.payer.channel_id


async def settled(economy, node, wallet: Wallet, channel: bytes, funds: int) -> int:
    state = await economy.ledger.channel(channel, wallet.account)
    assert (await economy.ledger.account(node.payee_key)).available == state.captured
    assert (await economy.ledger.account(wallet.account)).available == funds - state.captured
    return state.captured


@pytest.mark.parametrize("age", [0, 1, 4])
async def test_a_restored_wallet_signs_no_more_than_is_owed(economy, node, age: int) -> None:
    wallet = await economy.wallet()
    funds = (await economy.ledger.account(wallet.account)).available
    async with economy.client(node, wallet, keep_channels=True) as btt:
        for number in range(5):
            if number == age:
                await btt.session(100 * UNIT)
                old = copy_of(wallet, "old")
            channel = await buy(btt, 2)
    last = signed(wallet)
    async with economy.client(node, old) as btt:
        assert await buy(btt, 3) == channel
        assert last <= signed(old) <= OWED(13 * RUN) + UNIT
    assert btt.receipts[0].counts_agree
    captured = await settled(economy, node, wallet, channel, funds)
    assert OWED(13 * RUN) - UNIT <= captured <= OWED(13 * RUN)
    assert captured <= signed(old)


async def test_two_copies_at_once_pay_together_what_they_took(economy, node) -> None:
    wallet = await economy.wallet()
    funds = (await economy.ledger.account(wallet.account)).available
    taken = 0
    async with economy.client(node, wallet, keep_channels=True) as one:
        channel = await buy(one, 1)
        taken += 1
        twin = copy_of(wallet, "twin")
        async with economy.client(node, twin, keep_channels=True) as other:
            for _ in range(3):
                # The session of each fences that of the other: one at a time pays.
                for btt, runs in ((other, 2), (one, 1)):
                    try:
                        assert await buy(btt, runs) == channel
                    except SessionEnded:
                        assert await buy(btt, runs) == channel
                    taken += runs
            most = max(signed(wallet), signed(twin))
            assert OWED(taken * RUN) - UNIT <= most <= OWED(taken * RUN) + UNIT
    async with economy.client(node, twin) as btt:
        await btt.session(UNIT)
    assert btt.receipts[-1].counts_agree
    captured = await settled(economy, node, wallet, channel, funds)
    assert OWED(taken * RUN) - UNIT <= captured <= OWED(taken * RUN)
    assert captured <= max(signed(wallet), signed(twin))
