"""Integers in responses are bills: the caller's cap holds on the node, and again at the caller."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from btt.node.payments import metering
from btt.sdk.channel import Line
from btt.sdk.errors import CountsDiffer, InternalError, Overbilled
from btt.sdk.money import Unit
from kit.probe import BILL_PRICES, BILLS, Bills, Unchecked, pb, rpc

BYTE, COUNT, CALL = (BILL_PRICES[Line(BILLS, unit)].rate for unit in (Unit.BYTE, Unit.COUNT, Unit.CALL))


@pytest.fixture
async def node(economy):
    servicer = Bills()
    node = await economy.node(lambda r: rpc.add_BillsServiceServicer_to_server(servicer, r), BILL_PRICES)
    node.servicer = servicer
    return node


async def all_of(stream):
    return [message async for message in stream]


def order(bill, **fields):
    return pb.Order(data=bytes(20), max_rows=10, bill=bill, messages=1, **fields)


def calls(stub, bill):
    """A call of each kind; each allows ten rows."""
    ask = pb.Ask(size=bill, max_rows=10)
    yield "Total", lambda: stub.Total(ask)
    yield "Sort", lambda: stub.Sort(order(bill))
    yield "List", lambda: all_of(stub.List(order(bill)))
    yield "Sum", lambda: stub.Sum(iter([ask]))
    yield "Merge", lambda: all_of(stub.Merge(iter([order(bill)])))


@pytest.mark.parametrize("bill", [11, 999])
async def test_no_plugin_sends_more_than_its_caller_allows(node, economy, bill):
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(100_000)
        for method, call in calls(rpc.BillsServiceStub(session.channel), bill):
            with (
                capture_logs() as logs,
                pytest.raises(Overbilled, match=f"bills {bill} units; the request allowed 10") as said,
            ):
                await call()
            assert said.value.by == "node"
            assert [(log["event"], log["method"]) for log in logs] == [
                ("service.overbilled", f"/{BILLS}/{method}")
            ]
        await session.settle()
        # The request of a stream was acknowledged by the response that was not sent; its fee with it.
        assert session.payer.tally.owed == BYTE.owed(20) + CALL.owed(1)
        assert session.error is None, "an honest node goes on"
        for _, call in calls(rpc.BillsServiceStub(session.channel), 10):
            await call()
    [receipt] = btt.receipts
    assert receipt.counts_agree


async def test_a_plugin_that_states_a_million_million_units_gets_nothing_whatever_it_may_send(node, economy):
    node.servicer.bill = 10**12
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(100_000)
        for _, call in calls(rpc.BillsServiceStub(session.channel), 0):
            with pytest.raises(InternalError):
                await call()
        await session.settle()
        assert session.payer.tally.owed <= BYTE.owed(20) + CALL.owed(1)


async def test_within_the_cap_it_is_paid_as_asked_also_if_the_plugin_changes_its_request(node, economy):
    """It raises `max_rows`, and the bytes that it was sent, in the very message that it is given."""
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(100_000)
        for _, call in calls(rpc.BillsServiceStub(session.channel), 10):
            await call()
        await session.settle()
        [live] = node.sessions.all()
        owed = BYTE.owed(3 * 20) + COUNT.owed(5 * 10) + CALL.owed(4)
        assert live.payee.meter.owed == session.payer.tally.owed == owed
        assert live.payee.standing.written_off == 0, "nor was more charged, and excused at the end"


async def test_the_caps_of_many_requests_add_up_as_they_come(node, economy):
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(100_000)
        stub = rpc.BillsServiceStub(session.channel)
        first = pb.Order(max_rows=10, bill=4, messages=2)
        second = pb.Order(max_rows=3, bill=5, messages=1)
        third = pb.Order(max_rows=1, bill=2, messages=1)
        got = []
        with pytest.raises(Overbilled, match="bills 15 units; the request allowed 14"):
            async for message in stub.Merge(iter([first, second, third])):
                got.append(message.rows)
        assert got == [4, 4, 5]


async def test_a_node_that_checks_nothing_is_left_unpaid_by_the_caller(economy, monkeypatch):
    monkeypatch.setattr(metering, "Bills", Unchecked)
    for number in range(5):
        servicer = Bills()
        node = await economy.node(
            lambda r, s=servicer: rpc.add_BillsServiceServicer_to_server(s, r), BILL_PRICES
        )
        async with economy.client(node, await economy.wallet()) as btt:
            session = await btt.session(100_000)
            _, call = list(calls(rpc.BillsServiceStub(session.channel), 999))[number]
            with pytest.raises(CountsDiffer, match="bills 999 units; the request allowed 10"):
                await call()
            assert isinstance(session.error, CountsDiffer)
            assert session.payer.tally.owed <= BYTE.owed(20) + CALL.owed(1)
            await session.abandon()
            btt.providers[0].live = None
