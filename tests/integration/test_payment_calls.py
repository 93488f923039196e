"""Metered calls of every kind this version serves, over real sockets, against a hostile or honest node."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace

import grpc
import grpc.aio
import pytest

from btt.node.payments import metering
from btt.node.payments.free import FreeLimit, bounded
from btt.node.payments.registrar import Registrar
from btt.sdk.channel import Line
from btt.sdk.errors import (
    BudgetExceeded,
    CallRepeated,
    ConfigError,
    CountsDiffer,
    InternalError,
    PaymentRequired,
    RateLimited,
    SessionEnded,
)
from btt.sdk.money import Unit
from btt.sdk.payment.calls import CALL_KEY, PROOF_KEY, TOKEN_KEY
from btt.sdk.payment.options import method_charge
from btt.sdk.rpc import to_error
from kit.economy import RUN
from kit.probe import BYTES, CALL_PRICES, PRICES, Calls, Probe, Unchecked, pb, rpc


@pytest.fixture
async def probe(economy):
    """A node with the probe service; `open` gives a payer's session and stub."""
    servicer = Probe()
    node = await economy.node(lambda r: rpc.add_ProbeServiceServicer_to_server(servicer, r), PRICES)
    node.servicer = servicer

    @asynccontextmanager
    async def open_session(wallet=None, *, need=1_000_000, to=node, close=True):
        wallet = wallet or await economy.wallet()
        async with economy.client(to, wallet) as btt:
            session = await btt.session(need)
            yield session, rpc.ProbeServiceStub(session.channel), btt
            if not close:
                await session.abandon()
                btt.providers[0].live = None

    node.open = open_session
    return node


REFUSED = {
    "NoPolicy": "does not say what it costs",
    "FreeButCharged": "is FREE but has a charged field",
    "FreeNoBytes": "is FREE without bounds",
    "FreeNoCalls": "is FREE without bounds",
    "NothingCharged": "neither a charged field nor a fee",
    "Unbounded": "must set largest_message",
    "WithoutMode": "when probe.v1.NoMode.data becomes payable",
    "WithoutCap": "takes probe.v1.NoCap.rows, a bill",
    "ChargedText": "cannot charge probe.v1.Text.text",
    "SignedCount": "cannot charge probe.v1.Signed.rows",
    "InMap": "cannot count probe.v1.Mapped.parts: a charged field in a map",
    "Recursive": "cannot count probe.v1.Loops.loop",
    "DirectlyRecursive": "cannot count probe.v1.Loop",
    "AckedResponse": "a response as ACKED",
    "RequestOnReceipt": "probe.v1.Bytes.data of its request but as ACKED",
    "RequestOnVerdict": "probe.v1.Checked.data of its request but as ACKED",
    "UnboundedRequest": "must set largest_request",
    "BoundWithoutCharge": "must set largest_request",
    "FreeWithFee": "is FREE but has",
    "RequestInMap": "cannot count probe.v1.MappedUp.ups",
    "RepeatedCount": "cannot charge probe.v1.ManyRows.rows",
    "TwoModes": "mixes two modes",
    "FreeCallsStream": "is FREE but has a charged field",
}


@pytest.mark.parametrize("name", [m.name for m in pb.DESCRIPTOR.services_by_name["RefusedService"].methods])
def test_a_method_that_cannot_be_charged_for_certain_is_refused_and_told_why(name):
    with pytest.raises(ConfigError, match=f"^/probe.v1.RefusedService/{name} .*{REFUSED[name]}"):
        method_charge(f"/probe.v1.RefusedService/{name}")


def test_one_of_several_fields_is_counted_if_it_is_the_one():
    charge = method_charge("/probe.v1.EitherService/Get")
    line = Line("probe.v1.EitherService", Unit.BYTE)
    assert charge.units(pb.Either(data=b"123")) == [(line, 3)]
    assert charge.units(pb.Either(part=pb.Part(data=[b"1", b"23"]))) == [(line, 3)]
    assert charge.units(pb.Either(plain=pb.Plain(data=b"free"))) == []


def test_nested_and_repeated_fields_are_counted_in_full():
    message = pb.Nested(
        parts=[pb.Part(data=[b"12", b"3"]), pb.Part(data=[b"1"])], single=pb.Part(data=[b"12345"])
    )
    assert method_charge("/probe.v1.ProbeService/Deep").units(message) == [(BYTES, 9)]
    assert method_charge("/probe.v1.ProbeService/Deep").units(pb.Nested()) == []


async def test_registration_refuses_handlers_that_write_past_the_meter():
    class Writes(Probe):
        async def Many(self, request, context):  # noqa: N802
            await context.write(pb.Bytes())

    server = grpc.aio.server()
    with pytest.raises(ConfigError, match="must yield"):
        rpc.add_ProbeServiceServicer_to_server(Writes(), Registrar(server))
    with pytest.raises(ConfigError, match="async def"):
        rpc.add_EitherServiceServicer_to_server(rpc.EitherServiceServicer(), Registrar(server))
    await server.stop(0)


async def test_a_service_neither_writes_nor_reads_past_the_meter(economy):
    """It yields as it must, and tries the context all the same."""

    class Sly(Calls):
        async def SwapMany(self, request, context):  # noqa: N802
            await context.write(pb.Bytes(data=b"for nothing"))
            yield pb.Bytes(data=b"paid")

        async def Relay(self, requests, context):  # noqa: N802
            yield pb.Bytes(data=(await context.read()).data)

    node = await economy.node(lambda r: rpc.add_CallsServiceServicer_to_server(Sly(), r), CALL_PRICES)
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(100_000)
        stub = rpc.CallsServiceStub(session.channel)
        for call, says in ((stub.SwapMany(pb.Up()), "yields"), (stub.Relay([pb.Up(data=b"1")]), "iterator")):
            with pytest.raises(InternalError, match=says):
                async for _ in call:
                    raise AssertionError("nothing passes")
        await session.settle()
        assert session.payer.tally.owed == 0


async def test_unary_and_streamed_bytes_are_paid_on_receipt(probe):
    async with probe.open() as (session, stub, btt):
        assert len((await stub.One(pb.Ask(size=1000))).data) == 1000
        sizes = [len(m.data) async for m in stub.Many(pb.Ask(messages=5, size=RUN))]
        assert sizes == [RUN] * 5
        deep = [m async for m in stub.Deep(pb.Ask(messages=2, size=7))]
        assert len(deep) == 2
        await session.settle()
        owed = PRICES[BYTES].rate.owed(1000 + 5 * RUN + 2 * 21)
        assert session.payer.signed == session.payer.tally.owed == owed
    assert btt.receipts[0].counts_agree
    assert btt.receipts[0].captured == owed


async def test_verified_messages_are_paid_only_when_accepted(probe):
    async with probe.open() as (session, stub, btt):
        with pytest.raises(ConfigError, match="verdicts"):
            async for _ in stub.ManyChecked(pb.Ask(messages=1, size=1)):
                pass
        with session.verdicts() as verdicts:
            kept = 0
            async for message in stub.ManyChecked(pb.Ask(messages=6, size=100_000)):
                if message.data[0] % 2:
                    verdicts.reject(message)
                else:
                    verdicts.accept(message)
                    kept += 1
        with session.verdicts() as verdicts:
            verdicts.accept(await stub.OneChecked(pb.Ask(size=500)))
        with session.verdicts():
            await stub.OneChecked(pb.Ask(size=500))  # never decided: not paid
        await session.settle()
        assert kept == 3
        assert session.payer.tally.owed == PRICES[BYTES].rate.owed(300_500)
    assert btt.receipts[0].counts_agree
    # What was prepaid while the rejected messages used up the credit has come back.
    assert btt.receipts[0].owed == btt.receipts[0].captured == PRICES[BYTES].rate.owed(300_500)


async def test_a_bill_above_the_callers_cap_ends_the_session_unpaid(probe, monkeypatch):
    monkeypatch.setattr(metering, "Bills", Unchecked)
    async with probe.open(close=False) as (session, stub, _):
        got = [m.rows async for m in stub.Query(pb.Ask(messages=3, size=10, max_rows=30))]
        assert got == [10, 10, 10]
        await session.settle()
        with pytest.raises(CountsDiffer, match="allowed 30"):
            async for _ in stub.Query(pb.Ask(messages=4, size=10, max_rows=30)):
                pass
        assert isinstance(session.error, CountsDiffer)
        # The three messages within the cap were received and are honest debt; the fourth is not.
        assert session.payer.tally.owed <= 60
        with pytest.raises(CountsDiffer):
            await stub.One(pb.Ask(size=1))


async def test_a_service_cannot_send_more_than_it_declares(probe):
    async with probe.open() as (_, stub, _btt):
        with pytest.raises(Exception, match="larger message than it declares"):
            async for _ in stub.Query(pb.Ask(messages=1, size=1001, max_rows=5000)):
                pass


async def test_free_methods_need_no_session_and_are_bounded(probe):
    channel = (await _connection(probe)).channel(label="free")
    stub = rpc.ProbeServiceStub(channel)
    assert len((await stub.Free(pb.Ask(size=900))).data) == 900
    with pytest.raises(grpc.aio.AioRpcError) as too_much:
        await stub.Free(pb.Ask(size=2000))
    assert "free bytes" in too_much.value.details()
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in stub.FreeMany(pb.Ask(messages=3, size=400)):
            pass
    for _ in range(3):
        await stub.Free(pb.Ask(size=1))
    with pytest.raises(grpc.aio.AioRpcError) as too_often:
        await stub.Free(pb.Ask(size=1))
    assert isinstance(to_error(too_often.value), RateLimited)
    probe.clock.ahead_ms += 60_000
    await stub.Free(pb.Ask(size=1))
    await channel.close()


class _Told(Exception):
    """What a caller is told."""


class _Caller:
    def __init__(self, peer):
        self._peer = peer

    def peer(self):
        return self._peer

    async def abort(self, code, details, metadata):
        raise _Told(details)


async def test_free_calls_of_every_kind_are_counted_by_method_and_network(monkeypatch):
    async def unary(request, context):
        return pb.Plain()

    async def stream(request, context):
        yield pb.Plain()

    async def call(name, kind, caller):
        charge = replace(method_charge("/probe.v1.ProbeService/Free"), path=name, free_calls_per_minute=1)
        inner = stream if kind.endswith("stream") else unary
        made = bounded(
            getattr(grpc, f"{kind}_rpc_method_handler")(inner), charge, limit, lambda _: nullcontext()
        )
        answer = getattr(made, kind)(pb.Ask(), caller)
        if inner is unary:
            await answer
        else:
            assert [message async for message in answer] == [pb.Plain()]

    limit, here, there = FreeLimit(lambda: 0), _Caller("ipv4:192.0.2.1:5"), _Caller("ipv4:198.51.100.1:5")
    kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
    for kind in kinds:
        await call(kind, kind, here)
        await call(kind, kind, there)
        with pytest.raises(_Told, match="More than 1 calls"):
            await call(kind, kind, here)
    monkeypatch.setattr(limit, "MAX_KEYS", 2 * len(kinds))
    with pytest.raises(_Told, match="More than 1 calls"):
        await call("other", kinds[0], here)


async def test_free_calls_that_do_not_end_are_bounded():
    let = asyncio.Event()

    async def stream(request, context):
        yield pb.Plain()
        await let.wait()

    now, caller = 0, _Caller("ipv4:192.0.2.1:5")
    limit = FreeLimit(lambda: now)
    charge = replace(method_charge("/probe.v1.ProbeService/Free"), free_calls_per_minute=2)
    made = bounded(grpc.unary_stream_rpc_method_handler(stream), charge, limit, lambda _: nullcontext())
    held = [made.unary_stream(pb.Ask(), caller) for _ in range(2)]
    for call in held:
        await anext(call)
    now = 60_000
    with pytest.raises(_Told, match=r"More than 2 calls.* at once"):
        await anext(made.unary_stream(pb.Ask(), caller))
    await held[0].aclose()
    await anext(made.unary_stream(pb.Ask(), caller))
    let.set()
    assert [message async for message in held[1]] == []


def ticket(session, call_id):
    return ((TOKEN_KEY, session.token), (CALL_KEY, call_id), (PROOF_KEY, session.proof(call_id)))


async def _connection(node):
    from btt.sdk.identity import Offer
    from btt.sdk.payment.connection import NodeConnection

    offer = Offer.open(node.offers[0].document, ledger_id=node.ledger_id, node=None, now_ms=node.clock())
    return NodeConnection(node.address, node.tls[1], offer)


async def test_a_metered_call_without_or_with_a_wrong_session_is_refused(probe):
    channel = (await _connection(probe)).channel(label="bare")
    stub = rpc.ProbeServiceStub(channel)
    for metadata in (None, ((TOKEN_KEY, bytes(32)), (CALL_KEY, bytes(16))), ((TOKEN_KEY, b"x"),)):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub.One(pb.Ask(size=1), metadata=metadata)
        assert isinstance(to_error(failure.value), SessionEnded)
    assert probe.servicer.calls == 0
    await channel.close()


async def test_a_repeated_call_id_gets_the_stored_answer_and_is_charged_once(probe):
    async with probe.open() as (session, stub, _):
        await stub.One(pb.Ask(size=1))
        plain = (await _connection(probe)).channel(label="plain")
        again = rpc.ProbeServiceStub(plain)
        metadata = ticket(session, b"0123456789abcdef")
        session.payer.begin(b"0123456789abcdef")
        calls = probe.servicer.calls
        first = await again.One(pb.Ask(size=10), metadata=metadata)
        [live] = probe.sessions.all()
        owed = live.payee.meter.owed
        second = await again.One(pb.Ask(size=10), metadata=metadata)
        assert first == second
        assert probe.servicer.calls == calls + 1
        assert live.payee.meter.owed == owed
        with pytest.raises(grpc.aio.AioRpcError) as repeated:
            async for _ in again.Many(pb.Ask(messages=1, size=10), metadata=metadata):
                pass
        assert isinstance(to_error(repeated.value), CallRepeated)
        await plain.close()
        # Bring the books together again: these ten bytes were received outside the client's meter.
        live.payee.settle(b"0123456789abcdef", {})
        live.advance()


async def test_an_unpaid_call_is_served_one_unit_and_then_ends_with_payment_required(economy):
    servicer = Probe()
    node = await economy.node(
        lambda r: rpc.add_ProbeServiceServicer_to_server(servicer, r), {BYTES: PRICES[BYTES]}, grace_s=0.2
    )
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(1_000_000)
        plain = (await _connection(node)).channel(label="plain")
        stub = rpc.ProbeServiceStub(plain)
        got = 0
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            # Counted by nobody here, so nothing is signed: a payer that takes and does not pay.
            async for message in stub.Many(
                pb.Ask(messages=10, size=RUN), metadata=ticket(session, bytes(16))
            ):
                got += len(message.data)
        assert isinstance(to_error(failure.value), PaymentRequired)
        assert got == RUN
        await plain.close()
        [live] = node.sessions.all()
        live.payee.settle(bytes(16), {})


async def test_what_cannot_be_paid_is_not_requested(probe, economy):
    wallet = await economy.wallet()
    async with economy.client(probe, wallet, budget="3000 base units") as btt:
        session = await btt.session(3000)
        stub = rpc.ProbeServiceStub(session.channel)
        assert [m.rows async for m in stub.Query(pb.Ask(messages=3, size=1000, max_rows=3000))] == [1000] * 3
        await session.settle()
        calls = probe.servicer.calls
        with pytest.raises(BudgetExceeded):
            await stub.One(pb.Ask(size=1))
        assert probe.servicer.calls == calls
        assert session.payer.signed == 3000


async def test_breaking_off_settles_what_was_taken(probe):
    async with probe.open() as (session, stub, btt):
        taken = 0
        call = stub.Many(pb.Ask(messages=50, size=100_000))
        async for message in call:
            taken += len(message.data)
            if taken >= 300_000:
                call.cancel()
                break
        async with asyncio.timeout(20):
            await session.settle()
        [live] = probe.sessions.all()
        assert live.payee.meter.owed == session.payer.tally.owed
        assert session.payer.tally.owed < PRICES[BYTES].rate.owed(50 * 100_000)
    assert btt.receipts[0].counts_agree
