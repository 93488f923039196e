"""What a service sees of its meter: who pays, what is counted, and a way to acknowledge; no more."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from btt.node.payments.charged import Charged, RunningCall
from btt.sdk.errors import BttError
from btt.sdk.keys import PrivateKey
from btt.sdk.money import Unit
from btt.sdk.payment.apps import sign_grant
from kit.probe import CALL_PRICES, PRICES, Calls, Probe, pb, rpc
from kit.reach import reachable


class Watched(Calls):
    """Looks at the meter wherever it is; `seen` is what it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.calls = []

    async def _take(self, request, context):
        call = RunningCall().call()
        self.calls.append(call)
        self.seen.append((call.payer, call.app, dict(call.units), call.paid))
        if request.order == "acknowledge":
            call.acknowledge()
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no more of these")
        await super()._take(request, context)


@pytest.fixture
async def served(economy):
    servicer = Watched()
    node = await economy.node(lambda r: rpc.add_CallsServiceServicer_to_server(servicer, r), CALL_PRICES)
    return node, servicer


async def test_a_service_sees_who_pays_and_what_is_counted(served, economy):
    node, servicer = served
    app, wallet = PrivateKey.generate(), await economy.wallet()

    async def grant(channel_key, ledger_id):
        until = node.clock() + 3_600_000
        return sign_grant(app, channel_key=channel_key, ledger_id=ledger_id, valid_until_ms=until)

    async with economy.client(node, wallet, app=grant) as btt:
        session = await btt.session(1_000_000)
        stub = rpc.CallsServiceStub(session.channel)
        request = pb.Up(data=bytes(1000), reply=10)
        assert [len(m.data) async for m in stub.Relay([request, request])] == [10, 10]
        await stub.Upload([request])
        await stub.Put(request)
        await session.settle()
    payers, apps, units, _ = zip(*servicer.seen, strict=True)
    assert set(payers) == {wallet.account.address}
    assert set(apps) == {app.public.address}
    counted = [seen.get(Unit.BYTE, 0) for seen in units]
    assert counted[:3] == [1000, 2010, 1000], "of this call, both ways"
    assert counted[3] >= 1000
    assert [call.units for call in servicer.calls] == [{}] * 4, "what is settled is no longer counted"


async def test_without_an_application_there_is_none_and_a_payer_is_known_by_what_it_paid(served, economy):
    node, servicer = served
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(10_000_000)
        stub = rpc.CallsServiceStub(session.channel)
        for _ in range(2):
            await stub.Put(pb.Up(data=bytes(1 << 20)))
            await session.settle()
    assert [app for _, app, _, _ in servicer.seen] == [None, None]
    assert [paid for *_, paid in servicer.seen] == [0, 977]


async def test_what_a_service_acknowledged_is_paid_though_it_refuses_then(served, economy):
    node, _ = served

    async def owed(order):
        async with economy.client(node, await economy.wallet()) as btt:
            session = await btt.session(1_000_000)
            stub = rpc.CallsServiceStub(session.channel)
            with pytest.raises(BttError, match="INVALID_ARGUMENT"):
                await stub.Upload([pb.Up(data=bytes(1_000_000), order=order)])
            await session.settle()
        [receipt] = btt.receipts
        assert receipt.counts_agree
        return receipt.paid

    assert await owed("refuse") == 0
    assert await owed("acknowledge") == 932 + 10  # 1,000,000 bytes at 1 BTT / GiB, and the fee


async def test_a_free_call_has_no_meter_and_a_task_has_that_of_its_call(economy):
    seen = []

    class Looking(Probe):
        async def Free(self, request, context):  # noqa: N802
            seen.append(RunningCall().call())
            return await super().Free(request, context)

        async def One(self, request, context):  # noqa: N802
            async def work():
                seen.append(RunningCall().call())

            await asyncio.create_task(work())
            return await super().One(request, context)

    node = await economy.node(lambda r: rpc.add_ProbeServiceServicer_to_server(Looking(), r), PRICES)
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(100_000)
        stub = rpc.ProbeServiceStub(session.channel)
        await stub.One(pb.Ask(size=4))
        await stub.Free(pb.Ask(size=4))
    paid, free = seen
    assert isinstance(paid, Charged)
    assert free is None
    assert RunningCall().call() is None
    assert not [thing for thing in reachable(paid) if isinstance(thing, PrivateKey)]
