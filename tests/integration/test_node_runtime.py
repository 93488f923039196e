"""A whole node with a real ledger: it serves, is paid, stops in order, and starts again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from btt.node import folder as node_folder
from btt.node import service
from btt.node.folder import NodeFolder, running_address
from btt.node.payments.closing import Closer
from btt.node.runtime import Node
from btt.node.status import NOT_RUNNING, NOT_SERVING, SERVING, read_status
from btt.proto.content.v1 import content_pb2
from btt.proto.payment.v1 import payment_pb2, payment_pb2_grpc
from btt.sdk.budget import Budget
from btt.sdk.channel import Line, Price
from btt.sdk.client import Client
from btt.sdk.errors import (
    AppRefused,
    BttError,
    ChannelUnknown,
    ConfigError,
    Draining,
    InternalError,
    LedgerUnreachable,
    RateLimited,
)
from btt.sdk.identity import tls_name
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerAddress
from btt.sdk.money import Rate, Unit
from btt.sdk.rpc import to_error
from btt.sdk.signing import APP_UNKNOWN, SessionOpen
from btt.sdk.tls import pinned_channel
from btt.services.content.catalogue import Catalogue
from btt.services.content.publish import publish
from btt.services.ledger import folder as ledger_folder
from btt.services.ledger.books import Terms
from btt.services.ledger.server import LedgerConfig, serve
from kit.economy import RUN, content
from kit.probe import Probe, pb, rpc

SERVING_STATUS = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING_STATUS = health_pb2.HealthCheckResponse.NOT_SERVING


class Gated(Probe):
    """Sends one message, then waits until it may go on."""

    def __init__(self):
        super().__init__()
        self.gate = asyncio.Event()
        self.waiting = asyncio.Semaphore(0)
        self.ended = 0

    async def Many(self, request, context):  # noqa: N802
        try:
            yield pb.Bytes(data=b"first")
            self.waiting.release()
            await self.gate.wait()
            yield pb.Bytes(data=b"second")
        finally:
            self.ended += 1


class GatedPlugin:
    name = "probe"

    def __init__(self, context):
        self.servicer = Gated()
        self.stopped = False
        GatedPlugin.made = self

    async def start(self):
        pass

    def register(self, server):
        rpc.add_ProbeServiceServicer_to_server(self.servicer, server)

    def prices(self):
        service = "probe.v1.ProbeService"
        return {
            Line(service, Unit.BYTE): Price(Rate.parse("1 BTT / GiB"), RUN),
            Line(service, Unit.COUNT): Price(Rate(1, 1, Unit.COUNT), 1000),
        }

    async def stop(self):
        self.stopped = True


def make_folder(path: Path, ledger: str, **tables) -> NodeFolder:
    config = {
        "node": {"listen": "127.0.0.1:0"},
        "ledger": {"address": ledger},
        "payments": {
            "min_challenge": "1s",
            "min_lifetime": "10s",
            "close_margin": "1s",
            "credit_limit": "10 BTT",
        },
        "services": {"content": {"enabled": True}},
    }
    return node_folder.init(path, config={**config, **tables})


@pytest.fixture
def folder(economy, tmp_path) -> NodeFolder:
    return make_folder(tmp_path / "node", str(economy.running.address))


@pytest.fixture
def gated(economy, tmp_path):
    """Returns a function that makes a node with the gated service."""

    def make(**options):
        tables = {"services": {"probe": {"enabled": True}}, **options.pop("tables", {})}
        opened = make_folder(tmp_path / "node", str(economy.running.address), **tables)
        return Stoppable(opened, plugins={"probe": lambda: GatedPlugin}, clock=economy.clock, **options)

    return make


def client_of(economy, node: Node, wallet, **options) -> Client:
    return Client.connect(
        str(node.address),
        budget=Budget("5 BTT"),
        ledger=str(economy.running.address),
        wallet=wallet,
        clock=economy.clock,
        **options,
    )


def publish_in(folder: NodeFolder, name: str, data: bytes) -> bytes:
    source = folder.path.parent / name
    source.write_bytes(data)
    catalogue = Catalogue(folder.path / "content")
    try:
        return publish(source, catalogue).infohash
    finally:
        catalogue.close()


class Stoppable(Node):
    """A node that a test stops in the middle of its block."""

    @asynccontextmanager
    async def running(self):
        stopped = asyncio.Event()

        async def stop():
            stopped.set()
            await self.__aexit__()

        await self.__aenter__()
        try:
            async with plain_channel(self) as channel:
                yield self, channel, stop
        finally:
            if not stopped.is_set():
                await self.__aexit__()


@asynccontextmanager
async def plain_channel(node: Node):
    certificate = (node.folder.path / node_folder.CERTIFICATE).read_bytes()
    async with pinned_channel(
        "127.0.0.1", node.address.port, certificate, tls_name(node.address.node)
    ) as channel:
        yield channel


async def health(channel, service="") -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return (await health_pb2_grpc.HealthStub(channel).Check(request)).status


# Serving and being paid


async def test_content_published_while_it_runs_is_fetched_paid_and_shown_to_the_operator(
    economy, folder, tmp_path
):
    data = content(3 * RUN + 17)
    wallet = await economy.wallet()
    async with Node(folder, clock=economy.clock) as node:
        infohash = publish_in(folder, "film", data)
        btt = client_of(economy, node, wallet)
        async with btt, btt.content.fetch(infohash, tmp_path / "dest") as transfer:
            pass
        found = await read_status(folder.path)
        assert found.state == SERVING
        assert found.address == node.address
    assert hashlib.sha256((tmp_path / "dest" / "film").read_bytes()).digest() == hashlib.sha256(data).digest()
    (receipt,) = btt.receipts
    assert receipt.counts_agree
    price = Rate.parse("1 BTT / GiB").owed(len(data))
    assert transfer.receipt.spent == receipt.paid == receipt.captured == price
    assert (await economy.ledger.account(folder.payee_key)).available == price

    stopped = await read_status(folder.path)
    assert stopped.state == NOT_RUNNING
    assert stopped.address is None
    for status in (found, stopped):
        shown = status.as_json()
        assert shown["served_bytes"] == len(data)
        assert shown["paid"] == shown["captured"] == str(price)
        assert (shown["open_channels"], shown["closed_channels"]) == (0, 1)
        assert shown["services"][0]["price"] == "1 BTT / GiB"
        assert shown["services"][0]["units"] == len(data)
        assert ("channels", "0 open, 1 closed") in status.lines()


async def test_another_account_is_paid_if_the_operator_says_so(economy, tmp_path):
    receiver = await economy.wallet(0)
    opened = make_folder(
        tmp_path / "node",
        str(economy.running.address),
        payments={
            "payee": str(receiver.account.public.address),
            "min_challenge": "1s",
            "min_lifetime": "10s",
            "close_margin": "1s",
        },
    )
    infohash = publish_in(opened, "film", content(RUN))
    wallet = await economy.wallet()
    async with Node(opened, clock=economy.clock) as node:
        btt = client_of(economy, node, wallet)
        async with btt, btt.content.fetch(infohash, tmp_path / "dest"):
            pass
    assert (await economy.ledger.account(receiver.account)).available == Rate.parse("1 BTT / GiB").owed(RUN)


async def test_health_and_reflection_are_served_and_bounded(economy, folder):
    async with Node(folder, clock=economy.clock) as node, plain_channel(node) as channel:
        name = content_pb2.DESCRIPTOR.services_by_name["ContentService"].full_name
        assert await health(channel) == await health(channel, name) == SERVING_STATUS
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await health(channel, "nothing")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="*")]))
        answers = [answer async for answer in call]
        assert name in {service.name for service in answers[0].list_services_response.service}
        with pytest.raises(grpc.aio.AioRpcError) as limited:
            for _ in range(601):
                await health(channel)
        assert isinstance(to_error(limited.value), RateLimited)


# The ledger is away


async def open_some_channel(node: Node, channel) -> Exception:
    """Asks for a session of a channel that nobody opened; returns what the node says."""
    stub = payment_pb2_grpc.PaymentServiceStub(channel)
    begin = await stub.Begin(payment_pb2.BeginRequest())
    offer = await node.offers.current()
    body = SessionOpen(
        node=offer.node,
        channel=os.urandom(32),
        offer_digest=offer.digest,
        app=APP_UNKNOWN,
        client_nonce=bytes(16),
        server_nonce=begin.server_nonce,
        valid_until_ms=offer.issued_at_ms + 60_000,
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Open(payment_pb2.OpenRequest(open=body.encode(), signature=bytes(65)))
    return to_error(refused.value)


async def test_without_its_ledger_it_serves_what_is_free_and_takes_sessions_once_it_is_back(
    economy, tmp_path
):
    wallet = await economy.wallet(0)
    ledger_folder.init(
        tmp_path / "away",
        name="away",
        supply_to=wallet.account.public.address,
        terms=Terms(min_challenge_ms=1000, min_lifetime_ms=10_000),
    )
    async with serve(LedgerConfig(folder=tmp_path / "away")) as running:
        address = running.address
    opened = make_folder(tmp_path / "node", str(address))
    infohash = publish_in(opened, "film", content(RUN))
    async with Node(opened, clock=economy.clock) as node, plain_channel(node) as channel:
        client = Client.connect(
            str(node.address),
            budget=Budget("1 BTT"),
            ledger=str(address),
            wallet=wallet,
            clock=economy.clock,
        )
        async with client as btt:
            assert (await btt.content.quote(infohash)).total_bytes == RUN
            assert isinstance(await open_some_channel(node, channel), LedgerUnreachable)
            async with serve(LedgerConfig(folder=tmp_path / "away", port=address.port)):
                assert isinstance(await open_some_channel(node, channel), ChannelUnknown)
                async with btt.content.fetch(infohash, tmp_path / "dest"):
                    pass
                await btt.close_session()


async def test_another_ledger_in_its_place_is_not_believed(economy, folder, tmp_path):
    ledger_folder.init(tmp_path / "false", name="false")
    async with serve(LedgerConfig(folder=tmp_path / "false")) as false:
        address = replace(economy.running.address, port=false.address.port)
        opened = make_folder(tmp_path / "other", str(address))
        async with Node(opened, clock=economy.clock) as node, plain_channel(node) as channel:
            assert isinstance(await open_some_channel(node, channel), LedgerUnreachable)


# Starting


async def test_a_restart_keeps_its_name_and_its_offer(economy, folder):
    async with Node(folder, clock=economy.clock) as node:
        first = await node.offers.current()
    async with Node(NodeFolder.open(folder.path), clock=economy.clock) as node:
        assert node.address.node == folder.identity.address
        assert (await node.offers.current()).digest == first.digest


async def test_another_price_is_another_offer_and_the_old_one_is_honoured(economy, folder, tmp_path):
    infohash = publish_in(folder, "film", content(RUN))
    wallet = await economy.wallet()
    async with Node(folder, clock=economy.clock) as node, client_of(economy, node, wallet) as btt:
        old = await btt.node()
    config = folder.path / node_folder.CONFIG
    config.write_text(config.read_text() + 'rate = "2 BTT / GiB"\n')
    async with Node(NodeFolder.open(folder.path), clock=economy.clock) as node:
        assert (await node.offers.current()).serial == old.offer.serial + 1
        async with client_of(economy, node, wallet) as btt:
            assert (await btt.content.quote(infohash)).rate == Rate.parse("2 BTT / GiB")
            btt.providers[0]._node = replace(old, address=node.address)
            async with btt.content.fetch(infohash, tmp_path / "dest"):
                pass
        assert btt.receipts[0].paid == Rate.parse("1 BTT / GiB").owed(RUN)


async def test_a_second_start_is_refused_and_disturbs_nothing(economy, folder):
    async with Node(folder, clock=economy.clock) as node:
        with pytest.raises(ConfigError, match="is running already"):
            async with Node(folder, clock=economy.clock):
                pass
        assert (await read_status(folder.path)).state == SERVING
        assert running_address(folder.path) == node.address


async def test_a_port_that_is_taken(economy, folder, tmp_path):
    async with Node(folder, clock=economy.clock) as node:
        taken = {"node": {"listen": f"127.0.0.1:{node.address.port}"}}
        other = make_folder(tmp_path / "other", str(economy.running.address), **taken)
        with pytest.raises(ConfigError, match="cannot listen on"):
            async with Node(other, clock=economy.clock):
                pass
        with other.lock():
            pass  # it let go of what it had


async def test_a_service_that_must_be_refused_keeps_the_node_from_starting(economy, gated):
    class Cheap(GatedPlugin):
        def prices(self):
            return {}

    node = gated()
    node._plugins = {"probe": lambda: Cheap}
    with pytest.raises(ConfigError, match=r"services\.probe: .*has no price"):
        await node.__aenter__()
    assert GatedPlugin.made.stopped
    assert running_address(node.folder.path) is None


def test_init_makes_three_different_keys_for_its_owner_alone(tmp_path):
    address = LedgerAddress(PrivateKey.generate().address, "127.0.0.1", 7400, bytes(32))
    made = make_folder(tmp_path / "node", str(address))
    assert made.identity.address != made.payee_key.address == made.payee
    assert made.path.stat().st_mode & 0o777 == 0o700
    for name in (node_folder.IDENTITY_KEY, node_folder.PAYEE_KEY, node_folder.TLS_KEY, node_folder.CONFIG):
        assert (made.path / name).stat().st_mode & 0o777 == 0o600, name
    with pytest.raises(ConfigError, match="There is a node in"):
        make_folder(tmp_path / "node", str(address))


def test_init_takes_up_an_attempt_that_broke_off(tmp_path):
    address = LedgerAddress(PrivateKey.generate().address, "127.0.0.1", 7400, bytes(32))
    made = make_folder(tmp_path / "node", str(address))
    for name in (node_folder.CONFIG, node_folder.CERTIFICATE, node_folder.PAYEE_KEY):
        (made.path / name).unlink()
    again = make_folder(tmp_path / "node", str(address))
    assert again.identity.address == made.identity.address


def test_the_keys_may_have_a_password(tmp_path, monkeypatch):
    monkeypatch.setenv(node_folder.PASSWORD_ENV, "open sesame")
    address = LedgerAddress(PrivateKey.generate().address, "127.0.0.1", 7400, bytes(32))
    made = make_folder(tmp_path / "node", str(address))
    assert NodeFolder.open(made.path).identity.address == made.identity.address
    monkeypatch.delenv(node_folder.PASSWORD_ENV)
    with pytest.raises(ConfigError, match="password"):
        NodeFolder.open(made.path)


# Payment does not wait behind data


async def reached(probe, call) -> None:
    """Waits until a call is at the gate; a call that fails on the way says why, and nobody waits for ever."""
    waiting = asyncio.create_task(probe.waiting.acquire())
    await asyncio.wait([waiting, call], return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
        waiting.cancel()
        raise AssertionError("the call has ended") from call.exception()


async def many(session):
    stub = rpc.ProbeServiceStub(session.channel)
    return [message async for message in stub.Many(pb.Ask(messages=2, size=5))]


async def test_with_all_slots_taken_sessions_open_and_pay_and_only_paid_calls_are_refused(economy, gated):
    one, two = await economy.wallet(), await economy.wallet()
    async with gated(tables={"limits": {"calls": 1}}) as node:
        probe = GatedPlugin.made.servicer
        async with client_of(economy, node, one) as first, client_of(economy, node, two) as second:
            session = await first.session(100_000)
            running = asyncio.create_task(many(session))
            await reached(probe, running)
            other = await second.session(100_000)
            with pytest.raises(RateLimited):
                await many(other)
            probe.gate.set()
            assert len(await running) == 2
            assert len(await many(other)) == 2


async def test_a_session_may_not_take_every_slot(economy, gated):
    one, two = await economy.wallet(), await economy.wallet()
    async with gated(tables={"limits": {"calls_per_payer": 1}}) as node:
        probe = GatedPlugin.made.servicer
        async with client_of(economy, node, one) as first, client_of(economy, node, two) as second:
            session = await first.session(100_000)
            running = asyncio.create_task(many(session))
            await reached(probe, running)
            with pytest.raises(RateLimited):
                await many(session)
            other = asyncio.create_task(many(await second.session(100_000)))
            await reached(probe, other)
            probe.gate.set()
            assert len(await running) == len(await other) == 2


async def test_limits_and_applications_of_the_configuration_hold(economy, gated):
    service = {"enabled": True, "limits": {"calls_per_minute": 2, "deadline": "1h"}}
    tables = {"services": {"probe": service}, "apps": {"deny": [str(PrivateKey.generate().public.address)]}}
    async with (
        gated(tables=tables) as node,
        client_of(economy, node, await economy.wallet()) as btt,
    ):
        stub = rpc.ProbeServiceStub((await btt.session(100_000)).channel)
        for _ in range(2):
            await stub.One(pb.Ask(size=1))
        with pytest.raises(RateLimited, match="2 calls of probe a minute") as limited:
            await stub.One(pb.Ask(size=1))
        assert 0 < limited.value.retry_after <= 30
        economy.clock.ahead_ms += 60_000
        await stub.One(pb.Ask(size=1))


async def test_a_node_that_serves_known_applications_alone(economy, gated):
    async with (
        gated(tables={"apps": {"deny": ["unknown"]}}) as node,
        client_of(economy, node, await economy.wallet()) as btt,
    ):
        with pytest.raises(AppRefused, match="without a grant"):
            await btt.session(100_000)


async def test_a_cancelled_call_frees_its_slot(economy, gated):
    wallet = await economy.wallet()
    async with gated(tables={"limits": {"calls": 1}}) as node:
        probe = GatedPlugin.made.servicer
        async with client_of(economy, node, wallet) as btt:
            session = await btt.session(100_000)
            for _ in range(3):
                call = rpc.ProbeServiceStub(session.channel).Many(pb.Ask(messages=2, size=5))
                await anext(aiter(call))
                await probe.waiting.acquire()
                assert node.admission.running == 1
                call.cancel()
                await node.admission.idle()
            probe.gate.set()
            assert len(await many(session)) == 2


# Stopping


async def test_a_stop_lets_running_calls_end_and_takes_no_new_ones(economy, gated):
    wallet, late = await economy.wallet(), await economy.wallet()
    async with gated().running() as (node, channel, stop):
        probe = GatedPlugin.made.servicer
        async with client_of(economy, node, wallet, keep_channels=True) as btt:
            session = await btt.session(100_000)
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING_STATUS
            running = asyncio.create_task(many(session))
            await reached(probe, running)
            stopping = asyncio.create_task(stop())
            assert (await watch.read()).status == NOT_SERVING_STATUS
            with pytest.raises(Draining):
                await many(session)
            assert (await read_status(node.folder.path)).state == NOT_SERVING
            async with client_of(economy, node, late) as other:
                with pytest.raises(Draining):
                    await other.session(100_000)
            assert not GatedPlugin.made.stopped
            probe.gate.set()
            assert len(await running) == 2
            await stopping
            await session.abandon()
            btt.providers[0].live = None
        assert GatedPlugin.made.stopped
        assert probe.ended == 1


@pytest.mark.parametrize("hurried", [False, True])
async def test_a_call_that_does_not_end_is_cut_after_the_grace_time_or_at_once(economy, gated, hurried):
    wallet = await economy.wallet()
    async with gated(grace_s=1000 if hurried else 0.05).running() as (node, _, stop):
        probe = GatedPlugin.made.servicer
        async with client_of(economy, node, wallet, keep_channels=True) as btt:
            session = await btt.session(100_000)
            running = asyncio.create_task(many(session))
            await reached(probe, running)
            stopping = asyncio.create_task(stop())
            if hurried:
                node.hurry()
            await stopping
            with pytest.raises(BttError):
                await running
            await session.abandon()
            btt.providers[0].live = None
        assert GatedPlugin.made.stopped


async def test_what_was_delivered_before_a_stop_is_in_the_books_after_it(economy, gated):
    wallet = await economy.wallet()
    async with gated().running() as (node, _, stop):
        GatedPlugin.made.servicer.gate.set()
        async with client_of(economy, node, wallet, keep_channels=True) as btt:
            session = await btt.session(100_000)
            for _ in range(2):  # the second costs nothing more, so no payment brings it to the disk
                await many(session)
                await session.settle()
            await stop()
            await session.abandon()
            btt.providers[0].live = None
        units = (await read_status(node.folder.path)).earnings.units
    assert units[Line("probe.v1.ProbeService", Unit.BYTE)] == 2 * len(b"first" + b"second")


async def test_a_begun_close_is_finished_by_the_stop(economy, gated):
    wallet = await economy.wallet()
    async with gated().running() as (node, _, stop):
        GatedPlugin.made.servicer.gate.set()
        async with client_of(economy, node, wallet, keep_channels=True) as btt:
            session = await btt.session(100_000)
            await many(session)
            await session.settle()
            await session.abandon()
            btt.providers[0].live = None
        (channel,) = [record.channel_id for record, _ in await node.store.channels()]
        await node.store.begin_close(channel, 0, 0)
        await stop()
    assert (await economy.ledger.totals()).open_channels == 0
    assert (await read_status(node.folder.path)).earnings.closed_channels == 1


async def test_a_stop_leaves_no_task_no_thread_and_no_open_file(economy, folder):
    infohash = publish_in(folder, "film", content(RUN))
    wallet = await economy.wallet()

    def left():
        files = []
        for handle in Path("/proc/self/fd").iterdir():
            try:
                files.append(str(handle.readlink()))
            except OSError:
                continue
        # The threads of the loop itself stay with the loop.
        names = [thread.name for thread in threading.enumerate()]
        threads = sorted(name for name in names if not name.startswith("asyncio_"))
        codes = [getattr(task.get_coro(), "cr_code", None) for task in asyncio.all_tasks()]
        tasks = sorted(code.co_qualname for code in codes if code and "/btt/" in code.co_filename)
        return tasks, threads, [f for f in files if f.startswith(str(folder.path))]

    async def life():
        async with Node(folder, clock=economy.clock) as node:
            btt = client_of(economy, node, wallet)
            async with btt, btt.content.fetch(infohash, folder.path.parent / os.urandom(4).hex()):
                pass

    await life()
    first = left()
    await life()
    assert left() == first
    assert first[2] == []


# As a process


def start_process(folder: Path, *options: str) -> tuple[subprocess.Popen, dict]:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from btt.sdk.cli import main; main()",
            "node",
            "start",
            str(folder),
            *options,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    line = process.stdout.readline()
    if not line:
        _, errors = process.communicate()
        raise AssertionError(errors.decode())
    return process, json.loads(line)


@pytest.mark.parametrize("how", ["lifeline", "SIGTERM", "SIGINT"])
async def test_the_command_says_when_it_is_ready_and_stops_when_told(economy, folder, how):
    process, ready = await asyncio.to_thread(start_process, folder.path, "--stdin-lifeline")
    assert ready == {"ready": True, "address": str(running_address(folder.path))}
    assert (await read_status(folder.path)).state == SERVING
    if how == "lifeline":
        process.stdin.close()
        process.stdin = None
    else:
        process.send_signal(getattr(signal, how))
    out, errors = await asyncio.to_thread(process.communicate)
    assert process.returncode == 0, errors.decode()
    assert out == b"", "standard output carries the ready line alone"
    assert (await read_status(folder.path)).state == NOT_RUNNING


async def test_a_killed_node_is_seen_as_not_running_and_starts_again(economy, folder):
    process, ready = await asyncio.to_thread(start_process, folder.path)
    process.kill()
    await asyncio.to_thread(process.communicate)
    assert running_address(folder.path) is None
    assert (await read_status(folder.path)).state == NOT_RUNNING
    async with Node(folder, clock=economy.clock) as node:
        assert str(node.address).partition("@")[0] == ready["address"].partition("@")[0]


async def test_a_second_command_fails_with_the_code_of_a_configuration_error(economy, folder):
    async with Node(folder, clock=economy.clock):
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "btt.sdk.cli", "node", "start", str(folder.path)],
            capture_output=True,
            check=False,
        )
    assert done.returncode == 3
    assert b"is running already" in done.stderr


async def test_a_node_that_can_no_longer_watch_its_channels_gives_up(economy, folder, monkeypatch):
    async def broken(*_):
        raise RuntimeError("defect")

    monkeypatch.setattr(Closer, "run", broken)
    started = []
    with pytest.raises(InternalError, match="gave up"):
        await service.serve(folder, ready=started.append)
    assert len(started) == 1
    assert running_address(folder.path) is None
