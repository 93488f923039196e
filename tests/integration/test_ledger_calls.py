"""The whole life of channels over real gRPC: watchtower, challenge, refund, Watch, limits, rotation."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.errors import (
    AccountUnknown,
    ChannelClosed,
    ChannelClosing,
    ChannelLocked,
    ChannelUnknown,
    Draining,
    IdentityError,
    InsufficientFunds,
    InvalidRequest,
    LedgerUnreachable,
    RateLimited,
    SignatureInvalid,
    SignerMismatch,
    TermsRefused,
    UpdateInvalid,
)
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient
from btt.sdk.ledger import connection as connection_module
from btt.sdk.ledger.rotation import follow, signer_of
from btt.sdk.signing import ChannelClose, ChannelCommit, ChannelRefund, ChannelUpdate, sign, sign_document
from btt.services.ledger import folder, server
from btt.services.ledger.books import Terms
from btt.services.ledger.hub import MOST_PER_KEY, MOST_STRANGERS, MOST_WATCHERS, Hub
from btt.services.ledger.journal import EntryRef
from btt.services.ledger.store import Store
from btt.services.ledger.voice import Voice
from kit.hanging import ends

START = 1_800_000_000_000
HOUR, WINDOW = 3_600_000, 5000
ALICE, BOB, CAROL, K1, K2 = (PrivateKey(n.to_bytes(32, "big")) for n in (11, 12, 13, 21, 22))


class Clock:
    def __init__(self) -> None:
        self.now_ms = START

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def home(tmp_path: Path, clock: Clock) -> Path:
    made = tmp_path / "ledger"
    terms = Terms(min_challenge_ms=1000, min_lifetime_ms=1000, max_open_channels=3, min_update_delta=5)
    folder.init(made, name="test", supply_to=ALICE.address, amount=10_000, terms=terms, clock=clock)
    return made


def config(home: Path, **changes: Any) -> server.LedgerConfig:
    return server.LedgerConfig(
        **{"folder": home, "sweep_every": 3600.0, "auditors": (CAROL.address,), **changes}
    )


@pytest.fixture
async def running(home: Path, clock: Clock) -> AsyncIterator[server.RunningLedger]:
    async with server.serve(config(home), clock=clock) as ledger:
        yield ledger


@pytest.fixture
async def ledger(running: server.RunningLedger) -> AsyncIterator[LedgerClient]:
    async with LedgerClient.connect(running.address) as client:
        yield client


async def opened(ledger: LedgerClient, *, flags: int = 1, name: int = 0) -> bytes:
    t1 = ChannelCommit(
        payer=ALICE.address,
        payee=BOB.address,
        k1=K1.public,
        k2=K2.public,
        amount=100,
        expires_ms=START + HOUR,
        challenge_ms=WINDOW,
        flags=flags,
        fee=0,
        nonce=name.to_bytes(16, "big"),
        service_ref=bytes(32),
    )
    channel = t1.channel_id(ledger.ledger_id)
    t2 = ChannelRefund(channel=channel, not_before_ms=t1.expires_ms)
    await ledger.open_channel(t1, ALICE, sign(K2, t2, ledger.ledger_id))
    return channel


def t3(ledger: LedgerClient, channel: bytes, cumulative: int) -> tuple[ChannelUpdate, bytes]:
    update = ChannelUpdate(channel=channel, cumulative=cumulative)
    return update, sign(K1, update, ledger.ledger_id)


async def test_top_up_watchtower_request_challenge_finalize(
    ledger: LedgerClient, running: server.RunningLedger, clock: Clock
) -> None:
    channel = await opened(ledger)
    topped = await ledger.top_up(channel, ALICE, 50, bytes(16), valid_until_ms=START + HOUR)
    assert await ledger.top_up(channel, ALICE, 50, bytes(16), valid_until_ms=START + HOUR) == topped
    stored = await ledger.submit_update(*t3(ledger, channel, 40))
    assert await ledger.submit_update(*t3(ledger, channel, 40)) == stored
    with pytest.raises(UpdateInvalid):
        await ledger.submit_update(*t3(ledger, channel, 44))
    with pytest.raises(UpdateInvalid):
        await ledger.submit_update(*t3(ledger, channel, 151))
    with pytest.raises(SignatureInvalid):
        await ledger.submit_update(t3(ledger, channel, 90)[0], t3(ledger, channel, 91)[1])
    asked = await ledger.request_close(channel, ALICE, bytes(15) + b"1", valid_until_ms=START + HOUR)
    assert await ledger.request_close(channel, ALICE, bytes(15) + b"1", valid_until_ms=START + HOUR) == asked
    await ledger.submit_update(*t3(ledger, channel, 120))
    state = await ledger.channel(channel, K2)
    assert (state.phase, state.deposit, state.best) == (pb.CHANNEL_PHASE_CLOSING, 150, 120)
    assert state.deadline_ms == START + WINDOW
    assert state.best_signature == t3(ledger, channel, 120)[1]
    with pytest.raises(ChannelClosing):
        await ledger.top_up(channel, ALICE, 1)
    with pytest.raises(ChannelLocked):
        await ledger.finalize_channel(channel)
    assert await running.sweeper.sweep() == 0
    clock.now_ms += WINDOW
    done = await ledger.finalize_channel(channel)
    assert await ledger.finalize_channel(channel) == done
    with pytest.raises(ChannelClosed):
        await ledger.close_channel(ChannelClose(channel=channel, capture=0), K2)
    alice, bob = await ledger.account(ALICE), await ledger.account(BOB)
    assert (alice.available, alice.locked, bob.available) == (9880, 0, 120)
    with pytest.raises(ChannelUnknown):
        await ledger.finalize_channel(bytes(32))


async def test_the_ledger_pays_out_by_itself(
    ledger: LedgerClient, running: server.RunningLedger, clock: Clock
) -> None:
    vanished, asked = await opened(ledger, flags=0), await opened(ledger, name=1)
    await ledger.submit_update(*t3(ledger, vanished, 70))
    await ledger.request_close(asked, ALICE)
    with pytest.raises(ChannelLocked):
        await ledger.request_close(vanished, ALICE)
    clock.now_ms += WINDOW
    assert await running.sweeper.sweep() == 1
    assert (await ledger.channel(asked, K1)).phase == pb.CHANNEL_PHASE_CLOSED
    clock.now_ms = START + HOUR + 2 * WINDOW
    assert await running.sweeper.sweep() == 1
    assert await running.sweeper.sweep() == 0
    assert (await ledger.account(BOB)).available == 70
    assert (await ledger.account(ALICE)).available == 9930


async def test_sweeping_goes_on_by_itself(home: Path, clock: Clock) -> None:
    async with (
        server.serve(config(home, sweep_every=0.01), clock=clock) as running,
        LedgerClient.connect(running.address) as ledger,
    ):
        channel = await opened(ledger)
        pages = ledger.watch(K2, channel_id=channel)
        await ledger.request_close(channel, ALICE)
        clock.now_ms += WINDOW
        kinds: list[int] = []
        async for page in pages:
            kinds += [event.kind for event in page.events]
            if pb.ENTRY_KIND_FINALIZE in kinds:
                break
        await pages.aclose()  # type: ignore[attr-defined]


async def test_k1_can_ask_for_nothing(ledger: LedgerClient) -> None:
    channel = await opened(ledger)
    for call in (
        ledger.top_up(channel, K1, 5),
        ledger.request_close(channel, K1),
        ledger.close_channel(ChannelClose(channel=channel, capture=0), K1),
    ):
        with pytest.raises(SignerMismatch):
            await call
    with pytest.raises(AccountUnknown):  # it moves and reads what is in an account of its own: nothing
        await ledger.transfer(K1, BOB.public.address, 1)
    assert (await ledger.account(K1)).available == 0


async def test_caps(ledger: LedgerClient) -> None:
    info = await ledger.info()
    assert (info.max_open_channels, info.min_update_delta) == (3, 5)
    for name in range(3):
        await opened(ledger, name=name)
    with pytest.raises(TermsRefused, match="3 channels open"):
        await opened(ledger, name=3)


class TestRates:
    async def test_a_key_that_asks_too_often(self, home: Path, clock: Clock, monkeypatch: Any) -> None:
        monkeypatch.setattr(connection_module, "TRIES", 1)
        async with (
            server.serve(config(home, rate=0.5, burst=3), clock=clock) as running,
            LedgerClient.connect(running.address) as ledger,
        ):
            for _ in range(3):
                await ledger.transfer(ALICE, BOB.address, 10)
            with pytest.raises(RateLimited) as refused:
                await ledger.transfer(ALICE, BOB.address, 10)
            assert 0 < refused.value.retry_after <= 2
            assert refused.value.retryable
            await ledger.transfer(BOB, ALICE.address, 1)  # another key
            for _ in range(3):
                await ledger.account(ALICE)  # reads have a bucket of their own
            with pytest.raises(RateLimited):
                await ledger.account(ALICE)

    async def test_strangers_cannot_use_up_anothers_share(
        self, home: Path, clock: Clock, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(connection_module, "TRIES", 1)
        async with (
            server.serve(config(home, rate=0.5, burst=1), clock=clock) as running,
            LedgerClient.connect(running.address) as ledger,
        ):
            forged = ledger._signed(ALICE, t3(ledger, bytes(32), 5)[0])
            for _ in range(3):
                with pytest.raises(InvalidRequest):
                    await ledger._call(ledger._stub.Transfer, pb.TransferRequest(transfer=forged))
            await ledger.transfer(ALICE, BOB.address, 10)

    async def test_copies_of_what_a_key_signed_leave_it_its_share(
        self, home: Path, clock: Clock, monkeypatch: Any
    ) -> None:
        """A payer has the closes of its node, and updates that the ledger refuses; it sends them all day."""
        monkeypatch.setattr(connection_module, "TRIES", 1)
        async with (
            server.serve(config(home, rate=0.001, burst=3), clock=clock) as running,
            LedgerClient.connect(running.address) as ledger,
        ):
            first, second, third = [await opened(ledger, name=name) for name in range(3)]
            with pytest.raises(RateLimited):  # her three of what is new
                await ledger.top_up(first, ALICE, 1)
            (small, by_k1), (update, signed) = t3(ledger, second, 1), t3(ledger, second, 40)
            done = await ledger.close_channel(ChannelClose(channel=first, capture=0), K2)
            for _ in range(3):
                again = await ledger.close_channel(ChannelClose(channel=first, capture=0), K2)
                assert again.seq == done.seq
                with pytest.raises(UpdateInvalid):
                    await ledger.submit_update(small, by_k1)
            with pytest.raises(RateLimited):
                await ledger.close_channel(ChannelClose(channel=first, capture=0), K2)
            with pytest.raises(RateLimited):
                await ledger.submit_update(small, by_k1)
            await ledger.submit_update(update, signed)
            await ledger.close_channel(ChannelClose(channel=third, capture=0), K2)
            await ledger.close_channel(ChannelClose(channel=second, capture=0), K2)

    async def test_a_refusal_that_is_remembered_counts_for_who_signed_it(
        self, home: Path, clock: Clock, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(connection_module, "TRIES", 1)
        async with (
            server.serve(config(home, rate=0.001, burst=3), clock=clock) as running,
            LedgerClient.connect(running.address) as ledger,
        ):
            for _ in range(3):
                with pytest.raises(InsufficientFunds):
                    await ledger.transfer(ALICE, BOB.address, 10**6)
            with pytest.raises(RateLimited):
                await ledger.transfer(ALICE, BOB.address, 10**6)

    async def test_nobody_keeps_the_ledger_from_paying_out(
        self, home: Path, clock: Clock, monkeypatch: Any
    ) -> None:
        """Nobody signs a finalize: who asks for it too early, and often, delays it for nobody."""
        monkeypatch.setattr(connection_module, "TRIES", 1)
        async with (
            server.serve(config(home, rate=0.001, burst=1), clock=clock) as running,
            LedgerClient.connect(running.address) as ledger,
        ):
            channel = await opened(ledger)
            for expected in (ChannelLocked, RateLimited):
                with pytest.raises(expected):
                    await ledger.finalize_channel(channel)
            clock.now_ms += 2 * HOUR
            assert await running.sweeper.sweep() == 1


class TestWatch:
    async def read(self, pages: AsyncIterator[pb.LedgerEvents], count: int) -> list[pb.LedgerEvent]:
        found: list[pb.LedgerEvent] = []
        async for page in pages:
            found += page.events
            if len(found) >= count:
                break
        return found

    async def test_tells_what_was_and_what_comes(self, ledger: LedgerClient) -> None:
        channel = await opened(ledger)
        await ledger.transfer(ALICE, CAROL.address, 5)
        payee = ledger.watch(K2)
        page = await anext(payee)
        assert [(event.kind, event.channel_id) for event in page.events] == [
            (pb.ENTRY_KIND_OPEN_CHANNEL, channel)
        ]
        assert page.seen_seq == 3
        receipt = await ledger.submit_update(*t3(ledger, channel, 40))
        page = await anext(payee)
        (event,) = page.events
        assert (event.kind, event.seq, event.channel_id) == (pb.ENTRY_KIND_UPDATE, receipt.seq, channel)
        assert event.entry_hash == receipt.receipt.entry_hash
        await ledger.transfer(ALICE, CAROL.address, 5)  # does not concern it
        await ledger.request_close(channel, ALICE)
        page = await anext(payee)
        assert [event.kind for event in page.events] == [pb.ENTRY_KIND_REQUEST_CLOSE]
        await payee.aclose()  # type: ignore[attr-defined]

    async def test_goes_on_where_it_stopped(self, ledger: LedgerClient) -> None:
        channel = await opened(ledger)
        for cumulative in (10, 20, 30):
            await ledger.submit_update(*t3(ledger, channel, cumulative))
        everything = await self.read(ledger.watch(K1, channel_id=channel), 4)
        assert [event.seq for event in everything] == [2, 3, 4, 5]
        rest = await self.read(ledger.watch(K1, channel_id=channel, after_seq=3), 2)
        assert rest == everything[2:]

    async def test_an_account(self, ledger: LedgerClient) -> None:
        await ledger.transfer(ALICE, CAROL.address, 5)
        channel = await opened(ledger)
        await ledger.transfer(ALICE, BOB.address, 5)
        await ledger.close_channel(ChannelClose(channel=channel, capture=7), K2, 7, t3(ledger, channel, 7)[1])
        bob = await self.read(ledger.watch(BOB), 3)
        assert [event.seq for event in bob] == [3, 4, 5]
        carol = await self.read(ledger.watch(CAROL), 1)
        assert [(event.seq, event.kind, event.channel_id) for event in carol] == [
            (2, pb.ENTRY_KIND_TRANSFER, b"")
        ]
        alice = await self.read(ledger.watch(ALICE), 5)
        assert [event.seq for event in alice] == [1, 2, 3, 4, 5]

    async def test_many_events_come_in_pages(self, ledger: LedgerClient, monkeypatch: Any) -> None:
        monkeypatch.setattr("btt.services.ledger.watching.MOST_EVENTS", 2)
        for _ in range(5):
            await ledger.transfer(ALICE, BOB.address, 1)
        sizes = []
        async for page in ledger.watch(BOB):
            sizes.append(len(page.events))
            if sum(sizes) == 5:
                break
        assert sizes == [2, 2, 1]

    async def test_only_ones_own(self, ledger: LedgerClient) -> None:
        channel = await opened(ledger)
        with pytest.raises(SignerMismatch):
            await anext(ledger.watch(CAROL, channel_id=channel))
        with pytest.raises(ChannelUnknown):
            await anext(ledger.watch(CAROL, channel_id=bytes(32)))
        stranger = ledger.watch(CAROL)
        assert not (await anext(stranger)).events
        await stranger.aclose()  # type: ignore[attr-defined]

    async def test_watchers_per_key_are_bounded(self, ledger: LedgerClient) -> None:
        pages = [ledger.watch(ALICE) for _ in range(MOST_PER_KEY)]
        for each in pages:
            await anext(each)
        with pytest.raises(RateLimited):
            await anext(ledger.watch(ALICE))
        bob = ledger.watch(BOB)
        await anext(bob)
        for each in (*pages, bob):
            await each.aclose()  # type: ignore[attr-defined]

    async def test_strangers_take_no_place_of_those_who_have_an_account_or_a_channel(
        self, ledger: LedgerClient
    ) -> None:
        channel = await opened(ledger)  # to BOB, who has no account yet
        keys = [PrivateKey((100 + n).to_bytes(32, "big")) for n in range(MOST_STRANGERS // MOST_PER_KEY)]
        strange = [ledger.watch(key) for key in keys for _ in range(MOST_PER_KEY)]
        await asyncio.gather(*map(anext, strange))
        with pytest.raises(RateLimited):
            await anext(ledger.watch(CAROL))
        await ledger.transfer(ALICE, CAROL.address, 5)
        known = [*map(ledger.watch, (ALICE, BOB, CAROL, K2)), ledger.watch(K1, channel_id=channel)]
        await asyncio.gather(*map(anext, known))
        for each in (*strange, *known):
            await each.aclose()  # type: ignore[attr-defined]

    def test_those_who_are_known_leave_strangers_their_places(self) -> None:
        hub = Hub()
        for _ in range(2):  # who has left takes no place
            with ExitStack() as stack:
                for known, most in ((True, MOST_WATCHERS), (False, MOST_STRANGERS)):
                    for number in range(most):
                        stack.enter_context(
                            hub.watch(bytes((known, number % 256, number // 256)), (), known=known)
                        )
                    with pytest.raises(RateLimited):
                        stack.enter_context(hub.watch(b"one more", (), known=known))

    async def test_a_stop_ends_the_streams(self, home: Path, clock: Clock) -> None:
        serving = server.serve(config(home, grace=600.0), clock=clock)
        running = await serving.__aenter__()
        async with LedgerClient.connect(running.address) as ledger:
            pages = ledger.watch(ALICE)
            await anext(pages)
            following = asyncio.ensure_future(anext(pages))
            async with asyncio.timeout(30):
                await serving.__aexit__(None, None, None)
            with pytest.raises(Draining):
                await following

    async def test_who_listens_to_a_silence_hears_of_it(self, ledger: LedgerClient, monkeypatch: Any) -> None:
        pages = ledger.watch(ALICE)
        await anext(pages)
        with monkeypatch.context() as soon:
            soon.setattr("btt.sdk.ledger.client._SILENT_S", 0.05)
            async with ends("watching a ledger that stands still"):
                with pytest.raises(LedgerUnreachable, match="silent"):
                    await anext(pages)
        again = ledger.watch(ALICE, after_seq=1)
        assert (await anext(again)).seen_seq == 1

    async def test_a_liar(self, ledger: LedgerClient, monkeypatch: Any) -> None:
        def lie(self: Voice, name: str, content: Any) -> Any:
            return sign_document(CAROL, name, self._identity.ledger_id, content.SerializeToString())

        monkeypatch.setattr(Voice, "document", lie)
        with pytest.raises(IdentityError):
            await anext(ledger.watch(ALICE))


async def test_the_journal_is_for_auditors(ledger: LedgerClient, home: Path) -> None:
    await opened(ledger)
    for _ in range(70):
        await ledger.transfer(ALICE, BOB.address, 1)
    operator = folder.LedgerFolder.open(home).operator_key
    for key in (operator, CAROL):
        pages = [page async for page in ledger.entries(key)]
        assert [entry.seq for page in pages for entry in page.entries] == list(range(1, 73))
        assert len(pages) == 2
    for key in (ALICE, K1):
        with pytest.raises(SignerMismatch):
            await anext(ledger.entries(key))
    # What an auditor signed to see its own account opens nothing else.
    own, _ = ledger._query(CAROL, bytes(12) + CAROL.address.data, ledger.now_ms())
    with pytest.raises(SignerMismatch):
        await ledger._call(ledger._stub.GetEntries, pb.GetEntriesRequest(query=own))


class TestRotation:
    async def test_receipts_of_old_and_new_keys(self, home: Path, clock: Clock) -> None:
        async with (
            server.serve(config(home), clock=clock) as running,
            LedgerClient.connect(running.address) as ledger,
        ):
            address = running.address
            ask = {"request_id": bytes(16), "valid_until_ms": START + HOUR}
            old = await ledger.transfer(ALICE, BOB.address, 10, **ask)
        first, _ = folder.rotate(home, clock=clock)
        second, entry = folder.rotate(home, clock=clock)
        assert (home / f"operator.{first}.key").exists()
        async with (
            server.serve(config(home), clock=clock) as running,
            LedgerClient.connect(running.address) as ledger,
        ):
            assert running.address.operator == address.operator
            info = await ledger.info()
            assert ledger.operator_key.address == second
            assert (info.epoch, len(info.rotations)) == (3, 2)
            assert [key.last_seq for key in ledger.operator_keys] == [3, entry.seq, None]
            new = await ledger.transfer(ALICE, BOB.address, 10)
            assert (new.receipt.epoch, new.receipt.operator_key_id) == (3, second)
            again = await ledger.transfer(ALICE, BOB.address, 10, **ask)
            assert again.receipt.entry_hash == old.receipt.entry_hash
            assert again.receipt.epoch == 1
            ledger.check_receipt(old.encode(), old.signature, old.receipt.request_digest)
            keys = follow(address.operator, ledger.operator_key, info.rotations, ledger_id=address.ledger_id)
            assert signer_of(old, keys, address.ledger_id).key.address == address.operator
            for wrong in (info.rotations[:1], info.rotations[1:], info.rotations[::-1], []):
                with pytest.raises(IdentityError):
                    follow(address.operator, ledger.operator_key, wrong, ledger_id=address.ledger_id)
            for field in ("body", "old_signature", "new_signature"):
                changed = pb.OperatorRotation.FromString(info.rotations[0].SerializeToString())
                setattr(changed, field, getattr(info.rotations[1], field))
                with pytest.raises(IdentityError):
                    follow(
                        address.operator,
                        ledger.operator_key,
                        [changed, info.rotations[1]],
                        ledger_id=address.ledger_id,
                    )

    async def test_a_retired_key_signs_nothing_new(self, home: Path, clock: Clock) -> None:
        retired = folder.LedgerFolder.open(home).operator_key
        folder.rotate(home, clock=clock)
        async with (
            server.serve(config(home), clock=clock) as running,
            LedgerClient.connect(running.address) as ledger,
        ):
            true = await ledger.transfer(ALICE, BOB.address, 10)
            current = folder.LedgerFolder.open(home).operator_key
            ahead = replace(true.receipt, epoch=3)
            with pytest.raises(IdentityError, match="did not begin"):
                ledger.check_receipt(
                    ahead.encode(), sign(current, ahead, ledger.ledger_id), ahead.request_digest
                )
            forged = replace(true.receipt, operator_key_id=retired.address)
            with pytest.raises(IdentityError, match="handed over"):
                ledger.check_receipt(
                    forged.encode(), sign(retired, forged, ledger.ledger_id), forged.request_digest
                )

    async def test_a_client_follows_while_connected_and_never_back(
        self, home: Path, clock: Clock, tmp_path: Path
    ) -> None:
        older = tmp_path / "older"
        shutil.copytree(home, older)
        serving = server.serve(config(home), clock=clock)
        running = await serving.__aenter__()
        same_port = running.address.port
        async with LedgerClient.connect(running.address) as ledger:
            await serving.__aexit__(None, None, None)
            operator, _ = folder.rotate(home, clock=clock)
            async with server.serve(config(home, port=same_port), clock=clock):
                receipt = await ledger.transfer(ALICE, BOB.address, 10)
                assert receipt.receipt.operator_key_id == operator
            async with server.serve(config(older, port=same_port), clock=clock):
                with pytest.raises(IdentityError, match="went back"):
                    await ledger.info()


def test_a_hand_over_that_broke_off_is_finished(home: Path, clock: Clock, monkeypatch: Any) -> None:
    before = folder.LedgerFolder.open(home).operator_key

    def breaks(self: folder.LedgerFolder, operator_key: bytes) -> folder.LedgerFolder:
        if self.operator_key.public.data != operator_key:
            raise KeyboardInterrupt
        return self

    with monkeypatch.context() as patch:
        patch.setattr(folder.LedgerFolder, "settled", breaks)
        with pytest.raises(KeyboardInterrupt):
            folder.rotate(home, clock=clock)
    assert folder.LedgerFolder.open(home).operator_key == before
    operator, entry = folder.rotate(home, clock=clock)
    assert entry.seq == 3
    assert folder.LedgerFolder.open(home).operator_key.address == operator


def test_no_name_of_a_key_is_lost_to_a_power_cut(home: Path, clock: Clock, monkeypatch: Any) -> None:
    """Before the books name the new key, and before it replaces the old one, the folder is on the disk."""
    steps: list[str] = []
    fsync, rename, rotate = os.fsync, Path.rename, Store.rotate

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        if os.path.sameopenfile(descriptor, held):
            steps.append("folder synced")

    def renamed(path: Path, target: Path) -> Path:
        steps.append(f"{Path(target).name.replace(str(old), 'OLD')} named")
        return rename(path, target)

    def named(books: Store, *keys: PrivateKey, clock_ms: int) -> EntryRef:
        steps.append("books name the new key")
        return rotate(books, *keys, clock_ms=clock_ms)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Store, "rotate", named)
    old, held = folder.LedgerFolder.open(home).operator_key.address, os.open(home, os.O_RDONLY)
    try:
        folder.rotate(home, clock=clock)
        assert steps == [
            "operator.key.next named", "folder synced", "books name the new key",
            "operator.OLD.key named", "folder synced", "operator.key named",
        ]  # fmt: skip
        # An attempt that broke off before it synced left the name in memory only.
        folder.LedgerFolder.open(home).following_key()
        steps.clear()
        folder.rotate(home, clock=clock)
        assert steps[:2] == ["folder synced", "books name the new key"]
    finally:
        os.close(held)
