"""Programs that hold a grant instead of the wallet: what they can pay, and what nobody can do with it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import closing

import pytest

from btt.proto.ledger.v1 import ledger_pb2
from btt.sdk.budget import Budget
from btt.sdk.client import Client, Wallet
from btt.sdk.content.feed import LINE
from btt.sdk.errors import (
    AccountKeyNeeded,
    AppRefused,
    BttError,
    BudgetExceeded,
    ChannelClosed,
    InsufficientFunds,
    InvalidRequest,
    LedgerUnreachable,
    SessionEnded,
    SignerMismatch,
    TermsRefused,
)
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger.keeping import RECEIPTS, EvidenceStore
from btt.sdk.money import BTT
from btt.sdk.payment import pending, topups
from btt.sdk.payment.apps import sign_grant
from btt.sdk.payment.connection import connect_node
from btt.sdk.payment.granting import granted, make_grant
from btt.sdk.payment.grants import Grant
from btt.sdk.payment.purse import Purse
from btt.sdk.payment.refunds import Wanted, ask_back
from btt.sdk.payment.session import PaymentSession
from btt.sdk.payment.store import CLOSED, OPENING, PayerStore
from btt.sdk.signing import ChannelClose, ChannelUpdate, CloseRequest, TopUp, Transfer, sign
from btt.sdk.wallet import derive_channel_key
from kit.economy import CONTENT_PRICE, RUN, content
from kit.probe import BYTES, PRICES, Probe, pb, rpc

OWED = CONTENT_PRICE[LINE].rate.owed
UNIT, FOUR = OWED(RUN), OWED(4 * RUN)


def register(registrar):
    rpc.add_ProbeServiceServicer_to_server(Probe(), registrar)


def probe_node(economy, **options):
    return economy.node(register, {BYTES: PRICES[BYTES]}, **options)


@pytest.fixture
async def probe(economy):
    return await probe_node(economy)


@pytest.fixture
async def wallet(economy) -> Wallet:
    return await economy.wallet()


@pytest.fixture
async def purse(economy, wallet):
    """The owner's."""
    store = PayerStore(wallet.folder)
    economy.stack.callback(store.close)
    return Purse(wallet.account, store, economy.ledger, economy.clock)


async def grant_for(purse: Purse, node, path, amount: int, app: str = "player") -> Grant:
    proven = await connect_node(
        node.address, ledger_id=purse.ledger.ledger_id, store=purse.store, clock=purse.clock
    )
    await make_grant(purse, proven, path, app=app, amount=amount)
    return Grant.open(path)


@pytest.fixture
async def grant(purse, probe, tmp_path) -> Grant:
    return await grant_for(purse, probe, tmp_path / "player.grant", FOUR)


def client(economy, grant: Grant, **options) -> Client:
    return Client.connect(grant=grant, clock=economy.clock, **options)


async def take(btt: Client, runs: int) -> PaymentSession:
    session = await btt.session(runs * UNIT)
    for _ in range(runs):
        await rpc.ProbeServiceStub(session.channel).One(pb.Ask(size=RUN))
    await session.settle()
    return session


PROGRAM = """
import asyncio, os, signal, sys
from btt.sdk import Client

async def main():
    async with Client.connect() as btt:
        if sys.argv[3:]:
            async with btt.content.open_stream(sys.argv[1], sys.argv[2]) as film:
                await film.read(1 << 20)
                os.kill(os.getpid(), signal.SIGKILL)
        async with btt.content.fetch(sys.argv[1], sys.argv[2]) as transfer:
            pass
    print(int(transfer.receipt.spent))

asyncio.run(main())
"""


async def test_a_program_with_the_file_alone_fetches_and_pays_and_goes_on_after_kill_9(
    economy, purse, wallet, tmp_path
):
    data = content(12 * RUN)
    shop, infohash = await economy.content_node({"film": data})
    home = tmp_path / "home"
    grant = await grant_for(purse, shop, home / "player.grant", 20 * UNIT)
    before = (await economy.ledger.account(wallet.account)).available
    assert before == 100 * BTT - 20 * UNIT
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BTT_")}

    async def program(*words: str) -> tuple[int, bytes]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, infohash["film"].hex(), str(home / "out"), *words,
            env={**kept, "HOME": str(home), "BTT_GRANT": str(home / "player.grant")},
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, _ = await process.communicate()
        return process.returncode, out

    assert await program("and die") == (-signal.SIGKILL, b"")
    state = await economy.ledger.channel(grant.channel_id, wallet.account)
    assert state.phase == ledger_pb2.CHANNEL_PHASE_OPEN
    code, out = await program()
    assert code == 0
    assert int(out) < OWED(len(data)), "what the first one had was not bought again"
    assert (home / "out" / "film").read_bytes() == data
    assert sorted(one.name for one in home.iterdir()) == ["out", "player.grant", "player.grant.books"]
    # The channel stays for the next run; the last one closes it.
    async with client(economy, grant, keep_channels=False) as btt:
        await btt.session(0)
    [receipt] = btt.receipts
    assert receipt.channel_closed
    # A unit may have been prepaid and lost, or have come and not been written down.
    assert abs(receipt.captured - OWED(len(data))) <= UNIT
    assert (await economy.ledger.account(wallet.account)).available == 100 * BTT - receipt.captured
    assert (await economy.ledger.account(shop.payee_key)).available == receipt.captured


async def test_nothing_above_the_grant_is_spent_over_runs_and_budgets(economy, probe, wallet, grant):
    for budget in (None, Budget("50 BTT"), Budget("50 BTT", name="other")):
        async with client(economy, grant, budget=budget) as btt:
            await take(btt, 1)
    async with client(economy, grant, budget=Budget(UNIT - 1)) as btt:
        with pytest.raises(BudgetExceeded) as refused:
            await btt.session(UNIT)  # a budget of its own binds as ever
        assert refused.value.hint == BudgetExceeded.hint, "another grant would not help"
    async with client(economy, grant) as btt:
        session = await take(btt, 1)
        assert session.payer.signed == FOUR
        with pytest.raises(BudgetExceeded) as refused:
            await session.provide(UNIT)
        assert (refused.value.hint, refused.value.missing) == (topups.GRANT_HINT, UNIT)
        with pytest.raises(BudgetExceeded):
            await rpc.ProbeServiceStub(session.channel).One(pb.Ask(size=RUN))
        assert pending.pending(btt.books, grant.ledger.ledger_id) == []
    async with client(economy, grant, keep_channels=False) as btt:
        with pytest.raises(BudgetExceeded):
            await btt.session(UNIT)  # another run is told the same, and opens nothing
        await btt.session(0)
    assert btt.receipts[0].captured == FOUR
    with closing(EvidenceStore(grant.folder / RECEIPTS)) as kept:
        kinds = [one.kind for one in kept.operations(grant.ledger.ledger_id)]
    assert ledger_pb2.ENTRY_KIND_CLOSE_CHANNEL in kinds, "it can prove how the channel ended"
    account = await economy.ledger.account(wallet.account)
    assert (account.available, account.locked) == (100 * BTT - FOUR, 0)


async def test_what_takes_the_account_is_refused_and_says_what_to_do(economy, probe, wallet, grant):
    other = await probe_node(economy)
    async with client(economy, grant) as btt:
        await take(btt, 1)
        purse = await btt.purse()
        with pytest.raises(AccountKeyNeeded, match="btt wallet") as refused:
            await purse.ledger.transfer(purse.account, grant.key.address, 1)
        assert not refused.value.retryable
        with pytest.raises(AccountKeyNeeded):
            await topups.top_up(purse, grant.channel_id, 1)
        assert pending.pending(btt.books, grant.ledger.ledger_id) == [], "nothing waits for ever"
        elsewhere = await connect_node(
            other.address, ledger_id=grant.ledger.ledger_id, store=btt.books, clock=economy.clock
        )
        with pytest.raises(AccountKeyNeeded, match=f"pays {grant.node.node}, not"):
            await PaymentSession.open(purse, elsewhere, need=UNIT)
        assert await ask_back(purse, Wanted(idle=True)) == ([], [])
        async with client(economy, grant) as second:
            with pytest.raises(AccountKeyNeeded, match="Another program"):
                await second.session(UNIT)
    economy.clock.ahead_ms = grant.expires_ms - economy.clock()
    probe.sign()
    async with client(economy, grant) as btt:
        with pytest.raises(AccountKeyNeeded, match="has ended"):
            await btt.session(UNIT)
    account = await economy.ledger.account(wallet.account)
    assert (account.available, account.locked) == (100 * BTT - FOUR, FOUR), "one channel, as it was"


async def test_a_stolen_file_moves_no_more_than_its_channel_holds_and_to_that_node_only(
    economy, probe, wallet, purse, grant
):
    thief, ledger, key = PrivateKey.generate(), economy.ledger, grant.key
    async with economy.client(probe, wallet, keep_channels=True) as btt:
        session = await btt.session(9 * UNIT)  # other money of the wallet, at the same node
        other, deposit = session.payer.channel_id, session.payer.deposit
    until = ledger.now_ms() + 60_000

    def signed(message):
        return ledger._signed(key, message)

    transfer = Transfer(
        sender=wallet.account.address, recipient=thief.address, amount=1, request_id=bytes(16),
        valid_until_ms=until, memo=bytes(32),
    )  # fmt: skip
    top_up = TopUp(channel=grant.channel_id, amount=1, request_id=bytes(16), valid_until_ms=until)
    close = CloseRequest(channel=grant.channel_id, request_id=bytes(16), valid_until_ms=until)
    stub = ledger._stub
    for call, request in [
        (stub.Transfer, ledger_pb2.TransferRequest(transfer=signed(transfer))),
        (stub.TopUpChannel, ledger_pb2.TopUpChannelRequest(top_up=signed(top_up))),
        (stub.RequestClose, ledger_pb2.RequestCloseRequest(request=signed(close))),
        (stub.OpenChannel, ledger_pb2.OpenChannelRequest(commit=signed(grant.commit))),
    ]:
        with pytest.raises(SignerMismatch):
            await ledger._call(call, request)
    with pytest.raises(BttError):
        await ledger.transfer(key, thief.address, 1)  # K1 is no account
    with pytest.raises(SignerMismatch):
        await ledger.channel(other, key)
    for channel, amount in ((other, UNIT), (grant.channel_id, FOUR + 1)):
        update = ChannelUpdate(channel=channel, cumulative=amount)
        with pytest.raises(BttError):
            await ledger.submit_update(update, sign(key, update, ledger.ledger_id))
    everything = ChannelUpdate(channel=grant.channel_id, cumulative=FOUR)
    close = ChannelClose(channel=grant.channel_id, capture=FOUR)
    await ledger.close_channel(close, probe.payee_key, FOUR, sign(key, everything, ledger.ledger_id))
    assert (await ledger.account(thief)).available == 0
    assert (await ledger.account(probe.payee_key)).available == FOUR, "the node gets it, and nobody else"
    account = await ledger.account(wallet.account)
    assert (account.available, account.locked) == (100 * BTT - FOUR - deposit, deposit)


async def test_the_wallet_signs_nowhere_that_it_granted(economy, probe, wallet, purse, grant, tmp_path):
    restored = Wallet(tmp_path / "restored", wallet.account)  # from its words, without its books
    assert derive_channel_key(wallet.account, grant.commit.nonce).public != grant.commit.k1
    with pytest.raises(SignerMismatch):
        purse.channel_key(grant.commit)
    proven = await connect_node(
        probe.address, ledger_id=purse.ledger.ledger_id, store=purse.store, clock=purse.clock
    )
    with pytest.raises(ChannelClosed):
        await PaymentSession.open(purse, proven, need=UNIT, only=grant.channel_id)
    async with client(economy, grant) as dapp:
        session = await take(dapp, 1)
        for owner in (wallet, restored):
            async with economy.client(probe, owner) as btt:
                assert (await take(btt, 1)).payer.channel_id != grant.channel_id
            assert btt.receipts[0].captured == UNIT
        # Neither its clients nor `refund --all` take it back, used or not.
        assert session.error is None
        await take(dapp, 1)
    # What is left of it after its time the wallet can take.
    claim = purse.store.claim(grant.channel_id)
    assert claim is not None
    claim.release()
    assert await ask_back(purse, Wanted(idle=True)) == ([], [])
    assert (await economy.ledger.channel(grant.channel_id, wallet.account)).phase == 1
    async with client(economy, grant, keep_channels=False) as dapp:
        assert (await dapp.session(UNIT)).payer.signed == OWED(2 * RUN)


async def test_the_wallet_sees_what_was_paid_and_its_books_add_up(economy, probe, wallet, purse, grant):
    [seen] = await granted(purse)
    assert (seen.app, seen.paid, seen.state.deposit) == ("player", 0, FOUR)
    async with client(economy, grant, keep_channels=False) as btt:
        session = await take(btt, 3)
        last = session.payer.last()
        update = ChannelUpdate(channel=grant.channel_id, cumulative=last.cumulative)
        await economy.ledger.submit_update(update, last.signature)  # as the node does from time to time
        [seen] = await granted(purse)
        assert (seen.paid, purse.store.get(grant.channel_id).signed) == (OWED(3 * RUN), OWED(3 * RUN))
    [seen] = await granted(purse)
    assert (seen.state.phase, seen.paid) == (ledger_pb2.CHANNEL_PHASE_CLOSED, OWED(3 * RUN))
    assert await granted(purse) == []
    assert purse.store.get(grant.channel_id).state == CLOSED
    assert purse.store.left("granted to player", 4 * UNIT) == 4 * UNIT - OWED(3 * RUN)
    assert purse.store.paid_total(grant.node.node) == OWED(3 * RUN)


async def test_the_account_takes_a_grant_back(economy, probe, wallet, purse, grant):
    async with client(economy, grant) as btt:
        session = await take(btt, 1)
        await economy.ledger.request_close(grant.channel_id, wallet.account)
        async with asyncio.timeout(10):
            while session.error is None:
                session._changed.clear()
                await session._changed.wait()
        assert isinstance(session.error, SessionEnded)
        with pytest.raises(AccountKeyNeeded, match="has ended"):
            await btt.session(UNIT)
    assert [seen.state.phase for seen in await granted(purse)] == [ledger_pb2.CHANNEL_PHASE_CLOSING]


async def test_a_ledger_that_refuses_leaves_no_file(economy, probe, purse, tmp_path):
    with pytest.raises(InsufficientFunds):
        await grant_for(purse, probe, tmp_path / "rich.grant", 101 * BTT)
    with pytest.raises(TermsRefused):
        await grant_for(purse, probe, tmp_path / "none.grant", 0)
    for name in ("", "x" * 65, "two\nlines"):
        with pytest.raises(InvalidRequest):
            await grant_for(purse, probe, tmp_path / "bad.grant", UNIT, app=name)
    assert list(tmp_path.glob("*.grant")) == []
    assert (await granted(purse), purse.store.left("granted to player", 1)) == ([], 1)


async def test_a_lost_answer_is_asked_for_again(economy, probe, wallet, purse, tmp_path, monkeypatch):
    opened = purse.ledger.open_channel

    async def lost(*words):
        assert (tmp_path / "player.grant").exists(), "nothing is locked before somebody has the key"
        await opened(*words)
        raise LedgerUnreachable("lost")

    monkeypatch.setattr(purse.ledger, "open_channel", lost)
    with pytest.raises(LedgerUnreachable):
        await grant_for(purse, probe, tmp_path / "player.grant", 4 * UNIT)
    monkeypatch.undo()
    grant = Grant.open(tmp_path / "player.grant")
    assert purse.store.get(grant.channel_id).state == OPENING
    [seen] = await granted(purse)
    assert (seen.state.deposit, purse.store.get(grant.channel_id).state) == (4 * UNIT, "open")
    async with client(economy, grant) as btt:
        await take(btt, 1)


async def test_the_file_carries_the_applications_grant(economy, wallet, purse, tmp_path):
    app = PrivateKey.generate()

    async def granter(channel_key, ledger_id):
        until = economy.clock() + 3_600_000
        return sign_grant(app, channel_key=channel_key, ledger_id=ledger_id, valid_until_ms=until)

    probe = await probe_node(economy, start=False)
    probe.allow_apps = (str(app.address),)
    await probe.start(register)
    economy.stack.push_async_callback(probe.stop)
    plain = await grant_for(purse, probe, tmp_path / "plain.grant", UNIT)
    theirs = Purse(wallet.account, purse.store, economy.ledger, economy.clock, app=granter)
    grant = await grant_for(theirs, probe, tmp_path / "app.grant", UNIT)
    async with client(economy, plain) as btt:
        with pytest.raises(AppRefused):
            await take(btt, 1)
    async with client(economy, grant) as btt:
        await take(btt, 1)
    async with client(economy, plain, app=granter) as btt:
        await take(btt, 1)  # its own word for it does as well
