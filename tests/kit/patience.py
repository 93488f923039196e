"""A payer like a person with a bad line and little patience, and the rules that hold all the same."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter

import pytest

from btt.sdk.channel import Payee, Payer
from btt.sdk.errors import ConnectError, SessionEnded

BROKEN = (SessionEnded, ConnectError)
"""What a caller may see when its line or its session was cut."""


class Oops(Exception):
    pass


class Rules:
    """Watches both sides of every channel, by arithmetic of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int, unit: int) -> None:
        self.delivered = self.signed = 0
        deliver, sign = Payee.deliver, Payer.sign

        def watched_deliver(payee, call_id, segment, units):
            deliver(payee, call_id, segment, units)
            self.delivered += 1
            standing = payee.standing
            earned = max(standing.paid * 5 // 100, standing.lease)
            allowed = max(0, min(limit, earned - standing.written_off))
            unpaid = payee.meter.owed - (payee.best.cumulative if payee.best else 0)
            assert unpaid <= allowed, "the node lent more than its rules allow"
            assert payee.meter.owed <= payee.meter.deposit

        def watched_sign(payer, saved):
            update = sign(payer, saved)
            self.signed += 1
            assert update.cumulative <= payer.tally.owed + unit, "more than one unit ahead"
            return update

        monkeypatch.setattr(Payee, "deliver", watched_deliver)
        monkeypatch.setattr(Payer, "sign", watched_sign)


class ChaosPayer:
    """Does one of its `act_` methods at a time, over a line that it can cut.

    Args:
        seed: Decides what it does.
        node: Whom it pays.
        btt: Its client.
        relay: Its line.
        stub: Makes the stub of what it calls.
        need: Base units of each channel.
    """

    def __init__(self, seed, node, btt, relay, stub, need) -> None:
        self.random = random.Random(seed)
        self.node, self.btt, self.relay = node, btt, relay
        self.done: Counter[str] = Counter()
        self.session = None
        self.stub = None
        self.cutting = False
        self._make_stub = stub
        self._need = need

    async def run(self, seed, actions) -> None:
        for number in range(actions):
            try:
                async with asyncio.timeout(30):
                    await self.step()
            except BaseException as error:
                error.add_note(f"seed {seed}, action {number}, so far {dict(self.done)}")
                error.add_note(self.state())
                if self.btt.providers[0].live is not None:
                    await self.btt.providers[0].live.abandon()
                raise
        await self.open()

    async def settle(self, unit):
        """Settles, and checks that both sides have the same books; returns what is owed and signed."""
        async with asyncio.timeout(20):
            await self.session.settle()
        [live] = self.node.sessions.all()
        assert not live.payee.open_calls
        ours = {s: n for s, _, n in self.session.payer.tally if n}
        theirs = {s: n for s, _, n in live.payee.meter.tally if n}
        assert ours == theirs
        owed, signed = self.session.payer.tally.owed, self.session.payer.signed
        assert live.payee.best.cumulative == signed
        assert owed <= signed <= owed + unit
        assert len(self.done) == len([a for a in dir(self) if a.startswith("act_")])
        return owed, signed

    async def open(self) -> None:
        while self.session is None or self.session.error is not None:
            try:
                self.session = await self.btt.session(self._need)
            except BROKEN:
                assert self.cutting
        self.cutting = False
        self.stub = self._make_stub(self.session.channel)

    async def step(self) -> None:
        await self.open()
        actions = [a for a in dir(self) if a.startswith("act_")]
        name = self.random.choice(actions)
        self.done[name] += 1
        await getattr(self, name)()
        if self.session.error is not None:
            assert self.cutting, f"{name} ended the session: {self.session.error!r}"
            assert isinstance(self.session.error, BROKEN)

    @contextlib.contextmanager
    def maybe_broken(self):
        try:
            yield
        except BROKEN:
            if not self.cutting:
                raise

    # Helpers

    def state(self) -> str:
        """Where both sides stand, for whoever must find out why a test failed."""
        s, p = self.session, self.session.payer
        ours = f"calls {len(s._calls)} settling {len(s._settling)} owed {p.tally.owed} signed {p.signed}"
        said = f"said: owed {s._stated} paid {s._paid} credit {s._credit} demand {s._demand}; {s.error!r}"
        lines = [ours, said]
        for live in self.node.sessions.all():
            m = live.payee.meter
            standing = live.payee.standing
            lines.append(f"node: calls {live.payee.open_calls} owed {m.owed} paid {m.paid}"
                         f" waiting {len(live._waiting)} demand {live.demand} {standing}")  # fmt: skip
        return "\n".join(lines)

    def _cut(self) -> None:
        self.cutting = True
        self.relay.cut()

    def _end_at_node(self) -> None:
        self.cutting = True
        for session in self.node.sessions.all():
            self.node.sessions.end(session, SessionEnded("The node had a bad day."))

    async def _until_noticed(self) -> None:
        """A cut ends the session by itself: its payment stream breaks."""
        if self.cutting:
            with contextlib.suppress(*BROKEN):
                while True:
                    self.session._changed.clear()
                    if self.session.error is not None:
                        break
                    await self.session._changed.wait()

    async def _turns(self) -> None:
        for _ in range(self.random.randint(0, 12)):
            await asyncio.sleep(0)

    async def _drain(self, call) -> None:
        with self.maybe_broken():
            async for _ in call:
                pass

    async def _cancelled(self, work, reached) -> None:
        task = asyncio.ensure_future(work)
        wait = asyncio.create_task(reached.wait())
        await asyncio.wait([task, wait], return_when=asyncio.FIRST_COMPLETED)
        await self._turns()
        wait.cancel()
        task.cancel()
        await asyncio.wait([task, wait])
        if not task.cancelled():
            task.result()
