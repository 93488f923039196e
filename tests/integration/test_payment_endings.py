"""A paid call ends in its peer's words and at its deadline, whatever gRPC makes of either."""

from __future__ import annotations

import asyncio

import pytest
from grpc._cython import cygrpc
from grpc.aio import _call as calls

from btt.sdk.channel import PriceSheet
from btt.sdk.errors import DeadlineExceeded, RemoteError, UpdateInvalid
from btt.sdk.money import BTT
from btt.sdk.payment import metered
from btt.sdk.payment.capacity import Capacity
from kit.probe import CALL_PRICES, Calls, pb, rpc

UNIT = PriceSheet(b"", CALL_PRICES).unit_charge
HANG, REFUSED = pb.Up(data=b"1", order="hang"), pb.Up(data=b"1", order="refuse")
KINDS = {
    "Swap": calls.UnaryUnaryCall,
    "SwapMany": calls.UnaryStreamCall,
    "Upload": calls.StreamUnaryCall,
    "Relay": calls.StreamStreamCall,
}


@pytest.fixture
async def paid(economy):
    """A session with a service of every kind of call."""
    node = await economy.node(lambda r: rpc.add_CallsServiceServicer_to_server(Calls(), r), CALL_PRICES)
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(UNIT)
        yield session
        if session.error is not None:
            btt.providers[0].live = None


async def end(session, kind: str, request, **options) -> None:
    """Makes one call, and raises what it ends with."""
    call = getattr(rpc.CallsServiceStub(session.channel), kind)
    async with asyncio.timeout(20):
        if kind in ("Swap", "Upload"):
            await call([request] if kind == "Upload" else request, **options)
        else:
            async for _ in call([request] if kind == "Relay" else request, **options):
                pass


async def for_ever(*_: object) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_deadline_that_grpc_forgets_ends_the_call(paid, monkeypatch, kind):
    monkeypatch.setattr(metered, "LATE_S", 0.0)
    waits = {"Swap": "_invoke", "Upload": "_conduct_rpc"}.get(kind, "_read")
    with monkeypatch.context() as patch:
        patch.setattr(KINDS[kind], waits, for_ever)
        with pytest.raises(DeadlineExceeded):
            await end(paid, kind, HANG, timeout=0.05)
    async with asyncio.timeout(20):
        await paid.settle()
    assert paid.error is None, "other calls go on"
    await end(paid, kind, pb.Up(data=b"1"))


async def test_the_time_until_a_call_can_be_paid_counts_too(paid, monkeypatch):
    monkeypatch.setattr(Capacity, "ready", for_ever)
    with pytest.raises(DeadlineExceeded):
        await end(paid, "Swap", pb.Up(data=b"1"), timeout=0.05)


def no_longer_known(monkeypatch, kind: type) -> None:
    """A message was being sent when the peer's word came: gRPC tells its own instead, a moment later."""
    for name in ("_conduct_rpc", "_raise_for_status"):
        if (inner := getattr(kind, name, None)) is not None:

            async def overwritten(call, inner=inner):
                await call.code()
                call._cython_call.set_internal_error("a write failed")
                return await inner(call)

            async def answered(call, inner=inner):
                answer = await inner(call)
                call._cython_call.set_internal_error("a write failed")
                return answer if call._cython_call.is_ok() else cygrpc.EOF

            monkeypatch.setattr(kind, name, answered if name == "_conduct_rpc" else overwritten)


@pytest.mark.parametrize("kind", ["Upload", "Relay"])
async def test_the_reason_of_a_call_is_told_though_grpc_lost_it(paid, monkeypatch, kind):
    no_longer_known(monkeypatch, KINDS[kind])
    with pytest.raises(RemoteError, match="INVALID_ARGUMENT: not this"):
        await end(paid, kind, REFUSED)
    monkeypatch.undo()
    async with asyncio.timeout(20):
        await paid.settle()


async def test_the_reason_of_a_session_is_told_though_grpc_lost_it(paid, monkeypatch):
    no_longer_known(monkeypatch, calls.StreamStreamCall)
    paid.capacity._told = paid.payer.deposit + BTT  # a lie
    paid._wake.set()
    async with asyncio.timeout(20):
        while paid.error is None:
            paid._changed.clear()
            await paid._changed.wait()
    assert isinstance(paid.error, UpdateInvalid)
    await paid.abandon()


@pytest.mark.parametrize("kind", ["Upload", "Relay"])
async def test_a_call_that_ends_while_its_last_request_is_sent_was_cancelled_by_nobody(
    paid, monkeypatch, kind
):
    async def too_late(call) -> None:
        raise cygrpc.InternalError("the call has ended")

    monkeypatch.setattr(KINDS[kind], "_done_writing", too_late)
    with pytest.raises(RemoteError, match="INVALID_ARGUMENT: not this"):
        await end(paid, kind, REFUSED)
