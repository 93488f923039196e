"""The conformance kit finds what it is for: each service below is wrong in one way."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

pytest.importorskip("libtorrent", reason="the node's parts are not installed")

from btt.sdk.channel import Price
from btt.sdk.errors import BttError, QuotaFull
from btt.sdk.money import Rate, Unit
from btt.sdk.plugin import check_keys, read_rate
from btt.sdk.rpc import abort
from btt.sdk.testing import conformance
from btt.sdk.testing.conformance import Case
from kit.probe import CALL_PRICES, ROWS, Calls, pb, rpc

ALL = {
    "typed configuration errors",
    "registered",
    "every method is tried",
    "refused without payment",
    "paid as counted",
    "books agree after a cancelled call",
    "a full quota is told",
    "stops",
    "leaves no task",
}
UP = pb.Up(data=b"12345", seconds=2, reply=30)
REQUESTS = {
    "Fee": [pb.Ask(messages=3, size=20)],
    "FeeMany": [pb.Ask(messages=3, size=20)],
    "FeeChecked": [pb.Ask(messages=3, size=20)],
    "Put": [UP],
    "Swap": [UP],
    "SwapMany": [UP],
    "Upload": [UP, UP, UP],
    "UploadSwap": [UP, UP, UP],
    "Relay": [UP, UP, UP],
    "RelayChecked": [UP, UP, UP],
    "Search": [pb.Ask(messages=2, size=5, max_rows=10)],
}


class Good:
    """All four kinds of calls, charged both ways."""

    name = "probe"

    def __init__(self, context):
        check_keys(context.config, known=("rate",))
        read_rate(context.config, "rate", default="1 BTT / unit", unit=Unit.COUNT)

    async def start(self):
        pass

    def register(self, server):
        rpc.add_CallsServiceServicer_to_server(Calls(), server)

    def prices(self):
        return CALL_PRICES

    async def stop(self):
        pass


def case(plugin, **options):
    made = {"stubs": [rpc.CallsServiceStub], "requests": REQUESTS, "config": {"rate": "2 BTT / unit"}}
    return Case(plugin=plugin, **{**made, **options})


async def wrong(tried):
    return {finding.check: finding.text for finding in await conformance.run(tried) if not finding.ok}


async def test_a_good_service_of_every_kind_of_call_conforms():
    findings = await conformance.run(case(Good))
    assert [finding for finding in findings if not finding.ok] == []
    assert {finding.check for finding in findings} == ALL


async def test_a_method_without_a_charge_is_refused_at_registration():
    class Silent(Good):
        def register(self, server):
            async def no_policy(request, context):
                return pb.Plain()

            handler = grpc.unary_unary_rpc_method_handler(no_policy)
            server.add_registered_method_handlers("probe.v1.RefusedService", {"NoPolicy": handler})

        def prices(self):
            return {}

    found = await wrong(case(Silent))
    assert set(found) == {"registered"}
    assert "does not say what it costs" in found["registered"]


async def test_a_price_that_nobody_charges_is_refused_at_registration():
    class Vain(Good):
        def prices(self):
            return {**CALL_PRICES, ROWS: Price(Rate(1, 1, Unit.COUNT), 1)}

    assert set(await wrong(case(Vain))) == {"registered"}


async def test_a_wrong_configuration_must_be_refused_with_a_typed_error():
    class Careless(Good):
        def __init__(self, context):
            pass

    class Raw(Good):
        def __init__(self, context):
            check_keys(context.config, known=("rate",))
            Rate.parse(context.config["rate"])

    assert "no-such-key was accepted" in (await wrong(case(Careless)))["typed configuration errors"]
    assert "not a ConfigError" in (await wrong(case(Raw)))["typed configuration errors"]


async def test_a_method_that_is_not_tried_or_costs_nothing_is_named():
    some = {name: asked for name, asked in REQUESTS.items() if name != "Relay"}
    assert "/Relay" in (await wrong(case(Good, requests=some)))["every method is tried"]
    nothing = {**REQUESTS, "Put": [pb.Up()]}
    found = await wrong(case(Good, requests=nothing))
    assert set(found) == {"paid as counted"}, found
    assert "/Put: its request costs nothing" in found["paid as counted"]


async def test_a_service_that_does_not_end_is_named(monkeypatch):
    monkeypatch.setattr(conformance, "STOP_S", 0.2)

    class Clinging(Good):
        async def start(self):
            self.task = asyncio.create_task(asyncio.Event().wait(), name="forgotten")

        async def stop(self):
            await asyncio.Event().wait()

    began = time.monotonic()
    found = await wrong(case(Clinging))
    assert set(found) == {"stops", "leaves no task"}
    assert "forgotten" in found["leaves no task"]
    assert time.monotonic() - began < conformance.CALL_S

    class Falling(Good):
        async def stop(self):
            raise LookupError("it was here")

    assert "LookupError" in (await wrong(case(Falling)))["stops"]


async def test_a_full_quota_must_reach_the_caller_as_one():
    class Keeping(Good):
        failure = BttError

        def __init__(self, context):
            super().__init__(context)
            self.quota = context.quota

        def register(self, server):
            plugin = self

            class Servicer(Calls):
                async def Put(self, request, context):  # noqa: N802
                    try:
                        await plugin.quota.reserve("all", len(request.data))
                    except QuotaFull as full:
                        if plugin.failure is BttError:
                            await abort(context, full)
                        raise plugin.failure("unexpected") from full
                    return await super().Put(request, context)

            rpc.add_CallsServiceServicer_to_server(Servicer(), server)

    class Surprised(Keeping):
        failure = ValueError

    some = {"requests": REQUESTS, "quota": "1 KiB"}
    assert await wrong(case(Keeping, **some)) == {}
    assert "/Put: InternalError" in (await wrong(case(Surprised, **some)))["a full quota is told"]
    without = await wrong(case(Keeping))
    assert set(without) == {"paid as counted", "books agree after a cancelled call"}, "it may keep nothing"


async def test_a_service_that_fails_its_callers_is_named():
    class Broken(Good):
        def register(self, server):
            class Servicer(Calls):
                async def Fee(self, request, context):  # noqa: N802
                    raise ValueError("a bad day")

            rpc.add_CallsServiceServicer_to_server(Servicer(), server)

    found = await wrong(case(Broken))
    assert "/probe.v1.CallsService/Fee" in found["paid as counted"]
