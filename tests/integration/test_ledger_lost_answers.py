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

from btt.sdk.errors import InvalidRequest, OutcomeUnknown, RateLimited
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient, SignedReceipt
from btt.sdk.ledger import connection as connection_module
from btt.sdk.rpc import abort
from btt.services.ledger import folder, server
from btt.services.ledger.books import Terms
from btt.services.ledger.journal import Kind
from btt.services.ledger.reading import Reader
from btt.services.ledger.service import LedgerService
from kit.ledgers import BANK, HOUR, ISSUE, PRICE, SHOP, errands, insist, same

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


@pytest.mark.parametrize("kind", [Kind.TRANSFER, Kind.TOP_UP])
async def test_what_got_no_answer_is_asked_again_by_the_name_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """Nothing says to try again what would then be another payment."""
    monkeypatch.setattr(connection_module, "_PAUSES", (0.0, 0.0))
    home = tmp_path / "ledger"
    async with served(home) as ledger:
        person, answer = PEOPLE[0], LedgerService._answer
        lost: list[bytes] = []
        opening = errands(ledger, person, 0)[1]
        channel = (await opening.ask(ledger)).receipt.request_digest

        async def ask(**name: Any) -> SignedReceipt:
            if kind is Kind.TRANSFER:
                return await ledger.transfer(person, SHOP.address, 100, **name)
            return await ledger.top_up(channel, person, 100, **name)

        async def no_answer(self: LedgerService, context: Any, work: Any) -> Any:
            done = await answer(self, context, work)
            if hasattr(done, "body"):
                if done.body in lost:  # to be told to wait says nothing about the first time
                    await abort(context, RateLimited("Not so fast."))
                lost.append(done.body)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the line went")
            return done

        with monkeypatch.context() as patch:
            patch.setattr(LedgerService, "_answer", no_answer)
            with pytest.raises(OutcomeUnknown) as unknown:
                await ask()
            with pytest.raises(OutcomeUnknown):
                await ask(valid_until_ms=ledger.now_ms() + HOUR)
        assert not unknown.value.retryable
        known = {"request_id": unknown.value.request_id, "valid_until_ms": unknown.value.valid_until_ms}
        assert same(await ask(**known), await ask(**known))
        with pytest.raises(InvalidRequest, match="together"):
            await ask(request_id=known["request_id"])
    assert kinds(home).count(kind) == {Kind.TRANSFER: len(PEOPLE), Kind.TOP_UP: 0}[kind] + 2
