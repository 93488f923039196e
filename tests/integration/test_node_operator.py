"""An operator changes a running node: prices, limits, services; drains it, and stops it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from btt.node import editing
from btt.node import folder as node_folder
from btt.node import service as node_service
from btt.node.cli import app as node_app
from btt.node.commands import options
from btt.node.commands.options import change
from btt.node.commands.service import app as service_app
from btt.node.editing import edit
from btt.node.folder import NodeFolder, running_facts
from btt.node.payments.bans import Failure
from btt.node.plugins.host import LEAK_S, START_S, STOP_S, State
from btt.node.runtime import Node
from btt.sdk.budget import Budget
from btt.sdk.client import Client
from btt.sdk.errors import (
    BttError,
    ConfigError,
    Draining,
    PriceChanged,
    RateLimited,
    ServiceUnavailable,
    StorageError,
    TermsRefused,
)
from btt.sdk.money import Rate, Unit
from btt.sdk.plugin import check_keys, read_rate
from btt.sdk.rpc import to_error
from kit.hanging import ends
from kit.payers import RawPayer, dial
from kit.probe import BYTES, CALL_PRICES, PRICES, ROWS, Calls, Probe, pb, rpc


class Held(Probe):
    """Sends a row when it is let."""

    def __init__(self):
        super().__init__()
        self.let = asyncio.Semaphore(0)
        self.began = asyncio.Semaphore(0)

    async def Query(self, request, context):  # noqa: N802
        self.began.release()
        for _ in range(request.messages):
            await self.let.acquire()
            yield pb.Rows(rows=request.size)


class ProbePlugin:
    name = "probe"
    made: ProbePlugin

    def __init__(self, context):
        self.context = context
        self.servicer = Held()
        self.stopped = False
        ProbePlugin.made = self
        self.reload(context.config)

    def reload(self, config):
        check_keys(config, known=("rate",))
        self.rate = read_rate(config, "rate", default="0.000001 BTT / row", unit=Unit.COUNT)

    async def start(self):
        pass

    def register(self, server):
        rpc.add_ProbeServiceServicer_to_server(self.servicer, server)

    def prices(self):
        return {**PRICES, ROWS: replace(PRICES[ROWS], rate=self.rate)}

    async def stop(self):
        self.stopped = True


def make_node(economy, path, **tables) -> Node:
    config = {
        "node": {"listen": "127.0.0.1:0"},
        "ledger": {"address": str(economy.running.address)},
        "payments": {
            "min_challenge": "1s",
            "min_lifetime": "10s",
            "close_margin": "1s",
            "credit_limit": "1 BTT",
        },
        "services": {"probe": {"enabled": True}},
    }
    opened = node_folder.init(path, config={**config, **tables})
    return Node(opened, plugins={"probe": lambda: ProbePlugin}, clock=economy.clock)


@pytest.fixture
def node(economy, tmp_path) -> Node:
    return make_node(economy, tmp_path / "node")


def client_of(economy, node, wallet, **options) -> Client:
    return Client.connect(
        str(node.address), budget=Budget("5 BTT"), ledger=str(economy.running.address), wallet=wallet,
        clock=economy.clock, **options,
    )  # fmt: skip


async def until_draining(node):
    certificate, address = node.folder.certificate, node.address
    async with dial(certificate, address.node, address.port) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        async with ends("a node that serves as before, and should not,"):
            while (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING:
                pass
        watch.cancel()


async def rows(session, messages=1, size=1):
    call = rpc.ProbeServiceStub(session.channel).Query(
        pb.Ask(messages=messages, size=size, max_rows=messages * size)
    )
    return [message.rows async for message in call]


async def payer_of(economy, node, channel) -> RawPayer:
    offer = await node.offers.current()
    return await RawPayer(economy, offer, channel).fund()


# Prices


async def test_a_new_price_is_a_new_offer_and_running_sessions_keep_theirs(economy, node):
    wallet = await economy.wallet()
    async with node:
        probe = ProbePlugin.made.servicer
        before = await node.offers.current()
        async with client_of(economy, node, wallet) as btt:
            session = await btt.session(100_000)
            running = asyncio.create_task(rows(session, messages=2, size=1000))
            await probe.began.acquire()
            edit(node.folder.path, {"services.probe.rate": "0.000003 BTT / row"})
            told = await node.reload()
            assert told.as_json() == {"applied": ["services.probe.rate"], "restart": [], "error": ""}
            probe.let.release()
            probe.let.release()
            assert await running == [1000, 1000]
        now = await node.offers.current()
        assert now.serial == before.serial + 1
        assert now.sheet.prices[ROWS].rate == Rate(3, 1, Unit.COUNT)
        assert btt.receipts[0].paid == 2000, "at the price that was agreed"
        probe.let.release()
        async with client_of(economy, node, wallet) as btt:
            await rows(await btt.session(100_000), size=1000)
        assert btt.receipts[0].paid == 3000
    assert ProbePlugin.made.stopped


async def test_a_session_with_a_quote_that_is_too_old_is_refused_as_a_price_change(economy, node):
    async with node:
        certificate = node.folder.certificate
        async with dial(certificate, node.address.node, node.address.port) as channel:
            payer = await payer_of(economy, node, channel)
            for rate in (2, 3):
                edit(node.folder.path, {"services.probe.rate": f"0.00000{rate} BTT / row"})
                assert not (await node.reload()).error
                if rate == 2:
                    await payer.open()  # one change later the quote still holds
            with pytest.raises(PriceChanged):
                await payer.open()


async def test_an_offer_that_ends_during_a_call_does_not_cut_it_but_opens_nothing_more(economy, node):
    async with node:
        probe = ProbePlugin.made.servicer
        async with dial(node.folder.certificate, node.address.node, node.address.port) as channel:
            payer = await payer_of(economy, node, channel)
            await payer.open()
            stream = await payer.attach()
            call = payer.rows(2)
            taking = asyncio.create_task(call.read())
            await probe.began.acquire()
            economy.clock.ahead_ms += 25 * 3600_000  # the offer is good for a day
            assert payer.offer.valid_until_ms < economy.clock()
            probe.let.release()
            assert (await taking).rows == 1000
            await stream.write(payer.update(1000))
            probe.let.release()
            assert (await call.read()).rows == 1000, "what runs goes on at its price"
            assert (await node.offers.current()).digest != payer.offer.digest
            with pytest.raises(PriceChanged):
                await payer.open()
            stream.cancel()


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("services.probe.rate", "much", "services.probe"),
        ("services.probe.rat", "1 BTT / row", '"rat"'),
        ("services.probe.rate", "1 BTT / row", "more than anyone may owe"),
        ("services.nowhere.enabled", True, "not installed"),
    ],
)
async def test_a_wrong_configuration_changes_nothing(economy, node, key, value, word):
    async with node:
        before = await node.offers.current()
        edit(node.folder.path, {key: value, "limits.calls": 1})
        told = await node.reload()
        assert word in told.error
        assert told.applied == ()
        assert await node.offers.current() is before
        assert node.admission._node.calls == 512
        assert ProbePlugin.made.rate == Rate(1, 1, Unit.COUNT)


async def test_what_needs_a_restart_is_named_and_the_rest_is_taken(economy, node):
    async with node:
        edit(node.folder.path, {"payments.grace": "30s", "limits.calls": 7, "limits.up": "1 MiB/s"})
        told = await node.reload()
        assert set(told.applied) == {"limits.calls", "limits.up"}
        assert told.restart == ("payments.grace",)
        assert (node.admission._node.calls, node.limiter.up.limits("probe")) == (7, True)
        edit(node.folder.path, {"payments.grace": "60s"})
        assert (await node.reload()).as_json() == {"applied": [], "restart": [], "error": ""}


async def test_credit_and_bans_change_for_those_who_are_there(economy, node):
    wallet, other = await economy.wallet(), await economy.wallet()
    async with node:
        async with client_of(economy, node, wallet) as btt:
            await btt.session(100_000)
            [live] = node.sessions.all()
            payer = live.payer
            assert live.payee.standing.lease > 0, "a stranger who is lent a unit"
            assert await node.sessions.bans.payer_failed(payer, Failure.UNPAID, network=None) is None
            keys = {
                "payments.credit_limit": "2 BTT",
                "payments.strangers_per_network": "0 BTT",
                "payments.close_margin": "2s",
                "bans.after": 1,
            }
            edit(node.folder.path, keys)
            assert set((await node.reload()).applied) == set(keys)
            assert live.payee.standing.limit == 2_000_000
            assert node.closer.margin_ms == 2000
            economy.clock.ahead_ms += 31_000  # sooner it would be the same failure
            assert await node.sessions.bans.payer_failed(payer, Failure.UNPAID, network=None) is not None
        async with client_of(economy, node, other) as btt:
            await btt.session(100_000)
            live = next(session for session in node.sessions.all() if session.payer == other.account.address)
            assert live.payee.standing.lease == 0, "strangers are lent nothing any more"
            edit(node.folder.path, {"payments.strangers_per_hour": "5 BTT"})
            assert (await node.reload()).applied == ("payments.strangers_per_hour",)


async def test_credit_that_is_too_small_for_a_message_changes_nothing(economy, node):
    async with node:
        edit(node.folder.path, {"payments.credit_limit": "0.000001 BTT", "bans.after": 1})
        told = await node.reload()
        assert "more than anyone may owe" in told.error
        assert node.sessions.bans.policy.after == 3
        assert node.services.registry.credit_limit == 1_000_000
        edit(node.folder.path, {"payments.credit_limit": "0.9 BTT", "services.probe.rate": "0.01 BTT / row"})
        assert "more than anyone may owe" in (await node.reload()).error
        assert ProbePlugin.made.rate == Rate(1, 1, Unit.COUNT)
        assert node.services.registry.credit_limit == 1_000_000


async def test_other_terms_are_another_offer_and_new_channels_keep_them(economy, node):
    async with node, dial(node.folder.certificate, node.address.node, node.address.port) as channel:
        before = await node.offers.current()
        edit(node.folder.path, {"payments.min_amount": "2 BTT", "payments.min_challenge": "2s"})
        told = await node.reload()
        assert (told.applied, told.restart) == (("payments.min_amount",), ("payments.min_challenge",))
        now = await node.offers.current()
        assert now.serial == before.serial + 1
        assert (now.terms.min_amount, now.terms.min_challenge_ms) == (2_000_000, 1000)
        payer = RawPayer(economy, before, channel)
        with pytest.raises(TermsRefused, match="lock at least 2000000"):
            await payer.fund(deposit=1_000_000)
        await node.reload()
        assert await node.offers.current() is now, "what waits for a restart is no other offer"


# Opting out


async def test_a_service_is_switched_off_and_on_while_the_node_runs(economy, node):
    wallet = await economy.wallet()
    async with node:
        probe = ProbePlugin.made
        async with client_of(economy, node, wallet) as btt:
            session = await btt.session(100_000)
            running = asyncio.create_task(rows(session, messages=2))
            await probe.servicer.began.acquire()
            edit(node.folder.path, {"services.probe.enabled": False})
            assert not (await node.reload()).error
            with pytest.raises(ServiceUnavailable, match="switched off"):
                await rows(session)
            assert not probe.stopped, "a paid call runs"
            assert (await node.offers.current()).sheet.prices == {}
            assert running_facts(node.folder.path)["services"]["probe"]["state"] == "draining"
            retiring = list(node.reloader._retiring.values())
            assert not (await node.reload()).error
            assert list(node.reloader._retiring.values()) == retiring, "it is stopped once"
            probe.servicer.let.release()
            probe.servicer.let.release()
            assert await running == [1, 1]
            await asyncio.gather(*retiring)
            assert probe.stopped
            assert running_facts(node.folder.path)["services"]["probe"]["state"] == "stopped"
        edit(node.folder.path, {"services.probe.enabled": True})
        assert not (await node.reload()).error
        assert node.services.registry.hosts["probe"].state is State.SERVING
        assert ProbePlugin.made is not probe
        ProbePlugin.made.servicer.let.release()
        async with client_of(economy, node, wallet) as btt:
            assert await rows(await btt.session(100_000)) == [1]


async def test_a_service_that_is_switched_on_again_before_its_last_call_ended_goes_on(economy, node):
    wallet = await economy.wallet()
    path = node.folder.path
    async with node:
        probe, host = ProbePlugin.made, node.services.registry.hosts["probe"]
        async with client_of(economy, node, wallet) as btt:
            running = asyncio.create_task(rows(await btt.session(100_000), messages=2))
            await probe.servicer.began.acquire()
            edit(path, {"services.probe.enabled": False})
            assert not (await node.reload()).error
            # Refused: what was switched off goes on ending.
            edit(path, {"services.probe": {"enabled": True, "rate": "1 BTT / row"}})
            assert "more than anyone may owe" in (await node.reload()).error
            assert host.state is State.DRAINING
            edit(path, {"services.probe.rate": "0.000003 BTT / row"})
            told = await node.reload()
            assert (told.error, told.restart) == ("", ())
            assert running_facts(path)["services"]["probe"]["state"] == "serving"
            assert (await node.offers.current()).sheet.prices[ROWS].rate == Rate(3, 1, Unit.COUNT)
            for _ in range(3):
                probe.servicer.let.release()
            async with client_of(economy, node, wallet) as another:
                assert await rows(await another.session(100_000)) == [1]
            assert await running == [1, 1]
        assert not node.reloader._retiring
        assert not probe.stopped
        assert set(node.services.supervisor._tasks) == {"probe"}


async def test_a_service_that_is_switched_on_again_while_it_stops_starts_anew(economy, node, monkeypatch):
    stopping, let = asyncio.Event(), asyncio.Event()

    async def stop(plugin):
        stopping.set()
        await let.wait()

    monkeypatch.setattr(ProbePlugin, "stop", stop)
    async with node:
        probe = ProbePlugin.made
        edit(node.folder.path, {"services.probe.enabled": False})
        assert not (await node.reload()).error
        await stopping.wait()
        edit(node.folder.path, {"services.probe.enabled": True})
        again = asyncio.create_task(node.reload())
        let.set()
        assert not (await again).error
        assert node.services.registry.hosts["probe"].state is State.SERVING
        assert ProbePlugin.made is not probe


class Second:
    """Keeps something from the moment it starts, and offers what its node can charge or not."""

    name = "second"
    made: Second

    def __init__(self, context):
        self.context = context
        self.stopped = False
        Second.made = self

    async def start(self):
        await self.context.quota.reserve("at the start", 10)
        await self.during()

    async def during(self):
        """What happens while it starts or stops."""

    def register(self, server):
        rpc.add_CallsServiceServicer_to_server(Calls(), server)

    def prices(self):
        return CALL_PRICES

    async def stop(self):
        await self.during()
        self.stopped = True


async def test_a_service_that_does_not_do_changes_nothing_else_and_starts_when_it_does(
    economy, tmp_path, monkeypatch
):
    node = make_node(
        economy, tmp_path / "node", services={"second": {"enabled": False}, "probe": {"enabled": False}},
        limits={"calls": 100},
    )  # fmt: skip
    node._plugins["second"] = lambda: Second
    wallet = await economy.wallet()
    async with node:
        registry, before = node.services.registry, await node.offers.current()
        live = []

        async def during(second):
            live.append((node.admission._node.calls, second.context.quota.limit))
            await node.reprice()  # as when another service came back meanwhile

        monkeypatch.setattr(Second, "during", during)
        edit(
            node.folder.path,
            {
                "limits.calls": 7,
                "payments.credit_limit": "0.9 BTT",
                "services.second": {"enabled": True, "quota": "1 KiB", "limits": {"calls": 3}},
                "services.probe": {"enabled": True, "rate": "1 BTT / row"},
            },
        )
        told = await node.reload()
        assert "more than anyone may owe" in told.error
        assert told.applied == ()
        assert live == [(100, 1024)] * 2, "a service starts with its own section, the node keeps its limits"
        assert (node.admission._node.calls, registry.credit_limit) == (100, 1_000_000)
        assert Second.made.context.quota.limit == 0
        assert Second.made.stopped
        assert ProbePlugin.made.stopped
        assert await node.offers.current() is before
        assert {host.state for host in registry.hosts.values()} == {State.STOPPED}
        assert node.services.supervisor._tasks == {}

        edit(node.folder.path, {"services.probe.rate": "0.000003 BTT / row"})
        told = await node.reload()
        assert not told.error
        assert {"limits.calls", "services.probe.enabled", "services.probe.rate"} < set(told.applied)
        assert (node.admission._node.calls, registry.credit_limit) == (7, 900_000)
        assert registry.limits[ROWS.service].calls == 0
        assert registry.limits["probe.v1.CallsService"].calls == 3
        assert {host.state for host in registry.hosts.values()} == {State.SERVING}
        assert set(node.services.supervisor._tasks) == {"probe", "second"}
        ProbePlugin.made.servicer.let.release()
        async with client_of(economy, node, wallet) as btt:
            assert await rows(await btt.session(100_000)) == [1]


# Limits


async def test_one_limiter_bounds_what_all_calls_send_and_none_costs_nothing(economy, node):
    wallet = await economy.wallet()
    asked = []
    async with node:
        taken = node.limiter.up.take

        async def watched(service, flow, amount):
            asked.append((service, amount))
            await taken(service, flow, amount)

        node.limiter.up.take = watched
        async with client_of(economy, node, wallet) as btt:
            stub = rpc.ProbeServiceStub((await btt.session(100_000)).channel)
            assert [len(m.data) async for m in stub.Many(pb.Ask(messages=2, size=1000))] == [1000] * 2
            assert asked == []
            edit(node.folder.path, {"services.probe.limits": {"up": "100 MiB/s"}})
            assert (await node.reload()).applied == ("services.probe.limits",)
            assert [len(m.data) async for m in stub.Many(pb.Ask(messages=2, size=1000))] == [1000] * 2
            assert asked == [("probe", 1003)] * 2
            assert len((await stub.One(pb.Ask(size=10))).data) == 10
            assert asked[2:] == [("probe", 12)]


async def test_connections_are_bounded(economy, tmp_path):
    node = make_node(economy, tmp_path / "node", limits={"connections": 1})
    wallet = await economy.wallet()
    async with node:
        async with dial(node.folder.certificate, node.address.node, node.address.port) as channel:
            payer = await payer_of(economy, node, channel)
            await payer.open()
            stream = await payer.attach()
            async with dial(node.folder.certificate, node.address.node, node.address.port) as other:
                with pytest.raises(RateLimited, match="1 connections"):
                    await payer_of(economy, node, other)
            stream.cancel()
            with pytest.raises(asyncio.CancelledError):
                await stream.read()
        assert wallet


# Draining


async def test_a_drain_under_load_finishes_what_was_paid_and_closes_all_channels(economy, node):
    wallets = [await economy.wallet() for _ in range(3)]
    async with node:
        probe = ProbePlugin.made.servicer
        clients = [client_of(economy, node, wallet, keep_channels=True) for wallet in wallets]
        sessions = [await (await client.__aenter__()).session(100_000) for client in clients]
        running = [asyncio.create_task(rows(session, messages=3, size=1000)) for session in sessions]
        for _ in running:
            await probe.began.acquire()

        async def paid():  # what is left to wait for once no call runs
            while any(session.payee.meter.excess > 0 for session in node.sessions.all()):  # noqa: ASYNC110
                await asyncio.sleep(0)

        node.sessions.gone = paid
        draining = asyncio.create_task(node.drain())
        await until_draining(node)
        async with ends("a call to a node that takes no new ones"):
            with pytest.raises(Draining):
                await rows(sessions[0])
        late = await economy.wallet()
        async with client_of(economy, node, late) as other:
            with pytest.raises(Draining):
                await other.session(100_000)
        assert (await economy.ledger.account(late.account)).locked == 0, "nothing is locked for nothing"
        for _ in range(9):
            probe.let.release()
        assert await asyncio.gather(*running) == [[1000] * 3] * 3
        await draining
        for client, session in zip(clients, sessions, strict=True):
            await session.abandon()
            client._session = None
            await client.__aexit__(None, None, None)
    totals = await economy.ledger.totals()
    assert (totals.open_channels, totals.closed_channels) == (0, 3)
    assert (await economy.ledger.account(node.folder.payee_key)).available == 9000


async def test_a_hurried_drain_ends(economy, node):
    wallet = await economy.wallet()
    async with node, client_of(economy, node, wallet, keep_channels=True) as btt:
        session = await btt.session(100_000)
        running = asyncio.create_task(rows(session))
        await ProbePlugin.made.servicer.began.acquire()
        draining = asyncio.create_task(node.drain())
        node.hurry()
        await draining
        with pytest.raises((BttError, grpc.aio.AioRpcError)) as ended:
            await running
        assert not isinstance(ended.value, grpc.aio.AioRpcError) or to_error(ended.value)
        await session.abandon()
        btt._session = None


# The commands


def command(app, *words, code=0):
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout


def test_profiles_and_configuration(economy, tmp_path):
    home, server = tmp_path / "home", tmp_path / "server"
    for profile, path in (("home", home), ("server", server)):
        said = command(node_app, "init", path, "--profile", profile, "--ledger", economy.running.address)
        assert ("node.advertise" in said) is (profile == "server")
    config = NodeFolder.open(home).config
    assert config.node.listen.startswith("127.0.0.1:")
    assert config.limits.up == 2 << 20
    assert NodeFolder.open(server).config.node.listen.startswith("0.0.0.0:")

    path = home / node_folder.CONFIG
    path.write_text(path.read_text().replace("[limits]", "# what the line bears\n[limits]"))
    command(node_app, "config", "set", "limits.up", "500 KiB/s", "--node", home)
    command(node_app, "config", "set", "payments.grace", "30s", "--node", home)
    assert "# what the line bears\n[limits]" in path.read_text()
    found = json.loads(command(node_app, "config", "show", "--json", "--node", home))["config"]
    by_key = {row["key"]: row for row in found}
    assert by_key["limits.up"] == {
        "key": "limits.up", "value": "500 KiB/s", "origin": "node.toml", "needs_restart": False,
    }  # fmt: skip
    assert by_key["payments.grace"]["value"] == "30s"
    assert by_key["payments.grace"]["needs_restart"]
    assert by_key["payments.max_lifetime"] == {
        "key": "payments.max_lifetime", "value": "30d", "origin": "default", "needs_restart": False,
    }  # fmt: skip
    assert by_key["services.content.rate"]["value"] == "1 BTT / GiB"
    assert by_key["payments.payee"]["value"] == "", "one of the node's own"
    before = path.read_text()
    for key, value in (
        ("payments.grace", "soon"), ("payments.gruce", "1s"), ("limits.calls", "many"), ("apps.allow", "all"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            command(node_app, "config", "set", key, value, "--node", home)
    assert path.read_text() == before
    command(node_app, "config", "unset", "payments.grace", "--node", home)
    assert NodeFolder.open(home).config.payments.grace == 60_000
    command(node_app, "config", "set", "payments.payee", "", "--node", home)
    assert NodeFolder.open(home).config.payments.payee is None
    assert json.loads(command(node_app, "config", "check", "--json", "--node", home))["services"] == [
        "content"
    ]
    edit(home, {"services.content.rate": "no price"})
    with pytest.raises(ConfigError, match=r"services\.content"):
        command(node_app, "config", "check", "--node", home)


def test_a_price_that_is_none_and_a_service_that_is_not_there(economy, tmp_path):
    words = ("init", tmp_path / "node", "--ledger", economy.running.address)
    for price in ("banana", "1 BTT / call"):
        done = CliRunner().invoke(node_app, [*map(str, words), "--content-price", price])
        assert done.exit_code == 2
        assert "--content-price" in done.output
        assert "1 BTT / GiB" in " ".join(done.output.replace("│", "").split())
    command(node_app, *words)
    with pytest.raises(ConfigError, match='No service "nope" is installed'):
        command(service_app, "disable", "nope", "--node", tmp_path / "node")


def test_what_is_no_key_cannot_be_unset_and_a_wrong_one_that_was_written_can(economy, tmp_path):
    command(node_app, "init", tmp_path / "node", "--ledger", economy.running.address)
    path = tmp_path / "node" / node_folder.CONFIG
    before = path.read_text()
    for key, says in (
        ("payments.grce", '"payments.grace"'),
        ("no.such.key", "Known are"),
        ("limits.up.x", "up"),
    ):
        with pytest.raises(ConfigError, match=f'There is no key "{key}"') as refused:
            command(node_app, "config", "unset", key, "--node", path.parent)
        assert says in refused.value.hint
    said = command(node_app, "config", "unset", "payments.grace", "--node", path.parent)
    assert said.splitlines()[-1] == "Nothing had to change."
    assert path.read_text() == before, "it was the default all along"
    path.write_text(before + "[payments]\ngrce = 1\n")
    command(node_app, "config", "unset", "payments.grce", "--node", path.parent)
    command(node_app, "config", "unset", "payments", "--node", path.parent)
    assert path.read_text() == before


async def test_what_is_changed_while_a_node_starts_holds_once_it_serves(economy, node):
    reloading = asyncio.create_task(node.reload())
    await asyncio.sleep(0)
    edit(node.folder.path, {"limits.calls": 7})
    async with node:
        assert (await reloading).applied == ("limits.calls",)
        assert node.admission._node.calls == 7


async def test_a_disk_without_room_for_what_a_node_tells_keeps_it_from_nothing(economy, node, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    async with node:
        monkeypatch.setattr(node_folder.os, "pwrite", full)
        edit(node.folder.path, {"limits.calls": 7})
        assert (await node.reload()).applied == ("limits.calls",)
    assert all(task.done() for task in node._tasks)


async def test_a_lock_that_cannot_be_opened_is_no_defect(economy, node):
    (node.folder.path / node_folder.LOCK).mkdir()
    with pytest.raises(StorageError, match="cannot be opened"):
        async with node:
            pass


def test_commands_wait_for_a_service_as_long_as_the_node_does():
    assert START_S + STOP_S + LEAK_S < editing._ANSWER_S


def test_commands_that_change_something_at_the_same_time_change_both(economy, tmp_path, monkeypatch):
    path = tmp_path / "node"
    command(node_app, "init", path, "--ledger", economy.running.address)
    write, both = editing.write_private, threading.Barrier(2)

    def slow(*words):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # lets the other one come as far as this, if nothing keeps it
        write(*words)

    monkeypatch.setattr(editing, "write_private", slow)
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda key: change(path, {key: 7}, as_json=True), ("limits.calls", "bans.after")))
    config = NodeFolder.open(path).config
    assert (config.limits.calls, config.bans.after) == (7, 7)


def test_a_refused_change_that_cannot_be_undone_leaves_a_whole_file(economy, tmp_path, monkeypatch):
    path = tmp_path / "node"
    command(node_app, "init", path, "--ledger", economy.running.address)
    monkeypatch.setattr(options, "_refused", lambda *_: "It does not do.")
    write, calls = editing.write_private, []

    def once(*words):
        calls.append(words)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*words)

    monkeypatch.setattr(editing, "write_private", once)
    with pytest.raises(StorageError, match="No space left"):
        change(path, {"limits.calls": 7}, as_json=True)
    assert NodeFolder.open(path).config.limits.calls == 7


def test_a_service_whose_package_is_gone_can_be_switched_off(economy, tmp_path):
    path = tmp_path / "node"
    command(node_app, "init", path, "--ledger", economy.running.address)
    edit(path, {"services.gone": {"enabled": True, "since": datetime.date(2030, 1, 31)}})
    with pytest.raises(ConfigError, match='"gone" is configured but not installed'):
        command(node_app, "config", "check", "--node", path)
    assert 'services.gone.since = "2030-01-31"' in command(node_app, "config", "show", "--node", path)
    command(service_app, "disable", "gone", "--node", path)
    command(node_app, "config", "check", "--node", path)
    command(service_app, "disable", "--all", "--node", path)
    assert not any(section.enabled for section in NodeFolder.open(path).config.services.values())


def test_a_node_with_a_wrong_price_is_not_made(economy, tmp_path):
    ledger = ("--ledger", economy.running.address)
    for price in ("free", "1 BTT", "1 BTT / call"):
        command(node_app, "init", tmp_path / "node", *ledger, "--content-price", price, code=2)
    assert not (tmp_path / "node").exists()


def test_services_are_switched_and_priced(economy, tmp_path):
    path = tmp_path / "node"
    command(node_app, "init", path, "--ledger", economy.running.address)
    command(service_app, "price", "content", "3 BTT / GiB", "--node", path)
    before = (path / node_folder.CONFIG).read_text()
    with pytest.raises(ConfigError, match=r"Nothing has changed.*wrong unit"):
        command(service_app, "price", "content", "3 BTT / unit", "--node", path)
    with pytest.raises(ConfigError, match=r"Nothing has changed.*rate"):
        command(node_app, "config", "set", "services.content.rates", "3 BTT / GiB", "--node", path)
    assert (path / node_folder.CONFIG).read_text() == before
    command(service_app, "disable", "--all", "--node", path)
    (row,) = [
        row
        for row in json.loads(command(service_app, "list", "--json", "--node", path))["services"]
        if row["name"] == "content"
    ]
    assert (row["enabled"], row["state"], row["prices"]) == (False, "not running", ["3 BTT / GiB"])
    assert row["package"] == "btt-services"
    command(service_app, "enable", "content", "--node", path)
    assert NodeFolder.open(path).config.services["content"].enabled
    with pytest.raises(ConfigError, match='Did you mean "content"'):
        command(service_app, "enable", "contnt", "--node", path)
    command(service_app, "price", "content", "cheap", "--node", path, code=2)
    assert json.loads(command(node_app, "stop", path, "--json")) == {"was_running": False, "running": False}


@pytest.mark.parametrize("how", ["stop", "drain"])
async def test_a_running_node_is_told_by_commands(economy, tmp_path, how):
    path = tmp_path / "node"
    await asyncio.to_thread(
        command, node_app, "init", path, "--listen", "127.0.0.1:0", "--ledger", economy.running.address
    )
    ready = asyncio.Event()
    serving = asyncio.create_task(node_service.serve(NodeFolder.open(path), ready=lambda _: ready.set()))
    await ready.wait()
    said = await asyncio.to_thread(
        command, service_app, "price", "content", "2 BTT / GiB", "--node", path, "--json"
    )
    assert json.loads(said.splitlines()[-1]) == {
        "running": True, "applied": ["services.content.rate"], "restart": [], "error": "",
    }  # fmt: skip
    before = (path / node_folder.CONFIG).read_text()
    with pytest.raises(ConfigError, match="Nothing has changed"):
        await asyncio.to_thread(command, service_app, "price", "content", "2 BTT / call", "--node", path)
    assert (path / node_folder.CONFIG).read_text() == before
    said = await asyncio.to_thread(command, node_app, "config", "set", "node.name", "nas", "--node", path)
    assert "After a restart of the node: node.name" in said
    for reply in ("Written; that is how the node runs already.", "Nothing had to change."):
        said = await asyncio.to_thread(command, node_app, "config", "set", "node.name", "", "--node", path)
        assert said.splitlines()[-1] == reply
    assert "has stopped" in await asyncio.to_thread(command, node_app, how, path)
    assert await serving
    assert BYTES
