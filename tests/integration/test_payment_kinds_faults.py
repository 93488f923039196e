"""All four kinds of calls broken off in every way; afterwards both books are the same."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from btt.sdk.channel import PriceSheet
from btt.sdk.errors import DeadlineExceeded, RemoteError
from kit.chaos import Relay
from kit.economy import RUN
from kit.patience import ChaosPayer, Oops, Rules
from kit.probe import CALL_PRICES, UP_BYTES, Calls, pb, rpc

ACTIONS = 300  # of each seed


class Kinds(ChaosPayer):
    def up(self, **fields):
        size = self.random.choice([0, 1, 1000, 60_000, 200_000, RUN // 2])
        reply = self.random.choice([0, 1, 5000, 100_000, RUN])
        return pb.Up(data=bytes(size), seconds=self.random.randint(0, 4), reply=reply, **fields)

    def ups(self, most=5):
        return [self.up() for _ in range(self.random.randint(0, most))]

    # Calls that end well

    async def act_put(self) -> None:
        up = self.up()
        assert (await self.stub.Put(up)).taken == len(up.data)

    async def act_swap(self) -> None:
        up = self.up()
        assert len((await self.stub.Swap(up)).data) == up.reply

    async def act_swap_many(self) -> None:
        up = self.up()
        assert [len(m.data) async for m in self.stub.SwapMany(up)] == [up.reply] * up.seconds

    async def act_upload(self) -> None:
        ups = self.ups()
        assert (await self.stub.Upload(ups)).taken == sum(len(up.data) for up in ups)

    async def act_relay(self) -> None:
        ups = self.ups()
        got = [len(m.data) async for m in self.stub.Relay(ups)]
        assert got == [up.reply for up in ups if up.reply]

    async def act_half_close(self) -> None:
        """Responses come after the last request, and requests after the last response."""
        call, sizes = self.stub.Relay(), [1000, 0, 2000]
        for size in sizes:
            await call.write(pb.Up(data=bytes(size), reply=size))
        await call.done_writing()
        assert [len(m.data) async for m in call] == [1000, 2000]

    async def act_concurrent(self) -> None:
        safe = [self.act_put, self.act_swap_many, self.act_upload, self.act_relay, self.act_fails,
                self.act_service_stops_early, self.act_break, self.act_task_cancelled,
                self.act_requests_raise, self.act_verdicts]  # fmt: skip
        async with asyncio.TaskGroup() as group:
            for act in self.random.choices(safe, k=self.random.randint(2, 4)):
                group.create_task(act())

    # The service fails, or ends before its caller

    async def act_fails(self) -> None:
        order = self.random.choice(["refuse", "code"])
        up = self.up(order=order)
        ups = [*self.ups(3), up, *self.ups(2)]
        for work in (self.stub.Put(up), self.stub.Swap(up), self.stub.Upload(ups)):
            with pytest.raises(RemoteError):
                await work
        for stream in (self.stub.SwapMany(up), self.stub.Relay(ups)):
            with contextlib.suppress(RemoteError):
                async for _ in stream:
                    pass

    async def act_service_stops_early(self) -> None:
        ups = [*self.ups(3), pb.Up(data=bytes(self.random.choice([0, RUN])), order="stop"), *self.ups(4)]
        if self.random.random() < 0.5:
            await self.stub.Upload(ups)
        else:
            await self._drain(self.stub.Relay(ups))

    # The caller breaks off

    def any_call(self, ups=None):
        kind = self.random.choice([self.stub.SwapMany, self.stub.Upload, self.stub.Relay])
        return kind(self.up() if kind == self.stub.SwapMany else (self.ups() if ups is None else ups))

    async def finish(self, call) -> None:
        if hasattr(call, "__aiter__"):
            await self._drain(call)
        else:
            with self.maybe_broken():
                await call

    async def act_cancel(self) -> None:
        call = self.stub.Upload(self.ups()) if self.random.random() < 0.5 else self.stub.Relay(self.ups())
        reader = asyncio.create_task(self.finish(call))
        await self._turns()
        call.cancel()
        await asyncio.wait([reader])
        if not reader.cancelled():
            reader.result()

    async def act_cancel_at_once(self) -> None:
        self.stub.Relay(self.ups()).cancel()
        self.stub.Upload(self.ups()).cancel()

    async def act_break(self) -> None:
        left = self.random.randint(1, 3)
        async for _ in self.stub.Relay([pb.Up(data=bytes(1000), reply=1000) for _ in range(5)]):
            left -= 1
            if not left:
                break

    async def act_task_cancelled(self) -> None:
        sent, at = 0, self.random.randint(0, 4)
        reached = asyncio.Event()
        ups = [self.up() for _ in range(6)]

        async def requests():
            nonlocal sent
            for up in ups:
                if sent == at:
                    reached.set()
                sent += 1
                yield up

        kind = self.random.choice([self.stub.Upload, self.stub.Relay])
        await self._cancelled(self.finish(kind(requests())), reached)

    async def act_requests_raise(self) -> None:
        async def requests():
            for up in self.ups():
                yield up
            raise Oops

        with pytest.raises(Oops):
            await self.finish(self.stub.Upload(requests()))
        with pytest.raises(Oops):
            await self.finish(self.stub.Relay(requests()))

    async def act_deadline(self) -> None:
        hang = [*self.ups(3), pb.Up(data=bytes(1000), order="hang")]
        with pytest.raises(DeadlineExceeded):
            await self.stub.Upload(hang, timeout=self.random.choice([0.001, 0.02, 0.05]))
        with pytest.raises(DeadlineExceeded):
            async for _ in self.stub.Relay(hang, timeout=self.random.choice([0.001, 0.02])):
                pass
        with pytest.raises(DeadlineExceeded):
            await self.stub.Swap(pb.Up(order="hang"), timeout=0.001)

    async def act_verdicts(self) -> None:
        with self.session.verdicts() as verdicts:
            async for message in self.stub.RelayChecked([pb.Up(data=b"1", reply=9) for _ in range(3)]):
                if self.random.random() < 0.5:
                    verdicts.accept(message)

    # The line goes

    async def act_cut(self) -> None:
        at, sent = self.random.randint(0, 4), 0

        async def requests():
            nonlocal sent
            for up in [self.up() for _ in range(5)]:
                if sent == at:
                    self._cut()
                sent += 1
                yield up

        kind = self.random.choice([self.stub.Upload, self.stub.Relay])
        await self.finish(kind(requests()))
        await self._until_noticed()

    async def act_node_ends_session(self) -> None:
        async def requests():
            yield self.up()
            self._end_at_node()
            yield self.up()
            yield self.up()

        kind = self.random.choice([self.stub.Upload, self.stub.Relay])
        await self.finish(kind(requests()))
        await self._until_noticed()


@pytest.mark.parametrize("seed", [1, 2])
async def test_every_kind_of_call_broken_off_leaves_the_books_equal(economy, monkeypatch, seed):
    node = await economy.node(lambda r: rpc.add_CallsServiceServicer_to_server(Calls(), r), CALL_PRICES)
    unit = PriceSheet(b"", CALL_PRICES).unit_charge
    rules = Rules(monkeypatch, limit=unit * 64, unit=unit)
    async with Relay(node.port) as relay:
        port, node.port = node.port, relay.port
        client = economy.client(node, await economy.wallet(), budget="50 BTT")
        node.port = port
        async with client as btt:
            need = CALL_PRICES[UP_BYTES].rate.owed(4 << 30)
            kinds = Kinds(seed, node, btt, relay, rpc.CallsServiceStub, need)
            await kinds.run(seed, ACTIONS)
            assert (await kinds.stub.Put(pb.Up(data=bytes(9)))).taken == 9
            owed, signed = await kinds.settle(unit)
    [receipt] = btt.receipts
    assert receipt.counts_agree
    assert (receipt.owed, receipt.paid, receipt.captured) == (owed, signed, min(owed, signed))
    assert rules.delivered > ACTIONS
