"""`client.service(Stub)`: any service on the paid channel, within a budget for the block and each call."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from btt.sdk import Budget, Client
from btt.sdk.channel import Price
from btt.sdk.errors import (
    BudgetExceeded,
    ConfigError,
    InvalidRequest,
    LedgerUnreachable,
    NoProviders,
    RateLimited,
)
from btt.sdk.money import BTT, SUPPLY, Rate, Unit
from kit.probe import BILL_PRICES, BYTES, CALL_PRICES, ROWS, Bills, Calls, Probe, pb, rpc

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


UP = pb.Up(data=bytes(700), seconds=3, reply=900)
ORDER = pb.Order(data=bytes(20), max_rows=10, bill=4, messages=2)
ASK = pb.Ask(messages=2, size=5, max_rows=10)
COSTS = [
    # Method, its requests, what it costs at least and at most by hand: 1 BTT / GiB, 1 / 1000 s, 10 a fee.
    ("Fee", [ASK], 30, 30),
    ("FeeMany", [ASK], 20, None),
    ("FeeChecked", [ASK], 0, None),
    ("Put", [UP], 0, 2),
    ("Swap", [UP], 10, 10 + 978 + 1),
    ("SwapMany", [UP], 10, None),
    ("Upload", [UP, UP], 10, 13),
    ("UploadSwap", [UP, UP], 0, 979),
    ("Relay", [UP, UP], 10, None),
    ("Search", [ASK, ASK], 10, 11),
    # 1 / 10 bytes, 3 a row, 7 a fee
    ("Total", [ASK], 7, 7 + 30),
    ("Sort", [ORDER], 9, 9 + 30),
    ("List", [ORDER], 2, 2 + 30),
    ("Sum", [ASK, ASK], 7, 7 + 60),
    ("Merge", [ORDER, ORDER], 7, 7 + 4 + 60),
]


@pytest.fixture
async def every_kind(economy):
    def register(registrar):
        rpc.add_CallsServiceServicer_to_server(Calls(), registrar)
        rpc.add_BillsServiceServicer_to_server(Bills(), registrar)

    return await economy.node(register, {**CALL_PRICES, **BILL_PRICES})


async def test_an_estimate_bounds_what_is_paid_and_suffices_as_a_budget(every_kind, economy):
    """In calls of every kind, one after the other, so that what was rounded before counts, too."""
    async with economy.client(every_kind, await economy.wallet()) as btt:
        session = await btt.session(2_000_000)
        for method, requests, least, most in COSTS * 2:
            stub = rpc.CallsServiceStub if hasattr(rpc.CallsServiceServicer, method) else rpc.BillsServiceStub
            service = btt.service(stub, budget="1 BTT")
            cost = await service.estimate_call(method, *requests)
            assert (cost.least, cost.most) == (least, most), method
            budget = cost.most if cost.most is not None else "1 BTT"
            await session.settle()
            before = session.payer.tally.owed
            async with btt.service(stub, budget=budget, per_call=budget) as made:
                with service.verdicts() as verdicts:
                    call = getattr(made, method)(requests[0] if len(requests) == 1 else iter(requests))
                    if hasattr(call, "__aiter__"):
                        async for message in call:
                            if method == "FeeChecked":
                                verdicts.accept(message)
                    else:
                        await call
            await session.settle()
            paid = session.payer.tally.owed - before
            assert least <= paid <= (paid if most is None else most), method
    [receipt] = btt.receipts
    assert receipt.counts_agree


async def test_an_estimate_says_what_is_not_bounded_and_what_cannot_be_asked(every_kind, economy):
    async with economy.client(every_kind, await economy.wallet()) as btt:
        calls = btt.service(rpc.CallsServiceStub, budget="1 BTT")
        assert (await calls.estimate_call("FeeMany", ASK)).rates == {Unit.BYTE: Rate.parse("1 BTT / GiB")}
        for method, requests, said in (
            ("Nope", [ASK], "no method 'Nope'; it has Fee, "),
            ("Fee", [ASK, ASK], "takes one request, not 2"),
            ("Fee", [UP], "takes probe.v1.Ask, not probe.v1.Up"),
            ("Put", [pb.Up(data=bytes(1 << 20), seconds=1)], "carries at most 1048576"),
        ):
            with pytest.raises(InvalidRequest, match=said):
                await calls.estimate_call(method, *requests)
    assert btt.receipts == []


async def test_a_budget_below_the_estimate_is_refused_before_the_request(every_kind, economy):
    async with economy.client(every_kind, await economy.wallet()) as btt:
        async with btt.service(rpc.BillsServiceStub, budget="1 BTT", per_call="38 base units") as stub:
            with pytest.raises(BudgetExceeded, match="a call"):
                await stub.Sort(ORDER)
        async with btt.service(rpc.BillsServiceStub, budget="1 BTT", per_call="39 base units") as stub:
            assert (await stub.Sort(ORDER)).rows == 4
            asked = []

            def orders():
                for number in range(3):
                    asked.append(number)
                    yield pb.Order(max_rows=5)

            with pytest.raises(BudgetExceeded, match="a call"):  # the third would allow 15 together
                assert [m async for m in stub.Merge(orders())] == []
            assert asked == [0, 1, 2]
            await (await btt.session(0)).settle()
    assert 2 + 7 + 12 <= btt.receipts[0].owed <= 2 + 7 + 12 + 7, "the first call; the other's fee at most"


async def test_what_is_free_costs_nothing(node, economy):
    async with economy.client(node, await economy.wallet()) as btt:
        cost = await btt.service(rpc.ProbeServiceStub, budget="1 BTT").estimate_call("Free", pb.Ask())
        assert (cost.least, cost.most, cost.rates) == (0, 0, {})


async def test_a_ledger_that_is_away_costs_no_open_files(economy, tmp_path):
    ledger = replace(economy.running.address, port=1)
    btt = Client.connect(
        "127.0.0.1:1", budget=Budget("1 BTT"), ledger=str(ledger), wallet=await economy.wallet()
    )
    async with btt:

        async def files_after_a_try() -> int:
            with pytest.raises(LedgerUnreachable):
                await btt.ledger()
            return len(list(Path("/dev/fd").iterdir()))

        before = await files_after_a_try()
        assert {await files_after_a_try() for _ in range(3)} == {before}


async def test_a_client_is_of_no_use_after_its_block_until_it_is_entered_again(node, economy):
    btt = economy.client(node, await economy.wallet())
    for _ in range(2):
        async with btt:
            await btt.session(10)
        for use in (btt.node, btt.ledger, btt.purse, lambda: btt.session(10)):
            with pytest.raises(ConfigError, match="not open"):
                await use()
    async with btt:
        pass
    assert len(btt.receipts) == 2


async def test_a_price_beyond_all_there_is_is_never_paid_and_no_crash(economy):
    dear = {line: Price(Rate(SUPPLY, 1, line.unit), price.verify_units) for line, price in PRICES.items()}
    node = await economy.node(
        lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), dear, strangers_units=0
    )
    wallet = await economy.wallet()
    ask = pb.Ask(messages=1, size=2, max_rows=2)
    async with economy.client(node, wallet) as btt:
        service = btt.service(rpc.ProbeServiceStub, budget="1 BTT")
        assert await service.estimate({Unit.COUNT: 2}) == SUPPLY
        assert (await service.estimate_call("Query", ask)).most == SUPPLY
        with pytest.raises(BudgetExceeded):
            async with service as stub:
                [_ async for _ in stub.Query(ask)]
        with pytest.raises(BudgetExceeded):
            await btt.session(2 * SUPPLY)
    assert (await economy.ledger.account(wallet.account)).available == 100 * BTT
