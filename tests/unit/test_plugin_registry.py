"""What a node refuses of a service, naming the service and the reason."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from btt.node import registry
from btt.node.admission import Limits
from btt.node.config import ServiceSection
from btt.node.limits.limiter import Limiter
from btt.node.metrics import NodeMetrics
from btt.node.plugins.guard import _call
from btt.node.plugins.host import State, Surroundings
from btt.node.plugins.scope import follow_tasks
from btt.node.quota import Quotas
from btt.node.registry import Registry
from btt.sdk.errors import ConfigError, ServiceUnavailable
from btt.sdk.money import BTT, Rate
from btt.sdk.plugin import Line, Price, Unit, check_keys
from btt.services.content.plugin import ContentPlugin
from kit.hanging import ends
from kit.probe import CALL_PRICES, FEES, UP_BYTES, Calls, Probe, pb, rpc

SERVICE = "probe.v1.ProbeService"
BYTES = Line(SERVICE, Unit.BYTE)
ROWS = Line(SERVICE, Unit.COUNT)
MIB = 1 << 20
PRICES = {BYTES: Price(Rate.parse("1 BTT / GiB"), MIB), ROWS: Price(Rate(1, 1, Unit.COUNT), 1000)}
ON = ServiceSection(enabled=True)
NOTHING: dict = {}
SHORT = {"start_s": 0.05, "stop_s": 0.05, "leak_s": 0.05}


class Plugin:
    """A good one; the tests make it worse."""

    name = "probe"
    offered = PRICES
    events: list[str]

    def __init__(self, context):
        check_keys(context.config, known=("rate",))
        self.context = context
        self.events = []

    async def start(self):
        self.events.append("start")

    def register(self, server):
        rpc.add_ProbeServiceServicer_to_server(Probe(), server)

    def prices(self):
        return self.offered

    async def stop(self):
        self.events.append("stop")


def make(tmp_path, sections=None, *, credit_limit=BTT, **plugins):
    plugins = {name: (lambda cls=cls: cls) for name, cls in plugins.items()}
    sections = dict.fromkeys(plugins, ON) if sections is None else sections
    limiter = Limiter(lambda: 0.0)
    around = Surroundings(
        folder=tmp_path,
        clock=lambda: 0,
        limiter=limiter.of,
        metrics=NodeMetrics(None).of,
        quota=Quotas(None).of,
        meter=None,
        **SHORT,
    )
    made = Registry(plugins, around=around, limiter=limiter, credit_limit=credit_limit)
    made.configure(sections)
    return made


async def register(made):
    for host in made.hosts.values():
        await made.begin(host)
    return made


def found(made, method):
    """Returns the handler of a method as the server finds it."""

    class Details:
        pass

    Details.method = f"/{SERVICE}/{method}"
    return made.router.service(Details())


async def refusal(tmp_path, plugin, **options) -> str:
    with pytest.raises(ConfigError, match=r"^services\.probe") as caught:
        await register(make(tmp_path, probe=plugin, **options))
    return str(caught.value)


async def test_a_good_service_is_registered_with_its_charges_and_prices(tmp_path):
    made = make(tmp_path, probe=Plugin)
    await register(made)
    assert made.prices == PRICES
    assert made.services == made.router.services == (SERVICE,)
    assert made.owners == {SERVICE: "probe"}
    assert {path.rpartition("/")[2] for path in made.registrar.charges} == {
        method.name for method in pb.DESCRIPTOR.services_by_name["ProbeService"].methods
    }


def test_a_service_gets_its_own_folder_and_options_and_nothing_else(tmp_path):
    seen = []

    class Curious(Plugin):
        def __init__(self, context):
            seen.append(context)

    make(tmp_path, {"probe": ServiceSection(enabled=True, rate="2 BTT / GiB")}, probe=Curious)
    (context,) = seen
    assert context.data_dir == tmp_path / "probe"
    assert context.data_dir.is_dir()
    assert context.config == {"rate": "2 BTT / GiB"}
    assert set(context.__slots__) == {
        "data_dir", "config", "log", "clock", "tasks", "limiter", "metrics", "quota", "meter"
    }  # fmt: skip


async def test_messages_that_grpc_would_not_take(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "MAX_MESSAGE", MIB)
    assert "allows messages that are larger than gRPC takes here" in await refusal(tmp_path, Plugin)


async def test_a_method_without_a_policy(tmp_path):
    class Silent(Plugin):
        def register(self, server):
            async def no_policy(request, context):
                return pb.Plain()

            handler = grpc.unary_unary_rpc_method_handler(no_policy)
            server.add_registered_method_handlers("probe.v1.RefusedService", {"NoPolicy": handler})

    assert "RefusedService/NoPolicy does not say what it costs" in await refusal(tmp_path, Silent)


async def test_a_handler_that_writes_its_responses(tmp_path):
    class Writing(Probe):
        async def Many(self, request, context):  # noqa: N802
            await context.write(pb.Bytes())

    class Writer(Plugin):
        def register(self, server):
            rpc.add_ProbeServiceServicer_to_server(Writing(), server)

    assert "ProbeService/Many must yield" in await refusal(tmp_path, Writer)


async def test_a_handler_that_only_gives_itself_as_generic(tmp_path):
    class Hidden(Plugin):
        def register(self, server):
            super().register(server)
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("probe.v1.Other", {}),))

    class Anything(grpc.GenericRpcHandler):
        def service(self, details):
            return None

    class Catching(Plugin):
        def register(self, server):
            super().register(server)
            server.add_generic_rpc_handlers((Anything(),))

    assert "probe.v1.Other was not registered by method" in await refusal(tmp_path, Hidden)
    assert "A handler was not registered by method" in await refusal(tmp_path, Catching)


async def test_only_what_was_checked_is_served(tmp_path):
    """The generic handler of a plugin may hold more methods than it registers."""

    class Double(Plugin):
        def register(self, server):
            super().register(server)
            server.add_generic_rpc_handlers(
                (
                    grpc.method_handlers_generic_handler(
                        SERVICE, {"Secret": grpc.unary_unary_rpc_method_handler(print)}
                    ),
                )
            )

    made = await register(make(tmp_path, probe=Double))
    assert found(made, "Secret") is None
    assert found(made, "Many") is not None


@pytest.mark.parametrize(
    ("prices", "reason"),
    [
        ({BYTES: PRICES[BYTES]}, "charges COUNT, which has no price"),
        ({}, "has no price"),
        (
            {**PRICES, BYTES: Price(Rate.parse("1 BTT / GiB"), MIB - 1)},
            "more than the 1048575 of the verify unit",
        ),
        ({**PRICES, Line("probe.v1.Other", Unit.BYTE): PRICES[BYTES]}, "which no method charges"),
        ({**PRICES, BYTES: Price(Rate(1, MIB, Unit.COUNT), MIB)}, "priced per another unit"),
    ],
)
async def test_prices_that_do_not_fit_what_is_charged(tmp_path, prices, reason):
    class Priced(Plugin):
        offered = prices

    assert reason in await refusal(tmp_path, Priced)


async def test_a_credit_limit_below_one_verify_unit(tmp_path):
    text = await refusal(tmp_path, Plugin, credit_limit=1976)
    assert "costs 0.001977 BTT, more than anyone may owe" in text
    assert 'credit_limit = "0.001977 BTT"' in text
    await register(make(tmp_path, probe=Plugin, credit_limit=1977))


async def test_two_services_of_one_name(tmp_path):
    with pytest.raises(ConfigError, match=r"^services\.twin: probe\.v1\.ProbeService is served already"):
        await register(make(tmp_path, probe=Plugin, twin=Plugin))


def test_a_service_that_is_not_installed(tmp_path):
    with pytest.raises(
        ConfigError, match=r'"prob" is configured but not installed.*Did you mean "probe".*when a node starts'
    ):
        make(tmp_path, {"prob": ON}, probe=Plugin)
    with pytest.raises(ConfigError, match=r'"prob" is configured but not installed'):
        make(tmp_path, {"prob": ServiceSection()}, probe=Plugin)
    # An operator who removed its package can switch it off, and start.
    assert make(tmp_path, {"prob": ServiceSection(enabled=False)}, probe=Plugin).hosts == {}


def test_a_service_that_is_off_is_not_imported(tmp_path):
    class Never(Plugin):
        def __init__(self, context):
            raise AssertionError("made")

    made = make(tmp_path, {"probe": ServiceSection()}, probe=Never)
    assert made.hosts == {}
    assert not (tmp_path / "probe").exists()


async def test_a_call_from_before_a_restart_is_counted_no_more(tmp_path):
    made = await register(make(tmp_path, probe=Plugin))
    host = made.hosts["probe"]

    async def call(let):
        with _call(host):
            await let.wait()

    lets = [asyncio.Event(), asyncio.Event()]
    old = asyncio.create_task(call(lets[0]))
    await asyncio.sleep(0)
    host.fail("it broke")
    await host.stop()
    async with ends("a drain without a call"):
        await host.drain()
    host.configure()
    await made.begin(host)
    new = asyncio.create_task(call(lets[1]))
    await asyncio.sleep(0)
    lets[0].set()
    await old
    assert host.running == 1
    lets[1].set()
    await new
    assert host.running == 0
    await host.stop()


async def test_a_service_that_is_started_again_has_the_limits_that_hold(tmp_path):
    class Other(Plugin):
        name = "other"

    def section(calls):
        return ServiceSection.model_validate({"enabled": True, "limits": {"calls": calls}})

    async def again():
        host = made.hosts["probe"]
        host.fail("it broke")
        await host.stop()
        host.configure()
        await made.begin(host)
        return made.limits[SERVICE].calls

    made = await register(make(tmp_path, {"probe": section(3)}, probe=Plugin, other=Other))
    for refused in ({"probe": section(4), "prob": ON}, {"prob": ON}):
        with pytest.raises(ConfigError, match="not installed"):
            made.configure(refused)
        assert await again() == 3
    made.configure({"probe": section(5), "other": ON})
    assert await again() == 3, "what is made may be refused yet"
    made.limit({"probe": section(5)})
    assert made.limits[SERVICE].calls == 5
    assert await again() == 5


@pytest.mark.parametrize("moment", ["import", "init", "start", "register", "prices", "exit", "slow"])
async def test_a_service_that_fails_is_isolated_and_says_why(tmp_path, moment):
    def breaks(at):
        if moment == at:
            raise RuntimeError("broken")

    class Failing(Plugin):
        def __init__(self, context):
            breaks("init")
            self.events = []

        async def start(self):
            breaks("start")
            if moment == "exit":
                raise SystemExit(3)
            if moment == "slow":
                await asyncio.Event().wait()

        def register(self, server):
            breaks("register")
            super().register(server)

        def prices(self):
            breaks("prices")
            return super().prices()

    class Other(Plugin):
        name = "other"
        offered = NOTHING

        def register(self, server):
            pass

    made = make(tmp_path, {}, probe=Failing, other=Other)
    if moment == "import":
        made._plugins["probe"] = lambda: breaks("import")
    made.configure({"probe": ON, "other": ON})
    undo = follow_tasks(asyncio.get_running_loop())
    await register(made)
    undo()
    probe, other = made.hosts["probe"], made.hosts["other"]
    assert (probe.state, other.state) == (State.FAILED, State.SERVING)
    assert {"exit": "end the process", "slow": "did not start within"}.get(moment, "broken") in probe.reason
    assert probe.failed.is_set()
    with pytest.raises(ServiceUnavailable, match="probe of this node has failed"):
        probe.begin_call()
    await made.stop()
    assert (probe.state, other.state) == (State.STOPPED, State.STOPPED)


async def test_what_started_is_stopped_whatever_else_fails(tmp_path):
    events = []

    def plugin(label, *, starts=True, stops=True):
        class Noted(Plugin):
            offered = NOTHING

            def register(self, server):
                pass

            async def start(self):
                if not starts:
                    raise RuntimeError("no")
                events.append(f"{label} started")

            async def stop(self):
                events.append(f"{label} stopped")
                if not stops:
                    raise RuntimeError("no")

        return Noted

    made = make(tmp_path, a=plugin("a"), b=plugin("b", stops=False), c=plugin("c", starts=False))
    await register(made)
    assert made.hosts["c"].state is State.FAILED
    await made.stop()
    assert events == ["a started", "b started", "c stopped", "b stopped", "a stopped"]


def test_the_content_service_is_installed_like_any_other():
    assert registry.installed()["content"]() is ContentPlugin


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rat": "1 BTT / GiB"}, r'no key "rat"\..*Did you mean "rate"'),
        ({"rate": 1}, r'is not a price.*rate = "1 BTT / GiB"'),
        ({"rate": "much"}, r'"much" .*rate = "1 BTT / GiB"'),
        ({"rate": "1 BTT / call"}, "per the wrong unit"),
    ],
)
def test_the_content_service_checks_its_options(tmp_path, options, reason):
    with pytest.raises(ConfigError, match=rf"^services\.content: .*{reason}"):
        make(tmp_path, {"content": ServiceSection(enabled=True, **options)}, content=ContentPlugin)


# Charges of requests and fees


CALLS = "probe.v1.CallsService"


class CallsPlugin(Plugin):
    offered = CALL_PRICES

    def register(self, server):
        rpc.add_CallsServiceServicer_to_server(Calls(), server)


def with_price(line, price):
    return type("Changed", (CallsPlugin,), {"offered": {**CALL_PRICES, line: price}})


async def test_a_service_that_charges_requests_and_fees(tmp_path):
    made = make(tmp_path, probe=CallsPlugin)
    await register(made)
    assert made.prices == CALL_PRICES
    assert made.limits == {CALLS: Limits(name="probe")}


async def test_request_and_first_response_together_are_within_the_verify_unit(tmp_path):
    """They are taken at once when there is one request, so one unit must pay for both."""
    small = with_price(UP_BYTES, Price(Rate.parse("1 BTT / GiB"), (2 << 20) - 1))
    assert "Swap charges up to 2097152 units at once" in await refusal(tmp_path, small)


async def test_a_fee_is_within_its_verify_unit_and_has_a_price(tmp_path):
    small = with_price(FEES, Price(Rate(10, 1, Unit.CALL), 2))
    assert "Fee charges up to 3 units at once, more than the 2" in await refusal(tmp_path, small)
    without = type("Without", (CallsPlugin,), {"offered": {UP_BYTES: CALL_PRICES[UP_BYTES]}})
    assert "which has no price" in await refusal(tmp_path, without)


async def test_a_handler_of_another_kind_than_its_proto(tmp_path):
    class Other(CallsPlugin):
        def register(self, server):
            async def put(requests, context):
                return pb.Done()

            handler = grpc.stream_unary_rpc_method_handler(put)
            server.add_registered_method_handlers(CALLS, {"Put": handler})

    assert "Put is of another kind than its proto says" in await refusal(tmp_path, Other)


async def test_a_handler_that_is_no_coroutine(tmp_path):
    class Threaded(CallsPlugin):
        def register(self, server):
            handler = grpc.unary_unary_rpc_method_handler(lambda request, context: pb.Done())
            server.add_registered_method_handlers(CALLS, {"Put": handler})

    assert "Put must be an `async def`" in await refusal(tmp_path, Threaded)
