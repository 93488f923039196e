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
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from btt.node import folder as node_folder
from btt.node.folder import NodeFolder, running_address
from btt.node.runtime import Node
from btt.node.status import NOT_RUNNING, NOT_SERVING, SERVING, read_status
from btt.proto.content.v1 import content_pb2, content_pb2_grpc
from btt.sdk.budget import Budget
from btt.sdk.channel import Line, Price
from btt.sdk.client import Client
from btt.sdk.errors import ConfigError, Draining, LedgerUnreachable, RateLimited
from btt.sdk.identity import tls_name
from btt.sdk.money import Rate, Unit
from btt.sdk.payment.calls import CALL_KEY, TOKEN_KEY
from btt.sdk.rpc import to_error
from btt.sdk.tls import pinned_channel
from btt.services.content.catalogue import Catalogue
from btt.services.content.publish import publish
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
        return Node(opened, plugins={"probe": lambda: GatedPlugin}, clock=economy.clock, **options)

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


@asynccontextmanager
async def plain_channel(node: Node):
    certificate = (node._folder.path / node_folder.CERTIFICATE).read_bytes()
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
        async with client_of(economy, node, wallet) as btt:
            async with btt.content.fetch(infohash, tmp_path / "dest") as transfer:
                pass
        found = await read_status(folder.path)
        assert found.state == SERVING
        assert found.address == node.address
    assert hashlib.sha256((tmp_path / "dest" / "film").read_bytes()).digest() == hashlib.sha256(data).digest()
    (receipt,) = btt.receipts
    assert receipt.counts_agree
    price = Rate.parse("1 BTT / GiB").owed(len(data))
    assert transfer.receipt.spent == receipt.paid == receipt.captured == price
    assert (await economy.ledger.account(folder.payee_key)).balance == price

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
    async with Node(opened, clock=economy.clock) as node, client_of(economy, node, wallet) as btt:
        async with btt.content.fetch(infohash, tmp_path / "dest"):
            pass
    assert (await economy.ledger.account(receiver.account)).balance == Rate.parse("1 BTT / GiB").owed(RUN)


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


async def test_a_watcher_of_health_hears_that_the_node_stops(economy, gated):
    node = gated()
    async with plain_channel_when(node) as (channel, stop):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING_STATUS
        stopping = asyncio.create_task(stop())
        assert (await watch.read()).status == NOT_SERVING_STATUS
        await stopping


@asynccontextmanager
async def plain_channel_when(node: Node):
    """A started node's channel, and a function that stops the node."""
    await node.__aenter__()
    stopped = False

    async def stop():
        nonlocal stopped
        stopped = True
        await node.__aexit__(None, None, None)

    try:
        async with plain_channel(node) as channel:
            yield channel, stop
    finally:
        if not stopped:
            await stop()


# The ledger is away


async def test_without_its_ledger_it_serves_what_is_free_and_takes_no_session_until_it_is_back(
    economy, tmp_path
):
    away = tmp_path / "away"
    from btt.services.ledger import folder as ledger_folder
    from btt.services.ledger.books import Terms

    wallet = await economy.wallet(0)
    ledger_folder.init(
        away,
        name="away",
        supply_to=wallet.account.public.address,
        terms=Terms(min_challenge_ms=1000, min_lifetime_ms=10_000),
    )
    async with serve(LedgerConfig(folder=away)) as running:
        address = running.address
    opened = make_folder(tmp_path / "node", str(address))
    infohash = publish_in(opened, "film", content(RUN))
    again = LedgerConfig(folder=away, port=address.port)
    async with Node(opened, clock=economy.clock) as node:
        client = Client.connect(
            str(node.address),
            budget=Budget("1 BTT"),
            ledger=str(address),
            wallet=wallet,
            clock=economy.clock,
            keep_channels=True,
        )
        async with client as btt:
            assert (await btt.content.quote(infohash)).total_bytes == RUN
            async with serve(again):
                session = await btt.session(10_000)
                await session.abandon()
                btt._session = None
            node.ledger._client._timeout = 0.2
            client._ledger._timeout = 0.2
            with pytest.raises(LedgerUnreachable):
                await btt.session(10_000)
            async with serve(again):
                client._ledger._timeout = node.ledger._client._timeout = 5
                async with btt.content.fetch(infohash, tmp_path / "dest"):
                    pass
                await btt.close_session()


# Starting and stopping


async def test_a_restart_keeps_its_name_its_certificate_and_its_offer(economy, folder):
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
            btt._node._offer = None if False else old.offer  # noqa: SIM210
