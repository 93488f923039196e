"""Every history of a small channel, run through the ledger's own table of moves.

Amounts 0 to 3, two parties who sign and show what they like, a tower that shows what it was given,
anybody who finalizes, a clock, and a ledger that is away now and then: a search visits every state
that any order of events reaches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from btt.sdk.errors import BttError, ChannelClosed, ChannelClosing
from btt.sdk.signing import EARLY_CLOSE
from btt.services.ledger import machine
from btt.services.ledger.machine import Channel, Move, Phase, Step

MOST = 3
EXPIRES, WINDOW = 3, 2
"""Ticks; money must be out at EXPIRES + WINDOW + WINDOW (the grace)."""
OUT_BY = EXPIRES + 2 * WINDOW
END = OUT_BY + 2
OUTAGES = 2
"""How often the ledger is away; each time for as long as a window and more."""


@dataclass(frozen=True, slots=True)
class World:
    """One state.

    Args:
        channel: On the ledger.
        now: The clock.
        signed: Highest update that K1 signed; lower ones exist too, since it signed its way up.
        tower: What the tower holds and will show.
        shown: Highest update that the ledger acknowledged.
        chosen: True when the payee closed by itself, with a capture that it chose.
        outages: How often the ledger may still be away.
        back: When it came back last; 0 if it was never away.
        due: Ticks, of those in which the ledger is there, that the payee has left of a running window.
    """

    channel: Channel
    now: int = 0
    signed: int = 0
    tower: int = 0
    shown: int = 0
    chosen: bool = False
    outages: int = 0
    back: int = 0
    due: int = 0


def opened(deposit: int, flags: int) -> Channel:
    return Channel(
        id=bytes(32),
        commit=b"",
        payer=b"A" * 20,
        payee=b"B" * 20,
        k1=bytes(33),
        k2=bytes(33),
        expires_ms=EXPIRES,
        challenge_ms=WINDOW,
        flags=flags,
        refund_signature=bytes(65),
        deposit=deposit,
        opened_seq=1,
    )


def attempt(world: World, step: Step) -> Channel | None:
    try:
        return machine.take(world.channel, step)
    except BttError:
        return None


def out_by(world: World) -> int:
    """Returns when all money must be out."""
    return max(OUT_BY, world.back + WINDOW)


def away(world: World, ticks: int) -> World:
    """The ledger goes away now, comes back, and extends what it must."""
    channel, now = world.channel, world.now + ticks
    due, left = world.due, OUT_BY - max(world.now, EXPIRES)
    deadline = machine.after_outage(channel, since_ms=world.now, now_ms=now)
    if channel.phase is Phase.OPEN and max(world.now, EXPIRES) < min(now, OUT_BY):
        assert deadline is not None, "an outage took the payee's time"
    if deadline is not None:
        begins = channel.phase is Phase.OPEN
        channel = machine.take(channel, Step(Move.EXTEND, now, deadline))
        due = min(WINDOW, left) if begins else due
    return replace(world, channel=channel, now=now, outages=world.outages - 1, back=now, due=due)


def events(world: World, *, least_raise: int, most: int) -> Iterator[World]:
    """All that can happen next."""
    now = world.now
    if now < max(END, out_by(world)):
        yield replace(world, now=now + 1, due=max(0, world.due - 1))
    for ticks in range(1, WINDOW + 2) if world.outages and now < END else ():
        yield away(world, ticks)
    for amount in range(world.signed + 1, most + 1):  # the payer signs, even more than it locked
        yield replace(world, signed=amount)
    for amount in range(world.tower + 1, world.signed + 1):  # the payee gives the tower an update
        yield replace(world, tower=amount)
    for amount in range(1, most + 1):
        after = attempt(world, Step(Move.TOP_UP, now, amount))
        if after is not None and after.deposit <= most:
            yield replace(world, channel=after)
    # An update is shown by the payee or by its tower; both show what they hold, or something older.
    for amount in range(1, world.signed + 1):
        step = Step(Move.UPDATE, now, amount, b"s" * 65, least_raise=least_raise)
        after = attempt(world, step)
        if after is not None:
            yield replace(world, channel=after, shown=max(world.shown, amount))
    for shown in range(world.signed + 1):
        for capture in range(most + 1):
            after = attempt(world, Step(Move.CLOSE, now, capture, b"s" * 65, shown=shown))
            if after is not None:
                yield replace(world, channel=after, chosen=True)
    if (after := attempt(world, Step(Move.REQUEST_CLOSE, now))) is not None:
        yield replace(world, channel=after, due=min(WINDOW, max(0, OUT_BY - now)))
    if (after := attempt(world, Step(Move.FINALIZE, now))) is not None:
        yield replace(world, channel=after)


def check_move(before: World, after: World) -> None:
    old, new = before.channel, after.channel
    if old == new:
        return
    assert old.phase is not Phase.CLOSED, "a closed channel changed"
    assert new.phase >= old.phase, "a phase was taken back"
    assert new.deposit >= old.deposit
    assert new.best >= old.best, "an update was forgotten"
    if new.phase is Phase.CLOSED:
        to_payee, to_payer = new.captured, old.held - new.captured
        assert to_payee + to_payer == old.held == new.deposit, "money was made or lost"
        assert to_payer >= new.deposit - before.signed, "the payer lost more than it signed"
        if not (after.chosen and not before.chosen):
            assert to_payee >= before.shown, "the payee got less than it had shown"
        if old.phase is Phase.OPEN and not after.chosen:
            assert after.now >= OUT_BY, "nobody was warned"
        if not after.chosen:
            assert not before.due, "the payee had less than a window in which the ledger was there"
    else:
        assert new.held == new.deposit, "money left before the end"
    if new.phase is Phase.CLOSING and old.phase is Phase.OPEN:
        assert new.flags & EARLY_CLOSE or after.now >= EXPIRES
        assert new.deadline_ms <= max(out_by(after), after.now)
        if after.now <= EXPIRES + WINDOW and after.back == before.back:
            assert new.deadline_ms - after.now == WINDOW, "the window is too short"
    if old.phase is Phase.CLOSING:
        in_time = before.now < old.deadline_ms
        if after.back > before.back:
            assert new.deadline_ms - after.now == old.deadline_ms - before.now, "an outage counted"
        elif new.phase is Phase.CLOSED and not after.chosen:
            assert not in_time, "the window was cut short"
        else:
            assert in_time, "a late challenge counted"


def check_state(world: World) -> None:
    channel = world.channel
    assert 0 <= channel.captured <= channel.best <= channel.deposit
    assert channel.best <= world.signed, "money without a signature"
    if channel.phase is Phase.CLOSED:
        return
    assert channel.best >= world.shown
    # A payee who is awake gets its best update whenever the window has not ended.
    in_time = channel.phase is Phase.OPEN or world.now < channel.deadline_ms
    best = min(world.signed, channel.deposit)
    if in_time:
        after = attempt(world, Step(Move.CLOSE, world.now, best, b"s" * 65, shown=best))
        assert after is not None
        assert after.captured == best
        # So does one whose tower is awake, once a close was asked for.
        if channel.phase is Phase.CLOSING and channel.best < world.tower <= channel.deposit:
            assert attempt(world, Step(Move.UPDATE, world.now, world.tower, b"s" * 65)) is not None
    # Whoever vanished: at the end anybody gets the money out.
    if world.now >= out_by(world):
        assert attempt(world, Step(Move.FINALIZE, world.now)) is not None, "money is stuck"


def explore(start: World, *, least_raise: int = 1, most: int = MOST) -> int:
    seen = {start}
    waiting = [start]
    phases = set()
    while waiting:
        world = waiting.pop()
        check_state(world)
        phases.add(world.channel.phase)
        for after in events(world, least_raise=least_raise, most=most):
            check_move(world, after)
            if after not in seen:
                seen.add(after)
                waiting.append(after)
        assert len(seen) < 1_000_000
    assert phases == set(Phase)
    return len(seen)


@pytest.mark.parametrize("flags", [0, EARLY_CLOSE])
@pytest.mark.parametrize("deposit", [1, 2, 3])
def test_every_history_is_safe_and_ends(deposit: int, flags: int) -> None:
    assert explore(World(opened(deposit, flags)), least_raise=1) > 500


@pytest.mark.parametrize("flags", [0, EARLY_CLOSE])
def test_a_ledger_that_is_away_takes_nobodys_time_and_keeps_no_money(flags: int) -> None:
    assert explore(World(opened(1, flags), outages=OUTAGES), most=1) > 1000


def test_a_least_raise_never_costs_the_payee_its_best_update() -> None:
    assert explore(World(opened(3, 0)), least_raise=2) > 500


@pytest.mark.parametrize("late", [False, True])
def test_at_the_deadline_a_challenge_is_late_and_a_finalize_due(late: bool) -> None:
    channel = machine.take(opened(3, EARLY_CLOSE), Step(Move.REQUEST_CLOSE, 1))
    assert channel.deadline_ms == 1 + WINDOW
    now = channel.deadline_ms - (not late)
    moves = {
        Move.UPDATE: Step(Move.UPDATE, now, 2, b"s" * 65),
        Move.CLOSE: Step(Move.CLOSE, now, 2, b"s" * 65, shown=2),
        Move.FINALIZE: Step(Move.FINALIZE, now),
    }
    allowed = {move for move, step in moves.items() if attempt(World(channel, now), step) is not None}
    assert allowed == ({Move.FINALIZE} if late else {Move.UPDATE, Move.CLOSE})


def test_an_extension_ends_later_than_before_and_within_a_window_from_now() -> None:
    closing = machine.take(opened(3, EARLY_CLOSE), Step(Move.REQUEST_CLOSE, 1))
    at = closing.deadline_ms + 5
    allowed = [n for n in range(at + 2 * WINDOW) if attempt(World(closing), Step(Move.EXTEND, at, n))]
    assert allowed == list(range(at + 1, at + WINDOW + 1))
    allowed = [n for n in range(1 + 2 * WINDOW) if attempt(World(closing), Step(Move.EXTEND, 2, n))]
    assert allowed == list(range(closing.deadline_ms + 1, 2 + WINDOW + 1))
    assert attempt(World(opened(3, 0)), Step(Move.EXTEND, EXPIRES - 1, EXPIRES + 1)) is None
    begun = attempt(World(opened(3, 0)), Step(Move.EXTEND, EXPIRES, EXPIRES + WINDOW))
    assert begun is not None
    assert (begun.phase, begun.deadline_ms) == (Phase.CLOSING, EXPIRES + WINDOW)


def test_what_is_not_in_the_table_is_refused() -> None:
    assert set(machine.TABLE) == {
        *((Phase.OPEN, move) for move in Move),
        *((Phase.CLOSING, move) for move in (Move.UPDATE, Move.CLOSE, Move.FINALIZE, Move.EXTEND)),
    }
    for phase, error in ((Phase.CLOSING, ChannelClosing), (Phase.CLOSED, ChannelClosed)):
        for move in Move:
            if (phase, move) not in machine.TABLE:
                channel = replace(opened(3, EARLY_CLOSE), phase=phase)
                with pytest.raises(error):
                    machine.take(channel, Step(move, 0, 1))
