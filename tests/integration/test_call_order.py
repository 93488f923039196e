"""What a call of a node meets, and in which order: who fails several conditions is told the first."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import grpc.aio
import pytest
import structlog
from structlog.contextvars import merge_contextvars
from structlog.testing import LogCapture

from btt.node.admission import Limits
from btt.sdk.budget import Budget
from btt.sdk.client import Client
from btt.sdk.errors import (
    AppRefused,
    BttError,
    DeadlineExceeded,
    Draining,
    RateLimited,
    SessionEnded,
)
from btt.sdk.keys import PrivateKey
from btt.sdk.payment.apps import sign_grant
from btt.sdk.rpc import to_error
from kit import payers
from kit.payers import RawPayer, dial, probe_node
from kit.probe import Probe, pb, rpc

HOUR_MS = 3_600_000
SERVICE = "probe.v1.ProbeService"


@pytest.fixture
def lines():
    """The log, with what is bound to each call."""
    before = structlog.get_config()
    captured = LogCapture()
    structlog.configure(processors=[merge_contextvars, captured])
    yield captured.entries
    structlog.configure(**before)


async def told(stub) -> type[BttError] | None:
    """Makes a call, and returns what it is told; None if it is served."""
    try:
        await stub.One(pb.Ask(size=4))
    except BttError as error:
        return type(error)
    except grpc.aio.AioRpcError as failure:
        return type(to_error(failure))
    return None


async def test_a_call_meets_each_condition_in_its_turn(economy, tmp_path, lines):
    app = PrivateKey.generate()

    async def grant(channel_key, ledger_id):
        until = economy.clock() + HOUR_MS
        return sign_grant(app, channel_key=channel_key, ledger_id=ledger_id, valid_until_ms=until)

    node = probe_node(economy, tmp_path / "node", payments={}, bans={})
    wallet = await economy.wallet()
    async with node, dial(node.folder.certificate, node.address.node, node.address.port) as channel:
        node.connections.most = 10
        client = Client.connect(
            str(node.address), budget=Budget("5 BTT"), ledger=str(economy.running.address), wallet=wallet,
            clock=economy.clock, app=grant,
        )  # fmt: skip
        async with client as btt:
            stub = rpc.ProbeServiceStub((await btt.session(100_000)).channel)
            stranger = rpc.ProbeServiceStub(channel)
            assert await told(stub) is None
            [mine] = node.sessions.all()

            # All that can be wrong is; then it is set right, from the outside in.
            node.connections.most = 1  # the payment stream's own
            node.admission.draining = True
            economy.clock.ahead_ms += 2 * HOUR_MS
            node.admission._services = {
                SERVICE: Limits(name="probe", calls=1, calls_per_minute=1, deadline_s=60)
            }
            node.admission._rates.take("probe", mine.payer, Limits(calls_per_minute=1))
            found = [await told(stranger), await told(stub)]
            node.connections.most = 0
            found += [await told(stranger), await told(stub)]
            node.admission.draining = False
            found.append(await told(stub))
            mine.app = replace(mine.app, valid_until_ms=economy.clock() + HOUR_MS)
            with node.admission._concurrency.enter(mine.payer, node.admission._node, Limits(name="probe")):
                with pytest.raises(RateLimited, match="a minute"):
                    await stub.One(pb.Ask(size=4))
                node.admission._services[SERVICE] = Limits(name="probe", calls=1)
                with pytest.raises(RateLimited, match="at once"):
                    await stub.One(pb.Ask(size=4))
            found.append(await told(stub))
            assert found == [RateLimited, RateLimited, SessionEnded, Draining, AppRefused, None]

    # Whatever refused them: each was counted, and each has its line in the log.
    codes = {"SERVED": 2, "RATE_LIMITED": 4, "SESSION_ENDED": 1, "DRAINING": 1, "APP_REFUSED": 1}
    ended = [line for line in lines if line["event"] == "call.ended" and line["method"] == "One"]
    assert Counter(line["code"] for line in ended) == codes
    for code, calls in codes.items():
        labels = {"service": "probe", "method": "One", "code": code}
        assert node.metrics.registry.get_sample_value("btt_service_requests_total", labels) == calls
    assert len({line["request_id"] for line in ended}) == len(ended)
    assert all(line["service"] == "probe" and line["peer"].startswith("ipv4:127.0.0.1:") for line in ended)
    admitted = [line for line in ended if line["code"] in ("SERVED", "DRAINING", "APP_REFUSED")]
    assert {line["channel"] for line in admitted} == {mine.payee.channel_id.hex()}


async def test_a_call_that_waits_for_payment_has_no_longer_than_its_deadline(economy, tmp_path):
    """The deadline is outside the meter: nobody holds a place for the whole grace time."""
    node = probe_node(economy, tmp_path / "node", payments={}, bans={})
    async with node, dial(node.folder.certificate, node.address.node, node.address.port) as channel:
        payer = await RawPayer(economy, await node.offers.current(), channel).fund()
        await payer.open()
        stream = await payer.attach()
        node.admission._services = {SERVICE: Limits(name="probe", deadline_s=0.2)}
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            async for _ in payer.bytes(100):
                pass
        error = to_error(failed.value)
        assert isinstance(error, DeadlineExceeded), error
        assert "longer than 0.2 seconds" in str(error)
        stream.cancel()


async def test_what_a_service_logs_in_a_call_names_the_call(economy, tmp_path, lines, monkeypatch):
    log = structlog.get_logger("btt.services.probe")

    class Talking(Probe):
        async def One(self, request, context):  # noqa: N802
            await asyncio.create_task(_say(log))
            return await super().One(request, context)

    monkeypatch.setattr(payers, "Probe", Talking)
    node = probe_node(economy, tmp_path / "node", payments={}, bans={})
    wallet = await economy.wallet()
    async with node:
        client = Client.connect(
            str(node.address), budget=Budget("5 BTT"), ledger=str(economy.running.address), wallet=wallet,
            clock=economy.clock,
        )  # fmt: skip
        async with client as btt:
            stub = rpc.ProbeServiceStub((await btt.session(100_000)).channel)
            await stub.One(pb.Ask(size=4))
    [said] = [line for line in lines if line["event"] == "said"]
    [ended] = [line for line in lines if line["event"] == "call.ended" and line["method"] == "One"]
    assert said["request_id"] == ended["request_id"]
    assert (said["method"], said["channel"]) == ("One", ended["channel"])
    assert [line for line in lines if line["event"] == "node.stopped" and "request_id" in line] == []


async def _say(log):
    log.info("said")
