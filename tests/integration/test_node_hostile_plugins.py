"""Services that raise, hold up the loop, leave tasks behind or refuse to stop do not take the node down.

They are distributions with entry points, found and loaded as any other.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import textwrap
import types
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from btt.node import folder as node_folder
from btt.node import registry
from btt.node.folder import running_facts
from btt.node.plugins.host import State
from btt.node.runtime import Node
from btt.node.services import Patience
from btt.sdk.budget import Budget
from btt.sdk.client import Client
from btt.sdk.errors import InternalError, ServiceUnavailable
from btt.sdk.keys import PrivateKey
from kit.hanging import ends
from kit.payers import dial
from kit.probe import pb, rpc
from kit.reach import reachable

BASE = """
    import asyncio, threading, time
    from kit.probe import PRICES, Probe, pb, rpc

    made = []
    freed = threading.Event()
    noticed = []

    class Servicer(Probe):
        pass

    class Plugin:
        name = "probe"
        def __init__(self, context):
            self.context = context
            self.servicer = Servicer()
            made.append(self)
        async def start(self): pass
        def register(self, server): rpc.add_ProbeServiceServicer_to_server(self.servicer, server)
        def prices(self): return PRICES
        async def stop(self): pass
"""
HOSTILE = {
    "raises": """
        class Servicer(Servicer):
            async def One(self, request, context):
                raise SystemExit(7) if request.size else RuntimeError("secret detail")
            async def Many(self, request, context):
                yield pb.Bytes(data=b"first")
                raise KeyError("secret detail")
        class Hostile(Plugin):
            async def stop(self): raise RuntimeError("no")
    """,
    "overbills": """
        class Servicer(Servicer):
            async def Query(self, request, context):
                request.max_rows = 10**12
                yield pb.Rows(rows=10)
                yield pb.Rows(rows=request.size)
        class Hostile(Plugin): pass
    """,
    "blocks": """
        class Servicer(Servicer):
            async def One(self, request, context):
                freed.wait(60)
                return pb.Bytes(data=b"late")
        class Hostile(Plugin): pass
    """,
    "leaks": """
        async def for_ever(self):
            while True:
                await asyncio.sleep(3600)
        class Servicer(Servicer):
            async def One(self, request, context):
                self.leaked = asyncio.create_task(for_ever(self), name="leaked by a call")
                return pb.Bytes(data=b"done")
        class Hostile(Plugin):
            def __init__(self, context):
                super().__init__(context)
                self.early = [asyncio.create_task(for_ever(self), name="leaked by its making")]
            def register(self, server):
                super().register(server)
                self.early.append(asyncio.create_task(for_ever(self), name="leaked by register"))
            def prices(self):
                self.early.append(asyncio.create_task(for_ever(self), name="leaked by prices"))
                return PRICES
            async def start(self):
                self.leaked = asyncio.create_task(for_ever(self), name="leaked by start")
                self.kept = self.context.tasks.create(for_ever(self), name="its own")
    """,
    "refuses": """
        class Hostile(Plugin):
            async def stop(self):
                self.stopping = asyncio.current_task()
                while True:
                    try:
                        await asyncio.sleep(3600)
                    except asyncio.CancelledError:
                        if freed.is_set():
                            raise
    """,
    "exits": """
        async def work():
            raise SystemExit(7)
        class Hostile(Plugin):
            def __init__(self, context):
                super().__init__(context)
                self.early = asyncio.create_task(work(), name="from the beginning")
            async def start(self):
                self.work = asyncio.create_task(work(), name="by itself")
    """,
    "hangs": """
        class Hostile(Plugin):
            async def start(self):
                made.append(asyncio.current_task())
                await asyncio.Event().wait()
    """,
    "dies": """
        class Hostile(Plugin):
            async def start(self):
                async def work():
                    while not freed.is_set():
                        await asyncio.sleep(0)
                    if len(made) == 1:
                        raise ValueError("lost its way")
                self.context.tasks.create(work(), name="work")
    """,
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Returns a function that installs a hostile distribution, and gives its module.

    In the end all are freed, so that what a failed test left running can end.
    """
    names = []

    def add(kind: str) -> types.ModuleType:
        module = f"hostile_{kind}"
        site = tmp_path / "site"
        info = site / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        text = textwrap.dedent(BASE) + textwrap.dedent(HOSTILE[kind])
        (site / f"{module}.py").write_text(text)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[btt.services]\nprobe = {module}:Hostile\n")
        monkeypatch.syspath_prepend(str(site))
        names.append(module)
        import importlib

        return importlib.import_module(module)

    yield add
    for name in names:
        sys.modules.pop(name).freed.set()


def make_node(economy, path: Path, **options) -> Node:
    opened = node_folder.init(
        path,
        config={
            "node": {"listen": "127.0.0.1:0"},
            "ledger": {"address": str(economy.running.address)},
            "payments": {"min_challenge": "1s", "min_lifetime": "10s", "close_margin": "1s"},
            "services": {"probe": {"enabled": True}, "content": {"enabled": True}},
        },
    )
    found = registry.installed()
    assert "probe" in found, "found by its entry point"
    brief = {"start_s": 5.0, "stop_s": 0.1, "leak_s": 0.1, "backoff": lambda _: 0.0}
    patience = Patience(**{**brief, **options})
    return Node(opened, clock=economy.clock, patience=patience)


async def status(channel, service) -> int:
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return answer.status


def client_of(economy, node, wallet) -> Client:
    return Client.connect(
        str(node.address), budget=Budget("5 BTT"), ledger=str(economy.running.address), wallet=wallet,
        clock=economy.clock,
    )  # fmt: skip


async def test_one_that_raises_answers_with_a_typed_error_that_tells_nothing(economy, install, tmp_path):
    install("raises")
    wallet = await economy.wallet()
    async with make_node(economy, tmp_path / "node") as node:
        async with client_of(economy, node, wallet) as btt:
            stub = rpc.ProbeServiceStub((await btt.session(100_000)).channel)
            for size in (0, 1):
                with pytest.raises(InternalError) as said:
                    await stub.One(pb.Ask(size=size))
                assert "secret detail" not in str(said.value)
            with pytest.raises(InternalError):
                _ = [message async for message in stub.Many(pb.Ask(messages=2, size=5))]
            assert node.services.registry.hosts["probe"].state is State.SERVING, (
                "a call failed, not the service"
            )
        assert btt.receipts[0].paid <= 1, "for the five bytes that came"
        assert node.services.registry.hosts["content"].state is State.SERVING
    assert running_facts(node.folder.path) is None


@pytest.mark.parametrize("rows", [11, 2**32 - 1])
async def test_one_that_bills_above_its_callers_cap_is_seen_in_log_and_metrics(
    economy, install, tmp_path, rows
):
    install("overbills")
    wallet = await economy.wallet()
    async with make_node(economy, tmp_path / "node") as node:
        async with client_of(economy, node, wallet) as btt:
            stub = rpc.ProbeServiceStub((await btt.session(100_000)).channel)
            with capture_logs() as logs, pytest.raises(InternalError):
                async for message in stub.Query(pb.Ask(size=rows, max_rows=20)):
                    assert message.rows == 10
        [logged] = [log for log in logs if log["log_level"] == "error"]
        assert logged["method"] == "/probe.v1.ProbeService/Query"
        labels = {"service": "probe", "method": "Query", "code": "OVERBILLED" if rows == 11 else "INTERNAL"}
        assert node.metrics.registry.get_sample_value("btt_service_requests_total", labels) == 1
        assert node.services.registry.hosts["probe"].state is State.SERVING
    [receipt] = btt.receipts
    assert receipt.paid <= 20
    assert receipt.counts_agree


async def test_one_that_holds_up_the_loop_is_named_and_stopped_at_the_third_time(economy, install, tmp_path):
    module = install("blocks")
    wallet = await economy.wallet()
    node = make_node(economy, tmp_path / "node", block_s=0.2)
    told = []
    async with node:

        def notice(service, where):
            if service:  # anything may hold up a busy machine
                told.append((service, where))
                module.freed.set()  # only now may the loop go on

        node.services.watchdog._noticed = notice
        host = node.services.registry.hosts["probe"]
        blocked, counted, states = host.blocked, asyncio.Semaphore(0), []

        def count(what):
            blocked(what)
            states.append((host.state, host.reason))
            counted.release()

        host.blocked = count
        async with client_of(economy, node, wallet) as btt:
            stub = rpc.ProbeServiceStub((await btt.session(100_000)).channel)
            for _ in range(3):
                module.freed.clear()
                assert (await stub.One(pb.Ask(size=4))).data == b"late"
                await counted.acquire()
            assert {service for service, _ in told} == {"probe"}
            assert all("hostile_blocks.py" in where and "in One" in where for _, where in told)
            assert [state for state, _ in states] == [State.SERVING, State.SERVING, State.FAILED]
            assert "held up the node" in states[2][1]


async def test_one_that_ends_the_process_in_the_background_ends_only_itself(economy, install, tmp_path):
    module = install("exits")
    async with make_node(economy, tmp_path / "node") as node:
        plugin = module.made[0]
        await asyncio.wait({plugin.work, plugin.early})
        assert "tried to end the process" in str(plugin.work.exception())
        assert "tried to end the process" in str(plugin.early.exception())
        assert node.services.registry.hosts["content"].state is State.SERVING


async def test_one_that_never_starts_does_not_keep_the_node_from_starting(economy, install, tmp_path):
    module = install("hangs")
    node = make_node(economy, tmp_path / "node", start_s=0.1)
    async with ends("a node whose service does not start"), node:
        host = node.services.registry.hosts["probe"]
        assert host.failures
        assert module.made[1].cancelled(), "its start was ended"
        assert node.services.registry.hosts["content"].state is State.SERVING


async def test_what_one_leaves_running_is_cancelled_when_it_stops(economy, install, tmp_path):
    module = install("leaks")
    wallet = await economy.wallet()
    async with make_node(economy, tmp_path / "node") as node:
        async with client_of(economy, node, wallet) as btt:
            stub = rpc.ProbeServiceStub((await btt.session(100_000)).channel)
            await stub.One(pb.Ask(size=4))
        (plugin,) = module.made
        leaked = [plugin.leaked, plugin.kept, plugin.servicer.leaked, *plugin.early]
        assert len(plugin.early) == 3
        assert not any(task.done() for task in leaked)
    assert all(task.cancelled() for task in leaked)
    assert node.services.registry.abandoned == []


async def test_one_that_refuses_to_stop_does_not_keep_the_node(economy, install, tmp_path):
    module = install("refuses")
    node = make_node(economy, tmp_path / "node")
    async with ends("a node whose service refuses to stop"), node:
        pass
    assert running_facts(node.folder.path) is None
    (stopping,) = node.services.registry.abandoned
    assert stopping is module.made[0].stopping
    assert node.services.registry.hosts["content"].state is State.STOPPED
    module.freed.set()
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping


async def test_the_process_of_such_a_node_ends(economy, install, tmp_path):
    install("refuses")
    opened = make_node(economy, tmp_path / "node").folder
    paths = [str(tmp_path / "site"), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "btt.sdk.cli", "node", "start", str(opened.path),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert json.loads(await process.stdout.readline())["ready"]
        process.terminate()
        async with ends("a process whose service refuses to stop"):
            _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()
    assert b"service.tasks_refuse" in errors


async def test_one_whose_work_in_the_background_fails_is_isolated_and_comes_back(economy, install, tmp_path):
    module = install("dies")
    wallet = await economy.wallet()
    gate = asyncio.Event()
    node = make_node(economy, tmp_path / "node")
    async with ends("a service that comes back"), node:
        host = node.services.registry.hosts["probe"]
        drained = host.drain

        async def held(seconds=None):
            await gate.wait()
            await drained(seconds)

        host.drain = held
        async with (
            client_of(economy, node, wallet) as btt,
            dial(node.folder.certificate, node.address.node, node.address.port) as channel,
        ):
            stub = rpc.ProbeServiceStub((await btt.session(100_000)).channel)
            assert len((await stub.One(pb.Ask(size=4))).data) == 4
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service="probe.v1.ProbeService")
            )
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            module.freed.set()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert host.state is State.FAILED
            assert "lost its way" in host.reason
            with pytest.raises(ServiceUnavailable, match="has failed"):
                await stub.One(pb.Ask(size=4))
            assert await status(channel, "") == health_pb2.HealthCheckResponse.SERVING
            gate.set()
            while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
                pass
            assert len((await stub.One(pb.Ask(size=4))).data) == 4
            watch.cancel()
        assert len(module.made) == 2


async def test_what_a_service_is_given_leads_to_no_key(economy, install, tmp_path):
    module = install("leaks")
    async with make_node(economy, tmp_path / "node") as node:
        found = list(reachable(module.made[0].context))
        assert len(found) > 100
        assert [thing for thing in found if isinstance(thing, PrivateKey)] == []
        assert any(isinstance(thing, PrivateKey) for thing in reachable(node.offers)), "the search finds keys"
