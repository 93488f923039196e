"""A wallet leaves a node alone that lies or keeps refusing (A11, A12, P7's mirror)."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest

from btt.sdk.channel import Meter
from btt.sdk.content import feed as feeds
from btt.sdk.content.run import serialise
from btt.sdk.errors import (
    BttError,
    ContentMismatch,
    CountsDiffer,
    LedgerError,
    NodeBanned,
    PaymentRequired,
    RateLimited,
    SessionEnded,
)
from btt.sdk.payment.faults import NODE_BANS
from btt.sdk.payment.store import PayerStore
from btt.sdk.rpc import abort
from btt.sdk.signing import ChannelClose
from btt.services.content.service import ContentServicer
from kit import economy as kit
from kit.economy import RUN, content
from kit.probe import BYTES, PRICES, Probe, pb, rpc

UNIT = PRICES[BYTES].rate.owed(RUN)
DATA = content(3 * RUN)


async def fetch(btt, infohash, folder):
    async with btt.content.fetch(infohash, folder) as transfer:
        pass
    return transfer.receipt


class Moody(ContentServicer):
    """Serves content, unless it is told otherwise."""

    mood = None

    async def Fetch(self, request, context):  # noqa: N802
        answers = self.mood(request, context) if self.mood else super().Fetch(request, context)
        async for message in answers:
            yield message


@pytest.fixture
async def seller(economy, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(kit, "ContentServicer", Moody)
        node, infohash = await economy.content_node({"film": DATA})
    node.infohash = infohash["film"]
    return node


@pytest.fixture
def dials(monkeypatch):
    """Counts how often a client looks for the node."""
    from btt.sdk import provider

    seen, real = [], provider.connect_node

    async def connect(address, **options):
        seen.append(address)
        return await real(address, **options)

    monkeypatch.setattr(provider, "connect_node", connect)
    return seen


async def _lie(request, context):
    yield serialise(request.first_run, bytes(RUN))


async def test_a11_a_node_that_sent_wrong_bytes_is_not_dialled_until_the_ban_is_over(
    seller, economy, tmp_path, dials
):
    wallet = await economy.wallet()
    seller.servicer.mood = _lie
    async with economy.client(seller, wallet) as btt:
        with pytest.raises(ContentMismatch):
            await fetch(btt, seller.infohash, tmp_path)
        with pytest.raises(NodeBanned):  # by the same client
            await fetch(btt, seller.infohash, tmp_path)
    seller.servicer.mood = None
    [receipt] = btt.receipts
    assert receipt.captured == 0
    dials.clear()
    async with economy.client(seller, wallet) as btt:  # and by the next one on this wallet
        with pytest.raises(NodeBanned, match="does not verify") as left:
            await fetch(btt, seller.infohash, tmp_path)
    assert left.value.until_ms > economy.clock()
    assert dials == []
    async with economy.client(seller, await economy.wallet()) as btt:
        await fetch(btt, seller.infohash, tmp_path / "another wallet")
    economy.clock.ahead_ms += 600_000
    async with economy.client(seller, wallet) as btt:
        await fetch(btt, seller.infohash, tmp_path)
    assert (tmp_path / "film").read_bytes() == DATA


async def test_a_channel_to_a_banned_node_is_still_closed(seller, economy):
    async with economy.client(seller, await economy.wallet()) as btt:
        session = await btt.session(UNIT)
        btt.providers[0].blame(CountsDiffer("It lied."))
        session.fail(SessionEnded("The line broke."))
        receipt = await btt.close_session()
        assert receipt.channel_closed
        with pytest.raises(NodeBanned):
            await btt.session(UNIT)


async def test_a_node_can_be_forgiven_by_hand(seller, economy):
    wallet = await economy.wallet()
    store = PayerStore(wallet.folder)
    node = seller.identity.public.address
    store.strike(node, "it lied", now_ms=economy.clock(), policy=NODE_BANS, weight=3)
    store.close()
    async with economy.client(seller, wallet) as btt:
        with pytest.raises(NodeBanned, match="btt wallet forgive"):
            await btt.node()
        words = ["wallet", "forgive", str(node), "--wallet", str(wallet.folder), "--json"]
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-m", "btt.sdk.cli", *words], capture_output=True, check=True
        )
        assert json.loads(done.stdout) == {"node": str(node), "forgiven": True}
        await btt.node()


async def test_p7_a_node_that_keeps_refusing_is_left_alone_after_three_tries_in_vain(
    seller, economy, tmp_path, monkeypatch
):
    asked, slept = [], []

    async def refuse(request, context):
        asked.append(request)
        await abort(context, RateLimited("Too many.", retry_after=7))
        yield

    async def sleep(seconds):
        slept.append(seconds)

    wallet = await economy.wallet()
    seller.servicer.mood = refuse
    monkeypatch.setattr(feeds.asyncio, "sleep", sleep)
    monkeypatch.setattr(feeds, "TRIES", 3)
    for _ in range(3):
        async with economy.client(seller, wallet) as btt:
            with pytest.raises(RateLimited):
                await fetch(btt, seller.infohash, tmp_path)
    waited = [seconds for seconds in slept if seconds > 1]
    assert len(waited) == 6
    assert min(waited) > 7, "it waits as long as it is asked to"
    assert len(set(waited)) == 6, "and never as long as the others"
    seen = len(asked)
    async with economy.client(seller, wallet) as btt:
        with pytest.raises(NodeBanned, match="keeps refusing"):
            await fetch(btt, seller.infohash, tmp_path)
    assert len(asked) == seen


async def test_p7_a_node_that_is_away_or_a_ledger_that_refuses_is_not_held_against_the_node(
    seller, economy, tmp_path, monkeypatch
):
    wallet = await economy.wallet(0)
    monkeypatch.setattr(feeds, "TRIES", 2)
    for _ in range(4):
        async with economy.client(seller, wallet) as btt:
            with pytest.raises(BttError):
                await fetch(btt, seller.infohash, tmp_path)
    await seller.server.stop(0)
    for _ in range(4):
        async with economy.client(seller, wallet) as btt:
            with pytest.raises(BttError) as failure:
                await fetch(btt, seller.infohash, tmp_path)
            assert not isinstance(failure.value, NodeBanned)


async def _probe_node(economy, **options):
    return await economy.node(
        lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), {BYTES: PRICES[BYTES]}, **options
    )


async def test_a11_a_node_that_takes_a_prepayment_and_sends_nothing_gets_one_unit(economy, monkeypatch):
    node = await _probe_node(economy, strangers_units=0, grace_s=1.5)
    monkeypatch.setattr(Meter, "fits", lambda *_: False)
    monkeypatch.setattr(Meter, "demand", lambda self, *_: self.paid + UNIT)  # again and again
    async with economy.client(node, await economy.wallet(), keep_channels=True) as btt:
        session = await btt.session(50 * UNIT)
        with pytest.raises(PaymentRequired):
            async for _ in rpc.ProbeServiceStub(session.channel).Many(pb.Ask(messages=9, size=RUN)):
                pass
        assert 0 < session.payer.signed <= UNIT


async def test_a12_a_node_that_states_more_than_it_delivered_ends_the_session_and_is_left_alone(
    economy, monkeypatch
):
    node, wallet = await _probe_node(economy), await economy.wallet()
    real = Meter.owed.fget
    async with economy.client(node, wallet) as btt:
        session = await btt.session(50 * UNIT)
        stub = rpc.ProbeServiceStub(session.channel)
        await stub.One(pb.Ask(size=RUN))
        with monkeypatch.context() as patch:
            patch.setattr(Meter, "owed", property(lambda self: real(self) + 40 * UNIT))
            with pytest.raises(CountsDiffer):
                for _ in range(50):
                    await stub.One(pb.Ask(size=RUN))
        signed = session.payer.signed
        assert signed <= session.payer.tally.owed, "only what was accepted is signed"
        with pytest.raises(NodeBanned, match="claims more than it delivered"):
            await btt.session(UNIT)
    assert (await economy.ledger.account(node.payee_key)).available <= session.payer.tally.owed


async def test_a12_a_node_cannot_close_with_more_than_was_signed(economy):
    node, wallet = await _probe_node(economy), await economy.wallet()
    async with economy.client(node, wallet, keep_channels=True) as btt:
        session = await btt.session(50 * UNIT)
        async for _ in rpc.ProbeServiceStub(session.channel).Many(pb.Ask(messages=3, size=RUN)):
            pass
    [(record, _)] = await node.store.channels()
    best = record.best
    for capture, claimed in ((best.cumulative + 1, best.cumulative), (best.cumulative + 1,) * 2):
        with pytest.raises((LedgerError, BttError)):
            await economy.ledger.close_channel(
                ChannelClose(channel=record.channel_id, capture=capture),
                node.payee_key,
                claimed,
                best.signature,
            )
    async with node.sessions.lock(record.channel_id):
        await node.closer.close(record.channel_id)
    state = await economy.ledger.channel(record.channel_id, node.payee_key)
    assert state.captured == best.cumulative == PRICES[BYTES].rate.owed(3 * RUN)


async def test_a12_a_node_that_closes_with_more_than_was_accepted_is_left_alone(economy, monkeypatch):
    node, wallet = await _probe_node(economy), await economy.wallet()
    real = Meter.owed.fget
    async with economy.client(node, wallet, keep_channels=True) as btt:
        session = await btt.session(50 * UNIT)
        await rpc.ProbeServiceStub(session.channel).One(pb.Ask(size=RUN))
        await session.settle()
        with monkeypatch.context() as patch:
            patch.setattr(Meter, "owed", property(lambda self: real(self) + 1))
            await btt.close_session()
        assert not btt.receipts[0].counts_agree or btt.receipts[0].owed > UNIT
        with pytest.raises(NodeBanned):
            await btt.session(UNIT)
