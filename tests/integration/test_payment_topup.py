"""A channel that grows while it is used: one channel, one budget, and a node that asks the ledger."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import sys
from contextlib import closing

import pytest

from btt.node.payments import deposits
from btt.proto.ledger.v1 import ledger_pb2
from btt.sdk.budget import Budget
from btt.sdk.client import Client
from btt.sdk.content.feed import LINE
from btt.sdk.errors import (
    BudgetExceeded,
    ConfigError,
    InsufficientFunds,
    InvalidRequest,
    LedgerUnreachable,
    UpdateInvalid,
)
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient
from btt.sdk.money import BTT, SUPPLY
from btt.sdk.payment import pending, topups
from btt.sdk.payment.history import known_endpoint, trust_endpoint
from btt.sdk.payment.purse import Purse
from btt.sdk.payment.session import PaymentSession
from btt.sdk.payment.store import PayerStore
from kit.economy import CONTENT_PRICE, RUN, content
from kit.probe import BYTES, PRICES, Probe, pb, rpc

OWED = CONTENT_PRICE[LINE].rate.owed
UNIT = OWED(RUN)


@pytest.fixture
async def shop(economy):
    data = content(8 * RUN)
    node, infohash = await economy.content_node({"film": data})
    node.data, node.infohash = data, infohash["film"]
    return node


@pytest.fixture
async def probe(economy):
    return await economy.node(
        lambda r: rpc.add_ProbeServiceServicer_to_server(Probe(), r), {BYTES: PRICES[BYTES]}
    )


def named(economy, node, wallet, budget: str, **options) -> Client:
    return Client.connect(
        str(node.address), budget=Budget(budget, name="films"), ledger=str(economy.running.address),
        wallet=wallet, clock=economy.clock, **options,
    )  # fmt: skip


async def test_a_fetch_larger_than_the_first_channel_ends_in_one_channel(shop, economy, tmp_path):
    wallet = await economy.wallet()
    async with economy.client(shop, wallet) as btt:
        session = await btt.session(OWED(3 * RUN))
        assert session.payer.deposit == OWED(3 * RUN)
        async with btt.content.fetch(shop.infohash, tmp_path) as transfer:
            pass
        assert await btt.session(0) is session, "the session went on"
        state = await economy.ledger.channel(session.payer.channel_id, wallet.account)
        assert state.deposit <= OWED(len(shop.data)) + 1, "no more is locked than is bought"
    assert (tmp_path / "film").read_bytes() == shop.data
    [receipt] = btt.receipts
    assert receipt.counts_agree
    assert receipt.captured == transfer.receipt.spent == OWED(len(shop.data))
    totals = await economy.ledger.totals()
    assert (totals.open_channels, totals.closed_channels) == (0, 1)
    assert (await economy.ledger.account(wallet.account)).available == 100 * BTT - receipt.captured


async def test_calls_of_any_service_top_up_by_themselves(probe, economy):
    async with economy.client(probe, await economy.wallet()) as btt:
        session = await btt.session(UNIT)
        stub = rpc.ProbeServiceStub(session.channel)
        for _ in range(5):
            await stub.One(pb.Ask(size=RUN))
    [receipt] = btt.receipts
    assert (receipt.counts_agree, receipt.captured) == (True, OWED(5 * RUN))


async def test_the_budget_bounds_what_is_locked_and_the_error_says_what_is_missing(shop, economy, tmp_path):
    wallet = await economy.wallet()
    granted = 5 * UNIT
    with pytest.raises(BudgetExceeded) as refused:
        async with economy.client(shop, wallet, budget=f"{granted} base units", keep_channels=True) as btt:
            session = await btt.session(2 * UNIT)
            asked = []
            reserve = session.payer.reserve
            session.payer.reserve = lambda segment, units: (asked.append(units), reserve(segment, units))
            try:
                async with btt.content.fetch(shop.infohash, tmp_path):
                    pass
            finally:
                state = await economy.ledger.channel(session.payer.channel_id, wallet.account)
                assert state.deposit <= granted
    assert sum(asked) <= 5 * RUN, "what cannot be paid is not requested"
    assert 3 * UNIT - 3 <= refused.value.missing <= 3 * UNIT + 3
    assert "missing" in str(refused.value)


async def test_a_budget_that_reaches_for_nothing_opens_nothing(shop, economy):
    wallet = await economy.wallet()
    async with economy.client(shop, wallet, budget=f"{UNIT - 1} base units") as btt:
        with pytest.raises(BudgetExceeded) as refused:
            await btt.session(8 * UNIT)
    assert refused.value.missing == 7 * UNIT + 1
    assert (await economy.ledger.account(wallet.account)).locked == 0


async def test_two_processes_never_lock_more_than_their_budget(probe, economy):
    wallet, granted = await economy.wallet(), 10 * UNIT
    budget = f"{granted} base units"
    async with named(economy, probe, wallet, budget) as one, named(economy, probe, wallet, budget) as two:
        sessions = [await one.session(UNIT), await two.session(UNIT)]

        async def buy(session) -> None:
            while True:
                need = session.payer.spare + UNIT
                await session.capacity.provide(need, least=need)

        done = await asyncio.gather(*map(buy, sessions), return_exceptions=True)
        assert [type(error) for error in done] == [BudgetExceeded] * 2
        assert (await economy.ledger.account(wallet.account)).locked == granted
        assert sum(session.payer.limit for session in sessions) == granted


async def test_what_a_budget_spent_stays_spent_when_another_takes_the_channel_over(probe, economy):
    wallet, granted = await economy.wallet(), 4 * UNIT
    async with named(economy, probe, wallet, f"{granted} base units", keep_channels=True) as btt:
        session = await btt.session(granted)
        for _ in range(3):
            await rpc.ProbeServiceStub(session.channel).One(pb.Ask(size=RUN))
    async with economy.client(probe, wallet, keep_channels=True) as other:
        assert (await other.session(UNIT)).payer.channel_id == session.payer.channel_id
    async with named(economy, probe, wallet, f"{granted} base units") as btt:
        with pytest.raises(BudgetExceeded):
            await btt.session(2 * UNIT + 2 * UNIT)
            await (await btt.session(UNIT)).capacity.provide(2 * UNIT, least=2 * UNIT)


async def take(btt: Client, runs: int, *, need: int = UNIT) -> PaymentSession:
    session = await btt.session(need)
    for _ in range(runs):
        await rpc.ProbeServiceStub(session.channel).One(pb.Ask(size=RUN))
    await session.settle()
    return session


@pytest.mark.parametrize("reaches", [False, True])
async def test_a_lost_answer_tops_up_once(probe, economy, monkeypatch, reaches):
    wallet, granted = await economy.wallet(), 4 * UNIT
    inner = LedgerClient.top_up
    bodies = []

    async def lost(self, *args, **options):
        bodies.append((args, options))
        if reaches:
            await inner(self, *args, **options)
        raise LedgerUnreachable("The answer was lost.")

    async with named(economy, probe, wallet, f"{granted} base units") as btt:
        session = await btt.session(UNIT)
        monkeypatch.setattr(LedgerClient, "top_up", lost)
        with pytest.raises(LedgerUnreachable):
            await session.provide(4 * UNIT)
        assert session.payer.limit == UNIT, "nothing more may be signed yet"
        assert btt.books.left("films", granted) == 0, "it stays reserved"
        monkeypatch.setattr(LedgerClient, "top_up", inner)
        await session.provide(4 * UNIT)
        state = await economy.ledger.channel(session.payer.channel_id, wallet.account)
        assert state.deposit == granted == session.payer.limit
        assert pending.pending(btt.books, economy.ledger.ledger_id) == []
    assert (await economy.ledger.account(wallet.account)).available == 100 * BTT


def counted(monkeypatch, economy) -> list[bytes]:
    """The questions about channels that the node asks its ledger from now on."""
    asked, inner = [], economy.ledger.channel

    async def channel(channel_id, key):
        asked.append(channel_id)
        return await inner(channel_id, key)

    monkeypatch.setattr(economy.ledger, "channel", channel)
    return asked


async def test_a_payer_that_lies_about_its_deposit_is_believed_nothing(probe, economy, monkeypatch):
    async with economy.client(probe, await economy.wallet()) as btt:
        session = await btt.session(2 * UNIT)
        [live] = probe.sessions.all()
        asked = counted(monkeypatch, economy)
        told = session.capacity
        for claim in (UNIT, 2 * UNIT):  # what the node knows already costs no question
            told._told = claim
            session._wake.set()
            await rpc.ProbeServiceStub(session.channel).One(pb.Ask(size=1))
        assert asked == []
        for claim in range(2 * UNIT + 1, 2 * UNIT + 50):
            told._told = claim
            session._wake.set()
            await asyncio.sleep(0)
        async with asyncio.timeout(20):
            while session.error is None:
                session._changed.clear()
                await session._changed.wait()
        assert isinstance(session.error, UpdateInvalid)
        assert live.payee.meter.deposit == 2 * UNIT
        assert len(asked) == 1, "one lie, one question"
        btt.providers[0].live = None
        await session.abandon()


async def test_a_node_asks_about_one_channel_once_in_a_while(probe, economy, monkeypatch):
    wallet = await economy.wallet()
    async with economy.client(probe, wallet) as btt:
        session = await btt.session(UNIT)
        [live] = probe.sessions.all()
        monkeypatch.setattr(deposits, "PAUSE_S", 3600.0)
        await session.provide(2 * UNIT)
        asked = counted(monkeypatch, economy)
        more = asyncio.create_task(session.provide(3 * UNIT))
        events = []
        async with asyncio.timeout(20):
            async for page in economy.ledger.watch(wallet.account, channel_id=session.payer.channel_id):
                events += [event for event in page.events if event.kind == ledger_pb2.ENTRY_KIND_TOP_UP]
                if len(events) == 2:
                    break
        await rpc.ProbeServiceStub(session.channel).One(pb.Ask(size=1))
        assert (asked, live.payee.meter.deposit, session.payer.limit) == ([], 2 * UNIT, 2 * UNIT)
        more.cancel()
        await asyncio.wait([more])
        await session.abandon()
        btt.providers[0].live = None


async def test_what_the_owner_adds_by_hand_is_used_by_the_program_that_runs(probe, economy):
    wallet = await economy.wallet()
    async with economy.client(probe, wallet) as btt:
        session = await btt.session(UNIT)
        store = PayerStore(wallet.folder)
        owner = Purse(wallet.account, store, economy.ledger, economy.clock)
        await topups.top_up(owner, session.payer.channel_id, 4 * UNIT)
        assert store.get(session.payer.channel_id).deposit == 5 * UNIT
        store.close()
        await session.provide(5 * UNIT)
        assert (session.payer.deposit, session.payer.limit) == (5 * UNIT, 5 * UNIT)
        assert (await economy.ledger.account(wallet.account)).locked == 5 * UNIT, "nothing was added to it"


async def test_an_account_without_the_money_is_said_and_nothing_stays_reserved(probe, economy):
    wallet = await economy.wallet(2 * UNIT)
    async with economy.client(probe, wallet) as btt:
        session = await btt.session(UNIT)
        with pytest.raises(InsufficientFunds):
            await session.provide(9 * UNIT)
        assert btt.books.left(btt._budget.name, 5 * BTT) == 5 * BTT - UNIT
        await rpc.ProbeServiceStub(session.channel).One(pb.Ask(size=RUN))
    assert btt.receipts[0].captured == UNIT


async def test_a_budget_that_was_lowered_binds_what_is_locked_already(probe, economy):
    wallet = await economy.wallet()
    async with named(economy, probe, wallet, "1 BTT", keep_channels=True) as btt:
        await take(btt, 2, need=8 * UNIT)
    async with named(economy, probe, wallet, f"{3 * UNIT} base units", keep_channels=True) as btt:
        session = await take(btt, 1)
        with pytest.raises(BudgetExceeded):
            await session.provide(UNIT)
    assert (btt.receipts[0].paid, btt.receipts[0].counts_agree) == (OWED(3 * RUN), True)
    async with named(economy, probe, wallet, f"{UNIT} base units") as btt:
        with pytest.raises(BudgetExceeded):
            await btt.session(UNIT)
    assert (await economy.ledger.account(wallet.account)).available == 100 * BTT - OWED(3 * RUN)


@pytest.mark.parametrize("amount", [0, SUPPLY, SUPPLY + 1])
async def test_a_top_up_that_cannot_be_is_said_and_leaves_nothing(probe, economy, amount):
    wallet = await economy.wallet()
    async with named(economy, probe, wallet, "1 BTT") as btt:
        session = await btt.session(UNIT)
        with closing(PayerStore(wallet.folder)) as store:
            owner = Purse(wallet.account, store, economy.ledger, economy.clock)
            with pytest.raises(InvalidRequest, match="no more than there is"):
                await topups.top_up(owner, session.payer.channel_id, amount)
            assert await topups.resume(owner) == []
            assert pending.pending(store, economy.ledger.ledger_id) == []


async def test_a_request_that_came_too_late_is_made_again(probe, economy, monkeypatch):
    async with economy.client(probe, await economy.wallet()) as btt:
        session = await btt.session(UNIT)
        ledger = btt._ledger
        ledger._clock_offset_ms -= topups.VALID_MS + 5000  # this machine slept
        await session.provide(2 * UNIT)
        assert session.payer.limit == 2 * UNIT
        assert pending.pending(btt.books, economy.ledger.ledger_id) == []
        assert btt.books.left(btt._budget.name, 5 * BTT) == 5 * BTT - 2 * UNIT


async def test_all_clients_that_name_an_app_share_its_budget_for_good(shop, probe, economy, tmp_path):
    """Whatever each may spend by itself, at once and one after the other, at one node or another."""
    wallet = await economy.wallet()

    def client(total: int, app: Budget | None, node=shop, **options) -> Client:
        return Client.connect(
            str(node.address), budget=Budget(total, within=app, **options), wallet=wallet,
            ledger=str(economy.running.address), clock=economy.clock,
        )  # fmt: skip

    films, games = Budget(OWED(8 * RUN) + 2 * UNIT, name="films"), Budget(2 * UNIT, name="games")
    async with client(9 * UNIT, films) as btt:
        async with btt.content.fetch(shop.infohash, tmp_path / "one") as transfer:
            pass
        assert transfer.receipt.spent == OWED(8 * RUN)
    async with client(9 * UNIT, films, name="second") as btt, client(9 * UNIT, films, probe) as other:
        assert (await btt.session(UNIT)).payer.limit == UNIT
        assert (await other.session(2 * UNIT)).payer.limit == UNIT, "a part of it"
        assert (await btt.session(2 * UNIT)).payer.limit == UNIT, "nothing is left to top it up"
        async with client(9 * UNIT, films) as third:
            with pytest.raises(
                BudgetExceeded, match=re.escape(f"0 BTT of the budget films of {films.total}")
            ):
                await third.session(UNIT)
    async with client(9 * UNIT, games) as btt:
        await btt.session(2 * UNIT)  # another application has its own
    async with client(UNIT, Budget(films.amount + UNIT, name="films"), probe) as btt:
        await btt.session(UNIT)  # its owner has raised it
    with pytest.raises(InvalidRequest, match="second was used before, and not within games"):
        async with client(UNIT, games, name="second"):
            pass
    with pytest.raises(InvalidRequest, match="within itself"):
        client(UNIT, games, name="games")


PROGRAM = """
import asyncio, sys
from pathlib import Path
from btt.sdk.budget import Budget
from btt.sdk.client import Client, Wallet
from btt.sdk.errors import BudgetExceeded
from btt.sdk.keys import PrivateKey

node, ledger, folder, key, granted, step, shared = sys.argv[1:]
total = granted + " base units"
films = Budget(total, name="films")

async def main():
    async with Client.connect(
        node, ledger=ledger, budget=films if shared == "budget" else Budget(total, within=films),
        wallet=Wallet(Path(folder), PrivateKey(bytes.fromhex(key))),
    ) as btt:
        session = await btt.session(int(step))
        print("open", flush=True)
        sys.stdin.readline()
        try:
            while True:
                need = session.payer.spare + int(step)
                await session.capacity.provide(need, least=need)
        except BudgetExceeded:
            print(session.payer.limit, flush=True)
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


@pytest.mark.parametrize("shared", ["budget", "app"])
async def test_two_processes_share_one_wallet_and_one_budget(probe, economy, shared):
    wallet, granted = await economy.wallet(), 11 * UNIT
    words = [
        str(probe.address), str(economy.running.address), str(wallet.folder), wallet.account.secret.hex(),
        str(granted), str(UNIT), shared,
    ]  # fmt: skip
    pipe = asyncio.subprocess.PIPE
    both = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, *words, stdin=pipe, stdout=pipe)
        for _ in range(2)
    ]
    try:
        for process in both:
            assert await process.stdout.readline() == b"open\n"
        for process in both:
            process.stdin.write(b"\n")
        limits = [int(await process.stdout.readline()) for process in both]
        assert (await economy.ledger.account(wallet.account)).locked == granted == sum(limits)
        assert all(limit >= UNIT for limit in limits)
        for process in both:
            process.stdin.write(b"\n")
            assert await process.wait() == 0
    finally:
        for process in both:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert (await economy.ledger.account(wallet.account)).available == 100 * BTT


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_books_of_older_versions_are_brought_up_to_date(tmp_path, version):
    store = PayerStore(tmp_path)
    node = PrivateKey.generate().address
    trust_endpoint(store, "127.0.0.1:1", node)
    store.close()
    old = sqlite3.connect(tmp_path / "payer.db")
    old.executescript(
        "DROP TABLE transfers;"
        + ("ALTER TABLE budgets DROP COLUMN within;" if version < 4 else "")
        + (
            "ALTER TABLE budgets DROP COLUMN spent; ALTER TABLE channels DROP COLUMN kept_ms;"
            "DROP TABLE top_ups; DROP TABLE watched; DROP TABLE places;"
            if version < 3
            else ""
        )
        + ("DROP TABLE bans;" if version == 1 else "")
        + f"INSERT INTO budgets(name, granted) VALUES('films', 7); PRAGMA user_version={version};"
    )
    old.close()
    for _ in range(2):
        store = PayerStore(tmp_path)
        assert store.left("films", 7) == 7
        assert store.channels() == []
        assert known_endpoint(store, "127.0.0.1:1") == node
        assert store.conduct(node).strikes == 0
        with store.books() as db:
            assert db.execute("SELECT * FROM transfers").fetchall() == []
        store.close()
    newer = sqlite3.connect(tmp_path / "payer.db")
    newer.execute("PRAGMA user_version=9")
    newer.close()
    with pytest.raises(ConfigError):
        PayerStore(tmp_path)


def test_a_top_up_is_reserved_in_the_very_transaction_that_writes_it(tmp_path):
    """Two processes that both saw the same rest of the budget: the second writes nothing."""
    one, two = PayerStore(tmp_path), PayerStore(tmp_path)
    words = {"ledger_id": bytes(32), "valid_until_ms": 1, "budget": "films", "granted": 10}
    assert one.left("films", 10) == two.left("films", 10) == 10
    pending.begin(one, bytes(32), amount=7, **words)
    with pytest.raises(BudgetExceeded) as refused:
        pending.begin(two, bytes(32), amount=7, **words)
    assert refused.value.missing == 4
    assert len(pending.pending(two, bytes(32))) == 1
    one.close()
    two.close()


async def test_a_node_that_was_not_told_learns_it_when_the_next_session_opens(probe, economy):
    wallet = await economy.wallet()
    async with economy.client(probe, wallet, keep_channels=True) as btt:
        session = await btt.session(UNIT)
        owner = Purse(wallet.account, btt.books, economy.ledger, economy.clock)
        await topups.top_up(owner, session.payer.channel_id, 4 * UNIT)
    async with economy.client(probe, wallet) as btt:
        session = await btt.session(4 * UNIT)
        assert session.payer.deposit == 5 * UNIT
        async for _ in rpc.ProbeServiceStub(session.channel).Many(pb.Ask(messages=4, size=RUN)):
            pass
    assert btt.receipts[0].captured == OWED(4 * RUN)


async def add_elsewhere(economy, wallet, session, amount: int) -> None:
    """Adds to a channel from another machine of its owner, which this wallet's books know nothing of."""
    await economy.ledger.top_up(session.payer.channel_id, wallet.account, amount)


async def test_what_was_added_elsewhere_may_be_delivered_and_is_paid_from_the_budget(probe, economy):
    wallet = await economy.wallet()
    async with economy.client(probe, wallet) as btt:
        session = await btt.session(UNIT)
        await add_elsewhere(economy, wallet, session, 4 * UNIT)
        await session.provide(2 * UNIT)  # the node asks the ledger, and learns of both
        [live] = probe.sessions.all()
        assert (live.payee.meter.deposit, session.payer.limit) == (6 * UNIT, 2 * UNIT)
        async for _ in rpc.ProbeServiceStub(session.channel).Many(pb.Ask(messages=5, size=RUN)):
            pass
    [receipt] = btt.receipts
    assert (receipt.counts_agree, receipt.captured) == (True, OWED(5 * RUN))


@pytest.mark.parametrize("kind", ["One", "Many", "ManyChecked"])
async def test_what_the_budget_cannot_pay_is_not_accepted_though_the_channel_holds_it(probe, economy, kind):
    wallet = await economy.wallet()
    async with economy.client(probe, wallet, budget=f"{2 * UNIT} base units") as btt:
        session = await btt.session(UNIT)
        await add_elsewhere(economy, wallet, session, 4 * UNIT)
        await session.provide(2 * UNIT)
        stub, got = rpc.ProbeServiceStub(session.channel), 0
        with pytest.raises(BudgetExceeded, match="used up, as far as"):
            for size in (RUN // 2, RUN, RUN):
                if kind == "One":
                    got += len((await stub.One(pb.Ask(size=size))).data)
                    continue
                with session.verdicts() as verdicts:
                    async for message in getattr(stub, kind)(pb.Ask(messages=1, size=size)):
                        got += len(message.data)
                        if kind == "ManyChecked":
                            verdicts.accept(message)
        assert session.error is None
    [receipt] = btt.receipts
    assert (got, receipt.captured) == (RUN // 2 + RUN, OWED(got))
    assert not await probe.sessions.bans.all()
