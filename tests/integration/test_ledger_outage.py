"""The ledger was away while a challenge window ran: the payee has its chance all the same."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from btt.sdk.clock import SYSTEM, SharedClock
from btt.sdk.errors import (
    ChannelClosed,
    ChannelClosing,
    ChannelLocked,
    EvidenceInvalid,
    OutcomeUnknown,
    StorageError,
)
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient, evidence
from btt.sdk.ledger.keeping import RECEIPTS, EvidenceStore
from btt.sdk.signing import (
    EARLY_CLOSE,
    ChannelClose,
    ChannelCommit,
    ChannelExtension,
    ChannelRefund,
    ChannelUpdate,
    sign,
)
from btt.services.ledger import backup, folder, mark, sequencer, server, service
from btt.services.ledger.audit import AuditFailed, audit
from btt.services.ledger.export import journal
from btt.services.ledger.journal import Kind
from btt.services.ledger.overlay import Batch
from btt.services.ledger.recovery import recover
from btt.services.ledger.sequencer import ABSENT_MS, EACH_MS
from btt.services.ledger.server import LedgerConfig, serve
from btt.services.ledger.store import Store
from kit.ledgers import BANK, HOUR, K1, K2, SHOP, LedgerProcess

DEPOSIT, BEST = 1000, 700
MINUTE = 60_000


async def open_channel(
    ledger: LedgerClient, *, hours: int, flags: int = EARLY_CLOSE, window_ms: int = HOUR
) -> ChannelCommit:
    commit = ChannelCommit(
        payer=BANK.public.address,
        payee=SHOP.public.address,
        k1=K1.public,
        k2=K2.public,
        amount=DEPOSIT,
        expires_ms=ledger.now_ms() + hours * HOUR,
        challenge_ms=window_ms,
        flags=flags,
        fee=0,
        nonce=PrivateKey.generate().secret[:16],
        service_ref=bytes(32),
    )
    refund = ChannelRefund(channel=commit.channel_id(ledger.ledger_id), not_before_ms=commit.expires_ms)
    await ledger.open_channel(commit, BANK, sign(K2, refund, ledger.ledger_id))
    return commit


async def close(ledger: LedgerClient, channel: bytes) -> int:
    """The payee takes its best; returns what the books say that it got."""
    best = sign(K1, ChannelUpdate(channel=channel, cumulative=BEST), ledger.ledger_id)
    await ledger.close_channel(ChannelClose(channel=channel, capture=BEST), K2, BEST, best)
    return (await ledger.channel(channel, BANK)).captured


def kinds(home: Path) -> list[Kind]:
    with journal(home) as (_, entries, _database):
        return [entry.kind for entry in entries]


@pytest.fixture
def clock(tmp_path) -> SharedClock:
    return SharedClock.create(tmp_path / "clock")


@pytest.fixture
def process(tmp_path, clock) -> Iterator[LedgerProcess]:
    process = LedgerProcess.make(tmp_path / "ledger", log=tmp_path / "log", clock=clock.path)
    yield process
    process.kill()


async def test_a_window_that_would_have_ended_in_an_outage_is_given_back(process, clock):
    """Three hours of kill -9; a window of one that had begun, and an expired channel that nobody closed."""
    address = await asyncio.to_thread(process.start)
    async with LedgerClient.connect(address) as ledger:
        claimed, left, expired = [
            (await open_channel(ledger, hours=hours)).channel_id(ledger.ledger_id) for hours in (24, 24, 1)
        ]
        for channel in (claimed, left):
            await ledger.request_close(channel, BANK)
    process.kill()
    clock.advance(3 * HOUR)
    await asyncio.to_thread(process.start)
    async with LedgerClient.connect(address) as ledger:
        for channel in (claimed, left, expired):
            state = await ledger.channel(channel, BANK)
            assert 0.9 * HOUR < state.deadline_ms - state.time_ms <= HOUR
            with pytest.raises(ChannelLocked):
                await ledger.finalize_channel(channel)
        assert await close(ledger, claimed) == BEST
        assert await close(ledger, expired) == BEST
    # It is a whole window once, and not for ever; what had ended before an outage has ended.
    process.kill()
    clock.advance(HOUR // 2)
    await asyncio.to_thread(process.start)
    clock.advance(HOUR + 1000)
    async with LedgerClient.connect(address) as ledger:
        with pytest.raises((ChannelClosing, ChannelClosed)):
            await close(ledger, left)
        with suppress(ChannelClosed):  # the ledger itself was quicker
            await ledger.finalize_channel(left)
        assert (await ledger.channel(left, BANK)).captured == 0
    assert await asyncio.to_thread(process.stop) == 0
    assert kinds(process.home).count(Kind.EXTEND) == 4
    assert process.audit()["ok"]


async def test_a_process_that_was_stopped_for_a_while_took_nothing_of_a_window(tmp_path):
    """Stopped as soon as its payer asked for the end; the payee asks meanwhile, and is not too late."""
    process = LedgerProcess.make(tmp_path / "ledger", log=tmp_path / "log")
    try:
        address = await asyncio.to_thread(process.start)
        async with LedgerClient.connect(address, timeout=60) as ledger:
            commit = await open_channel(ledger, hours=1, window_ms=ABSENT_MS)
            channel = commit.channel_id(ledger.ledger_id)
            await ledger.request_close(channel, BANK)
            process.signal(signal.SIGSTOP)
            late = SYSTEM() + ABSENT_MS + 500
            closing = asyncio.create_task(close(ledger, channel))
            while SYSTEM() < late:  # noqa: ASYNC110 - only time makes a pause long
                await asyncio.sleep(0.05)
            process.signal(signal.SIGCONT)
            assert await closing == BEST
        assert await asyncio.to_thread(process.stop) == 0
        assert Kind.EXTEND in kinds(process.home)
        assert process.audit()["ok"]
    finally:
        process.kill()


class Home:
    """A ledger in this process, with a clock that stands still."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now_ms = 1_700_000_000_000
        self.moved_ms = 0
        """How far a devnet's clock is ahead of its machine's."""
        folder.init(path, name="test", supply_to=BANK.public.address, clock=self.clock)

    def machine(self) -> int:
        return self.now_ms

    def clock(self) -> int:
        return self.now_ms + self.moved_ms

    def serve(self):
        return serve(LedgerConfig(folder=self.path, grace=0, sweep_every=3600), clock=self.clock)


@pytest.fixture
def home(tmp_path) -> Home:
    return Home(tmp_path / "ledger")


async def _closing(home: Home, ledger: LedgerClient) -> bytes:
    channel = (await open_channel(ledger, hours=24)).channel_id(ledger.ledger_id)
    await ledger.request_close(channel, BANK)
    return channel


async def _decides(ledger: LedgerClient, channel: bytes) -> None:
    """Asks for something that is refused, and so leaves nothing in the journal."""
    with pytest.raises(ChannelLocked):
        await ledger.finalize_channel(channel)


async def test_a_disk_that_takes_nothing_is_an_outage_too(home, monkeypatch):
    async with home.serve() as running, LedgerClient.connect(running.address) as ledger:
        channel = await _closing(home, ledger)
        with monkeypatch.context() as patch:

            def full(*_: object) -> None:
                raise StorageError("The disk is full.")

            patch.setattr(Store, "commit", full)
            with pytest.raises(OutcomeUnknown, match="The disk is full"):
                await ledger.transfer(BANK, SHOP.public.address, 1)
            home.now_ms += 3 * HOUR
            with pytest.raises(OutcomeUnknown, match="The disk is full"):
                await ledger.transfer(BANK, SHOP.public.address, 1)
        await running.sweeper.sweep()
        assert await close(ledger, channel) == BEST


@pytest.fixture
def machine(home, monkeypatch) -> Home:
    """The home, on a machine that has its clock."""
    monkeypatch.setattr(sequencer, "SYSTEM", home.machine)
    return home


@pytest.mark.parametrize("by", ["a pause", "a sync that hung"])
async def test_time_that_passed_while_nothing_was_decided_is_given_back(machine, monkeypatch, by):
    """Also if the first that is decided afterwards is the end of the window."""
    async with machine.serve() as running, LedgerClient.connect(running.address) as ledger:
        channel = await _closing(machine, ledger)
        commit = Store.commit

        def hangs(books: Store, batch: Batch) -> None:
            commit(books, batch)
            machine.now_ms += 3 * HOUR

        with monkeypatch.context() as patch:
            if by == "a pause":
                machine.now_ms += 3 * HOUR
            else:
                patch.setattr(Store, "commit", hangs)
                await ledger.transfer(BANK, SHOP.public.address, 1)
        await _decides(ledger, channel)
        assert await close(ledger, channel) == BEST


async def test_a_loop_that_goes_on_while_the_disk_hangs_does_not_hide_it(machine, monkeypatch):
    monkeypatch.setattr(sequencer, "LOOK_S", 0.0)
    monkeypatch.setattr(sequencer, "IN_PLACE_S", 0.0)
    monkeypatch.setattr(sequencer, "ABSENT_MS", 20 * MINUTE)
    loop, commit = asyncio.get_running_loop(), Store.commit

    async def turns() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    def hangs(books: Store, batch: Batch) -> None:
        commit(books, batch)
        for _ in range(4):
            machine.now_ms += 20 * MINUTE
            asyncio.run_coroutine_threadsafe(turns(), loop).result(60)

    async with machine.serve() as running, LedgerClient.connect(running.address) as ledger:
        channel = await _closing(machine, ledger)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "commit", hangs)
            await ledger.transfer(BANK, SHOP.public.address, 1)
        assert await close(ledger, channel) == BEST


async def test_a_pause_at_any_reading_of_a_clock_is_given_back(machine, monkeypatch):
    left = 0

    def slips(read: Callable[[], int]) -> Callable[[], int]:
        def reading() -> int:
            nonlocal left
            left -= 1
            if left == 0:
                machine.now_ms += 3 * HOUR
            return read()

        return reading

    monkeypatch.setattr(sequencer, "SYSTEM", slips(machine.machine))
    monkeypatch.setattr(machine, "clock", slips(machine.clock))
    async with machine.serve() as running, LedgerClient.connect(running.address) as ledger:
        for reading in range(1, 10):
            channel = await _closing(machine, ledger)
            left = reading
            await _decides(ledger, channel)
            left = 0
            assert await close(ledger, channel) == BEST


async def test_an_outage_that_the_process_lived_through_is_given_back_as_long_as_it_was(machine):
    async with machine.serve() as running, LedgerClient.connect(running.address) as ledger:
        channel = await _closing(machine, ledger)
        before = (await ledger.channel(channel, BANK)).deadline_ms
        for pause_ms, given_ms in (ABSENT_MS, 0), (ABSENT_MS + 1, ABSENT_MS + 1), (10 * MINUTE, 10 * MINUTE):
            machine.moved_ms += 5 * MINUTE  # a quiet time
            await _decides(ledger, channel)
            machine.now_ms += pause_ms
            await _decides(ledger, channel)
            after = (await ledger.channel(channel, BANK)).deadline_ms
            assert after - before == given_ms
            before = after


@pytest.mark.parametrize(("beyond_ms", "extensions"), [(0, 2), (1, 3)])
async def test_giving_many_back_is_no_outage_unless_it_hangs(machine, monkeypatch, beyond_ms, extensions):
    give_back = server.give_back

    def slowly(*args: Any, **times: Any) -> Batch:
        machine.now_ms += ABSENT_MS + EACH_MS + beyond_ms
        return give_back(*args, **times)

    async with machine.serve() as running, LedgerClient.connect(running.address) as ledger:
        channel = await _closing(machine, ledger)
        with monkeypatch.context() as patch:
            patch.setattr(server, "give_back", slowly)
            machine.now_ms += 10 * MINUTE
            await _decides(ledger, channel)
        for _ in range(2):
            await _decides(ledger, channel)
        machine.now_ms += ABSENT_MS + 1  # and the allowance is for once
        await _decides(ledger, channel)
    assert kinds(machine.path).count(Kind.EXTEND) == extensions


async def test_a_clock_that_is_moved_or_held_on_purpose_is_no_outage(machine):
    async with machine.serve() as running, LedgerClient.connect(running.address) as ledger:
        channel = await _closing(machine, ledger)
        machine.moved_ms += 20 * MINUTE
        await _decides(ledger, channel)
        machine.now_ms += 10 * MINUTE
        machine.moved_ms -= 10 * MINUTE
        await _decides(ledger, channel)
        machine.moved_ms += 40 * MINUTE
        await ledger.finalize_channel(channel)
    assert Kind.EXTEND not in kinds(machine.path)


async def test_who_watches_hears_of_it_though_nobody_asks_for_anything(machine, monkeypatch):
    monkeypatch.setattr(sequencer, "LOOK_S", 0.01)
    monkeypatch.setattr(service, "_HEARTBEAT", 3600.0)
    async with machine.serve() as running, LedgerClient.connect(running.address) as ledger:
        await _closing(machine, ledger)
        watching = ledger.watch(SHOP)
        told = [event.kind for event in (await anext(watching)).events]
        machine.now_ms += 3 * HOUR
        async with asyncio.timeout(30):
            told += [event.kind for event in (await anext(watching)).events]
        await watching.aclose()
    assert told[-2:] == [Kind.REQUEST_CLOSE, Kind.EXTEND]


async def test_a_key_that_is_changed_after_an_outage_gives_back_what_was_before(home):
    async with home.serve() as running, LedgerClient.connect(running.address) as ledger:
        channel = await _closing(home, ledger)
    home.now_ms += 3 * HOUR
    folder.rotate(home.path, clock=home.clock)
    async with home.serve() as running, LedgerClient.connect(running.address) as ledger:
        assert await close(ledger, channel) == BEST


async def test_a_start_without_an_outage_changes_nothing(home):
    async with home.serve() as running, LedgerClient.connect(running.address) as ledger:
        channel = await _closing(home, ledger)
        before = await ledger.channel(channel, BANK)
    async with home.serve() as running, LedgerClient.connect(running.address) as ledger:
        assert (await ledger.channel(channel, BANK)).deadline_ms == before.deadline_ms
    assert Kind.EXTEND not in kinds(home.path)


async def test_extensions_are_evidence_and_a_recovery_restores_them(home, tmp_path):
    with closing(EvidenceStore(tmp_path / RECEIPTS)) as keeper:
        async with home.serve() as running, LedgerClient.connect(running.address, keeper=keeper) as ledger:
            backup.backup(home.path, tmp_path / "copy")
            channel = await _closing(home, ledger)
        home.now_ms += 3 * HOUR
        async with home.serve() as running, LedgerClient.connect(running.address, keeper=keeper) as ledger:
            captured = await close(ledger, channel)
            await ledger.gather(BANK)
            ledger_id = ledger.ledger_id
        told, header = list(keeper.operations(ledger_id)), keeper.header(ledger_id)
    assert [one.kind for one in told].count(Kind.EXTEND) == 1
    whole = kinds(home.path)
    database = home.path / folder.DATABASE
    database.unlink()
    mark.path_of(database).unlink()

    stranger = PrivateKey.generate()
    forged = []
    for one in told:
        if one.kind == Kind.EXTEND:
            message = ChannelExtension.decode(one.body)
            own = stranger.public.data + sign(stranger, message, ledger_id)
            one = replace(one, signatures=own)
            with pytest.raises(EvidenceInvalid, match="not signed by the ledger's operator"):
                one.check(ledger.operator_keys, ledger_id)
        forged.append(one)
    for name, shown in (("forged", forged), ("true", told)):
        evidence.export(tmp_path / name, header, shown)
    with pytest.raises(EvidenceInvalid, match="without the operator's signature"):
        recover(home.path, source=tmp_path / "copy", evidence=[tmp_path / "forged"])
    report = recover(home.path, evidence=[tmp_path / "true"], finish=True)
    assert (report.missing, report.refused, report.restored) == ([], [], len(told))
    assert kinds(home.path) == [*whole, Kind.RECOVER]
    async with home.serve() as running, LedgerClient.connect(running.address) as ledger:
        assert (await ledger.channel(channel, BANK)).captured == captured == BEST


async def test_the_audit_takes_no_extension_of_anybody_else_and_none_beyond_a_window(home):
    async with home.serve() as running, LedgerClient.connect(running.address) as ledger:
        await _closing(home, ledger)
    home.now_ms += 3 * HOUR
    async with home.serve():
        pass
    with journal(home.path) as (description, entries, _):
        whole = list(entries)
    assert whole[-1].kind is Kind.EXTEND
    audit(description, whole)
    message, stranger = ChannelExtension.decode(whole[-1].body), PrivateKey.generate()
    ledger_id = running.identity.ledger_id
    own = stranger.public.data + sign(stranger, message, ledger_id)
    with pytest.raises(AuditFailed, match="never was the operator's"):
        audit(description, [*whole[:-1], replace(whole[-1], signatures=own)])
