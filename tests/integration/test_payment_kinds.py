"""A real paid method of each kind, charged both ways, over real sockets: requests, responses and fees."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import grpc
import pytest

from btt.node.payments import metering
from btt.proto.common.v1.document_pb2 import SignedDocument
from btt.proto.payment.v1 import payment_pb2
from btt.sdk.errors import BudgetExceeded, CountsDiffer, InvalidRequest, RemoteError
from btt.sdk.payment.options import method_charge
from kit.economy import RUN
from kit.probe import CALL_PRICES, FEES, SECONDS, UP_BYTES, Calls, Unchecked, pb, rpc

BYTE, COUNT, CALL = (CALL_PRICES[line].rate for line in (UP_BYTES, SECONDS, FEES))


@pytest.fixture
async def calls(economy):
    """A node with every kind of call; `open` gives a payer's session and stub."""
    servicer = Calls()
    node = await economy.node(lambda r: rpc.add_CallsServiceServicer_to_server(servicer, r), CALL_PRICES)
    node.servicer = servicer

    @asynccontextmanager
    async def open_session(need=1_000_000, **options):
        async with economy.client(node, await economy.wallet(), **options) as btt:
            session = await btt.session(need)
            async with asyncio.timeout(30):
                yield session, rpc.CallsServiceStub(session.channel)
        [receipt] = btt.receipts
        assert receipt.counts_agree
        assert receipt.owed == receipt.captured

    node.open = open_session
    return node


def counted(session, *, data=0, seconds=0, fees=0):
    """Both sides hold exactly this, and it is what the rates say."""
    units = {s.line: n for s, _, n in session.payer.tally if n}
    wanted = {UP_BYTES: data, SECONDS: seconds, FEES: fees}
    assert units == {line: n for line, n in wanted.items() if n}
    assert session.payer.tally.owed == BYTE.owed(data) + COUNT.owed(seconds) + CALL.owed(fees)


def books(node):
    [live] = node.sessions.all()
    return live.payee


async def ups(*sizes, **fields):
    for size in sizes:
        yield pb.Up(data=bytes(size), **fields)


async def test_unary_unary_pays_request_response_and_fee(calls):
    async with calls.open() as (session, stub):
        assert (await stub.Put(pb.Up(data=bytes(1000), seconds=7))).taken == 1000
        assert len((await stub.Swap(pb.Up(data=bytes(10), reply=5000))).data) == 5000
        await stub.Fee(pb.Ask(size=100_000))
        await session.settle()
        counted(session, data=6010, seconds=7, fees=4)
        assert books(calls).meter.owed == session.payer.tally.owed == session.payer.signed


async def test_unary_stream_pays_request_responses_and_fee(calls):
    async with calls.open() as (session, stub):
        got = [len(m.data) async for m in stub.SwapMany(pb.Up(data=bytes(500), seconds=4, reply=RUN - 4))]
        assert got == [RUN - 4] * 4
        assert [m async for m in stub.SwapMany(pb.Up(data=bytes(600)))] == []  # a good end without one
        await session.settle()
        counted(session, data=1100 + 4 * (RUN - 4), seconds=4, fees=2)


async def test_stream_unary_pays_what_is_acknowledged_far_beyond_the_credit(calls):
    async with calls.open() as (session, stub):
        assert (await stub.Upload(ups(*[RUN] * 12))).taken == 12 * RUN
        assert len((await stub.UploadSwap(ups(100, 200, reply=1000))).data) == 2000
        await session.settle()
        counted(session, data=12 * RUN + 2300, fees=1)
        assert not books(calls).meter.written_off


async def test_stream_stream_pays_both_ways_at_once(calls):
    async with calls.open() as (session, stub):
        sizes = [len(m.data) async for m in stub.Relay(ups(*[RUN] * 6, reply=RUN - 1))]
        assert sizes == [RUN - 1] * 6
        await session.settle()
        counted(session, data=6 * (2 * RUN - 1), fees=1)
        assert not books(calls).meter.written_off


async def test_the_write_and_read_interface_is_metered_too(calls):
    async with calls.open() as (session, stub):
        call = stub.Relay()
        for size in (1000, 2000):
            await call.write(pb.Up(data=bytes(size), reply=size))
            assert len((await call.read()).data) == size
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        upload = stub.Upload()
        await upload.write(pb.Up(data=bytes(300)))
        await upload.done_writing()
        assert (await upload).taken == 300
        await session.settle()
        counted(session, data=6300, fees=2)


async def test_a_plain_iterable_of_requests_is_metered_too(calls):
    async with calls.open() as (session, stub):
        assert (await stub.Upload([pb.Up(data=bytes(10)), pb.Up(data=bytes(5))])).taken == 15
        await session.settle()
        counted(session, data=15, fees=1)


async def test_requests_that_are_not_charged_stream_freely(calls):
    async with calls.open() as (session, stub):
        asks = [pb.Ask(messages=2, size=10, max_rows=20), pb.Ask(messages=1, size=30, max_rows=30)]
        assert [m.rows async for m in stub.Search(iter(asks))] == [10, 10, 30]
        await session.settle()
        counted(session, seconds=50, fees=1)


async def test_verdicts_decide_on_responses_and_acknowledgements_on_requests(calls):
    async with calls.open() as (session, stub):
        with session.verdicts() as verdicts:
            number = 0
            async for message in stub.RelayChecked(ups(100, 100, 100, reply=1000)):
                number += 1
                (verdicts.reject if number == 2 else verdicts.accept)(message)
        await session.settle()
        counted(session, data=300 + 2000)


# Fees


async def test_a_fee_is_owed_with_the_first_response_or_a_good_end_and_once(calls):
    async with calls.open() as (session, stub):
        assert len([m async for m in stub.FeeMany(pb.Ask(messages=3, size=10))]) == 3
        await session.settle()
        counted(session, data=30, fees=2)
        assert [m async for m in stub.FeeMany(pb.Ask())] == []
        assert [m async for m in stub.Search(iter([]))] == []
        assert (await stub.Upload(iter([]))).taken == 0
        await session.settle()
        counted(session, data=30, fees=2 + 2 + 1 + 1)


async def test_a_refused_call_costs_nothing_and_is_no_mark_against_its_payer(calls):
    async with calls.open() as (session, stub):
        with pytest.raises(RemoteError, match="nothing asked"):
            await stub.Fee(pb.Ask())
        for order in ("refuse", "code"):
            request = pb.Up(data=bytes(RUN), reply=1, order=order)
            for call in (stub.Put(request), stub.Swap(request)):
                with pytest.raises(RemoteError):
                    await call
            with pytest.raises(RemoteError):
                assert [m async for m in stub.SwapMany(request)] == []
        request = pb.Up(data=bytes(RUN), reply=1, order="refuse")
        with pytest.raises(RemoteError):
            await stub.Upload([request])
        with pytest.raises(RemoteError):
            assert [m async for m in stub.Relay([request])] == []
        await session.settle()
        assert books(calls).standing.written_off == 0
        counted(session)


async def test_a_defect_of_the_service_costs_only_what_it_had_acknowledged(calls):
    async with calls.open() as (session, stub):
        good, bad = pb.Up(data=bytes(1000), reply=100), pb.Up(data=bytes(RUN), order="raise")
        with pytest.raises(RemoteError):
            await stub.Swap(bad)
        with pytest.raises(RemoteError):
            await stub.Upload([good, bad])
        got = []
        with pytest.raises(RemoteError):
            async for message in stub.Relay([good, bad]):
                got.append(message)
        await session.settle()
        assert len(got) == 1
        assert books(calls).standing.written_off == 0
        counted(session, data=1000 + 1100, fees=2)


async def test_a_rejected_first_response_takes_its_fee_with_it(calls):
    async with calls.open() as (session, stub):
        with session.verdicts() as verdicts:
            async for message in stub.FeeChecked(pb.Ask(messages=1, size=10)):
                verdicts.reject(message)
        await session.settle()
        counted(session)
        with session.verdicts() as verdicts:
            async for message in stub.FeeChecked(pb.Ask(messages=2, size=10)):
                verdicts.accept(message)
        await session.settle()
        counted(session, data=20, fees=2)


async def test_fees_stand_in_the_statement(calls, economy):
    async with economy.client(calls, await economy.wallet()) as btt:
        session = await btt.session(1_000_000)
        stub = rpc.CallsServiceStub(session.channel)
        await stub.Fee(pb.Ask(size=1))
        await session.settle()
        receipt = await btt.close_session()
        document = SignedDocument.FromString(receipt.statement)
        statement = payment_pb2.SessionStatement.FromString(document.payload)
        [fee] = [c for c in statement.settled if c.units]
        assert (fee.service, fee.unit, fee.units) == (FEES.service, 3, 3)
        assert statement.owed == CALL.owed(3)


# What holds against each other


async def test_a_node_takes_no_request_beyond_the_bound():
    session = SimpleNamespace(begin=lambda call_id: None)
    for charge in map(method_charge, ("/probe.v1.CallsService/Put", "/probe.v1.CallsService/Upload")):
        begun = metering.Metering(session, bytes(16), charge, lambda count: None)
        with pytest.raises(InvalidRequest, match="carries at most"):
            await begun.hold(pb.Up(data=bytes(RUN + 1)))


async def test_a_request_beyond_the_bound_or_the_budget_is_never_sent(calls, monkeypatch):
    async with calls.open(budget="5000 base units", need=5000) as (session, stub):
        with monkeypatch.context() as node:
            node.setattr(metering.Metering, "_asked", lambda self, request: [])  # it would take them
            for call in (stub.Put(pb.Up(data=bytes(RUN + 1))), stub.Upload([pb.Up(data=bytes(RUN + 1))])):
                with pytest.raises(InvalidRequest, match="carries at most"):
                    await call
        with pytest.raises(BudgetExceeded):
            await stub.Upload(ups(*[RUN] * 6))
        assert calls.servicer.taken <= 4  # 5000 buys four runs and a part
        with pytest.raises(InvalidRequest):
            assert [m async for m in stub.Relay([pb.Up(seconds=RUN + 1)])] == []
        await session.settle()
        assert session.payer.tally.owed <= session.payer.signed <= 5000


async def test_what_the_caller_raises_in_its_requests_reaches_the_caller(calls):
    async def broken():
        yield pb.Up(data=bytes(10))
        raise LookupError("the disk is gone")

    async with calls.open() as (session, stub):
        for _ in range(3):
            with pytest.raises(LookupError):
                await stub.Upload(broken())
            with pytest.raises(LookupError):
                assert len([m async for m in stub.Relay(broken())]) == 0
        await session.settle()


async def test_a_node_that_acknowledges_what_was_not_sent_is_left_unpaid(calls, economy, monkeypatch):
    from btt.node.payments.session import Session

    real = Session.acknowledge
    monkeypatch.setattr(Session, "acknowledge", lambda self, call, n: real(self, call, n + 5))
    async with economy.client(calls, await economy.wallet()) as btt:
        session = await btt.session(1_000_000)
        stub = rpc.CallsServiceStub(session.channel)
        with pytest.raises(CountsDiffer, match="not sent"):
            await stub.Upload([pb.Up(data=bytes(10)), pb.Up(order="hang")], timeout=20)
        assert session.payer.tally.owed == 0
        await session.abandon()
        btt.providers[0].live = None


async def test_the_cap_of_a_stream_is_what_all_its_requests_allow_together(calls, economy, monkeypatch):
    monkeypatch.setattr(metering, "Bills", Unchecked)
    async with economy.client(calls, await economy.wallet()) as btt:
        session = await btt.session(1_000_000)
        stub = rpc.CallsServiceStub(session.channel)
        asks = [pb.Ask(messages=1, size=10, max_rows=10), pb.Ask(messages=2, size=10, max_rows=15)]
        with pytest.raises(CountsDiffer, match="bills 30 units; the request allowed 25"):
            async for _ in stub.Search(asks):
                pass
        assert session.payer.tally.owed <= COUNT.owed(20) + CALL.owed(1)
        await session.abandon()
        btt.providers[0].live = None


async def test_the_service_stops_reading_while_nothing_is_paid(calls, economy):
    """A request is let in only while the credit covers it; the rest waits at its sender."""
    async with economy.client(calls, await economy.wallet()) as btt:
        session = await btt.session(1_000_000)
        session._due = lambda: None  # a payer that acknowledges and does not pay
        stub = rpc.CallsServiceStub(session.channel)
        sent = 0

        async def flood():
            nonlocal sent
            while True:
                sent += 1
                yield pb.Up(data=bytes(RUN))

        call = stub.Upload(flood())
        [live] = calls.sessions.all()
        async with asyncio.timeout(30):
            while not live._waiting:
                await live._news.wait()
                await asyncio.sleep(0)
        taken = calls.servicer.taken
        unit = calls.policy.unit
        assert taken == unit // BYTE.owed(RUN)  # all that its credit of one unit covers
        for _ in range(200):
            await asyncio.sleep(0)
        assert calls.servicer.taken == taken
        assert sent <= taken + 16
        call.cancel()
        await session.abandon()


async def test_a_reader_that_never_reads_holds_few_messages_on_the_node(calls):
    async with calls.open() as (session, stub):
        call = stub.SwapMany(pb.Up(seconds=10_000, reply=100_000))
        reader = aiter(call)
        await anext(reader)
        before = -1
        while before != calls.servicer.sent:
            before = calls.servicer.sent
            for _ in range(500):
                await asyncio.sleep(0)
        # What the first reading of one unit's credit paid for, and no more, has been made.
        assert calls.servicer.sent <= 2 * calls.policy.unit // BYTE.owed(100_000) + 2
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await anext(reader)
        await session.settle()


async def test_handlers_reach_no_way_around_the_meter(calls, economy, monkeypatch):
    async def upload(self, requests, context):
        await context.read()
        return pb.Done()

    async def relay(self, requests, context):
        await context.write(pb.Bytes(data=b"free"))
        yield pb.Bytes()

    monkeypatch.setattr(Calls, "Upload", upload)
    monkeypatch.setattr(Calls, "Relay", relay)
    node = await economy.node(lambda r: rpc.add_CallsServiceServicer_to_server(Calls(), r), CALL_PRICES)
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(1_000_000)
        stub = rpc.CallsServiceStub(session.channel)
        with pytest.raises(Exception, match="takes its requests from the iterator"):
            await stub.Upload(ups(10))
        with pytest.raises(Exception, match="yields its responses"):
            async for _ in stub.Relay(ups(10)):
                raise AssertionError("nothing passes")
        await session.settle()
        assert session.payer.tally.owed == 0


async def test_a_call_that_overtakes_the_payment_stream_waits_for_it(calls, economy, monkeypatch):
    """Both have a connection of their own, so either may come first."""
    from btt.node.payments.session import Session

    arrived, attach, until = asyncio.Event(), Session.attach, Session.until_attached
    late = []
    monkeypatch.setattr(Session, "attach", lambda session: late.append(session))

    async def waits(session):
        arrived.set()
        await until(session)

    monkeypatch.setattr(Session, "until_attached", waits)
    async with economy.client(calls, await economy.wallet()) as btt:
        stub = rpc.CallsServiceStub((await btt.session(1_000_000)).channel)
        call = asyncio.ensure_future(stub.Put(pb.Up(data=b"1")))
        await arrived.wait()
        while not late:
            await asyncio.wait([call], timeout=0.01)
        attach(late[0])
        assert (await call).taken == 1
