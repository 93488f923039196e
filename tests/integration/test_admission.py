"""What a node lets in: applications, rates, concurrency and time, in this order, over real sockets."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import grpc.aio
import pytest

from btt.node.admission import Admission, Apps, Limits
from btt.node.admission.apps import parse_app
from btt.node.admission.concurrency import Concurrency
from btt.node.admission.deadlines import deadline
from btt.node.admission.rates import MAX_BUCKETS, Rates
from btt.sdk.errors import AppRefused, DeadlineExceeded, RateLimited
from btt.sdk.keys import Address, PrivateKey
from btt.sdk.payment.apps import MAX_GRANT_MS, NO_APP, open_grant, sign_grant
from btt.sdk.payment.purse import Purse
from btt.sdk.signing import APP_UNKNOWN
from kit.hanging import ends
from kit.probe import CALL_PRICES, PRICES, Calls, Probe, pb, rpc

HOUR_MS = 3_600_000


@pytest.fixture
async def calls(economy):
    servicer = Calls()
    node = await economy.node(lambda r: rpc.add_CallsServiceServicer_to_server(servicer, r), CALL_PRICES)
    node.servicer = servicer
    node.admission._services = {}
    return node


# Applications


def granter(app, clock, *, life_ms=HOUR_MS, **changes):
    async def grant(channel_key, ledger_id):
        fields = {"channel_key": channel_key, "ledger_id": ledger_id, **changes}
        return sign_grant(app, valid_until_ms=clock() + life_ms, **fields)

    return grant


def only(node, *, allow=("*",), deny=()):
    node.admission.apps = Apps(allow=allow, deny=deny, clock=node.clock)


async def test_a_session_with_a_grant_is_known_by_its_app_and_without_one_unknown(calls, economy):
    app = PrivateKey.generate()
    for grant, seen in ((granter(app, calls.clock), app.public.address), (None, APP_UNKNOWN)):
        async with economy.client(calls, await economy.wallet(), app=grant) as btt:
            session = await btt.session(1_000_000)
            await rpc.CallsServiceStub(session.channel).Put(pb.Up(data=b"1"))
            [live] = calls.sessions.all()
            assert live.app.app == seen


async def test_operators_allow_and_refuse_by_app(calls, economy):
    app, other = PrivateKey.generate(), PrivateKey.generate()
    name = str(app.public.address)

    async def served(grant):
        async with economy.client(calls, await economy.wallet(), app=grant) as btt:
            try:
                session = await btt.session(1_000_000)
            except AppRefused:
                return False
            return (await rpc.CallsServiceStub(session.channel).Put(pb.Up(data=b"1"))).taken == 1

    ours, theirs = granter(app, calls.clock), granter(other, calls.clock)
    only(calls, allow=(name,))
    assert [await served(g) for g in (ours, theirs, None)] == [True, False, False]
    only(calls, deny=(name,))
    assert [await served(g) for g in (ours, theirs, None)] == [False, True, True]
    only(calls, deny=("unknown",))
    assert [await served(g) for g in (ours, theirs, None)] == [True, True, False]
    only(calls, allow=("unknown",))
    assert [await served(g) for g in (ours, None)] == [False, True]


async def test_an_expired_grant_ends_a_session_at_its_next_call(calls, economy):
    app = PrivateKey.generate()
    async with economy.client(calls, await economy.wallet(), app=granter(app, calls.clock)) as btt:
        session = await btt.session(1_000_000)
        stub = rpc.CallsServiceStub(session.channel)
        await stub.Put(pb.Up(data=b"1"))
        economy.clock.ahead_ms += HOUR_MS + 1
        with pytest.raises(AppRefused, match="expired"):
            await stub.Put(pb.Up(data=b"1"))


@pytest.mark.parametrize(
    ("life_ms", "changes"),
    [
        (-1, {}),
        (MAX_GRANT_MS + 60_000, {}),
        (HOUR_MS, {"channel_key": PrivateKey.generate().public}),
        (HOUR_MS, {"ledger_id": bytes(32)}),
    ],
)
async def test_a_grant_that_is_not_for_this_channel_now_is_refused_by_the_node(
    calls, economy, monkeypatch, life_ms, changes
):
    """The client looks at its grant too; here it does not."""
    app = PrivateKey.generate()
    from btt.sdk.payment import purse

    monkeypatch.setattr(
        purse, "open_grant", lambda document, **_: type("Grant", (), {"app": app.public.address})
    )
    grant = granter(app, calls.clock, life_ms=life_ms, **changes)
    async with economy.client(calls, await economy.wallet(), app=grant) as btt:
        with pytest.raises(AppRefused, match="grant"):
            await btt.session(1_000_000)


async def test_naming_an_app_with_the_grant_of_another_or_none_is_refused(calls, economy, monkeypatch):
    app, liar = PrivateKey.generate(), PrivateKey.generate().public.address

    async def lie(self, channel_key, ledger_id):
        return liar, await granter(app, calls.clock)(channel_key, ledger_id)

    async def none(self, channel_key, ledger_id):
        return liar, None

    for claim in (lie, none):
        monkeypatch.setattr(Purse, "granted_app", claim)
        async with economy.client(calls, await economy.wallet()) as btt:
            with pytest.raises(AppRefused):
                await btt.session(1_000_000)


def test_a_grant_is_of_its_signer():
    app, key = PrivateKey.generate(), PrivateKey.generate().public
    document = sign_grant(app, channel_key=key, ledger_id=bytes(32), valid_until_ms=10)
    assert open_grant(document, channel_key=key, ledger_id=bytes(32), now_ms=5).app == app.public.address
    document.signature = PrivateKey.generate().sign(bytes(32))
    with pytest.raises(AppRefused, match="not valid"):
        open_grant(document, channel_key=key, ledger_id=bytes(32), now_ms=5)
    document.payload = b"\xff" * 10
    with pytest.raises(AppRefused, match="not valid"):
        open_grant(document, channel_key=key, ledger_id=bytes(32), now_ms=5)


@pytest.mark.parametrize("text", ["", "T123", "Unknown", "**"])
def test_what_is_no_application_is_refused_in_the_configuration(text):
    with pytest.raises(ValueError, match="is no application"):
        parse_app(text)


# Rates and concurrency


def payer(number: int) -> Address:
    return Address(number.to_bytes(20, "big"))


def test_a_payer_begins_so_many_calls_a_minute_and_is_told_when_the_next_may():
    now = 0
    rates, limits = Rates(lambda: now), Limits(name="s", calls_per_minute=3)
    for _ in range(3):
        rates.take("s", payer(1), limits)
    with pytest.raises(RateLimited) as limited:
        rates.take("s", payer(1), limits)
    assert limited.value.retry_after == 20
    rates.take("s", payer(2), limits)
    rates.take("other", payer(1), limits)
    now = 20_000
    rates.take("s", payer(1), limits)
    with pytest.raises(RateLimited):
        rates.take("s", payer(1), limits)


def test_a_clock_that_is_set_back_keeps_no_payer_waiting():
    now = 3_600_000
    rates, limits = Rates(lambda: now), Limits(calls_per_minute=1)
    for number in range(MAX_BUCKETS):
        rates.take("", payer(number), limits)
    now = 0
    rates.take("", payer(1), limits)
    with pytest.raises(RateLimited):
        rates.take("", payer(1), limits)
    rates.take("", payer(MAX_BUCKETS), limits)


def test_the_buckets_of_payers_are_bounded():
    now = 0
    rates, limits = Rates(lambda: now), Limits(calls_per_minute=60)
    for number in range(MAX_BUCKETS):
        rates.take("", payer(number), limits)
    with pytest.raises(RateLimited):
        rates.take("", payer(MAX_BUCKETS), limits)
    now = 1000  # the others' buckets are full again
    rates.take("", payer(MAX_BUCKETS), limits)
    assert len(rates._full_at) == 1


def test_each_bound_on_calls_at_once_holds_by_itself():
    node = Limits(calls=4, calls_per_payer=3)
    small, large = Limits(name="small", calls=2), Limits(name="large", calls_per_payer=1)
    counter = Concurrency()

    inside = []

    def enter(who, service):
        entered = counter.enter(payer(who), node, service)
        entered.__enter__()
        inside.append(entered)
        return entered

    first, _, third = enter(1, small), enter(1, small), enter(1, large)
    with pytest.raises(RateLimited, match="2 calls of small at once"):
        enter(2, small)
    with pytest.raises(RateLimited, match="A payer may run 3 paid calls"):
        enter(1, node)
    third.__exit__(None, None, None)
    with pytest.raises(RateLimited, match="A payer may run 1 calls of large"):
        enter(2, large)
        enter(2, large)
    inside.remove(third)
    enter(3, large)
    with pytest.raises(RateLimited, match="serves 4 paid calls"):
        enter(4, node)
    first.__exit__(None, None, None)
    inside.remove(first)
    assert counter.running == len(inside) == 3
    for entered in inside:
        entered.__exit__(None, None, None)
    assert counter.running == 0
    assert not counter._running, "nobody is remembered"


async def test_a_call_of_a_service_without_limits_counts_once():
    node = Limits(calls=1, calls_per_minute=2)
    apps = Apps(allow=("*",), deny=(), clock=lambda: 0)
    admission = Admission(apps=apps, node=node, services={}, clock=lambda: 0)
    session, context = (
        SimpleNamespace(payer=payer(1), app=NO_APP),
        SimpleNamespace(time_remaining=lambda: None),
    )
    for _ in range(2):
        with admission.admit(SimpleNamespace(service="probe"), session, context):
            assert admission.running == 1
    with (
        pytest.raises(RateLimited, match="2 paid calls a minute"),
        admission.admit(SimpleNamespace(service="probe"), session, context),
    ):
        pass


async def test_how_often_a_payer_calls_is_bounded_over_all_services(calls, economy):
    calls.admission.limit(Limits(calls_per_minute=2))
    calls.admission._services = {"probe.v1.CallsService": Limits(name="calls", calls_per_minute=100)}
    async with economy.client(calls, await economy.wallet()) as btt:
        stub = rpc.CallsServiceStub((await btt.session(100_000)).channel)
        for _ in range(2):
            await stub.Put(pb.Up(data=b"1"))
        with pytest.raises(RateLimited, match="2 paid calls a minute"):
            await stub.Put(pb.Up(data=b"1"))


async def test_limits_are_of_the_payer_over_all_its_channels(calls, economy):
    """Two clients of one wallet have two sessions on two channels, and one limit."""
    only_two = Limits(calls=100, calls_per_payer=2)
    calls.admission._node = only_two
    wallet = await economy.wallet()
    async with economy.client(calls, wallet) as one, economy.client(calls, wallet) as two:
        stubs = [rpc.CallsServiceStub((await c.session(100_000)).channel) for c in (one, two)]
        assert len(calls.sessions.all()) == 2
        held = [stub.Relay() for stub in stubs]
        for call in held:
            await call.write(pb.Up(data=b"1", reply=1))
            await call.read()
        for stub in stubs:
            with pytest.raises(RateLimited, match="A payer may run 2"):
                await stub.Put(pb.Up(data=b"1"))
        async with economy.client(calls, await economy.wallet()) as other:
            stub = rpc.CallsServiceStub((await other.session(100_000)).channel)
            await stub.Put(pb.Up(data=b"1"))
        for call in held:
            await call.done_writing()
            assert [m async for m in call] == []
        await stubs[0].Put(pb.Up(data=b"1"))


# Time


async def test_a_call_without_a_deadline_gets_that_of_its_service(calls, economy):
    service = "probe.v1.CallsService"
    calls.admission._services = {service: Limits(name="calls", deadline_s=0.05)}
    async with economy.client(calls, await economy.wallet()) as btt:
        session = await btt.session(1_000_000)
        stub = rpc.CallsServiceStub(session.channel)
        hang = pb.Up(data=bytes(1000), order="hang")
        async with ends("a call without a deadline"):
            for call in (stub.Put(hang), stub.Upload([hang])):
                with pytest.raises(DeadlineExceeded, match=r"longer than 0\.05 seconds"):
                    await call
            for stream in (stub.SwapMany(hang), stub.Relay([pb.Up(data=b"1", reply=1), hang])):
                with pytest.raises(DeadlineExceeded, match=r"longer than 0\.05 seconds"):
                    async for _ in stream:
                        pass
            # A service that says nothing has what the node says.
            calls.admission.limit(Limits(deadline_s=0.06))
            for services in ({}, {service: Limits(name="calls")}):
                calls.admission._services = services
                with pytest.raises(DeadlineExceeded, match=r"longer than 0\.06 seconds"):
                    await stub.Put(hang)
        calls.admission._services = {service: Limits(name="calls", deadline_s=0.05)}
        await session.settle()
        [live] = calls.sessions.all()
        assert live.payee.standing.written_off == 0, "a service that is too slow is no fault of its payer"
        # A shorter deadline of the caller's own stands, a longer one does not.
        with pytest.raises(DeadlineExceeded, match=r"longer than 0\.05 seconds"):
            await stub.Put(hang, timeout=60)
        calls.admission._services = {service: Limits(name="calls", deadline_s=60)}
        patient = stub.Put(hang, timeout=0.3)
        with pytest.raises(DeadlineExceeded, match="its deadline"):
            await patient
        async with ends("a call that its caller has given up"):  # the node hears of it a little later
            await calls.admission.idle()
    assert btt.receipts[0].counts_agree


async def test_a_call_that_is_cancelled_as_its_time_is_up_is_cancelled(monkeypatch):
    timers = []

    def later(delay, call):
        timers.append((delay, call))
        return SimpleNamespace(cancel=lambda: None)

    async def run(remaining):
        with deadline(60, SimpleNamespace(time_remaining=lambda: remaining)):
            await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", later)
    calls = [asyncio.create_task(run(remaining)) for remaining in (None, 61, 5)]
    await asyncio.sleep(0)
    assert [delay for delay, _ in timers] == [60, 60], "gRPC ends what its caller gave less time"
    for _, expire in timers:
        expire()
    for call in (calls[0], calls[2]):
        call.cancel()
    await asyncio.wait(calls)
    assert [call.cancelled() for call in calls] == [True, False, True]
    assert isinstance(calls[1].exception(), DeadlineExceeded)


async def test_a_reader_that_does_not_read_holds_its_call_no_longer_than_the_deadline(calls, economy):
    async with economy.client(calls, await economy.wallet(), budget="50 BTT") as btt:
        session = await btt.session(40_000_000)
        stub = rpc.CallsServiceStub(session.channel)
        [live] = calls.sessions.all()
        live.payee.standing.paid += 10**9  # an old payer: its credit does not end the flow
        live.payee.standing.limit = 10**9
        calls.admission._services = {"probe.v1.CallsService": Limits(name="calls", deadline_s=0.5)}
        call = stub.SwapMany(pb.Up(seconds=600, reply=1 << 20))
        reader = aiter(call)
        await anext(reader)
        assert calls.admission.running == 1
        async with asyncio.timeout(20):
            await calls.admission.idle()
        assert calls.servicer.sent < 100, "what is not read is not made: nobody holds it in memory"
        call.cancel()
        await session.abandon()
        btt.providers[0].live = None


async def test_a_free_call_of_a_service_has_a_deadline_too(economy):
    class Slow(Probe):
        async def Free(self, request, context):  # noqa: N802
            await asyncio.Event().wait()

        async def FreeMany(self, request, context):  # noqa: N802
            yield pb.Plain()
            await asyncio.Event().wait()

    node = await economy.node(lambda r: rpc.add_ProbeServiceServicer_to_server(Slow(), r), PRICES)
    node.admission._services = {"probe.v1.ProbeService": Limits(name="probe", deadline_s=0.05)}
    async with economy.client(node, await economy.wallet()) as btt:
        stub = rpc.ProbeServiceStub((await btt.session(100_000)).channel)
        with pytest.raises(grpc.aio.AioRpcError, match=r"longer than 0\.05 seconds"):
            await stub.Free(pb.Ask())
        with pytest.raises(grpc.aio.AioRpcError, match=r"longer than 0\.05 seconds"):
            async for _ in stub.FreeMany(pb.Ask()):
                pass
        # A service that says nothing has what the node says.
        node.admission._services = {"probe.v1.ProbeService": Limits(name="probe")}
        node.admission.limit(Limits(deadline_s=0.06))
        async with ends("a free call of a service that says nothing"):
            with pytest.raises(grpc.aio.AioRpcError, match=r"longer than 0\.06 seconds"):
                await stub.Free(pb.Ask())
