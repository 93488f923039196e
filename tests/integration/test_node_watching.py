"""What an operator sees of a node: its log, its metrics, and what the doctor says."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import threading
import urllib.request
from dataclasses import replace

import pytest
import structlog
from typer.testing import CliRunner

from btt.node import folder as node_folder
from btt.node.commands.doctor import app as doctor_app
from btt.node.config import LogSection
from btt.node.doctor import Result, examine
from btt.node.editing import edit
from btt.node.folder import NodeFolder
from btt.node.logs import configure
from btt.node.metrics import NodeMetrics
from btt.node.payments.session import Session
from btt.node.runtime import Node
from btt.node.status import SERVING, read_status
from btt.sdk.budget import Budget
from btt.sdk.client import Client
from btt.sdk.errors import ConfigError, ContentUnknown
from btt.sdk.money import Rate
from btt.services.content.catalogue import Catalogue
from btt.services.content.publish import publish
from kit.economy import RUN, content
from kit.hanging import HANGS_S


def make_folder(economy, path, **tables):
    config = {
        "node": {"listen": "127.0.0.1:0"},
        "ledger": {"address": str(economy.running.address)},
        "payments": {"min_challenge": "1s", "min_lifetime": "10s", "close_margin": "1s"},
        "services": {"content": {"enabled": True}},
    }
    return node_folder.init(path, config={**config, **tables})


async def buy(economy, node, tmp_path, *, dest="dest"):
    """Asks for what is not there, then buys a film; returns what was paid."""
    source = tmp_path / "film"
    source.write_bytes(content(2 * RUN + 3))
    catalogue = Catalogue(node.folder.path / "content")
    infohash = publish(source, catalogue).infohash
    catalogue.close()
    wallet = await economy.wallet()
    async with Client.connect(
        str(node.address), budget=Budget("5 BTT"), ledger=str(economy.running.address), wallet=wallet,
        clock=economy.clock,
    ) as btt:  # fmt: skip
        with pytest.raises(ContentUnknown):
            await btt.content.quote(bytes(32))
        async with btt.content.fetch(infohash, tmp_path / dest):
            pass
    return wallet


# The log


async def test_the_log_of_a_whole_paid_run_holds_no_secret(economy, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(node_folder.PASSWORD_ENV, "correct horse battery")
    folder = make_folder(economy, tmp_path / "node")
    tokens, made = [], Session.__init__

    def remember(session, **options):
        made(session, **options)
        tokens.append(session.token)

    monkeypatch.setattr(Session, "__init__", remember)
    kept, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure(LogSection(level="debug", format="json"), sys.stderr)
    root.setLevel(logging.DEBUG)
    try:
        async with Node(folder, clock=economy.clock) as node:
            wallet = await buy(economy, node, tmp_path)
            structlog.get_logger().warning("a careless line", state=vars(node.sessions), folder=folder)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()
        structlog.configure(**kept)
    text = capfd.readouterr().err
    events = {json.loads(line)["event"] for line in text.splitlines()}
    assert {"session.open", "channel.closed", "node.serving", "a careless line"} <= events
    assert tokens
    secrets = [folder.identity.secret, folder.payee_key.secret, wallet.account.secret, *tokens]
    for secret in secrets:
        assert secret.hex() not in text
        assert repr(secret)[2:-1] not in text
    assert "correct horse" not in text
    assert folder.tls_key.decode().splitlines()[1] not in text


# Metrics


async def test_metrics_say_what_the_books_say_and_name_no_peer(economy, tmp_path):
    folder = make_folder(economy, tmp_path / "node", metrics={"listen": "127.0.0.1:0"})
    async with Node(folder, clock=economy.clock) as node:
        wallet = await buy(economy, node, tmp_path)
        url = f"http://127.0.0.1:{node.metrics_port}/metrics"
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=20).read().decode())
    due = Rate.parse("1 BTT / GiB").owed(2 * RUN + 3)
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for state in ("accrued", "signed", "settled"):
        assert float(lines[f'btt_revenue_base_units{{state="{state}"}}']) == due
    assert float(lines['btt_channels{state="closed"}']) == 1
    assert float(lines['btt_plugin_state{service="content",state="serving"}']) == 1
    fetches = [
        float(value)
        for name, value in lines.items()
        if name.startswith("btt_service_requests_total") and 'method="Fetch"' in name and "SERVED" in name
    ]
    assert sum(fetches) >= 1
    unknown = 'btt_service_requests_total{code="CONTENT_UNKNOWN",method="Quote",service="content"}'
    assert float(lines[unknown]) == 1
    assert str(wallet.account.public.address) not in text
    assert wallet.account.public.address.data.hex() not in text


async def test_numbers_that_take_long_to_read_hold_up_no_payment(economy, tmp_path, monkeypatch):
    reading, paid, in_time = threading.Event(), threading.Event(), []

    def long(db):
        reading.set()
        in_time.append(paid.wait(2))
        return ()

    monkeypatch.setattr("btt.node.samples.read_entries", long)
    async with Node(make_folder(economy, tmp_path / "node"), clock=economy.clock) as node:
        asked = asyncio.create_task(node._samples())
        await asyncio.to_thread(reading.wait, HANGS_S)
        await node.store.last_serial()
        paid.set()
        assert await asked
    assert in_time == [True]


async def test_metrics_of_a_service_are_bounded_and_survive_its_restart():
    async def nothing():
        return []

    metrics = NodeMetrics(nothing)
    for _ in range(2):
        given = metrics.of("acme.thing")
        given.count("rows_total", 2)
        given.gauge("used_bytes", 7)
        given.gauge("rows_total", 1)  # of another kind: dropped
        given.count("Not a name")
    for number in range(200):
        given.count(f"made_up_{number}_total")
    assert metrics.registry.get_sample_value("btt_acme_thing_rows_total") == 4
    assert metrics.registry.get_sample_value("btt_acme_thing_used_bytes") == 7
    assert metrics.registry.get_sample_value("btt_acme_thing_made_up_199_total") is None
    assert len(list(metrics.registry.collect())) <= 66


async def test_metrics_on_a_port_that_is_taken(economy, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        folder = make_folder(economy, tmp_path / "node", metrics={"listen": listen})
        with pytest.raises(ConfigError, match="Metrics cannot be served"):
            await Node(folder, clock=economy.clock).__aenter__()


# The doctor


async def examined(folder, clock):
    return {finding.check: finding for finding in await examine(folder.path, clock=clock)}


async def test_the_doctor_finds_a_node_in_good_order(economy, tmp_path):
    folder = make_folder(economy, tmp_path / "node")
    async with Node(folder, clock=economy.clock) as node:
        await buy(economy, node, tmp_path)
        found = await examined(folder, economy.clock)
        done = await asyncio.to_thread(CliRunner().invoke, doctor_app, ["--node", str(folder.path), "--json"])
    bad = {check: finding for check, finding in found.items() if finding.result is not Result.OK}
    assert bad.keys() == {"port"}, "it listens on this machine alone"
    assert bad["port"].result is Result.WARNING
    assert "listen =" in bad["port"].do
    assert done.exit_code == 0
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["ok"]
    checks = {"configuration", "node", "ledger", "clock", "port", "disk", "channels", "service content"}
    assert {line["check"] for line in said["checks"]} == checks
    stopped = await examined(folder, economy.clock)
    assert (stopped["node"].result, stopped["node"].do) == (
        Result.WARNING,
        f"Start it: btt node start {folder.path}.",
    )


async def test_the_doctor_finds_an_address_that_means_this_machine(economy, tmp_path):
    folder = make_folder(economy, tmp_path / "node")
    async with Node(folder, clock=economy.clock):
        edit(folder.path, {"node.listen": "0.0.0.0:0"})  # as if it had begun so
        port = (await examined(folder, economy.clock))["port"]
        assert (port.result, "node.advertise" in port.do) == (Result.WARNING, True)
        edit(folder.path, {"node.advertise": "127.0.0.1"})
        assert (await examined(folder, economy.clock))["port"].result is Result.OK


async def test_the_status_of_a_node_whose_address_for_others_leads_nowhere_from_here(economy, tmp_path):
    folder = make_folder(economy, tmp_path / "node")
    edit(folder.path, {"node.advertise": "node.invalid"})
    async with Node(NodeFolder.open(folder.path), clock=economy.clock) as node:
        status = await read_status(folder.path)
    assert (status.state, status.address) == (SERVING, node.address)
    assert status.address.host == "node.invalid"


async def test_the_doctor_finds_a_wrong_clock_either_way(economy, tmp_path):
    folder = make_folder(economy, tmp_path / "node")
    for ahead, word in ((60_000, "ahead of"), (-60_000, "behind")):
        found = await examined(folder, lambda ahead=ahead: economy.clock() + ahead)
        assert found["clock"].result is Result.FAILED
        assert word in found["clock"].found
        assert "NTP" in found["clock"].do


async def test_the_doctor_finds_what_is_missing(economy, tmp_path, monkeypatch):
    folder = make_folder(economy, tmp_path / "node")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        away = replace(economy.running.address, port=port)
        listen = f"127.0.0.1:{port}"
        off = {"services.content.enabled": False}
        edit(folder.path, {"ledger.address": str(away), "node.listen": listen, **off})
        monkeypatch.setattr("btt.node.doctor._DIAL_S", 0.2)
        monkeypatch.setattr("btt.node.doctor._LEAST_FREE", 1 << 60)
        found = await examined(folder, economy.clock)
    assert {check for check, f in found.items() if f.result is Result.FAILED} == {"ledger", "port", "disk"}
    assert found["services"].result is Result.WARNING
    assert all(f.do for f in found.values() if f.result is not Result.OK)
    done = await asyncio.to_thread(CliRunner().invoke, doctor_app, ["--node", str(folder.path)])
    assert done.exit_code == 1
    assert "-> " in done.stdout


async def test_the_doctor_finds_channels_that_nobody_looks_after(economy, tmp_path):
    folder = make_folder(economy, tmp_path / "node")
    async with Node(folder, clock=economy.clock) as node:
        wallet = await economy.wallet()
        async with Client.connect(
            str(node.address), budget=Budget("5 BTT"), ledger=str(economy.running.address), wallet=wallet,
            clock=economy.clock, keep_channels=True,
        ) as btt:  # fmt: skip
            await btt.session(100_000)
    found = await examined(folder, economy.clock)
    assert "1 open" in found["channels"].found
    economy.clock.ahead_ms += 400 * 86_400_000
    found = await examined(folder, economy.clock)
    assert found["channels"].result is Result.FAILED


async def test_the_doctor_finds_a_configuration_that_does_not_do(economy, tmp_path):
    folder = make_folder(economy, tmp_path / "node")
    path = folder.path / node_folder.CONFIG
    path.write_text(path.read_text() + "\n[limts]\n")
    (only,) = await examine(folder.path)
    assert (only.check, only.result) == ("configuration", Result.FAILED)
    assert 'Did you mean "limits"' in only.do
