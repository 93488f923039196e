"""Channels at their very deadlines, by a clock that also jumps back: what counts is the ledger's time.

Random timelines over gRPC and the real books, aimed at the millisecond before, at and after each
limit, against a few lines that say when what is allowed.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from btt.sdk.errors import ChannelClosed, ChannelClosing, ChannelExpired, ChannelLocked
from btt.sdk.ledger import LedgerClient
from btt.sdk.signing import EARLY_CLOSE, ChannelClose, ChannelUpdate, sign
from btt.services.ledger import folder, server
from btt.services.ledger.books import Terms
from kit.attack import ALICE, BOB, DEPOSIT, ISSUE, K1, K2, Clock, opened, t1

LIFE, WINDOW = 5000, 1000
CHANNELS, STEPS = 30, 25


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def ledger(tmp_path: Path, clock: Clock) -> AsyncIterator[LedgerClient]:
    terms = Terms(min_challenge_ms=WINDOW, min_lifetime_ms=LIFE)
    folder.init(
        tmp_path / "ledger", name="test", supply_to=ALICE.address, amount=ISSUE, terms=terms, clock=clock
    )
    config = server.LedgerConfig(folder=tmp_path / "ledger", sweep_every=3600, rate=10**6, burst=10**6)
    async with (
        server.serve(config, clock=clock) as running,
        LedgerClient.connect(running.address) as client,
    ):
        yield client


@dataclass
class Expected:
    """When what is allowed; times in milliseconds."""

    expires: int
    early: bool
    deposit: int = DEPOSIT
    best: int = 0
    deadline: int | None = None
    paid: int | None = None

    @property
    def abandoned(self) -> int:
        return self.expires + 2 * WINDOW

    @property
    def is_open(self) -> bool:
        return self.paid is None and self.deadline is None

    def allows(self, move: str, now: int) -> bool:
        if self.paid is not None:
            return False
        if move == "top up":
            return self.is_open and now < self.expires
        if move == "request":
            return self.is_open and (self.early or now >= self.expires)
        if move == "finalize":
            return now >= (self.abandoned if self.deadline is None else self.deadline)
        return self.deadline is None or now < self.deadline  # update, close

    def take(self, move: str, now: int, amount: int) -> None:
        if move == "top up":
            self.deposit += amount
        elif move == "request":
            self.deadline = max(now, min(now + WINDOW, self.abandoned))
        elif move == "update":
            self.best = amount
        else:
            self.paid = amount if move == "close" else self.best


async def test_every_limit_holds_to_the_millisecond(ledger: LedgerClient, clock: Clock) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    ledger_ms, serial, earned = clock.now_ms, 0, 0
    taken: set[tuple[str, bool]] = set()

    for number in range(CHANNELS):
        ledger_ms = clock.now_ms = max(clock.now_ms, ledger_ms)
        commit = t1(number, expires_ms=clock.now_ms + LIFE, challenge_ms=WINDOW,
                    flags=EARLY_CLOSE * dice.randrange(2))  # fmt: skip
        channel = await opened(ledger, commit)
        model = Expected(commit.expires_ms, bool(commit.flags))

        async def make(move: str, amount: int, now: int, name: int, channel: bytes = channel) -> None:
            ids = {"request_id": name.to_bytes(16, "big"), "valid_until_ms": now + 1}
            update = ChannelUpdate(channel=channel, cumulative=amount) if amount else None
            if move == "top up":
                await ledger.top_up(channel, ALICE, amount, **ids)
            elif move == "request":
                await ledger.request_close(channel, ALICE, **ids)
            elif move == "finalize":
                await ledger.finalize_channel(channel)
            elif move == "update":
                assert update is not None
                await ledger.submit_update(update, sign(K1, update, ledger.ledger_id))
            else:
                close = ChannelClose(channel=channel, capture=amount)
                shown = (amount, sign(K1, update, ledger.ledger_id)) if update else (0, b"")
                await ledger.close_channel(close, K2, *shown)

        done: set[tuple[str, int]] = set()
        for _ in range(STEPS):
            limits = [model.expires, model.abandoned, *([model.deadline] if model.deadline else [])]
            back = clock.now_ms - dice.randrange(10_000)
            clock.now_ms = dice.choice([clock.now_ms, dice.choice(limits) + dice.choice((-1, 0, 1)), back])
            now = max(clock.now_ms, ledger_ms)
            move = dice.choice(["update", "update", "close", "request", "finalize", "top up"])
            most = model.best + 1
            amount = {"update": most, "close": dice.choice([0, most]), "top up": 1}.get(move, 0)
            if (move, amount) in done and move in ("finalize", "close"):
                continue  # the same request again gets the same answer
            if move in ("update", "close") and amount > model.deposit:
                continue
            serial += 1
            allowed = model.allows(move, now)
            taken.add((move, allowed))
            if allowed:
                await make(move, amount, now, serial)
                model.take(move, now, amount)
                done.add((move, amount))
                ledger_ms = now
            else:
                with pytest.raises((ChannelClosed, ChannelClosing, ChannelExpired, ChannelLocked)):
                    await make(move, amount, now, serial)
        # Whatever happened, the money gets out, and the payee has the best it has shown.
        clock.now_ms = max(ledger_ms, model.abandoned)
        if model.paid is None:
            await ledger.finalize_channel(channel)
            model.take("finalize", clock.now_ms, 0)
            ledger_ms = clock.now_ms
        state = await ledger.channel(channel, K2)
        assert state.captured == model.paid
        earned += model.paid or 0
    assert len(taken) == 10, "each was tried in time and out of time"
    alice, bob = await ledger.account(ALICE), await ledger.account(BOB)
    assert (alice.available, alice.locked, bob.available) == (ISSUE - earned, 0, earned)
