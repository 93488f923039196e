"""`btt wallet transfer` and `btt channel topup` whose answers get lost: the same command again pays once."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import grpc
import pytest

from btt.sdk.cli import main
from btt.sdk.errors import AccountUnknown, InsufficientFunds, InvalidRequest, OutcomeUnknown, StorageError
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerAddress, LedgerClient, connection
from btt.sdk.payment import pending, transfers
from btt.sdk.payment.store import PayerStore
from btt.sdk.signing import ChannelCommit, ChannelRefund, sign
from btt.sdk.wallet import Keystore, derive_channel_key
from btt.services.ledger import folder, server
from btt.services.ledger.books import Terms
from btt.services.ledger.service import LedgerService

START, HOUR, ISSUE = 1_800_000_000_000, 3_600_000, 10_000
K2, BOB, CAROL = (PrivateKey(n.to_bytes(32, "big")) for n in (22, 12, 13))
NOT_KNOWN = "It is not known whether 0.0001 BTT went to"


@dataclass
class Line:
    """What happens to requests that move money, on their way there or back."""

    loses: Literal["", "requests", "answers"] = ""
    holds: Literal["", "requests", "answers"] = ""
    asked: list[bytes] = field(default_factory=list)
    held: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def pass_by(self, what: str, context: Any) -> None:
        if self.holds == what:
            self.held.set()
            await self.released.wait()
        if self.loses == what:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the line went")

    def wrap(self, method: Callable[..., Any]) -> Callable[..., Any]:
        async def call(service: LedgerService, request: Any, context: Any) -> Any:
            self.asked.append(request.SerializeToString())
            await self.pass_by("requests", context)
            answer = await method(service, request, context)
            await self.pass_by("answers", context)
            return answer

        return call


class World:
    """A ledger with a clock that the test sets, and a wallet."""

    ledger: LedgerAddress

    def __init__(self, wallet: Path, line: Line, capsys: pytest.CaptureFixture[str]) -> None:
        self.wallet, self.line, self._capsys = wallet, line, capsys
        self.now_ms = START
        self.key = Keystore.create(wallet / "wallet.json", "").key()

    def words(self, *words: str) -> list[str]:
        return [*words, "--ledger", str(self.ledger), "--wallet", str(self.wallet), "--json", "--yes"]

    async def start(self, amount: int) -> asyncio.subprocess.Process:
        """Begins to send something to BOB in a process of its own."""
        words = self.words("wallet", "transfer", str(BOB.address), f"{amount} base units")
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "btt.sdk.cli", *words,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

    async def run(self, *words: str, code: int = 0) -> tuple[Any, str]:
        def command() -> int:
            try:
                return main(self.words(*words))
            except SystemExit as ended:
                return int(ended.code or 0)

        ended = await asyncio.to_thread(command)
        told = self._capsys.readouterr()
        assert ended == code, told.err
        return json.loads(told.out), told.err

    async def send(self, amount: int, to: PrivateKey = BOB, *, code: int = 0) -> tuple[Any, str]:
        return await self.run("wallet", "transfer", str(to.address), f"{amount} base units", code=code)

    async def holds(self, *keys: PrivateKey) -> list[int]:
        async with LedgerClient.connect(self.ledger) as ledger:
            return [(await ledger.account(key)).available for key in keys]

    def under_way(self) -> int:
        with closing(sqlite3.connect(self.wallet / "payer.db")) as books:
            [(count,)] = books.execute("SELECT count(*) FROM transfers").fetchall()
        return int(count)


@pytest.fixture
async def world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> AsyncIterator[World]:
    monkeypatch.setattr(connection, "_PAUSES", (0.0, 0.0))
    made = World(tmp_path / "wallet", Line(), capsys)
    for name in ("Transfer", "TopUpChannel"):
        monkeypatch.setattr(LedgerService, name, made.line.wrap(getattr(LedgerService, name)))
    home, terms = tmp_path / "ledger", Terms(min_challenge_ms=1000, min_lifetime_ms=1000)
    folder.init(home, name="test", supply_to=made.key.address, amount=ISSUE, terms=terms, clock=lambda: START)
    config = server.LedgerConfig(folder=home, grace=0, sweep_every=3600)
    async with server.serve(config, clock=lambda: made.now_ms) as running:
        made.ledger = running.address
        yield made


@pytest.mark.parametrize(("lost", "late"), [("answers", False), ("requests", True)])
async def test_the_same_command_again_pays_once(world: World, lost: Any, late: bool) -> None:
    world.line.loses = lost
    told, _ = await world.send(100, code=4)
    assert (told["error"]["reason"], world.under_way()) == ("OUTCOME_UNKNOWN", 1)
    assert NOT_KNOWN in told["error"]["message"]
    assert "never pays it twice" in told["error"]["hint"]
    told, _ = await world.send(100, code=4)
    assert NOT_KNOWN in told["error"]["message"]
    assert len(set(world.line.asked)) == 1, "the same bytes each time"

    world.line.loses = ""
    world.now_ms += 61_000 if late else 0
    sent, note = await world.send(100)
    never = late and lost == "requests"
    assert ("did not happen, and never will" in note) == never
    assert ("nothing more was sent" in note) == (not never)
    before = {"entry": None if never else sent["entry"], "amount": "100", "to": str(BOB.address)}
    assert sent["earlier"] == before
    assert await world.holds(BOB) == [100]
    assert world.under_way() == 0

    sent, note = await world.send(100)  # on purpose
    assert (sent["earlier"], note) == (None, "")
    assert await world.holds(BOB, world.key) == [200, ISSUE - 200]


async def test_another_transfer_settles_the_one_before_it_first(world: World) -> None:
    world.line.loses = "answers"
    await world.send(100, code=4)
    told, _ = await world.send(7, CAROL, code=4)
    assert NOT_KNOWN in told["error"]["message"]
    assert await world.holds(BOB, CAROL) == [100, 0], "nothing is sent before that is known"
    world.line.loses = ""
    world.now_ms += HOUR
    sent, note = await world.send(7, CAROL)
    assert f"A transfer of 0.0001 BTT to {BOB.address}, asked for before, went through" in note
    assert "nothing more" not in note
    assert sent["earlier"]["amount"] == "100"
    assert await world.holds(BOB, CAROL, world.key) == [100, 7, ISSUE - 107]
    assert world.under_way() == 0


async def test_one_with_another_memo_is_another_transfer(world: World) -> None:
    def send(memo: bytes, code: int = 0) -> Awaitable[tuple[Any, str]]:
        words = ("wallet", "transfer", str(BOB.address), "100 base units", "--memo", os.fsdecode(memo))
        return world.run(*words, code=code)

    world.line.loses = "answers"
    await send(b"invoice 1", 4)
    world.line.loses = ""
    sent, note = await send(b"invoice \xb2")
    assert "went through" in note
    assert "nothing more" not in note
    assert sent["entry"] != sent["earlier"]["entry"]
    assert await world.holds(BOB) == [200]


@pytest.mark.parametrize("where", ["requests", "answers"])
async def test_kill_9_before_the_answer(world: World, where: Any) -> None:
    world.line.holds = where
    process = await world.start(100)
    await world.line.held.wait()
    assert world.under_way() == 1
    process.kill()
    await process.communicate()
    assert await world.holds(BOB) == [100 if where == "answers" else 0]
    world.line.holds = ""
    sent, note = await world.send(100)
    assert sent["earlier"]["entry"] == sent["entry"]
    assert "nothing more was sent" in note
    assert await world.holds(BOB) == [100]
    assert (len(set(world.line.asked)), world.under_way()) == (1, 0)


async def test_of_two_processes_one_waits_for_the_other(world: World) -> None:
    world.line.holds = "answers"
    first = await world.start(100)
    await world.line.held.wait()
    with (world.wallet / "claims" / "transfers").open("wb") as taken, pytest.raises(BlockingIOError):
        fcntl.flock(taken, fcntl.LOCK_EX | fcntl.LOCK_NB)
    second = await world.start(100)
    world.line.released.set()
    for process in (first, second):
        out, err = await process.communicate()
        assert json.loads(out)["earlier"] is None, err.decode()
    assert await world.holds(BOB) == [200]
    assert world.under_way() == 0


async def test_what_is_refused_is_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unreadable(*_: object) -> NoReturn:
        raise InvalidRequest("This program cannot read the answer.")

    poor = PrivateKey((51).to_bytes(32, "big"))
    async with LedgerClient.connect(world.ledger) as ledger:
        with closing(PayerStore(world.wallet)) as store:
            for key, to, amount, refusal in (
                (world.key, BOB, ISSUE + 1, InsufficientFunds),
                (world.key, world.key, 1, InvalidRequest),
                (poor, BOB, 1, AccountUnknown),
            ):
                with pytest.raises(refusal):
                    await transfers.send(store, ledger, key, to.address, amount, bytes(32))
                assert world.under_way() == 0
            world.line.loses = "answers"
            with pytest.raises(OutcomeUnknown):
                await transfers.send(store, ledger, world.key, BOB.address, 1, bytes(32))
            with pytest.raises(StorageError):
                await transfers.send(store, ledger, world.key, CAROL.address, 1, bytes(32))
            world.line.loses = ""
            with monkeypatch.context() as patch, pytest.raises(OutcomeUnknown):
                patch.setattr(LedgerClient, "_acknowledged", unreadable)
                await transfers.settle(store, ledger, world.key)
            assert world.under_way() == 1, "the ledger refused nothing"
            assert await transfers.settle(store, ledger, poor) is None, "another account's"
    assert await world.holds(BOB, CAROL) == [1, 0]


async def test_a_top_up_by_hand_happens_once(world: World) -> None:
    async with LedgerClient.connect(world.ledger) as ledger:
        t1 = ChannelCommit(
            payer=world.key.address, payee=BOB.address, k1=derive_channel_key(world.key, bytes(16)).public,
            k2=K2.public, amount=100, expires_ms=START + HOUR, challenge_ms=1000, flags=1, fee=0,
            nonce=bytes(16), service_ref=bytes(32),
        )  # fmt: skip
        channel = t1.channel_id(ledger.ledger_id)
        t2 = ChannelRefund(channel=channel, not_before_ms=t1.expires_ms)
        await ledger.open_channel(t1, world.key, sign(K2, t2, ledger.ledger_id))
    words = ("channel", "topup", channel.hex(), "30 base units")
    world.line.loses = "answers"
    await world.run(*words, code=4)
    await world.run(*words, code=4)
    world.line.loses = ""
    found, note = await world.run(*words)
    assert (found["deposit"], "nothing more was locked" in note) == ("130", True)
    found, note = await world.run(*words)  # on purpose
    assert (found["deposit"], note) == ("160", "")
    # Neither what a program began nor another amount is what is asked for now.
    for budget, more, deposit in (("films", 30, 220), ("", 31, 281)):
        with closing(PayerStore(world.wallet)) as store:
            pending.begin(
                store, channel, ledger_id=world.ledger.ledger_id, amount=30, valid_until_ms=START + HOUR,
                budget=budget, granted=1000,
            )  # fmt: skip
        found, note = await world.run(*words[:3], f"{more} base units")
        assert (found["deposit"], note) == (str(deposit), "")
