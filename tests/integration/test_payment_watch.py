"""A node that looks after its channels on the ledger, while payers try to leave with what they owe."""

from __future__ import annotations

import asyncio

import pytest

from btt.proto.ledger.v1 import ledger_pb2
from btt.sdk import group_commit
from btt.sdk.channel import Segment, SignedUpdate
from btt.sdk.errors import BttError, SessionEnded
from btt.sdk.signing import ChannelClose, ChannelUpdate, sign
from kit.economy import RUN
from kit.probe import BYTES, PRICES, Probe, pb, rpc

UNIT = PRICES[BYTES].rate.owed(RUN)


@pytest.fixture
async def paid(economy):
    """A node, and a payer that has paid for three units and left its channel open."""
    node = await economy.node(
        lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), {BYTES: PRICES[BYTES]}
    )
    node.wallet = await economy.wallet()
    async with economy.client(node, node.wallet, keep_channels=True) as btt:
        session = await btt.session(100 * UNIT)
        node.channel_id = session.payer.channel_id
        async for _ in rpc.ProbeServiceStub(session.channel).Many(pb.Ask(messages=3, size=RUN)):
            pass
    node.owed = btt.receipts[0].owed
    assert node.owed == PRICES[BYTES].rate.owed(3 * RUN)
    return node


async def test_the_best_update_is_shown_to_the_ledger(paid, economy):
    assert (await economy.ledger.channel(paid.channel_id, paid.payee_key)).best == 0
    assert await paid.closer.watch() == 0
    state = await economy.ledger.channel(paid.channel_id, paid.payee_key)
    assert state.phase == ledger_pb2.CHANNEL_PHASE_OPEN
    assert state.best == paid.owed
    assert await paid.closer.watch() == 0, "the same update is not shown again"


async def test_a_payer_that_closes_early_does_not_leave_with_what_it_owes(paid, economy):
    await economy.ledger.request_close(paid.channel_id, paid.wallet.account)
    assert await paid.closer.watch() == 1
    state = await economy.ledger.channel(paid.channel_id, paid.payee_key)
    assert state.phase == ledger_pb2.CHANNEL_PHASE_CLOSED
    assert state.captured == paid.owed
    assert (await economy.ledger.account(paid.payee_key)).available == paid.owed
    assert (await paid.store.earnings()).captured == paid.owed


async def test_a_closing_channel_gets_no_session(paid, economy):
    await economy.ledger.request_close(paid.channel_id, paid.wallet.account)
    async with economy.client(paid, paid.wallet) as btt:
        try:
            session = await btt.session(UNIT)
        except BttError:
            return
        assert session.payer.channel_id != paid.channel_id


async def test_a_channel_that_the_ledger_closed_without_us_counts_what_was_paid(paid, economy):
    # Somebody else with K2, as another copy of this node would have, took less than was owed.
    record, _ = await paid.store.channel(paid.channel_id)
    await economy.ledger.close_channel(
        ChannelClose(channel=paid.channel_id, capture=UNIT),
        paid.payee_key,
        record.best.cumulative,
        record.best.signature,
    )
    assert await paid.closer.watch() == 0
    earnings = await paid.store.earnings()
    assert earnings.captured == UNIT == (await economy.ledger.account(paid.payee_key)).available
    assert (earnings.open_channels, earnings.closed_channels) == (0, 1)


@pytest.mark.parametrize("closed_by", ["the node", "the ledger"])
async def test_what_a_busy_channel_was_saving_when_it_closed_is_paid_and_no_arrears(
    economy, monkeypatch, closed_by
):
    node = await economy.node(
        lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), {BYTES: PRICES[BYTES]}
    )
    async with economy.client(node, await economy.wallet(), keep_channels=True) as btt:
        session = await btt.session(100 * UNIT)
        channel_id = session.payer.channel_id
        live = node.sessions.live(channel_id)
        call = bytes(16)
        live.begin(call)
        await live.charge(call, [(Segment(session.offer.digest, BYTES), RUN)])

        async def pay(cumulative: int) -> None:
            update = ChannelUpdate(channel=channel_id, cumulative=cumulative)
            signature = sign(session.payer._key, update, economy.ledger.ledger_id)
            await live.pay(SignedUpdate(cumulative, signature), node.store)

        async def read_and_pay(channel_id: bytes, read=node.store.channel):
            reading = asyncio.ensure_future(read(channel_id))
            await asyncio.sleep(0)
            with pytest.raises(SessionEnded):
                await pay(UNIT - 1)
            return await reading

        if closed_by == "the ledger":
            await economy.ledger.close_channel(
                ChannelClose(channel=channel_id, capture=0), node.payee_key, 0, b""
            )
        monkeypatch.setattr(group_commit, "IN_PLACE_S", 0)  # as on a slow disk
        with monkeypatch.context() as patch:
            patch.setattr(node.store, "channel", read_and_pay)
            saving = asyncio.create_task(pay(UNIT - 2))
            await asyncio.sleep(0)
            await (node.closer.watch() if closed_by == "the ledger" else node.closer.close(channel_id))
        await saving
        record, tally = await node.store.channel(channel_id)
        assert (record.best.cumulative, tally.owed) == (UNIT - 2, UNIT)
        assert record.capture == (0 if closed_by == "the ledger" else UNIT - 2)
        assert record.arrears == live.payee.standing.written_off == 2
        btt.providers[0].live = None
        await session.abandon()


async def test_a_channel_has_one_lock_while_somebody_waits_for_it(paid):
    locks, channel = paid.sessions.lock, paid.channel_id
    held = locks(channel)
    await held.acquire()
    waiting = asyncio.create_task(locks(channel).acquire())
    await asyncio.sleep(0)
    held.release()  # free for a moment, until the one that waits runs
    others = [locks(number.to_bytes(32, "big")) for number in range(5000)]
    assert locks(channel) is held
    assert await waiting
    held.release()
    del others, held, waiting
    assert len(paid.sessions._opening) == 0, "it keeps none that nobody has"
