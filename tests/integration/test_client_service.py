"""`client.service(Stub)`: any service on the paid channel, within a budget for the block and each call."""

from __future__ import annotations

import asyncio

import pytest

from btt.sdk.channel import Price
from btt.sdk.errors import BudgetExceeded, InvalidRequest, NoProviders, RateLimited
from btt.sdk.money import Rate, Unit
from kit.probe import BYTES, CALL_PRICES, ROWS, Calls, Probe, pb, rpc

ROW = Rate(1, 1, Unit.COUNT)
PRICES = {BYTES: Price(Rate.parse("1 BTT / GiB"), 1 << 20), ROWS: Price(ROW, 1000)}


@pytest.fixture
async def node(economy):
    probe = Probe()
    node = await economy.node(lambda r: rpc.add_ProbeServiceServicer_to_server(probe, r), PRICES)
    node.probe = probe
    return node


async def test_a_stub_pays_what_was_estimated(node, economy):
    async with economy.client(node, await economy.wallet()) as btt:
        service = btt.service(rpc.ProbeServiceStub, budget="0.01 BTT")
        assert service.name == "probe.v1.ProbeService"
        assert (await service.rates())[Unit.COUNT] == ROW
        cost = await service.estimate({Unit.COUNT: 300})
        assert cost == 300
        assert btt.receipts == [], "an estimate opens nothing"
        async with service as stub:
            rows = [m.rows async for m in stub.Query(pb.Ask(messages=3, size=100, max_rows=300))]
            assert rows == [100] * 3
        assert service.spent == cost
    [receipt] = btt.receipts
    assert receipt.counts_agree
    assert receipt.paid == receipt.owed == cost


@pytest.mark.parametrize("calls", [1, 4])
async def test_the_block_ends_before_its_budget_does(node, economy, calls):
    async with economy.client(node, await economy.wallet()) as btt:
        service = btt.service(rpc.ProbeServiceStub, budget="5000 base units")

        async def read(stub):
            return [m async for m in stub.Query(pb.Ask(messages=100, size=400, max_rows=40_000))]

        async with service as stub:
            found = await asyncio.gather(*(read(stub) for _ in range(calls)), return_exceptions=True)
            assert any(isinstance(each, BudgetExceeded) for each in found)
        assert 5000 - 1000 - calls * 1000 <= service.spent <= 5000
    [receipt] = btt.receipts
    assert receipt.paid == receipt.owed == service.spent, "also when many calls ran at once"


async def test_a_call_has_a_budget_of_its_own(node, economy):
    async with economy.client(node, await economy.wallet()) as btt:
        service = btt.service(rpc.ProbeServiceStub, budget="20000 base units", per_call="2000 base units")
        async with service as stub:
            for _ in range(3):
                got = 0
                with pytest.raises(BudgetExceeded, match="a call"):
                    async for _message in stub.Query(pb.Ask(messages=9, size=500, max_rows=9000)):
                        got += 1
                assert got == 3, "the fourth could have been of 1000 rows"
        assert service.spent == 3 * 3 * 500


async def test_what_a_request_costs_is_bounded_before_it_is_sent(economy):
    servicer = Calls()
    node = await economy.node(lambda r: rpc.add_CallsServiceServicer_to_server(servicer, r), CALL_PRICES)
    async with economy.client(node, await economy.wallet()) as btt:
        async with btt.service(rpc.CallsServiceStub, budget="3000 base units") as stub:
            with pytest.raises(BudgetExceeded, match="budget"):
                await stub.Upload(pb.Up(data=bytes(1 << 20)) for _ in range(9))
            assert servicer.taken <= 3
        service = btt.service(rpc.CallsServiceStub, budget="40 base units")
        async with service as stub:
            with pytest.raises(BudgetExceeded):
                for _ in range(5):
                    await stub.Fee(pb.Ask(size=1))
        assert service.spent <= 40


async def test_errors_of_free_methods_are_typed_too(node, economy):
    async with (
        economy.client(node, await economy.wallet()) as btt,
        btt.service(rpc.ProbeServiceStub, budget="0.001 BTT") as stub,
    ):
        with pytest.raises(RateLimited):
            for _ in range(6):
                await stub.Free(pb.Ask(size=1))


async def test_a_node_without_the_service_is_not_paid(node, economy):
    async with economy.client(node, await economy.wallet()) as btt:
        with pytest.raises(NoProviders, match="CallsService: 1 without this service"):
            async with btt.service(rpc.CallsServiceStub, budget="1 BTT"):
                pass
        with pytest.raises(InvalidRequest, match="not charge per CALL"):
            await btt.service(rpc.ProbeServiceStub, budget="1 BTT").estimate({Unit.CALL: 1})
        with pytest.raises(InvalidRequest, match="no amount"):
            btt.service(rpc.ProbeServiceStub, budget="a lot")
    assert btt.receipts == []
