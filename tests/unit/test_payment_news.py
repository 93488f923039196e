"""A payer is told how its channel stands only when it would not do the same untold, and always then."""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace

import pytest

from btt.node.payments.session import TELL_S, PayerBook, Session
from btt.sdk.channel import (
    Durable,
    Line,
    Payee,
    Price,
    PriceSheet,
    Segment,
    SignedUpdate,
    Standing,
    Tally,
    signing_point,
)
from btt.sdk.channel.payee import REMEMBERED_CALLS
from btt.sdk.errors import InvalidRequest, PaymentRequired, SessionEnded
from btt.sdk.keys import Address, PrivateKey
from btt.sdk.money import Rate, Unit
from btt.sdk.signing import ChannelUpdate, sign

LEDGER, CHANNEL, CALL, OTHER = b"L" * 32, b"C" * 32, b"a" * 16, b"b" * 16
KEY = PrivateKey(b"\x01" * 32)
LINE = Line("test.Files", Unit.BYTE)
UNIT = 10
SHEET = PriceSheet(b"1" * 32, {LINE: Price(Rate(1, 1, Unit.BYTE), UNIT)})
SEGMENT = Segment(SHEET.digest, LINE)
CREDIT = 1000
POINT = signing_point(CREDIT, UNIT)
GRACE_S = 60


class Live:
    """A session with one call that runs, of a payer that has paid a while."""

    def __init__(self, standing: Standing) -> None:
        self.standing, self.paid, self.strikes = standing, 0, 0
        payee = Payee(
            ledger_id=LEDGER, channel_id=CHANNEL, key=KEY.public, deposit=100_000, best=None, tally=Tally(),
            standing=standing,
        )  # fmt: skip
        payee.pin(SHEET)
        self.session = Session(
            payer=Address(bytes(20)),
            network="",
            book=PayerBook(standing),
            payee=payee,
            offer=SimpleNamespace(sheet=SHEET, digest=SHEET.digest),
            epoch=1,
            grace_s=GRACE_S,
            unpaid=self.choked,
            app=None,
        )
        self.session.begin(CALL)

    async def choked(self, session: Session) -> None:
        self.strikes += 1

    async def save(self, checked, tally, written_off):
        return Durable.write(checked, lambda _: None)

    async def pay(self, amount: int) -> None:
        self.paid += amount
        update = ChannelUpdate(channel=CHANNEL, cumulative=self.paid)
        await self.session.pay(SignedUpdate(self.paid, sign(KEY, update, LEDGER)), self)
        self.session.advance()

    async def send(self, units: int, call: bytes = CALL) -> asyncio.Task[None]:
        sending = asyncio.create_task(self.session.charge(call, [(SEGMENT, units)]))
        await asyncio.sleep(0)
        return sending

    async def told(self) -> bool:
        """Says whether a statement is due at this moment, and has it sent."""
        try:
            async with asyncio.timeout(0):
                return (await self.session.news()).stale
        except TimeoutError:
            return False

    def end(self) -> None:
        self.session.end(SessionEnded("The test is over."))


@pytest.fixture
async def live():
    made = Live(Standing(unit=UNIT, limit=5 * CREDIT, paid=20 * CREDIT))
    assert made.standing.credit == CREDIT
    assert not await made.told()
    yield made
    made.end()


@pytest.fixture
async def timers(live, monkeypatch):
    """What is to happen `TELL_S` or `GRACE_S` from now, by that time, instead of its happening."""
    loop, set_up = asyncio.get_running_loop(), {TELL_S: [], GRACE_S: []}
    call_later = loop.call_later

    def later(delay, call, *args):
        if delay not in set_up:
            return call_later(delay, call, *args)
        set_up[delay].append(partial(call, *args))
        return SimpleNamespace(cancel=lambda: None)

    monkeypatch.setattr(loop, "call_later", later)
    return set_up


async def test_a_payer_that_pays_by_itself_is_told_nothing(live):
    for _ in range(2):
        await (await live.send(POINT))
        assert not await live.told()
        await live.pay(POINT)
        assert not await live.told()


async def test_a_payer_hears_that_all_is_paid_when_no_call_runs(live):
    await (await live.send(UNIT))
    live.session.settle(CALL, {SEGMENT: UNIT})
    live.session.advance()
    assert await live.told()
    await live.pay(UNIT)
    assert await live.told()


async def test_a_payer_hears_of_less_credit_at_once_and_of_more_when_it_matters(live):
    async def told_with(credit: int) -> bool:
        live.standing.paid = 20 * credit
        live.session.advance()
        return await live.told()

    assert not await told_with(CREDIT)
    assert not await told_with(CREDIT + CREDIT // 8)
    assert await told_with(CREDIT + CREDIT // 8 + 1)
    assert await told_with(CREDIT)
    assert await told_with(CREDIT - 1)


async def test_a_payer_that_would_not_sign_yet_hears_of_what_waits(live):
    await (await live.send(POINT - 1))
    waiting = await live.send(CREDIT)
    assert await live.told()
    await live.pay(live.session.demand)
    await waiting


async def test_a_payer_with_nothing_to_sign_hears_what_is_to_be_prepaid(live):
    live.end()
    newcomer = Live(Standing(unit=UNIT, limit=CREDIT, lease=UNIT))
    assert not await newcomer.told()
    assert signing_point(UNIT, UNIT) == 0
    waiting = await newcomer.send(UNIT + 1)
    assert await newcomer.told()
    await newcomer.pay(newcomer.session.demand)
    await waiting
    newcomer.end()


async def test_a_payer_that_should_sign_by_itself_is_reminded_of_what_waits_all_the_same(live, timers):
    await (await live.send(POINT))
    first, second = await live.send(CREDIT), await live.send(CREDIT)
    assert not await live.told()
    first.cancel()
    await asyncio.wait([first])
    assert len(timers[TELL_S]) == 1
    timers[TELL_S].pop()()  # it is about the first one, which waits no more
    assert not await live.told()
    assert len(timers[TELL_S]) == 1
    timers[TELL_S].pop()()
    assert await live.told()
    live.session.advance()
    assert not await live.told(), "it has heard of this"
    second.cancel()
    await asyncio.wait([second])


async def test_a_payer_that_was_asked_to_prepay_hears_that_nothing_waits_any_more(live):
    waiting = await live.send(CREDIT + 1)
    assert await live.told()
    assert live.session._told_demand == 1
    waiting.cancel()
    await asyncio.wait([waiting])
    assert await live.told()
    assert not await live.told()


async def test_a_payer_that_has_paid_what_it_was_asked_for_hears_no_more(live):
    waiting = await live.send(CREDIT + 1)
    assert await live.told()
    await live.pay(1)
    await waiting
    assert not await live.told()


async def test_what_a_payer_does_not_read_is_bounded(live):
    for number in range(REMEMBERED_CALLS):
        live.session.settle(number.to_bytes(16, "big"), {})
    with pytest.raises(InvalidRequest):
        live.session.settle(OTHER, {})
    assert len((await live.session.news()).settlements) == REMEMBERED_CALLS
    live.session.settle(OTHER, {})


async def test_p7_a_message_waits_as_long_as_the_payer_gets_on_and_then_its_payer_is_choked(live, timers):
    await (await live.send(CREDIT))
    waiting = await live.send(3 * UNIT)
    await live.pay(UNIT)
    timers[GRACE_S].pop()()
    await asyncio.sleep(0)
    assert not waiting.done(), "it has paid, though too little: its time begins again"
    timers[GRACE_S].pop()()
    with pytest.raises(PaymentRequired, match="60 seconds"):
        await waiting
    assert live.strikes == 1
    await live.pay(2 * UNIT)
    await (await live.send(3 * UNIT)), "what waited in vain holds no credit"
