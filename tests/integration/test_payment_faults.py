"""A thousand things that go wrong in an honest session; afterwards both books are the same."""

from __future__ import annotations

import asyncio
import contextlib
import gc

import grpc
import pytest

from btt.sdk.channel import PriceSheet
from btt.sdk.content.feed import LINE
from btt.sdk.errors import SessionEnded
from kit.chaos import Relay
from kit.economy import CONTENT_PRICE, RUN, content
from kit.patience import ChaosPayer, Oops, Rules
from kit.probe import BYTES, PRICES, Probe, pb, rpc

ACTIONS = 1000  # of each seed


class Chaos(ChaosPayer):
    def ask(self, messages: int | None = None):
        size = self.random.choice([0, 1, 1000, 60_000, 200_000, RUN])
        return pb.Ask(messages=self.random.randint(1, 6) if messages is None else messages, size=size)

    # Calls that end well

    async def act_one(self) -> None:
        ask = self.ask()
        assert len((await self.stub.One(ask)).data) == ask.size

    async def act_many(self) -> None:
        ask = self.ask()
        assert [len(m.data) async for m in self.stub.Many(ask)] == [ask.size] * ask.messages

    async def act_rows(self) -> None:
        ask = pb.Ask(messages=3, size=self.random.randint(1, 1000), max_rows=3000)
        assert len([m async for m in self.stub.Query(ask)]) == 3

    async def act_concurrent(self) -> None:
        actions = [self.act_one, self.act_many, self.act_break, self.act_cancel_stream, self.act_verdicts,
                   self.act_task_cancelled, self.act_exception]  # fmt: skip
        chosen = self.random.choices(actions, k=self.random.randint(2, 4))
        async with asyncio.TaskGroup() as group:
            for act in chosen:
                group.create_task(act())

    # Calls that are broken off

    async def act_cancel_at_once(self) -> None:
        self.stub.Many(self.ask()).cancel()

    async def act_cancel_before_first(self) -> None:
        call = self.stub.Many(self.ask())
        reader = asyncio.create_task(self._drain(call))
        await self._turns()
        call.cancel()
        await asyncio.wait([reader])
        if not reader.cancelled():
            reader.result()

    async def act_break(self) -> None:
        left = self.random.randint(1, 3)
        async for _ in self.stub.Many(self.ask(6)):
            left -= 1
            if not left:
                break

    async def act_cancel_stream(self) -> None:
        left = self.random.randint(1, 3)
        call = self.stub.Many(self.ask(6))
        async for _ in call:
            left -= 1
            if not left:
                call.cancel()
                break

    async def act_exception(self) -> None:
        # Not pytest.raises: it would keep the traceback, and with it the call, alive.
        with contextlib.suppress(Oops):
            async for _ in self.stub.Many(self.ask(4)):
                raise Oops

    async def act_task_cancelled(self) -> None:
        """The caller's task is cancelled at some message, or before the first."""
        at, reached = self.random.randint(0, 4), asyncio.Event()
        ask = self.ask(6)

        async def read() -> None:
            seen = 0
            if seen == at:
                reached.set()
            async for _ in self.stub.Many(ask):
                seen += 1
                if seen == at:
                    reached.set()

        await self._cancelled(read(), reached)

    async def act_unary_cancelled(self) -> None:
        reached = asyncio.Event()
        reached.set()
        await self._cancelled(self.stub.One(self.ask()), reached)

    # Verdicts

    async def act_verdicts(self) -> None:
        stop = self.random.randint(1, 8)
        with self.session.verdicts() as verdicts:
            seen = 0
            async for message in self.stub.ManyChecked(self.ask(6)):
                seen += 1
                verdict = self.random.choice(["accept", "accept", "reject", "none"])
                if verdict == "accept":
                    verdicts.accept(message)
                elif verdict == "reject":
                    verdicts.reject(message)
                # What is not accepted holds the one unit of a payer without credit until the call ends.
                if seen == stop or verdict != "accept":
                    break

    async def act_verdicts_exception(self) -> None:
        with contextlib.suppress(Oops), self.session.verdicts() as verdicts:
            async for message in self.stub.ManyChecked(self.ask(4)):
                if self.random.random() < 0.5:
                    verdicts.accept(message)
                    continue
                raise Oops
            raise Oops

    async def act_rejected_unary(self) -> None:
        with self.session.verdicts() as verdicts:
            verdicts.reject(await self.stub.OneChecked(self.ask()))

    # The session or the line goes

    async def act_cut(self) -> None:
        """The line drops while messages arrive, or while nothing does."""
        at = self.random.randint(0, 4)
        with self.maybe_broken():
            if not at:
                self._cut()
                await self.stub.One(self.ask())
            seen = 0
            async for _ in self.stub.Many(self.ask(6)):
                seen += 1
                if seen == at:
                    self._cut()
        await self._until_noticed()

    async def act_cut_in_verdicts(self) -> None:
        at = self.random.randint(1, 4)
        with self.maybe_broken(), self.session.verdicts() as verdicts:
            seen = 0
            async for message in self.stub.ManyChecked(self.ask(6)):
                seen += 1
                verdicts.accept(message)
                if seen == at:
                    self._cut()
        await self._until_noticed()

    async def act_node_ends_session(self) -> None:
        at = self.random.randint(1, 4)
        with self.maybe_broken():
            seen = 0
            async for _ in self.stub.Many(self.ask(6)):
                seen += 1
                if seen == at:
                    self._end_at_node()
        await self._until_noticed()

    async def act_abandon(self) -> None:
        call = self.stub.Many(self.ask(6))
        reader = asyncio.create_task(self._drain(call))
        await self._turns()
        self.cutting = True
        await self.session.abandon()
        await asyncio.wait([reader])
        if not reader.cancelled():
            reader.result()


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_thousand_cancels_breaks_and_disconnects_leave_the_books_equal(economy, monkeypatch, seed):
    servicer = Probe()
    node = await economy.node(lambda r: rpc.add_ProbeServiceServicer_to_server(servicer, r), PRICES)
    unit = PriceSheet(b"", PRICES).unit_charge
    rules = Rules(monkeypatch, limit=unit * 64, unit=unit)
    async with Relay(node.port) as relay:
        port, node.port = node.port, relay.port
        client = economy.client(node, await economy.wallet(), budget="50 BTT")
        node.port = port
        async with client as btt:
            need = PRICES[BYTES].rate.owed(4 << 30)
            chaos = Chaos(seed, node, btt, relay, rpc.ProbeServiceStub, need)
            await chaos.run(seed, ACTIONS)
            assert len((await chaos.stub.One(pb.Ask(size=1000))).data) == 1000
            owed, signed = await chaos.settle(unit)
    [receipt] = btt.receipts
    assert receipt.counts_agree
    assert receipt.channel_closed
    assert (receipt.owed, receipt.paid, receipt.captured) == (owed, signed, min(owed, signed))
    assert (await economy.ledger.account(node.payee_key)).available == receipt.captured
    assert rules.delivered > ACTIONS
    assert rules.signed > 100


@pytest.fixture
async def session(economy):
    node = await economy.node(lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), PRICES)
    async with economy.client(node, await economy.wallet()) as btt:
        session = await btt.session(1_000_000)
        yield session
    assert btt.receipts[0].counts_agree


async def test_breaking_off_ends_the_call_though_somebody_still_holds_it(session):
    stub = rpc.ProbeServiceStub(session.channel)
    held = stub.Many(pb.Ask(messages=50, size=RUN))
    async for _ in held:
        break
    async with asyncio.timeout(30):
        await session.settle()
        assert held.cancelled()
        assert len((await stub.One(pb.Ask(size=RUN))).data) == RUN


async def test_breaking_off_a_call_that_has_ended_by_itself_reports_it_too(session):
    stub = rpc.ProbeServiceStub(session.channel)
    gc.collect()
    gc.disable()  # the collector would end it, some day
    try:
        held = stub.Many(pb.Ask(messages=1, size=RUN))
        async with asyncio.timeout(30):
            async for _ in held:
                assert await held.code() is grpc.StatusCode.OK
                break
            await session.settle()
        assert not held.cancelled()
    finally:
        gc.enable()


async def test_the_reader_of_one_call_may_wait_for_another(session):
    """What the first call sent ahead takes the credit; the second is prepaid, and nothing is stuck."""
    stub = rpc.ProbeServiceStub(session.channel)
    async with asyncio.timeout(30):
        async for _ in stub.Many(pb.Ask(messages=2, size=RUN)):
            assert len((await stub.One(pb.Ask(size=RUN))).data) == RUN


async def test_a_cancelled_caller_stays_cancelled_when_the_session_ends_too(session):
    """Else a timeout or a task group would take the session's end for its own."""
    stub = rpc.ProbeServiceStub(session.channel)
    started = asyncio.Event()

    async def read():
        async for _ in stub.Many(pb.Ask(messages=50, size=RUN)):
            started.set()

    reader = asyncio.create_task(read())
    await started.wait()
    reader.cancel()
    session.fail(SessionEnded("The line went at the same moment."))
    await asyncio.wait([reader])
    assert reader.cancelled()


async def test_closing_waits_for_a_node_that_lost_the_session(economy, tmp_path):
    data = content(3 * RUN)
    node, infohash = await economy.content_node({"film.bin": data})
    async with economy.client(node, await economy.wallet()) as btt:
        async with btt.content.fetch(infohash["film.bin"], tmp_path / "out") as transfer:
            pass
        [live] = node.sessions.all()
        node.sessions.end(live, SessionEnded("The node forgot."))
    [receipt] = btt.receipts
    assert receipt.counts_agree
    assert receipt.captured == transfer.receipt.spent == CONTENT_PRICE[LINE].rate.owed(len(data))
