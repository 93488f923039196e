"""P7 at the node: who does not pay is choked, then banned; who only had bad luck is not."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import grpc.aio
import pytest

from btt.node import folder as node_folder
from btt.node.payments import store as payee_store
from btt.node.payments.bans import Failure
from btt.node.payments.store import PayeeStore
from btt.proto.payment.v1 import payment_pb2
from btt.sdk.channel import BanPolicy, Conduct
from btt.sdk.errors import (
    Banned,
    CountsDiffer,
    PaymentRequired,
    SessionEnded,
    SignatureInvalid,
    UpdateInvalid,
)
from btt.sdk.identity import NodeAddress
from btt.sdk.keys import PrivateKey
from btt.sdk.payment import bans as table
from btt.sdk.payment.bans import all_conduct, load_conduct, save_conduct
from btt.sdk.payment.calls import CALL_KEY
from btt.sdk.payment.connection import connect_node
from btt.sdk.payment.store import PayerStore
from btt.sdk.payment.wire import counts_of
from btt.sdk.rpc import to_error
from kit.payers import UNIT, RawPayer, Relay, dial, probe_node
from kit.probe import PRICES, Probe, pb, rpc

POLICY = BanPolicy(after=3, first_ms=600_000, longest_ms=4_800_000, forget_ms=3_600_000, apart_ms=0)


class Shop:
    """A node, and those who come to it by hand."""

    def __init__(self, economy, node, channel) -> None:
        self.economy, self.node, self.channel = economy, node, channel

    async def payer(self) -> RawPayer:
        return await RawPayer(self.economy, self.node.offers[0], self.channel).fund(100 * UNIT)

    async def conduct(self, payer: RawPayer) -> Conduct:
        subject = str(payer.account.public.address)
        return await self.node.store.run(lambda db: load_conduct(db, subject))

    async def network(self) -> Conduct:
        return await self.node.store.run(lambda db: load_conduct(db, "127.0.0.0/24"))


@asynccontextmanager
async def open_shop(economy, **options):
    node = await economy.node(
        lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), PRICES, **{"bans": POLICY, **options}
    )
    async with dial(node.tls[1], node.identity.public.address, node.port) as channel:
        yield Shop(economy, node, channel)


@pytest.fixture
async def shop(economy):
    async with open_shop(economy) as shop:
        yield shop


@pytest.fixture
async def strict(economy):
    """One that waits for payment a moment only."""
    async with open_shop(economy, grace_s=0.1) as shop:
        yield shop


async def end_of(call) -> Exception:
    """Returns what a call or a stream ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        async for _ in call:
            pass
    return to_error(failure.value)


async def end_of_stream(stream) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        while await stream.read() is not grpc.aio.EOF:
            pass
    return to_error(failure.value)


# What counts


async def test_p7_a10_who_does_not_pay_is_choked_then_banned_and_comes_back_when_it_is_over(strict):
    payer = await strict.payer()
    for strike in range(POLICY.after - 1):
        assert isinstance(await payer.grab(waits=True), PaymentRequired), "choked first"
        assert (await strict.conduct(payer)).strikes == strike + 1
    assert isinstance(await payer.grab(waits=True), Banned)
    assert payer.got == UNIT, "all of it cost the node one unit"
    with pytest.raises(Banned, match="it did not pay in time") as refused:
        await payer.open()
    assert 0 < refused.value.retry_after <= POLICY.first_ms / 1000
    with pytest.raises(Banned):  # and no money is locked in a channel that would be refused
        await payer.fund()
    strict.economy.clock.ahead_ms += POLICY.first_ms
    await payer.open()


async def test_p7_a_ban_ends_every_session_and_call_of_the_payer_and_nobody_elses(strict):
    payer, other = await strict.payer(), await strict.payer()
    await payer.open()
    stream = await payer.attach()
    second = RawPayer(strict.economy, payer.offer, payer.channel, account=payer.account)
    await second.fund(100 * UNIT)
    await second.open()
    also = await second.attach()
    await other.open()
    lives = await other.attach()
    # Two failures lie behind it; the third is a call that waits now.
    [subject] = [str(payer.account.public.address)]
    near = Conduct(strikes=2, at_ms=strict.economy.clock(), reason="it did not pay in time")
    await strict.node.store.run(lambda db: save_conduct(db, subject, near, now_ms=0))
    assert isinstance(await end_of(payer.rows(3)), Banned)
    assert isinstance(await end_of_stream(stream), Banned)
    assert isinstance(await end_of_stream(also), Banned)
    await lives.write(payment_pb2.PayRequest(report=payment_pb2.Report(call_id=bytes(16))))
    assert await lives.read() is not grpc.aio.EOF
    lives.cancel()


async def test_p7_calls_that_wait_together_fail_once(economy):
    async with open_shop(economy, grace_s=0.3, bans=replace(POLICY, apart_ms=60_000)) as shop:
        payer = await shop.payer()
        await payer.open()
        stream = await payer.attach()
        ends = await asyncio.gather(*(end_of(payer.rows(2)) for _ in range(8)))
        assert {type(error) for error in ends} == {PaymentRequired}
        assert (await shop.conduct(payer)).strikes == 1
        stream.cancel()


@pytest.mark.parametrize(
    ("lie", "error"),
    [
        (lambda p: p.update(500, key=PrivateKey.generate()), UpdateInvalid),
        (
            lambda p: payment_pb2.PayRequest(
                report=payment_pb2.Report(
                    call_id=bytes(range(16)),
                    accepted=[
                        payment_pb2.Count(
                            offer_digest=p.offer.digest, service="probe.v1.ProbeService", unit=2, units=9
                        )
                    ],
                )
            ),
            CountsDiffer,
        ),
    ],
    ids=["an update that K1 did not sign", "units that were never sent"],
)
async def test_p7_what_no_honest_program_sends_is_a_strike(shop, lie, error):
    payer = await shop.payer()
    for _ in range(POLICY.after - 1):
        await payer.open()
        stream = await payer.attach()
        await stream.write(lie(payer))
        assert isinstance(await end_of_stream(stream), error)
    await payer.open()
    stream = await payer.attach()
    await stream.write(lie(payer))
    assert isinstance(await end_of_stream(stream), Banned)
    with pytest.raises(Banned):
        await payer.open()


async def test_p7_what_an_older_session_still_says_is_no_strike(shop):
    """An honest payer came back, and the node reads the rest of its old stream only now."""
    payer = await shop.payer()
    await payer.open()
    old, stream = shop.node.sessions.live(payer.id), await payer.attach()
    ticket = payer.ticket()
    call_id = dict(ticket)[CALL_KEY]
    ask = pb.Ask(messages=1, size=UNIT, max_rows=UNIT)
    async for _ in rpc.ProbeServiceStub(shop.channel).Query(ask, metadata=ticket):
        pass
    accepted = counts_of(old.payee.delivered(call_id))
    assert accepted
    await payer.open()

    async def rest():
        yield payment_pb2.PayRequest(report=payment_pb2.Report(call_id=call_id, accepted=accepted))
        yield payer.update(UNIT)

    await shop.node.payments._hear(old, rest())
    assert (await shop.conduct(payer)).strikes == 0
    assert shop.node.sessions.live(payer.id).payee.meter.paid == 0
    stream.cancel()


async def _open_as(shop, payer, thief):
    with pytest.raises(SignatureInvalid):
        await payer.open(key=thief)


async def _call_as(shop, payer, thief):
    call = rpc.ProbeServiceStub(shop.channel).Query(
        pb.Ask(messages=1, size=1, max_rows=1), metadata=payer.ticket(thief)
    )
    assert isinstance(await end_of(call), SignatureInvalid)


async def _attach_as(shop, payer, thief):
    stream = payer.stub.Pay()
    _, (_, call_id), (_, signature) = payer.ticket(thief)
    attach = payment_pb2.Attach(token=payer.token, call_id=call_id, signature=signature)
    await stream.write(payment_pb2.PayRequest(attach=attach))
    assert isinstance(await end_of_stream(stream), SignatureInvalid)


@pytest.mark.parametrize("misuse", [_open_as, _call_as, _attach_as])
async def test_p7_a_stranger_without_the_key_gets_nobodys_payer_banned(shop, misuse):
    payer, thief = await shop.payer(), PrivateKey.generate()
    await payer.open()
    for _ in range(POLICY.after):
        await misuse(shop, payer, thief)
    assert await shop.conduct(payer) == Conduct()
    await payer.open()
    assert (await shop.network()).is_banned(shop.economy.clock())
    newcomer = await shop.payer()
    await newcomer.open()
    assert newcomer.credit == 0, "strangers from there are lent nothing"


async def test_p7_leaving_the_ledger_channel_unpaid_beyond_the_allowance_is_a_strike(shop):
    payer = await shop.payer()
    await payer.grab(pays=60 * UNIT)
    assert payer.got - payer.paid > UNIT, "more than a crash explains"
    await shop.economy.ledger.request_close(payer.id, payer.account)
    assert await shop.node.closer.watch() == 1
    conduct = await shop.conduct(payer)
    assert (conduct.strikes, conduct.reason) == (1, "it left more unpaid than its allowance")
    # Alone it never adds up to a ban: it had to pay a multiple before it could do so again.
    who = payer.account.public.address
    for _ in range(POLICY.after):
        await shop.node.sessions.failed(who, None, Failure.DEFAULT)
    assert (await shop.conduct(payer)).strikes == 1
    await shop.node.sessions.failed(who, None, Failure.UNPAID)
    assert (await shop.conduct(payer)).strikes == 2


# What does not count


async def test_p7_a_client_that_crashes_again_and_again_is_not_banned(shop):
    payer = await shop.payer()
    for _ in range(3 * POLICY.after):
        assert await payer.grab() is None  # gone, without a word, in the middle of a call
    assert await shop.conduct(payer) == Conduct()
    assert await shop.network() == Conduct()
    assert payer.got == UNIT
    # What was lost on the way is all that is held against it: it pays, and is served on its credit.
    await payer.grab(pays=5 * UNIT)
    assert payer.paid == 5 * UNIT - payer.credit


async def test_p7_who_owes_nothing_may_stop_paying_but_not_who_never_began(economy):
    async with open_shop(economy, grace_s=0.1, strangers_units=0) as shop:
        payer, idler = await shop.payer(), await shop.payer()
        for n in range(POLICY.after + 1):
            await payer.open()
            stream = await payer.attach()
            if not n:
                await stream.write(payer.update(3 * UNIT))
            assert isinstance(await end_of(payer.rows(5)), PaymentRequired)
            stream.cancel()
        assert await shop.conduct(payer) == Conduct()
        ends = [await idler.grab(waits=True) for _ in range(POLICY.after)]
        assert isinstance(ends[-1], Banned), "it holds a place in the queue, and nothing comes"


async def test_p7_a_dead_network_is_no_default(economy, tmp_path):
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(
            probe_node(economy, tmp_path / "node", payments={"grace": "3s"}, bans={})
        )
        relay = await stack.enter_async_context(Relay(node.address.port, "127.0.9.1"))
        channel = await stack.enter_async_context(
            dial(node.folder.certificate, node.address.node, relay.port)
        )
        payer = await RawPayer(economy, node.offers.usable()[0], channel).fund(100 * UNIT)
        await payer.open()
        stream, call = await payer.attach(), payer.rows(5)
        assert (await call.read()).rows == UNIT
        [session] = node.sessions.all()
        relay.silence()
        # The node finds out by itself, before the grace time is over.
        with pytest.raises(SessionEnded, match="payment stream"):
            while True:
                await session.news()
        assert await node.store.run(all_conduct) == {}
        call.cancel()
        stream.cancel()


# Who else is hit


async def test_p7_a_proven_payer_is_served_on_credit_from_a_network_of_defaulters(economy):
    async with open_shop(
        economy, grace_s=1
    ) as strict:  # a defaulter waits for it, and an honest stranger pays within
        proven = await strict.payer()
        await proven.open()
        stream = await proven.attach()
        await stream.write(proven.update(60 * UNIT))
        await stream.done_writing()
        assert "ended the payment stream" in str(await end_of_stream(stream))
        for _ in range(POLICY.after):
            await (await strict.payer()).grab(waits=True)
        assert (await strict.network()).is_banned(strict.economy.clock())
        await proven.open()
        assert proven.credit == 3 * UNIT
        stranger = await strict.payer()
        await stranger.open()
        assert stranger.credit == 0
        await stranger.grab(pays=3 * UNIT)
        assert stranger.got == 3 * UNIT


# What is kept


async def _start(folder) -> tuple[asyncio.subprocess.Process, NodeAddress]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "btt.sdk.cli", "node", "start", str(folder), "--stdin-lifeline",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    ready = json.loads(await process.stdout.readline())
    return process, NodeAddress.parse(ready["address"])


async def test_p7_a_ban_survives_kill_9_and_a_restart(economy, tmp_path):
    config = {
        "node": {"listen": "127.0.0.1:0"},
        "ledger": {"address": str(economy.running.address)},
        "payments": {"min_challenge": "1s", "min_lifetime": "10s", "close_margin": "1s"},
        "bans": {"after": 1},
        "services": {"content": {"enabled": True}},
    }
    folder = node_folder.init(tmp_path / "node", config=config)
    store = PayerStore(tmp_path / "wallet")
    payer = None
    try:
        for life in range(2):
            process, address = await _start(folder.path)
            try:
                found = await connect_node(
                    address, ledger_id=economy.ledger.ledger_id, store=store, clock=economy.clock
                )
                async with dial(folder.certificate, address.node, address.port) as channel:
                    payer = payer or await RawPayer(economy, found.offer, channel).fund(100 * UNIT)
                    payer.channel, payer.offer = channel, found.offer
                    if life == 1:
                        with pytest.raises(Banned, match="did not sign"):
                            await payer.open()
                        break
                    await payer.open()
                    stream = await payer.attach()
                    await stream.write(payer.update(500, key=PrivateKey.generate()))
                    assert isinstance(await end_of_stream(stream), Banned)
            finally:
                process.kill()
                await process.wait()
    finally:
        store.close()


async def test_books_from_before_there_were_bans_are_brought_up_to_date(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(payee_store, "SCHEMA_VERSION", 1)
        for later in ("BANS", "DAYS", "REFUSALS", "QUOTA", "LENT", "TODAY"):
            patch.setattr(payee_store, f"{later}_SCHEMA", "")
        patch.setattr(payee_store, "tell_days", lambda db, clock: None)
        patch.setattr(payee_store, "load_lent", lambda db: [])
        old = PayeeStore(tmp_path / "payments.db")
        await old.add_offer(bytes(32), 7, b"payload", b"signature")
        old.close()
    for _ in range(2):
        store = PayeeStore(tmp_path / "payments.db")
        assert await store.last_serial() == 7
        assert await store.run(all_conduct) == {}
        store.close()
    db = sqlite3.connect(tmp_path / "payments.db")
    assert db.execute("PRAGMA user_version").fetchone() == (payee_store.SCHEMA_VERSION,)
    db.close()


async def test_the_memory_of_failures_is_bounded_and_keeps_what_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "MAX_SUBJECTS", 50)
    monkeypatch.setattr(table, "ROOM", 10)
    store = PayeeStore(tmp_path / "payments.db")
    try:
        forever = Conduct(until_ms=2**62, reason="by the operator", by_operator=True)
        running = Conduct(bans=1, at_ms=5, until_ms=10_000, reason="it did not pay in time")
        for subject, conduct in (("operator", forever), ("banned", running)):
            await store.run(lambda db, s=subject, c=conduct: save_conduct(db, s, c, now_ms=100))
        for n in range(500):
            strike = Conduct(strikes=1, at_ms=100 + n, reason="it did not pay in time")
            await store.run(lambda db, n=n, c=strike: save_conduct(db, f"key {n}", c, now_ms=100 + n))
        kept = await store.run(all_conduct)
    finally:
        store.close()
    assert len(kept) <= 50
    assert {"operator", "banned", "key 499"} <= kept.keys()


# By hand


def peers(folder, *words: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "btt.sdk.cli", "node", "peers", *words, "--node", str(folder), "--json"],
        capture_output=True,
        check=True,
    )
    return json.loads(done.stdout)


async def test_the_operator_bans_and_unbans_while_the_node_runs(economy, tmp_path):
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(probe_node(economy, tmp_path / "node", payments={}, bans={}))
        path = node.folder.path
        channel = await stack.enter_async_context(
            dial(node.folder.certificate, node.address.node, node.address.port)
        )
        payer = await RawPayer(economy, node.offers.usable()[0], channel).fund(100 * UNIT)
        who = str(payer.account.public.address)
        await payer.open()
        stream = await payer.attach()
        await stream.write(payer.update(5 * UNIT))
        peer = await asyncio.to_thread(peers, path, "ban", who, "--for", "1d", "--reason", "too loud")
        assert peer["peer"] == who
        assert isinstance(await end_of_stream(stream), Banned), "the node notices by itself"
        with pytest.raises(Banned, match="too loud") as refused:
            await payer.open()
        assert 86_000 < refused.value.retry_after <= 86_400
        [row] = (await asyncio.to_thread(peers, path, "list"))["peers"]
        assert (row["peer"], row["paid"], row["banned"], row["reason"]) == (
            who,
            str(5 * UNIT),
            True,
            "too loud",
        )
        assert (await asyncio.to_thread(peers, path, "unban", who))["forgotten"]
        await payer.open()
        stream = await payer.attach()
        await asyncio.to_thread(peers, path, "ban", "127.0.0.77")
        assert isinstance(await end_of_stream(stream), Banned)
        with pytest.raises(Banned, match="This network is banned for good"):
            await payer.open()
        assert (await asyncio.to_thread(peers, path, "unban", "127.0.0.0/24"))["forgotten"]
        await payer.open()
