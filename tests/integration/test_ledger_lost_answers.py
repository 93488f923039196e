"""Answers get lost and requests come twice: in the end it is as if nothing had."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import grpc
import pytest

from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient
from btt.sdk.ledger import connection as connection_module
from btt.services.ledger import folder, server
from btt.services.ledger.books import Terms
from btt.services.ledger.reading import Reader
from btt.services.ledger.service import LedgerService
from kit.ledgers import BANK, ISSUE, PRICE, SHOP, errands, insist, same

PEOPLE = [PrivateKey(n.to_bytes(32, "big")) for n in (51, 52)]
ROUNDS = 4


@asynccontextmanager
async def served(home: Path) -> AsyncIterator[LedgerClient]:
    terms = Terms(min_challenge_ms=1, min_lifetime_ms=1000)
    folder.init(home, name="test", supply_to=BANK.address, amount=ISSUE, terms=terms)
    config = server.LedgerConfig(folder=home, sweep_every=3600)
    async with server.serve(config) as running, LedgerClient.connect(running.address) as ledger:
        for key in PEOPLE:
            await ledger.transfer(BANK, key.address, 1000)
        yield ledger


async def live(ledger: LedgerClient, *, twice: bool) -> dict[str, Any]:
    """People do all that can be done; returns how it ends."""

    async def person(key: PrivateKey) -> None:
        for number in range(ROUNDS):
            for errand in errands(ledger, key, number):
                first, *others = await asyncio.gather(*(insist(ledger, errand) for _ in range(1 + twice)))
                assert all(same(first, other) for other in others)

    await asyncio.gather(*map(person, PEOPLE))
    totals = await ledger.totals()
    return {
        "accounts": [(await ledger.account(key)).available for key in (BANK, SHOP, *PEOPLE)],
        "totals": (totals.issued, totals.accounts, totals.channels, totals.closed_channels, totals.head_seq),
    }


def kinds(home: Path) -> list[int]:
    with closing(Reader(home / "ledger.sqlite3")) as reader:
        return sorted(entry.kind for entry in reader.entries(0, 10**6))


@pytest.mark.parametrize("lost", [0.5, 1.0], ids=["half are lost", "each is lost once"])
async def test_lost_answers_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: float
) -> None:
    monkeypatch.setattr(connection_module, "_PAUSES", (0.0, 0.0))
    async with served(tmp_path / "calm") as ledger:
        calm = await live(ledger, twice=False)
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    answer: Callable[..., Any] = LedgerService._answer
    dropped: list[bytes] = []

    async def answer_gets_lost(self: LedgerService, context: Any, work: Any) -> Any:
        done = await answer(self, context, work)
        if hasattr(done, "receipt"):
            body = done.receipt.body
            if dice.random() < lost and (lost < 1 or body not in dropped):
                dropped.append(body)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the line went")
        return done

    async with served(tmp_path / "rough") as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(LedgerService, "_answer", answer_gets_lost)
            rough = await live(ledger, twice=True)
    assert len(dropped) >= 8 * ROUNDS * len(PEOPLE) // 2
    assert rough == calm
    assert kinds(tmp_path / "rough") == kinds(tmp_path / "calm")
    assert rough["accounts"][1] == PRICE * ROUNDS * len(PEOPLE)
