"""Money always gets out: of dead clients' channels, of channels of nodes that vanished, of old ones."""

from __future__ import annotations

import asyncio
import json
import sqlite3

import pytest

from btt.node.payments.session import Session
from btt.proto.common.v1.document_pb2 import SignedDocument
from btt.proto.ledger.v1 import ledger_pb2
from btt.proto.payment.v1 import payment_pb2
from btt.sdk import provider as provider_module
from btt.sdk.errors import (
    BttError,
    CaptureDisputed,
    ChannelClosed,
    CountsDiffer,
    LedgerUnreachable,
    NodeBanned,
    SessionEnded,
    StorageError,
)
from btt.sdk.keys import PublicKey
from btt.sdk.ledger import LedgerClient
from btt.sdk.money import BTT
from btt.sdk.payment import keeper as keeper_module
from btt.sdk.payment import session as session_module
from btt.sdk.payment.outcome import look
from btt.sdk.payment.purse import Purse
from btt.sdk.payment.refunds import KEEP_MS, Wanted, ask_back
from btt.sdk.payment.store import CLOSED, PayerStore
from btt.sdk.payment.store import CLOSING as CLOSING_HERE
from btt.sdk.signing import ChannelClose, open_document
from kit.economy import RUN, content
from kit.probe import BYTES, PRICES, Probe, pb, rpc

UNIT = PRICES[BYTES].rate.owed(RUN)
OPEN, CLOSING, DONE = (
    ledger_pb2.CHANNEL_PHASE_OPEN,
    ledger_pb2.CHANNEL_PHASE_CLOSING,
    ledger_pb2.CHANNEL_PHASE_CLOSED,
)


def probe_node(economy):
    return economy.node(lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), {BYTES: PRICES[BYTES]})


@pytest.fixture
async def probe(economy):
    node = await probe_node(economy)
    node.wallet = await economy.wallet()
    return node


@pytest.fixture
async def purse(probe, economy):
    store = PayerStore(probe.wallet.folder)
    economy.stack.callback(store.close)
    return Purse(probe.wallet.account, store, economy.ledger, economy.clock)


async def buy(session, units: int) -> None:
    async for _ in rpc.ProbeServiceStub(session.channel).Many(pb.Ask(messages=units, size=RUN)):
        pass


async def die(btt) -> bytes:
    """Ends a client as a crash would: nothing is said, nothing is closed."""
    channel_id = btt.providers[0].live.payer.channel_id
    await btt.providers[0].live.abandon()
    btt.providers[0].live = None
    await btt._stop_keeping(tidy=False)
    btt._keeper = None
    return channel_id


async def dead_channel(economy, node, wallet, *, deposit: int, units: int) -> bytes:
    async with economy.client(node, wallet) as btt:
        session = await btt.session(deposit)
        await buy(session, units)
        await session.settle()
        return await die(btt)


async def ended(session) -> None:
    """Returns once a session has ended."""
    async with asyncio.timeout(20):
        while session.error is None:
            session._changed.clear()
            await session._changed.wait()


async def told(economy, wallet, channel_id: bytes, kind: int) -> None:
    """Returns once the ledger has told of an event of a channel."""
    async with asyncio.timeout(20):
        async for page in economy.ledger.watch(wallet.account, channel_id=channel_id):
            if any(event.kind == kind for event in page.events):
                return


async def phase(economy, wallet, channel_id) -> int:
    return (await economy.ledger.channel(channel_id, wallet.account)).phase


async def test_the_next_client_takes_a_dead_clients_used_up_channel_up(probe, economy):
    dead = await dead_channel(economy, probe, probe.wallet, deposit=3 * UNIT, units=3)
    async with economy.client(probe, probe.wallet) as btt:
        session = await btt.session(2 * UNIT)
        assert session.payer.channel_id == dead
        await buy(session, 2)
    [receipt] = btt.receipts
    assert receipt.counts_agree
    assert receipt.captured == PRICES[BYTES].rate.owed(5 * RUN)
    assert (await economy.ledger.totals()).closed_channels == 1
    assert (await economy.ledger.account(probe.wallet.account)).available == 100 * BTT - receipt.captured


async def test_a_client_of_another_node_asks_a_dead_clients_channel_back_from_its_node(probe, economy, purse):
    dead = await dead_channel(economy, probe, probe.wallet, deposit=50 * UNIT, units=2)
    other = await probe_node(economy)
    async with economy.client(other, probe.wallet) as btt:
        await btt.session(UNIT)
        await told(economy, probe.wallet, dead, ledger_pb2.ENTRY_KIND_CLOSE_CHANNEL)
    state = await economy.ledger.channel(dead, probe.wallet.account)
    assert state.captured == PRICES[BYTES].rate.owed(2 * RUN), "the node closed it, and got what it is owed"
    assert (await economy.ledger.account(probe.wallet.account)).locked == 0
    assert purse.store.get(dead).state == CLOSED


async def test_a_node_that_vanished_keeps_no_money(probe, economy, purse, monkeypatch):
    dead = await dead_channel(economy, probe, probe.wallet, deposit=50 * UNIT, units=2)
    await probe.closer.watch()  # it showed its best update before it vanished
    await probe.server.stop(0)
    touched, _ = await ask_back(purse, Wanted(idle=True))
    assert [(one.channel_id, one.phase) for one in touched] == [(dead, CLOSING)]
    assert (await ask_back(purse, Wanted(idle=True)))[0] == [], "asked once; the window runs"
    await told(economy, probe.wallet, dead, ledger_pb2.ENTRY_KIND_FINALIZE)
    touched, _ = await ask_back(purse, Wanted(idle=True))
    assert [(one.channel_id, one.phase) for one in touched] == [(dead, DONE)]
    assert purse.store.get(dead).state == CLOSED
    paid = PRICES[BYTES].rate.owed(2 * RUN)
    account = await economy.ledger.account(probe.wallet.account)
    assert (account.available, account.locked) == (100 * BTT - paid, 0)


async def test_leaving_asks_the_ledger_when_the_node_does_not_close(probe, economy, monkeypatch):
    monkeypatch.setattr(provider_module, "CLOSE_PAUSES_S", (0.0,))
    with pytest.raises(BttError):
        async with economy.client(probe, probe.wallet) as btt:
            session = await btt.session(9 * UNIT)
            await probe.server.stop(0)
    assert await phase(economy, probe.wallet, session.payer.channel_id) == CLOSING


async def test_a_kept_channel_waits_some_hours_for_the_next_client(probe, economy, purse):
    async with economy.client(probe, probe.wallet, keep_channels=True) as btt:
        session = await btt.session(9 * UNIT)
        await buy(session, 1)
    channel_id = session.payer.channel_id
    wanted = Wanted(idle=True, keep_ms=KEEP_MS)
    assert await ask_back(purse, wanted) == ([], [])
    assert await phase(economy, probe.wallet, channel_id) == OPEN
    economy.clock.ahead_ms = KEEP_MS + 1000
    probe.sign()
    [touched], _ = await ask_back(purse, wanted)
    assert (touched.channel_id, touched.phase) == (channel_id, DONE)
    assert touched.captured == UNIT


async def test_a_channel_in_use_is_left_alone(probe, economy, purse):
    async with economy.client(probe, probe.wallet) as btt:
        session = await btt.session(9 * UNIT)
        assert await ask_back(purse, Wanted(idle=True)) == ([], [])
        await buy(session, 1)
    assert btt.receipts[0].counts_agree


async def test_a_client_moves_on_when_its_channel_is_closed_under_it(probe, economy):
    async with economy.client(probe, probe.wallet) as btt:
        session = await btt.session(9 * UNIT)
        await buy(session, 2)
        await session.settle()
        live = probe.store.channel(session.payer.channel_id)
        best = (await live)[0].best
        # The node takes its money and says nothing: it would go on taking payments.
        await economy.ledger.close_channel(
            ChannelClose(channel=session.payer.channel_id, capture=best.cumulative),
            probe.payee_key, best.cumulative, best.signature,
        )  # fmt: skip
        await ended(session)
        assert isinstance(session.error, SessionEnded)
        with pytest.raises(SessionEnded):
            await buy(session, 1)
        assert session.payer.signed == best.cumulative, "nothing was paid into the closed channel"
        other = await btt.session(9 * UNIT)
        assert other.payer.channel_id != session.payer.channel_id
        await buy(other, 1)
    assert [receipt.captured for receipt in btt.receipts] == [UNIT]


async def test_a_fetch_goes_on_in_another_channel(economy, tmp_path):
    data = content(24 * RUN)
    node, infohash = await economy.content_node({"film": data})
    wallet = await economy.wallet()
    async with economy.client(node, wallet) as btt:
        async with btt.content.fetch(infohash["film"], tmp_path) as transfer:
            async for step in transfer.progress(0.001):
                if step.done_bytes and btt.providers[0].live is not None:
                    break
            first = btt.providers[0].live.payer.channel_id
            await economy.ledger.request_close(first, wallet.account)
        assert btt.providers[0].live.payer.channel_id != first
    assert (tmp_path / "film").read_bytes() == data


@pytest.fixture
def disputed(monkeypatch) -> asyncio.Event:
    """Set when the keeper of a client has found a dispute."""
    event, inner = asyncio.Event(), keeper_module.Keeper._fail

    def fail(self, error, channel_id=None):
        inner(self, error, channel_id)
        if self.disputes:
            event.set()

    monkeypatch.setattr(keeper_module.Keeper, "_fail", fail)
    return event


def change_books(wallet, query: str, *values: object) -> None:
    books = sqlite3.connect(wallet.folder / "payer.db")
    with books:
        books.execute(query, values)
    books.close()


async def take(economy, node, channel_id: bytes) -> int:
    """The node closes a channel with its best update, without a word to its payer."""
    record, _ = await node.store.channel(channel_id)
    paid = record.best.cumulative
    await economy.ledger.close_channel(
        ChannelClose(channel=channel_id, capture=paid), node.payee_key, paid, record.best.signature
    )
    return paid


async def evidence(wallet) -> dict[str, str]:
    [file] = (wallet.folder / "evidence").iterdir()
    return json.loads(file.read_text())


async def test_a_capture_above_the_nodes_own_statement_is_disputed(probe, economy, disputed):
    async with economy.client(probe, probe.wallet, keep_channels=True) as btt:
        session = await btt.session(9 * UNIT)
        await buy(session, 2)
    # A node that prepays itself: its statement says that less is owed than was paid.
    document = SignedDocument.FromString(btt.receipts[0].statement)
    said = payment_pb2.SessionStatement.FromString(document.payload)
    said.owed -= 1
    document.payload = said.SerializeToString()
    change_books(probe.wallet, "UPDATE channels SET statement = ?", document.SerializeToString())
    with pytest.raises(CaptureDisputed):
        async with economy.client(await probe_node(economy), probe.wallet) as btt:
            await btt.session(UNIT)
            paid = await take(economy, probe, session.payer.channel_id)
            async with asyncio.timeout(20):
                await disputed.wait()
    kept = await evidence(probe.wallet)
    assert kept["channel"] == session.payer.channel_id.hex()
    state = open_document(
        SignedDocument.FromString(bytes.fromhex(kept["ledger_state"])),
        "ChannelState",
        economy.ledger.ledger_id,
        PublicKey(bytes.fromhex(kept["operator_key"])),
    )
    assert ledger_pb2.ChannelState.FromString(state).captured == paid == said.owed + 1


async def test_a_capture_above_what_was_signed_ends_the_session_with_its_error(probe, economy, disputed):
    async with economy.client(probe, probe.wallet) as btt:
        session = await btt.session(9 * UNIT)
        await buy(session, 2)
        await session.settle()
        change_books(probe.wallet, "UPDATE channels SET signed = signed - 1")  # an old copy of them
        await take(economy, probe, session.payer.channel_id)
        async with asyncio.timeout(20):
            await disputed.wait()
        with pytest.raises(CaptureDisputed):
            await buy(session, 1)
        btt._keeper.disputes.clear()
        await session.abandon()
        btt.providers[0].live = None
    assert (await evidence(probe.wallet))["channel"] == session.payer.channel_id.hex()


async def test_the_watch_is_taken_up_where_it_broke(probe, economy, monkeypatch):
    monkeypatch.setattr(keeper_module, "FIRST_PAUSE_S", 0.0)
    begun, inner, again = [], LedgerClient.watch, asyncio.Event()

    async def brittle(self, key, *, channel_id=None, after_seq=0):
        begun.append(after_seq)
        if len(begun) == 3:
            again.set()
        async for page in inner(self, key, channel_id=channel_id, after_seq=after_seq):
            yield page
            if page.events and len(begun) < 3:
                raise LedgerUnreachable("The line broke.")

    monkeypatch.setattr(LedgerClient, "watch", brittle)
    async with economy.client(probe, probe.wallet) as btt:
        session = await btt.session(9 * UNIT)
        await economy.ledger.transfer(economy.faucet, probe.wallet.account.public.address, 1)
        async with asyncio.timeout(20):
            await again.wait()
        monkeypatch.setattr(LedgerClient, "watch", inner)
        await economy.ledger.request_close(session.payer.channel_id, probe.wallet.account)
        await ended(session)
    assert begun[0] == 0
    assert begun == sorted(set(begun)), "each goes on after what was handled"


async def test_no_task_outlives_the_client(probe, economy):
    before = asyncio.all_tasks()
    async with economy.client(probe, probe.wallet) as btt:
        await btt.session(UNIT)
    left = {task for task in asyncio.all_tasks() - before if not task.done()}
    assert not [task for task in left if "channel-keeper" in task.get_name()]


async def test_a_proof_that_could_not_be_kept_is_sought_again(probe, economy, purse):
    dead = await dead_channel(economy, probe, probe.wallet, deposit=9 * UNIT, units=2)
    change_books(probe.wallet, "UPDATE channels SET signed = signed - 1")
    await take(economy, probe, dead)
    in_its_way = probe.wallet.folder / "evidence"
    in_its_way.write_text("")
    with pytest.raises(StorageError, match="could not be kept"):
        await look(purse, dead)
    in_its_way.unlink()
    _, disputes = await ask_back(purse, Wanted(idle=True))
    assert [type(error) for error in disputes] == [CaptureDisputed]
    assert (await evidence(probe.wallet))["channel"] == dead.hex()
    assert purse.store.get(dead).state == CLOSED


# Nodes that hold money fast


async def test_a_node_that_calls_a_new_channel_closed_gets_no_other(probe, economy, monkeypatch):
    async def lie(request, network):
        raise ChannelClosed("The channel is closed.")

    monkeypatch.setattr(probe.payments, "_open", lie)
    async with economy.client(probe, probe.wallet) as btt:
        with pytest.raises(CountsDiffer, match="just agreed"):
            await btt.session(3 * UNIT)
        [channel] = btt.books.channels()
        assert (channel.deposit, channel.state) == (3 * UNIT, CLOSING_HERE)
        with pytest.raises(NodeBanned):
            await btt.session(3 * UNIT)
    assert (await economy.ledger.account(probe.wallet.account)).available == 100 * BTT - 3 * UNIT


async def test_a_node_that_settles_nothing_holds_no_client_at_its_exit(probe, economy, monkeypatch):
    monkeypatch.setattr(session_module, "SETTLE_S", 0.2)
    monkeypatch.setattr(Session, "settle", lambda self, call_id, accepted: None)
    async with economy.client(probe, probe.wallet) as btt:
        session = await btt.session(9 * UNIT)
        await buy(session, 2)
        with pytest.raises(SessionEnded, match="not settled"):
            await session.settle()
    [receipt] = btt.receipts  # a new session settles by what both have counted
    assert receipt.counts_agree
    assert receipt.captured == 2 * UNIT
