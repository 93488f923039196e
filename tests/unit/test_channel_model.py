"""An honest payer and an honest payee over a bad network and bad disks.

Messages get lost, doubled and overtaken, calls break off, and either side may come back
with any state it ever had on disk. Whatever happens, the books agree once things calm
down, and nobody is hurt beyond the bounds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from btt.sdk.channel import (
    Checked,
    Durable,
    Intent,
    Line,
    Payee,
    Payer,
    Price,
    PriceSheet,
    Segment,
    SignedUpdate,
    Standing,
    Tally,
)
from btt.sdk.channel.prices import Count
from btt.sdk.errors import BudgetExceeded
from btt.sdk.keys import PrivateKey
from btt.sdk.money import Rate, Unit

LEDGER, CHANNEL = b"L" * 32, b"C" * 32
KEY = PrivateKey(b"\x01" * 32)
BYTES, CALLS, TICKS = (Line(n, u) for n, u in (("f", Unit.BYTE), ("f", Unit.COUNT), ("s", Unit.COUNT)))
SHEETS = [
    PriceSheet(
        bytes([number]) * 32,
        {
            BYTES: Price(Rate(amount, 3, Unit.BYTE), 10),
            CALLS: Price(Rate(5, 1, Unit.COUNT), 1),
            TICKS: Price(Rate(11 + number, 1, Unit.COUNT), 2),
        },
    )
    for number, amount in enumerate((7, 2, 10))
]
UNIT = max(sheet.unit_charge for sheet in SHEETS)


@dataclass(frozen=True)
class Report:
    """What the payer says of a call that has ended."""

    call_id: bytes
    accepted: dict[Segment, int]


@dataclass(frozen=True)
class PayerDisk:
    signed: int
    tally: Tally


@dataclass(frozen=True)
class PayeeDisk:
    best: SignedUpdate | None
    tally: Tally
    standing: Standing


@dataclass
class Call:
    """The network's side of a call: messages that left and did not arrive yet."""

    flight: list[tuple[Segment, int]] = field(default_factory=list)


def books(tally: Tally) -> dict[Segment, int]:
    return {segment: units for segment, _, units in tally if units}


def written(disk: Tally, counts: Iterable[Count], memory: Tally) -> Tally:
    """What is on disk once these counts are, which must be all that is in memory."""
    after = disk.copy()
    for segment, rate, units in counts:
        after.price(segment, rate)
        after.add(segment, units - after.units(segment))
    assert books(after) == books(memory)
    return after


class World:
    """Both sides, what lies between them, their disks, and what really happened."""

    def __init__(self, *, deposit: int, limit: int, lease: int) -> None:
        self.deposit = deposit
        self.sheet = 0
        self.standing = Standing(unit=UNIT, limit=limit, lease=lease)
        self.payer_disk = [PayerDisk(0, Tally())]
        self.payee_disk = [PayeeDisk(None, Tally(), replace(self.standing))]
        self.truth = Tally()  # accepted or forfeited, over the whole history
        for sheet in SHEETS:
            for segment, rate in sheet.segments():
                self.truth.price(segment, rate)
        self.most_signed = 0
        self.payee_restored = False
        self.owned_up = False
        self.borne = 0  # what payers used of calls that the payee voided comes on top of the credit
        self.calls = 0
        self.up: list[SignedUpdate | Report] = []
        self.down: list[tuple[bytes, dict[Segment, int]]] = []
        self.running: dict[bytes, Call] = {}
        self.waiting = 0
        self.start_payer(0)
        self.start_payee(0)
        self.open_session()

    # Starting and meeting

    def start_payer(self, state: int) -> None:
        disk = self.payer_disk[state]
        self.payer_books = disk.tally
        self.payer = Payer(
            ledger_id=LEDGER,
            channel_id=CHANNEL,
            key=KEY,
            deposit=self.deposit,
            signed=disk.signed,
            tally=disk.tally.copy(),
        )

    def start_payee(self, state: int) -> None:
        disk = self.payee_disk[state]
        self.payee_books = disk.tally
        self.standing = replace(disk.standing, unpaid=0)
        self.payee = Payee(
            ledger_id=LEDGER,
            channel_id=CHANNEL,
            key=KEY.public,
            deposit=self.deposit,
            best=disk.best,
            tally=disk.tally.copy(),
            standing=self.standing,
        )

    def open_session(self, sheet: int | None = None) -> None:
        self.up, self.down, self.running, self.waiting = [], [], {}, 0
        self.sheet = self.sheet if sheet is None else sheet
        for past in SHEETS:  # a payee knows all the offers it ever made, a payer those it was shown
            self.payee.pin(past)
            self.payer.pin(past)
        self.payer.pin(SHEETS[self.sheet])
        last = self.payer.last()
        if last is not None:
            self.take_update(last)
        claimed = books(self.payer.tally)
        if any(units > self.payee.meter.tally.units(segment) for segment, units in claimed.items()):
            # A payee lost its books or voided a call, or a payer came back with an old state and
            # then with a newer one: it owns up to what was written off, and that stays counted too.
            self.owned_up = True
        settled = self.payee.reconcile(claimed)
        self.save_payee()
        self.payer.reconcile(best=self.payee.best, settled=settled)
        for segment, units in books(self.payer.tally).items():
            self.truth.add(segment, max(0, units - self.truth.units(segment)))
        self.save_payer(self.payer.signed, self.payer.tally.changes())
        self.payer.tally.saved()
        assert books(self.payer.tally) == books(self.payee.meter.tally)
        assert self.payer.tally.owed == self.payee.meter.owed
        assert self.payer.signed == self.payee.meter.paid

    def save_payer(self, signed: int, counts: Iterable[Count]) -> None:
        self.payer_books = written(self.payer_books, counts, self.payer.tally)
        self.payer_disk.append(PayerDisk(signed, self.payer_books))

    def save_payee(self, best: SignedUpdate | None = None) -> None:
        meter, standing = self.payee.meter, replace(self.standing)
        if best is not None:
            standing.paid += best.cumulative - meter.paid
        self.payee_books = written(self.payee_books, meter.tally.changes(), meter.tally)
        self.payee_disk.append(PayeeDisk(best or self.payee.best, self.payee_books, standing))
        meter.tally.saved()

    # Data

    def begin(self) -> bytes:
        self.calls += 1
        call_id = self.calls.to_bytes(16, "big")
        self.payer.begin(call_id)
        self.payee.begin(call_id)
        self.running[call_id] = Call()
        return call_id

    def send(self, call_id: bytes, line: Line, units: int) -> bool:
        """Asks for a message; it leaves if the budget and the credit allow it."""
        segment = Segment(SHEETS[self.sheet].digest, line)
        try:
            self.payer.reserve(segment, units)
        except BudgetExceeded:
            return False
        meter = self.payee.meter
        if not meter.affordable([(segment, units)]) or not meter.fits([(segment, units)]):
            self.waiting = max(self.waiting, meter.demand([(segment, units)]))
            self.payer.release(segment, units)
            return False
        credit = self.standing.credit
        self.payee.deliver(call_id, segment, units)
        assert self.standing.unpaid <= credit
        assert self.payee.meter.owed <= self.deposit
        self.running[call_id].flight.append((segment, units))
        return True

    def arrive(self, call_id: bytes, *, good: bool = True) -> None:
        segment, units = self.running[call_id].flight.pop(0)
        self.payer.received(call_id, segment, units)
        if good:
            self.payer.accepted(call_id, segment, units)
            self.truth.add(segment, units)
        self.payer.release(segment, units)

    def end(self, call_id: bytes) -> None:
        """Breaks a call off: what is in flight is lost."""
        for segment, units in self.running.pop(call_id).flight:
            self.payer.release(segment, units)
        self.up.append(Report(call_id, dict(self.payer.end(call_id).accepted)))

    # Payment

    def pay(self, *, flush: bool = False) -> bool:
        due = self.payer.due(credit=self.standing.credit, demand=self.waiting, flush=flush)
        if due is None:
            return False

        def write(intent: Intent) -> None:
            self.save_payer(intent.cumulative, intent.counts)

        self.up.append(self.payer.sign(Durable.write(self.payer.intend(due), write)))
        self.most_signed = max(self.most_signed, due)
        return True

    def take_update(self, update: SignedUpdate) -> None:
        checked = self.payee.check(update)
        if checked is not None:

            def write(saved: Checked) -> None:
                self.save_payee(saved.update)

            before = self.payee.best
            self.payee.accept(Durable.write(checked, write))
            assert self.payee.best is update
            assert before is None or update.cumulative > before.cumulative
        if self.waiting and self.waiting <= self.payee.meter.paid:
            self.waiting = 0

    def deliver_up(self, index: int = 0, *, double: bool = False) -> None:
        """Takes the report at the head, or any update that no report holds back."""
        free = next((i for i, m in enumerate(self.up) if isinstance(m, Report)), len(self.up) - 1)
        message = self.up[index % (free + 1)]
        if not (double and isinstance(message, SignedUpdate)):
            self.up.remove(message)
        if isinstance(message, SignedUpdate):
            self.take_update(message)
        else:
            self.down.append((message.call_id, self.payee.settle(message.call_id, message.accepted)))

    def deliver_down(self) -> None:
        call_id, settled = self.down.pop(0)
        before = books(self.payer.tally)
        self.payer.settle(call_id, settled)
        for segment, units in books(self.payer.tally).items():
            self.truth.add(segment, units - before.get(segment, 0))

    def calm_down(self) -> None:
        """Ends everything in good order."""
        for call_id in list(self.running):
            while self.running[call_id].flight:
                self.arrive(call_id)
            self.end(call_id)
        while self.up:
            self.deliver_up()
        while self.down:
            self.deliver_down()
        assert books(self.payer.tally) == books(self.payee.meter.tally)
        assert self.payer.tally.owed == self.payee.meter.owed
        self.pay(flush=True)
        while self.up:
            self.deliver_up()
        assert self.payee.meter.paid >= self.payee.meter.owed
        assert self.standing.unpaid == 0

    # What holds at any time

    def check(self) -> None:
        assert self.most_signed <= self.deposit
        assert self.payer.signed <= self.most_signed
        assert self.payee.meter.paid <= self.most_signed
        assert self.most_signed <= self.truth.owed + UNIT
        s = self.standing
        assert s.unpaid == max(0, self.payee.meter.excess)
        if not self.payee_restored:
            assert self.owned_up or s.unpaid + s.written_off <= s.exposure + self.borne
            assert s.paid == self.payee.meter.paid


class Machine(RuleBasedStateMachine):
    """Hypothesis chooses what happens next."""

    deposit, limit, lease = 2000, 400, UNIT

    def __init__(self) -> None:
        super().__init__()
        self.world = World(deposit=self.deposit, limit=self.limit, lease=self.lease)

    def call(self, index: int) -> bytes:
        return list(self.world.running)[index % len(self.world.running)]

    @precondition(lambda self: len(self.world.running) < 3)
    @rule()
    def begin(self) -> None:
        self.world.begin()

    @precondition(lambda self: self.world.running)
    @rule(i=st.integers(0, 2), line=st.sampled_from([BYTES, BYTES, CALLS, TICKS]), units=st.integers(1, 10))
    def send(self, i: int, line: Line, units: int) -> None:
        self.world.send(self.call(i), line, min(units, SHEETS[0].prices[line].verify_units))

    @precondition(lambda self: any(c.flight for c in self.world.running.values()))
    @rule(i=st.integers(0, 2), good=st.integers(0, 5))
    def arrive(self, i: int, good: int) -> None:
        full = [k for k, c in self.world.running.items() if c.flight]
        self.world.arrive(full[i % len(full)], good=good > 0)

    @precondition(lambda self: self.world.running)
    @rule(i=st.integers(0, 2))
    def end(self, i: int) -> None:
        self.world.end(self.call(i))

    @precondition(lambda self: self.world.running)
    @rule(i=st.integers(0, 2))
    def fail(self, i: int) -> None:
        """The payee breaks a call off by its own fault."""
        call_id = self.call(i)
        self.world.payee.void(call_id)
        self.world.end(call_id)
        used = self.world.up[-1]
        assert isinstance(used, Report)
        self.world.borne += sum(self.world.truth.rate(s).owed(n) for s, n in used.accepted.items())

    @rule(flush=st.booleans())
    def pay(self, flush: bool) -> None:
        self.world.pay(flush=flush)

    @rule(line=st.sampled_from([BYTES, CALLS, TICKS]), units=st.integers(1, 10))
    def pay_and_send(self, line: Line, units: int) -> None:
        world = self.world
        call_id = self.call(0) if world.running else world.begin()
        units = min(units, SHEETS[0].prices[line].verify_units)
        if not world.send(call_id, line, units) and world.pay():
            world.deliver_up(len(world.up) - 1)
            world.send(call_id, line, units)

    @precondition(lambda self: self.world.up)
    @rule(i=st.integers(0, 5), double=st.booleans())
    def deliver_up(self, i: int, double: bool) -> None:
        self.world.deliver_up(i, double=double)

    @precondition(lambda self: any(isinstance(m, SignedUpdate) for m in self.world.up))
    @rule(i=st.integers(0, 5))
    def lose_update(self, i: int) -> None:
        updates = [m for m in self.world.up if isinstance(m, SignedUpdate)]
        self.world.up.remove(updates[i % len(updates)])

    @precondition(lambda self: self.world.down)
    @rule()
    def deliver_down(self) -> None:
        self.world.deliver_down()

    @rule()
    def calm_down(self) -> None:
        if self.world.payer.signed == self.world.most_signed:  # no update was lost for good
            for message in (self.world.payer.last(),):
                if message is not None:
                    self.world.up.append(message)
            self.world.calm_down()

    @rule(sheet=st.integers(0, len(SHEETS) - 1))
    def reconnect(self, sheet: int) -> None:
        self.world.open_session(sheet)

    @rule(age=st.integers(0, 8))
    def payer_comes_back(self, age: int) -> None:
        world = self.world
        world.start_payer(max(0, len(world.payer_disk) - 1 - age))
        world.open_session()

    @rule(age=st.integers(0, 8))
    def payee_comes_back(self, age: int) -> None:
        world = self.world
        world.start_payee(max(0, len(world.payee_disk) - 1 - age))
        world.payee_restored = True
        world.open_session()

    @rule(payer_age=st.integers(0, 8), payee_age=st.integers(0, 8))
    def both_come_back(self, payer_age: int, payee_age: int) -> None:
        world = self.world
        world.start_payer(max(0, len(world.payer_disk) - 1 - payer_age))
        world.start_payee(max(0, len(world.payee_disk) - 1 - payee_age))
        world.payee_restored = True
        world.open_session()

    @invariant()
    def holds(self) -> None:
        self.world.check()


class OnCredit(Machine):
    """With credit that grows."""


class Prepaid(Machine):
    """A stranger without a lease: everything is prepaid until credit is earned, which stays small."""

    limit, lease = 8, 0


_SETTINGS = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestOnCredit = OnCredit.TestCase
TestOnCredit.settings = _SETTINGS
TestPrepaid = Prepaid.TestCase
TestPrepaid.settings = _SETTINGS


@pytest.mark.parametrize(
    ("limit", "lease"), [(10_000, UNIT), (8, 0), (0, 0)], ids=["credit", "small-credit", "prepaid"]
)
def test_a_thousand_cancels_leave_the_session_usable(limit: int, lease: int) -> None:
    dice = random.Random(7)
    world = World(deposit=10**7, limit=limit, lease=lease)
    step: dict[int, Callable[[bytes], object]] = {
        0: world.arrive,
        1: lambda call_id: world.send(call_id, BYTES, dice.randint(1, 10)),
        2: lambda call_id: world.send(call_id, TICKS, 1),
    }
    cancels = 0
    while cancels < 1000:
        while len(world.running) < 3:
            world.begin()
        call_id = dice.choice(list(world.running))
        for _ in range(dice.randint(0, 4)):
            kind = dice.randrange(3)
            if kind or world.running[call_id].flight:
                step[kind](call_id)
            world.pay()
            if dice.random() < 0.7:
                while world.up:
                    world.deliver_up()
        if dice.random() < 0.5:
            world.end(call_id)
            cancels += 1
        if dice.random() < 0.5 and world.down:
            world.deliver_down()
        if dice.random() < 0.01:
            world.open_session()
        world.check()
    world.calm_down()
    world.check()
    # And it still works: a whole verify unit comes through and is paid.
    before = world.payee.meter.paid
    call_id = world.begin()
    for _ in range(20):
        if not world.send(call_id, TICKS, 2):
            assert world.pay()
            world.deliver_up()
            assert world.send(call_id, TICKS, 2)
        world.arrive(call_id)
    world.calm_down()
    assert world.payee.meter.paid > before
    assert world.payee.meter.paid <= world.truth.owed + UNIT
