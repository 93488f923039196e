"""What a payer may owe, over real sessions: newcomers, strangers' budget, prepayment, budgets."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest

from btt.node.payments.network import network_of
from btt.sdk.channel import BanPolicy
from btt.sdk.errors import BudgetExceeded, PaymentRequired
from btt.sdk.money import BTT
from btt.sdk.payment.calls import CALL_KEY, PROOF_KEY, TOKEN_KEY
from btt.sdk.payment.store import PayerStore
from btt.sdk.rpc import to_error
from kit.economy import RUN, content
from kit.probe import BYTES, PRICES, Probe, pb, rpc

ONLY_BYTES = {BYTES: PRICES[BYTES]}
UNIT = PRICES[BYTES].rate.owed(RUN)


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("ipv4:192.0.2.7:4000", "192.0.2.0/24"),
        ("ipv4:192.0.2.250:1", "192.0.2.0/24"),
        ("ipv6:[2001:db8:1:2::1]:4000", "2001:db8:1::/48"),
        ("ipv6:%5B2001:db8:1:3::1%5D:4000", "2001:db8:1::/48"),
        ("ipv6:[::ffff:192.0.2.9]:1", "192.0.2.0/24"),
        ("unix:/tmp/x", "unix"),
    ],
)
def test_networks_are_24_and_48(peer, network):
    assert network_of(peer) == network


async def test_without_a_strangers_budget_newcomers_prepay_and_are_still_served(economy, tmp_path):
    data = content(4 * RUN + 5)
    node, infohash = await economy.content_node({"a": data}, strangers_units=0)
    async with economy.client(node, await economy.wallet()) as btt:
        quote = await btt.content.quote(infohash["a"])
        ahead = 0
        async with btt.content.fetch(quote, tmp_path) as transfer:
            async for _ in transfer.progress(0.01):
                payer = btt.providers[0].live.payer if btt.providers[0].live else None
                ahead = max(ahead, payer.ahead if payer else 0)
    assert (tmp_path / "a").read_bytes() == data
    assert ahead <= UNIT, "never more than one verify unit ahead"
    assert btt.receipts[0].counts_agree
    assert btt.receipts[0].captured == quote.cost


async def _take_and_default(economy, node, wallet):
    """Takes whatever a node sends without paying; returns the bytes taken."""
    async with economy.client(node, wallet) as btt:
        session = await btt.session(50 * UNIT)
        session._due = lambda: None  # this payer signs nothing
        raw = session._node.channel(label="default")
        metadata = ((TOKEN_KEY, session.token), (CALL_KEY, bytes(16)), (PROOF_KEY, session.proof(bytes(16))))
        taken = 0
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            async for message in rpc.ProbeServiceStub(raw).Many(
                pb.Ask(messages=20, size=RUN), metadata=metadata
            ):
                taken += len(message.data)
        assert isinstance(to_error(failure.value), PaymentRequired)
        await raw.close()
        await session.abandon()
        btt.providers[0].live = None
        return taken


async def test_fresh_identities_together_take_no_more_than_the_strangers_budget(economy):
    node = await economy.node(
        lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r),
        ONLY_BYTES,
        strangers_units=3,
        grace_s=0.05,
    )
    taken = [await _take_and_default(economy, node, await economy.wallet()) for _ in range(6)]
    assert taken == [RUN] * 3 + [0] * 3
    economy.clock.ahead_ms += 3600_000
    assert await _take_and_default(economy, node, await economy.wallet()) == RUN


async def test_a_defaulter_gets_no_second_unit_by_reopening_or_by_another_channel(economy):
    node = await economy.node(
        lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r),
        ONLY_BYTES,
        grace_s=0.05,
        bans=BanPolicy(after=100),  # its credit alone stops it
    )
    wallet = await economy.wallet()
    assert await _take_and_default(economy, node, wallet) == RUN
    # Reopening states that nothing was accepted: the unit is written off, and used up its credit.
    assert await _take_and_default(economy, node, wallet) == 0
    store = PayerStore(wallet.folder)
    for channel in store.channels():
        store.set_state(channel.channel_id, "closed")
    store.close()
    assert await _take_and_default(economy, node, wallet) == 0


async def test_credit_grows_with_what_was_paid_up_to_the_limit(economy):
    node = await economy.node(
        lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), ONLY_BYTES, limit_units=2
    )
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(200 * UNIT)
        stub = rpc.ProbeServiceStub(session.channel)
        assert session._credit == UNIT
        async for _ in stub.Many(pb.Ask(messages=100, size=RUN)):
            pass
        await session.settle()
        [live] = node.sessions.all()
        assert live.payee.standing.credit == 2 * UNIT
        assert live.payee.standing.earned > 2 * UNIT


async def test_a_message_above_the_credit_is_prepaid_and_never_waits_for_ever(economy):
    node = await economy.node(
        lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), ONLY_BYTES, strangers_units=0
    )
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(50 * UNIT)
        stub = rpc.ProbeServiceStub(session.channel)
        got = [len(m.data) async for m in stub.Many(pb.Ask(messages=3, size=RUN))]
        assert got == [RUN] * 3
        assert len((await stub.One(pb.Ask(size=RUN))).data) == RUN
    assert btt.receipts[0].captured == PRICES[BYTES].rate.owed(4 * RUN)


async def test_twenty_calls_at_once_share_one_credit_and_all_finish(economy):
    node = await economy.node(lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), ONLY_BYTES)
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(200 * UNIT)
        stub = rpc.ProbeServiceStub(session.channel)
        worst = 0

        async def run():
            nonlocal worst
            async for _ in stub.Many(pb.Ask(messages=3, size=RUN // 2)):
                [live] = node.sessions.all()
                standing = live.payee.standing
                worst = max(worst, standing.unpaid - standing.credit)

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(run())
        assert worst <= 0
    assert btt.receipts[0].counts_agree


async def test_a_budget_ends_a_fetch_that_resumes_with_another(economy, tmp_path):
    data = content(6 * RUN)
    node, infohash = await economy.content_node({"a": data})
    wallet = await economy.wallet()
    with pytest.raises(BudgetExceeded):
        async with (
            economy.client(node, wallet, budget=f"{3 * UNIT} base units") as btt,
            btt.content.fetch(infohash["a"], tmp_path) as transfer,
        ):
            async for _ in transfer.progress():
                pass
    assert not (tmp_path / "a").exists()
    async with economy.client(node, wallet) as again:
        async with again.content.fetch(infohash["a"], tmp_path) as transfer:
            async for _ in transfer.progress():
                pass
        assert transfer.receipt.fetched_bytes < len(data)
    assert (tmp_path / "a").read_bytes() == data
    paid = (await economy.ledger.account(node.payee_key)).available
    assert paid <= 3 * UNIT + transfer.receipt.spent
    assert paid >= PRICES[BYTES].rate.owed(len(data)) - 1


async def test_a_named_budget_is_spent_once_over_all_clients(economy, tmp_path):
    from btt.sdk.budget import Budget
    from btt.sdk.client import Client

    data = content(4 * RUN)
    node, infohash = await economy.content_node({"a": data})
    wallet = await economy.wallet()

    async def fetch(where):
        client = Client.connect(
            str(node.address),
            budget=Budget(f"{5 * UNIT} base units", name="films"),
            ledger=str(economy.running.address),
            wallet=wallet,
            clock=economy.clock,
        )
        async with client as btt, btt.content.fetch(infohash["a"], where) as transfer:
            async for _ in transfer.progress():
                pass

    await fetch(tmp_path / "one")
    with pytest.raises(BudgetExceeded):
        await fetch(tmp_path / "two")
    assert (await economy.ledger.account(node.payee_key)).available <= 5 * UNIT


async def test_two_users_of_one_wallet_open_channels_of_their_own(economy):
    node = await economy.node(lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), ONLY_BYTES)
    wallet = await economy.wallet(BTT)
    async with economy.client(node, wallet) as one, economy.client(node, wallet) as two:
        first, second = await one.session(5 * UNIT), await two.session(5 * UNIT)
        assert first.payer.channel_id != second.payer.channel_id
        for session in (first, second):
            await rpc.ProbeServiceStub(session.channel).One(pb.Ask(size=RUN))
        assert first.error is None
        assert second.error is None
    assert one.receipts[0].captured == two.receipts[0].captured == UNIT
