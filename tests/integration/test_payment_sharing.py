"""One payer has one credit however many sessions and calls it runs, and many payers get on together."""

from __future__ import annotations

import asyncio
import statistics
from contextlib import AsyncExitStack

import pytest

from btt.node.payments.metering import Metering
from btt.sdk.channel import Price, PriceSheet
from btt.sdk.errors import ConfigError, CountsDiffer, InternalError, Overbilled
from btt.sdk.money import Rate, Unit
from kit.economy import RUN
from kit.patience import Rules
from kit.probe import CALL_PRICES, PRICES, ROWS, Calls, Probe, pb, rpc

UNIT = PriceSheet(b"", CALL_PRICES).unit_charge


@pytest.fixture
async def calls(economy):
    servicer = Calls()
    node = await economy.node(lambda r: rpc.add_CallsServiceServicer_to_server(servicer, r), CALL_PRICES)
    node.servicer = servicer
    return node


def mixed(stub, *, rounds=1):
    """Calls of all four kinds, each a coroutine that reads it to the end."""

    async def drain(stream):
        async for _ in stream:
            pass

    for _ in range(rounds):
        yield stub.Swap(pb.Up(data=bytes(RUN // 2), seconds=3, reply=RUN // 2))
        yield drain(stub.SwapMany(pb.Up(data=bytes(1000), seconds=3, reply=RUN)))
        yield stub.Upload([pb.Up(data=bytes(RUN // 2)) for _ in range(4)])
        yield drain(stub.Relay([pb.Up(data=bytes(RUN // 2), reply=RUN // 2) for _ in range(3)]))


async def _swallow(call):
    try:
        await call
    except Exception:  # noqa: BLE001 - how each ends is not the matter
        return False
    return True


async def test_sessions_and_connections_of_one_payer_share_one_credit(calls, economy):
    """Three sessions that do not pay get one unit together, with calls of all four kinds."""
    wallet = await economy.wallet()
    async with AsyncExitStack() as stack:
        work = []
        for _ in range(3):
            btt = await stack.enter_async_context(economy.client(calls, wallet))
            session = await btt.session(1_000_000)
            session._due = lambda: None
            stack.callback(setattr, btt.providers[0], "live", None)
            stack.push_async_callback(session.abandon)
            work += [asyncio.create_task(_swallow(c)) for c in mixed(rpc.CallsServiceStub(session.channel))]
        sessions = calls.sessions.all()
        assert len(sessions) == 3
        book = sessions[0]._book
        assert all(s._book is book for s in sessions)
        async with asyncio.timeout(30):
            while sum(len(s._waiting) for s in sessions) < sum(not task.done() for task in work):
                await asyncio.wait(work, timeout=0.01)
        owed = sum(s.payee.meter.owed for s in sessions)
        assert 0 < owed == book.standing.unpaid <= book.standing.credit == UNIT
        assert any(s.demand for s in sessions)
        for task in work:
            task.cancel()
        await asyncio.wait(work)


async def test_three_sessions_of_one_payer_finish_calls_of_all_kinds(calls, economy, monkeypatch):
    rules = Rules(monkeypatch, limit=64 * UNIT, unit=UNIT)
    wallet = await economy.wallet()
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(economy.client(calls, wallet)) for _ in range(3)]
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for btt in clients:
                session = await btt.session(1_000_000)
                for call in mixed(rpc.CallsServiceStub(session.channel), rounds=3):
                    group.create_task(_finish(call))
    assert rules.delivered > 50
    assert all(btt.receipts[0].counts_agree for btt in clients)
    assert len({btt.receipts[0].owed for btt in clients}) == 1


async def _finish(call):
    await call


async def test_five_hundred_calls_of_fifty_clients_share_fairly(calls, economy):
    """When half of all is delivered, the slowest client and the slowest call have most of their part."""
    clients, each, messages = 50, 10, 10
    got = [[0] * each for _ in range(clients)]
    half: list[list[int]] = []
    left = clients * each * messages // 2
    calls.servicer.gate = asyncio.Barrier(clients * each)

    async def read(client, call, stream):
        nonlocal left
        async for _ in stream:
            got[client][call] += 1
            left -= 1
            if not left:
                half.extend(map(list, got))

    async with AsyncExitStack() as stack:
        stubs = []
        for _ in range(clients):
            btt = await stack.enter_async_context(
                economy.client(calls, await economy.wallet(), keep_channels=True)
            )
            stubs.append(rpc.CallsServiceStub((await btt.session(200_000)).channel))
            await stubs[-1].Put(pb.Up())  # connects
        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            for client, stub in enumerate(stubs):
                orders = ["meet"] + [""] * (messages - 1)
                ups = [pb.Up(data=bytes(100), reply=65_536, order=order) for order in orders]
                for call in range(each):
                    many = pb.Up(seconds=messages, reply=65_536, order="meet")
                    stream = stub.Relay(ups) if call % 2 else stub.SwapMany(many)
                    group.create_task(read(client, call, stream))
    assert got == [[messages] * each] * clients
    by_call = [count for counts in half for count in counts]
    by_client = [sum(counts) for counts in half]
    fairness = {
        "clients": min(by_client) / statistics.median(by_client),
        "calls": min(by_call) / statistics.median(by_call),
    }
    print(f"slowest over median at half: {fairness}")
    assert fairness["clients"] >= 0.7, by_client
    assert fairness["calls"] >= 0.4, half


# A plugin that bills what it likes


class Greedy(Probe):
    async def Query(self, request, context):  # noqa: N802
        yield pb.Rows(rows=request.messages or (request.size * 10**12 if request.size else 999))


async def test_a_plugin_that_states_a_million_million_units_gets_nothing(economy):
    """More than its method declares does not leave the node."""
    node = await economy.node(lambda r: rpc.add_ProbeServiceServicer_to_server(Greedy(), r), PRICES)
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(1_000_000)
        with pytest.raises(InternalError, match="larger message than it declares"):
            async for _ in rpc.ProbeServiceStub(session.channel).Query(pb.Ask(size=1, max_rows=2**63)):
                raise AssertionError("nothing passes")
        await session.settle()
        assert session.payer.signed == session.payer.tally.owed == 0


async def test_a_plugin_that_bills_above_the_callers_cap_gets_nothing(economy):
    """999 rows are what its method may send; the caller allowed 10."""
    node = await economy.node(lambda r: rpc.add_ProbeServiceServicer_to_server(Greedy(), r), PRICES)
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(1_000_000)
        with pytest.raises(Overbilled, match="bills 999 units; the request allowed 10"):
            async for _ in rpc.ProbeServiceStub(session.channel).Query(pb.Ask(max_rows=10)):
                raise AssertionError("nothing passes")
        await session.settle()
        assert session.payer.signed == session.payer.tally.owed == 0


async def test_a_node_that_sends_more_than_its_method_declares_gets_nothing(economy, monkeypatch):
    """The node ignores its own bound, and the caller's request would allow any number."""
    monkeypatch.setattr(Metering, "count", lambda self, message, wire=None: [])
    node = await economy.node(lambda r: rpc.add_ProbeServiceServicer_to_server(Greedy(), r), PRICES)
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(1_000_000)
        ask = pb.Ask(messages=1001, max_rows=2**63)
        with pytest.raises(CountsDiffer, match="more units than its service allows"):
            async for _ in rpc.ProbeServiceStub(session.channel).Query(ask):
                raise AssertionError("it is not handed over")
        assert isinstance(session.error, CountsDiffer)
        assert session.payer.signed == session.payer.tally.owed == 0
        await session.abandon()
        btt.providers[0].live = None


async def test_a_plugin_whose_unit_is_beyond_what_anyone_may_owe_is_not_started(tmp_path):
    from btt.node.config import ServiceSection
    from btt.node.limits.limiter import Limiter
    from btt.node.metrics import NodeMetrics
    from btt.node.plugins.host import Surroundings
    from btt.node.quota import Quotas
    from btt.node.registry import Registry

    class Plugin:
        name = "greedy"

        def __init__(self, context): ...

        def register(self, server):
            rpc.add_ProbeServiceServicer_to_server(Greedy(), server)

        def prices(self):
            return {**PRICES, ROWS: Price(Rate(1, 1, Unit.COUNT), 10**12)}

        async def start(self): ...

    limiter = Limiter(lambda: 0.0)
    around = Surroundings(folder=tmp_path, clock=lambda: 0, limiter=limiter.of, metrics=NodeMetrics(None).of,
                          quota=Quotas(None).of, meter=None)  # fmt: skip
    made = Registry({"greedy": lambda: Plugin}, around=around, limiter=limiter, credit_limit=10**9)
    (host,) = made.configure({"greedy": ServiceSection(enabled=True)})
    with pytest.raises(ConfigError, match="more than anyone may owe"):
        await made.begin(host)
