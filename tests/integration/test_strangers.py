"""Many identities together (A9) against a whole node: what they take unpaid, and who is served still."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from btt.node import folder as node_folder
from btt.node.runtime import Node
from btt.sdk.budget import Budget
from btt.sdk.channel import PriceSheet
from btt.sdk.client import Client
from btt.sdk.identity import NodeAddress
from btt.sdk.payment.connection import connect_node
from btt.sdk.payment.store import PayerStore
from kit.payers import UNIT, RawPayer, Relay, dial, probe_node
from kit.probe import PRICES, pb, rpc

LENT = PriceSheet(bytes(32), PRICES).unit_charge
"""What a stranger is lent: the dearest message, of which a thief's has the rows alone."""
TOTAL, EACH = 5, 2  # strangers that the budgets of all networks and of each suffice for
FIRST_MS = 2 * 3_600_000


class Internet:
    """A node, and payers in front of it who come from networks 127.0.1.0/24, 127.0.2.0/24 …"""

    def __init__(self, economy, node: Node, stack: AsyncExitStack) -> None:
        self.economy, self.node, self._stack = economy, node, stack
        self._relays: list[Relay] = []
        self._channels: list[object] = []

    async def networks(self, count: int) -> None:
        for number in range(count):
            relay = await self._stack.enter_async_context(
                Relay(self.node.address.port, f"127.0.{number + 1}.9")
            )
            dialled = dial(self.node.folder.certificate, self.node.address.node, relay.port)
            self._channels.append(await self._stack.enter_async_context(dialled))
            self._relays.append(relay)

    async def payers(self, count: int, deposit: int = 100 * UNIT) -> list[RawPayer]:
        """Returns identities with funded channels, dealt out to the networks in turn."""
        offer = self.node.offers.usable()[0]
        made = [RawPayer(self.economy, offer, self._channels[n % len(self._channels)]) for n in range(count)]
        await asyncio.gather(*(payer.fund(deposit) for payer in made))
        return made

    async def newcomer(self, network: int = 0) -> int:
        """Somebody honest from there buys two messages; returns how much it was ahead at most."""
        address = f"btt://{self.node.address.node}@127.0.0.1:{self._relays[network].port}"
        client = Client.connect(
            address,
            budget=Budget("1 BTT"),
            ledger=str(self.economy.running.address),
            wallet=await self.economy.wallet(),
            clock=self.economy.clock,
        )
        async with client as btt:
            session = await btt.session(10 * UNIT)
            ahead = rows = 0
            async for message in rpc.ProbeServiceStub(session.channel).Query(
                pb.Ask(messages=2, size=1000, max_rows=2000)
            ):
                ahead, rows = max(ahead, session.payer.ahead), rows + message.rows
        assert rows == 2000
        assert btt.receipts[0].counts_agree
        assert btt.receipts[0].captured == 2 * UNIT
        return ahead


@pytest.fixture
async def internet(economy, tmp_path) -> AsyncIterator[Internet]:
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(
            probe_node(
                economy,
                tmp_path / "node",
                payments={
                    "strangers_per_hour": f"{TOTAL * LENT} base units",
                    "strangers_per_network": f"{EACH * LENT} base units",
                    "grace": "2s",
                },
                bans={"first": f"{FIRST_MS} ms", "longest": "30d"},
            )
        )
        yield Internet(economy, node, stack)


@pytest.mark.parametrize(("identities", "networks"), [(1, 1), (10, 1), (300, 1), (300, 4)])
async def test_a9_hundreds_of_identities_take_no_more_than_the_strangers_budget(
    internet, identities, networks
):
    await internet.networks(networks)
    thieves = await internet.payers(identities)
    await asyncio.gather(*(thief.grab() for thief in thieves))
    stolen = sum(thief.got for thief in thieves)
    lent = min(identities, EACH * networks, TOTAL)
    assert UNIT * lent <= stolen <= LENT * lent
    # Coming back, saying that nothing had arrived, brings no more than was lent either.
    await asyncio.gather(*(thief.grab() for thief in thieves[:20]))
    assert sum(thief.got for thief in thieves) <= LENT * lent
    if lent < identities:
        assert await internet.newcomer() <= UNIT, "served for one unit ahead, and no more"


async def test_a9_pay_and_default_under_a_hundred_fresh_keys_gets_five_percent(internet):
    await internet.networks(4)
    for pays in (25 * UNIT, 50 * UNIT):
        thieves = await internet.payers(100)
        await asyncio.gather(*(thief.grab(pays=pays) for thief in thieves))
        got, paid = sum(thief.got for thief in thieves), sum(thief.paid for thief in thieves)
        assert got > paid > 90 * pays, "they paid, and then took what they could"
        assert 100 * (got - paid) <= 5 * paid


async def test_a9_strangers_who_never_pay_cost_their_network_its_credit_and_nobody_else(internet):
    await internet.networks(2)
    thieves = (await internet.payers(12))[::2]
    await asyncio.gather(*(thief.grab(waits=True) for thief in thieves))
    stolen = sum(thief.got for thief in thieves)
    assert UNIT * EACH <= stolen <= LENT * EACH
    # Enough of the budget is back, and still a fresh key from there is lent nothing.
    fresh, elsewhere = await internet.payers(2)
    internet.economy.clock.ahead_ms += FIRST_MS - 60_000
    await asyncio.gather(fresh.grab(), elsewhere.grab())
    assert (fresh.got, elsewhere.got) == (0, UNIT)
    assert await internet.newcomer() <= UNIT
    [later] = (await internet.payers(2))[::2]
    internet.economy.clock.ahead_ms += 120_000
    await later.grab()
    assert later.got == UNIT, "a ban ends"


# What a restart forgets


LENT_FOR_ONE = {
    "strangers_per_hour": f"{LENT} base units",
    "strangers_per_network": f"{LENT} base units",
}


async def _newcomers(economy, node: Node, count: int = 1) -> list[RawPayer]:
    """Opens sessions of fresh keys, one after another; they stay open."""
    offer, address = node.offers.usable()[0], node.address
    made = []
    for _ in range(count):
        async with dial(node.folder.certificate, address.node, address.port) as channel:
            payer = await RawPayer(economy, offer, channel).fund(10 * UNIT)
            await payer.open()
            made.append(payer)
    return made


async def test_a9_a_node_that_is_started_again_lends_strangers_no_more(economy, tmp_path):
    def life() -> Node:
        return probe_node(economy, tmp_path / "node", payments=LENT_FOR_ONE, bans={})

    async with life() as node:
        async with dial(node.folder.certificate, node.address.node, node.address.port) as channel:
            thief = await RawPayer(economy, node.offers.usable()[0], channel).fund(10 * UNIT)
            await thief.grab()
        assert thief.got == UNIT
    for _ in range(2):
        async with life() as node:
            [fresh] = await _newcomers(economy, node)
            assert fresh.credit < LENT, "what was taken stays lent"
    economy.clock.ahead_ms += 3_600_000
    async with life() as node:
        [later] = await _newcomers(economy, node)
    assert later.credit == LENT, "the hour refills it, also while no node runs"
    async with life() as node:
        [next_one] = await _newcomers(economy, node)
    assert next_one.credit == LENT, "what nobody took came back when the node stopped"
    economy.clock.ahead_ms -= 7_200_000  # a clock that is set back neither lends more nor stops the refill
    async with life() as node:
        [fresh] = await _newcomers(economy, node)
        assert fresh.credit == LENT
        [fresh] = await _newcomers(economy, node)
        assert fresh.credit < LENT
        economy.clock.ahead_ms += 3_600_000
        [later] = await _newcomers(economy, node)
        assert later.credit == LENT


@asynccontextmanager
async def _process(folder) -> AsyncIterator[NodeAddress]:
    """A real node, which ends by kill -9."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "btt.sdk.cli", "node", "start", str(folder), "--stdin-lifeline",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield NodeAddress.parse(json.loads(await process.stdout.readline())["address"])
    finally:
        process.kill()
        await process.wait()


async def test_a9_nor_does_one_that_died_by_kill_9(economy, tmp_path):
    folder = node_folder.init(
        tmp_path / "node",
        config={
            "node": {"listen": "127.0.0.1:0"},
            "ledger": {"address": str(economy.running.address)},
            "payments": {"min_challenge": "1s", "min_lifetime": "10s", "close_margin": "1s"}
            | dict.fromkeys(LENT_FOR_ONE, "1000 base units"),  # one piece costs 977
            "services": {"content": {"enabled": True}},
        },
    )
    lent = []
    store = PayerStore(tmp_path / "wallet")
    try:
        for _ in range(2):
            async with _process(folder.path) as address:
                met = await connect_node(
                    address, ledger_id=economy.ledger.ledger_id, store=store, clock=economy.clock
                )
                async with dial(folder.certificate, address.node, address.port) as channel:
                    payer = await RawPayer(economy, met.offer, channel).fund(10 * UNIT)
                    await payer.open()
                    lent.append(payer.credit)
    finally:
        store.close()
    assert lent[0] > 0
    assert lent[1] == 0
