"""Holders keep what the ledger acknowledged: their own requests at once, those of others by asking."""

from __future__ import annotations

import sqlite3
import threading
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.cli.receipts import show_receipts
from btt.sdk.errors import (
    ConfigError,
    IdentityError,
    LedgerUnreachable,
    SignatureInvalid,
    SignerMismatch,
    StorageError,
)
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient, evidence, keeping
from btt.sdk.ledger.evidence import Evidence
from btt.sdk.ledger.keeping import EvidenceStore
from btt.sdk.ledger.proving import prove
from btt.sdk.ledger.receipt import SignedReceipt
from btt.sdk.payment.topups import top_up
from btt.sdk.signing import (
    ChannelClose,
    ChannelCommit,
    ChannelRefund,
    ChannelUpdate,
    Receipt,
    Transfer,
    sign,
)
from btt.services.ledger import export, folder, server, service, watching
from btt.services.ledger.backup import backup
from btt.services.ledger.books import Terms
from btt.services.ledger.journal import Entry, Kind
from btt.services.ledger.recovery import recover
from kit.economy import content

START, HOUR, WINDOW = 1_800_000_000_000, 3_600_000, 5000
ALICE, BOB, CAROL, K1, K2 = (PrivateKey(n.to_bytes(32, "big")) for n in (11, 12, 13, 21, 22))


class World:
    """A ledger whose clock the test sets, and holders with a file of receipts each."""

    def __init__(self, root: Path) -> None:
        self.root, self.home, self.now_ms = root, root / "ledger", START
        folder.init(
            self.home,
            name="test",
            supply_to=ALICE.address,
            amount=10_000,
            terms=Terms(min_challenge_ms=1000, min_lifetime_ms=1000),
            clock=lambda: START,
        )

    @asynccontextmanager
    async def serve(self, port: int = 0) -> AsyncIterator[server.RunningLedger]:
        config = server.LedgerConfig(folder=self.home, port=port, sweep_every=3600.0)
        async with server.serve(config, clock=lambda: self.now_ms) as self.running:
            yield self.running

    @asynccontextmanager
    async def client(self, name: str) -> AsyncIterator[LedgerClient]:
        with closing(EvidenceStore(self.root / name)) as keeper:
            async with LedgerClient.connect(self.running.address, keeper=keeper) as client:
                yield client

    def kept(self, name: str) -> list[Evidence]:
        with closing(EvidenceStore(self.root / name)) as store:
            return list(store.operations(self.running.identity.ledger_id))

    def export(self, name: str) -> Path:
        path = self.root / f"{name}.evidence"
        with closing(EvidenceStore(self.root / name)) as store:
            ledger_id = self.running.identity.ledger_id
            header = store.header(ledger_id)
            assert header is not None
            evidence.export(path, header, store.operations(ledger_id))
        return path

    def journal(self) -> list[Entry]:
        with export.journal(self.home) as (_, entries, _):
            return list(entries)

    async def open(self, ledger: LedgerClient) -> bytes:
        t1 = ChannelCommit(
            payer=ALICE.address,
            payee=BOB.address,
            k1=K1.public,
            k2=K2.public,
            amount=100,
            expires_ms=START + HOUR,
            challenge_ms=WINDOW,
            flags=1,
            fee=0,
            nonce=bytes(16),
            service_ref=bytes(32),
        )
        channel = t1.channel_id(ledger.ledger_id)
        t2 = ChannelRefund(channel=channel, not_before_ms=t1.expires_ms)
        await ledger.open_channel(t1, ALICE, sign(K2, t2, ledger.ledger_id))
        return channel


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def as_entry(one: Evidence) -> tuple[int, bytes, bytes, int, bytes]:
    assert one.receipt is not None
    return one.kind, one.body, one.signatures, one.receipt.seq, one.receipt.receipt.entry_hash


async def test_every_acknowledged_request_is_kept_to_the_byte(world: World) -> None:
    async with world.serve(), world.client("alice") as alice, world.client("node") as node:
        await alice.transfer(ALICE, CAROL.address, 5)
        channel = await world.open(alice)
        await alice.top_up(channel, ALICE, 50)
        await alice.request_close(channel, ALICE)
        update = ChannelUpdate(channel=channel, cumulative=7)
        signature = sign(K1, update, node.ledger_id)
        with pytest.raises(SignatureInvalid):
            await node.submit_update(update, signature, k1=K2.public)
        await node.submit_update(update, signature, k1=K1.public)
        await node.close_channel(ChannelClose(channel=channel, capture=7), K2, 7, signature)
        # They are on disk before the call returned; a second process reads them.
        entries = [(e.kind, e.body, e.signatures, e.seq, e.hash) for e in world.journal()]
        assert [as_entry(one) for one in world.kept("alice")] == entries[1:5]
        assert [as_entry(one) for one in world.kept("node")] == entries[5:]
        assert [Kind(kind) for kind, *_ in entries[1:]] == [
            Kind.TRANSFER, Kind.OPEN_CHANNEL, Kind.TOP_UP, Kind.REQUEST_CLOSE, Kind.UPDATE,
            Kind.CLOSE_CHANNEL,
        ]  # fmt: skip
        proof = prove([world.export("alice")], world.running.address)
        assert len(proof.acknowledged) == 4


async def test_holders_learn_what_others_did_to_them(world: World) -> None:
    async with world.serve() as running, world.client("alice") as alice, world.client("bob") as bob:
        channel = await world.open(alice)
        await alice.submit_update(
            ChannelUpdate(channel=channel, cumulative=60),
            sign(K1, ChannelUpdate(channel=channel, cumulative=60), alice.ledger_id),
        )
        await alice.request_close(channel, ALICE)
        world.now_ms += WINDOW
        assert await running.sweeper.sweep() == 1  # nobody asked for it, nobody got its receipt
        await alice.transfer(ALICE, BOB.address, 1)
        assert await bob.gather(BOB) == 5
        entries = [(e.kind, e.body, e.signatures, e.seq, e.hash) for e in world.journal()]
        assert [as_entry(one) for one in world.kept("bob")] == entries[1:]
        assert [Kind(kind) for kind, *_ in entries[1:]] == [
            Kind.OPEN_CHANNEL, Kind.UPDATE, Kind.REQUEST_CLOSE, Kind.FINALIZE, Kind.TRANSFER,
        ]  # fmt: skip


async def test_pages_and_places(world: World, monkeypatch: Any) -> None:
    """What was told is not told again, however many pages it takes and wherever it broke off."""
    monkeypatch.setattr(watching, "MOST_OPERATIONS", 3)
    async with world.serve(), world.client("alice") as alice, world.client("carol") as carol:
        for _ in range(7):
            await alice.transfer(ALICE, CAROL.address, 1)
        assert await carol.gather(CAROL) == 7
        assert await carol.gather(CAROL) == 0
        await alice.transfer(ALICE, CAROL.address, 1)
        assert await carol.gather(CAROL) == 1
        assert len(world.kept("carol")) == 8
        async with LedgerClient.connect(world.running.address) as nobody:
            assert await nobody.gather(CAROL) == 0


async def test_a_channels_operations_are_for_its_keys(world: World) -> None:
    async with world.serve(), world.client("alice") as alice, world.client("node") as node:
        channel = await world.open(alice)
        for key in (CAROL, BOB):
            with pytest.raises(SignerMismatch):
                await node.gather(key, channel_id=channel)
        assert await node.gather(CAROL) == 0
        for key in (K1, K2, ALICE):
            async with world.client(key.address.data.hex()) as holder:
                assert await holder.gather(key, channel_id=channel) == 1


async def test_a_node_alone_brings_back_the_channels_that_pay_it(world: World) -> None:
    """The payer would rather have its money than its memory: the payee has the payer's own signature."""
    async with world.serve(), world.client("alice") as alice, world.client("node") as node:
        backup(world.home, world.root / "backup")
        channel = await world.open(alice)
        await node.gather(K2, channel_id=channel)
    for path in world.home.glob("ledger.sqlite3*"):
        path.unlink()
    shown = world.export("node")
    report = recover(world.home, source=world.root / "backup", evidence=[shown], finish=True)
    assert report is not None
    assert report.restored == 1
    async with world.serve(), world.client("alice") as alice:
        state = await alice.channel(channel, K2)
        assert (state.phase, state.deposit) == (pb.CHANNEL_PHASE_OPEN, 100)
        assert (await alice.account(ALICE)).available == 9_900


async def test_places_of_a_lost_epoch_mean_nothing_in_the_next(world: World) -> None:
    async with world.serve(), world.client("alice") as alice, world.client("carol") as carol:
        backup(world.home, world.root / "backup")
        for _ in range(5):
            await alice.transfer(ALICE, CAROL.address, 1)
        assert await carol.gather(CAROL) == 5
    for path in world.home.glob("ledger.sqlite3*"):
        path.unlink()
    recover(world.home, source=world.root / "backup", finish=True)
    async with world.serve(), world.client("alice") as alice, world.client("carol") as carol:
        await alice.transfer(ALICE, CAROL.address, 9)  # entry 3 of epoch 2; she had seen up to 6
        assert await carol.gather(CAROL) == 1
        seqs = [one.receipt.receipt for one in world.kept("carol") if one.receipt]
        assert [(said.epoch, said.seq) for said in seqs] == [(1, 2), (1, 3), (2, 3), (1, 4), (1, 5), (1, 6)]
        proof = prove([world.export("carol")], world.running.address)
        assert (len(proof.acknowledged), len(proof.undone), proof.equivocations) == (1, 5, ())


async def test_a_watcher_is_told_that_its_place_is_gone(world: World) -> None:
    async with AsyncExitStack() as stack:
        async with world.serve():
            port = world.running.address.port
            client = await stack.enter_async_context(world.client("alice"))
            backup(world.home, world.root / "backup")
            for _ in range(5):
                await client.transfer(ALICE, CAROL.address, 1)
        for path in world.home.glob("ledger.sqlite3*"):
            path.unlink()
        recover(world.home, source=world.root / "backup", finish=True)
        async with world.serve(port):
            await client.totals()  # it answers again
            assert client.recovered == 0
            pages = client.watch(CAROL, after_seq=6)
            with pytest.raises(LedgerUnreachable, match="recovered"):
                await anext(pages)
            assert client.recovered == 2
            pages = client.watch(CAROL)
            assert (await anext(pages)).seen_seq == 2
            await pages.aclose()  # type: ignore[attr-defined]


async def test_a_full_disk_of_the_holder_makes_no_failure_of_a_payment(world: World) -> None:
    """The ledger has done it. Whoever is told that it failed pays twice."""
    async with world.serve(), world.client("alice") as alice:

        def full(*_: object, **__: object) -> None:
            raise StorageError("The disk is full.")

        assert alice._keeper is not None
        alice._keeper.keep, keep = full, alice._keeper.keep  # type: ignore[method-assign]
        receipt = await alice.transfer(ALICE, CAROL.address, 5)
        with pytest.raises(StorageError):  # here nothing else is at stake
            await alice.gather(ALICE)
        alice._keeper.keep = keep  # type: ignore[method-assign]
        assert world.kept("alice") == []
        assert await alice.gather(ALICE) == 1
        assert [one.receipt for one in world.kept("alice")] == [receipt]


def _unsigned(told: pb.AcknowledgedOperation) -> None:
    told.signatures = told.signatures[:40] + bytes(58)


def _other(told: pb.AcknowledgedOperation) -> None:
    said = Transfer.decode(told.body)
    told.body = Transfer(
        sender=said.sender,
        recipient=said.recipient,
        amount=6,
        request_id=said.request_id,
        valid_until_ms=said.valid_until_ms,
        memo=said.memo,
    ).encode()


def _unreceipted(told: pb.AcknowledgedOperation) -> None:
    told.ClearField("receipt")


def _unknown(told: pb.AcknowledgedOperation) -> None:
    told.kind = pb.ENTRY_KIND_GENESIS


@pytest.mark.parametrize("lie", [_unsigned, _other, _unreceipted, _unknown])
async def test_a_ledger_that_tells_what_it_cannot_prove(
    world: World, lie: Callable[[pb.AcknowledgedOperation], None], monkeypatch: Any
) -> None:
    true = watching.operation

    def lying(*args: Any) -> pb.AcknowledgedOperation:
        told = true(*args)
        lie(told)
        return told

    async with world.serve(), world.client("alice") as alice, world.client("carol") as carol:
        await alice.transfer(ALICE, CAROL.address, 5)
        monkeypatch.setattr(service.watching, "operation", lying)
        with pytest.raises(IdentityError):
            await carol.gather(CAROL)
        assert world.kept("carol") == []


def test_kept_receipts_stay(tmp_path: Path, monkeypatch: Any) -> None:
    """Two histories under one number are kept side by side; a file that breaks off adds nothing."""
    ledger_id = bytes(32)
    header = pb.EvidenceHeader(ledger_id=ledger_id)

    def one(seq: int, mark: bytes) -> Evidence:
        update = ChannelUpdate(channel=mark * 32, cumulative=1)
        said = Receipt(
            request_digest=update.digest(ledger_id),
            seq=seq,
            entry_hash=mark * 32,
            time_ms=1,
            code=0,
            epoch=1,
            operator_key_id=ALICE.address,
        )
        return Evidence(
            int(pb.ENTRY_KIND_UPDATE),
            update.encode(),
            bytes(98),
            SignedReceipt(said, sign(ALICE, said, ledger_id)),
        )

    def broken() -> Any:
        yield one(9, b"z")
        raise StorageError("it breaks off")

    with closing(EvidenceStore(tmp_path / "receipts.db")) as store:
        store.keep(header, [one(1, b"a"), one(2, b"b")])
        store.keep(header, [one(1, b"a"), one(2, b"c")])
        with pytest.raises(StorageError):
            store.keep(header, broken())
        assert [e.receipt.seq for e in store.operations(ledger_id) if e.receipt] == [1, 2, 2]
        assert len(store.equivocations(ledger_id)) == 1
        store.keep(header, [one(7, b"a")])  # the request of entry 1
        assert [b.receipt.seq for _, b in store.equivocations(ledger_id) if b.receipt] == [2, 7]
        assert store.rival(ledger_id, one(2, b"d")) is not None
        assert store.rival(ledger_id, one(3, b"b")) is not None, "one request, two entries"
        assert store.rival(ledger_id, one(3, b"d")) is None
        threads = [
            threading.Thread(target=store.keep, args=(header, [one(10 + n, bytes([n]))])) for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(list(store.operations(ledger_id))) == 12
        closer = threading.Thread(target=store.close)

        def look(*_: object) -> object:
            if closer.ident is None:
                closer.start()
                closer.join(0.2)  # it waits for us
            return True

        monkeypatch.setattr(keeping, "undone_by", look)
        assert store.promised(ledger_id, ()) is None, "it went through all of them"
        closer.join()
        with pytest.raises(StorageError):
            store.header(ledger_id)
    db = sqlite3.connect(tmp_path / "receipts.db")
    db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(ConfigError):
        EvidenceStore(tmp_path / "receipts.db")


def _update(ledger_id: bytes, seq: int) -> Evidence:
    update = ChannelUpdate(channel=seq.to_bytes(32, "big"), cumulative=1)
    said = Receipt(
        request_digest=update.digest(ledger_id),
        seq=seq,
        entry_hash=bytes(32),
        time_ms=1,
        code=0,
        epoch=1,
        operator_key_id=ALICE.address,
    )
    kind = int(pb.ENTRY_KIND_UPDATE)
    return Evidence(kind, update.encode(), bytes(98), SignedReceipt(said, bytes(65)))


def test_the_receipts_of_years_are_exported_in_little_memory(tmp_path: Path) -> None:
    ledger_id, target, count = bytes(32), tmp_path / "out", 4000
    with closing(EvidenceStore(tmp_path / keeping.RECEIPTS)) as store:
        store.keep(
            pb.EvidenceHeader(ledger_id=ledger_id), (_update(ledger_id, seq) for seq in range(1, count + 1))
        )
    tracemalloc.start()
    try:
        show_receipts(tmp_path, ledger_id, export=target, as_json=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    _, found = evidence.load(target, ledger_id)
    assert len(list(found)) == count
    assert peak < 250 * count


def test_an_export_takes_no_file_of_somebody_elses(tmp_path: Path) -> None:
    other, header = tmp_path / "out.new", pb.EvidenceHeader(ledger_id=bytes(32))
    other.write_text("somebody's")

    def breaks_off() -> Iterator[Evidence]:
        yield _update(bytes(32), 1)
        raise StorageError("the disk failed")

    with pytest.raises(StorageError):
        evidence.export(tmp_path / "out", header, breaks_off())
    assert list(tmp_path.iterdir()) == [other]
    evidence.export(tmp_path / "out", header, ())
    assert other.read_text() == "somebody's"


def test_what_an_older_program_kept_is_kept_on(tmp_path: Path) -> None:
    """Version 2 kept one version of each request; the file keeps them, and takes others beside them."""
    ledger_id, channel = bytes(32), b"c" * 32
    update = ChannelUpdate(channel=channel, cumulative=1)
    one = Evidence(int(pb.ENTRY_KIND_UPDATE), update.encode(), bytes(98), None)
    db = sqlite3.connect(tmp_path / "receipts.db")
    db.executescript(VERSION_2)
    digest = update.digest(ledger_id)
    db.execute(
        "INSERT INTO operations VALUES(?, 0, 0, ?, ?, ?, ?, ?, NULL, NULL)",
        (ledger_id, digest, digest, one.kind, one.body, one.signatures),
    )
    db.commit()
    db.close()
    other = replace(one, signatures=b"x" * 98)
    for _ in range(2):
        with closing(EvidenceStore(tmp_path / "receipts.db")) as store:
            store.keep(pb.EvidenceHeader(ledger_id=ledger_id), [one, other, other])
            assert list(store.operations(ledger_id)) == [one, other]


VERSION_2 = """
CREATE TABLE ledgers(
    ledger_id BLOB PRIMARY KEY CHECK(length(ledger_id) = 32), header BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE operations(
    ledger_id BLOB NOT NULL, seq INTEGER NOT NULL, epoch INTEGER NOT NULL, entry_hash BLOB NOT NULL,
    digest BLOB NOT NULL, kind INTEGER NOT NULL, body BLOB NOT NULL, signatures BLOB NOT NULL,
    receipt BLOB, receipt_signature BLOB, PRIMARY KEY(ledger_id, seq, epoch, entry_hash)
) STRICT, WITHOUT ROWID;
CREATE INDEX operations_by_digest ON operations(ledger_id, digest);
CREATE TABLE seen(
    ledger_id BLOB NOT NULL, subject BLOB NOT NULL, recovered INTEGER NOT NULL, seq INTEGER NOT NULL,
    PRIMARY KEY(ledger_id, subject)
) STRICT, WITHOUT ROWID;
CREATE TABLE heads(
    ledger_id BLOB NOT NULL, document BLOB NOT NULL, PRIMARY KEY(ledger_id, document)
) STRICT, WITHOUT ROWID;
CREATE TABLE log_room(times INTEGER NOT NULL);
INSERT INTO log_room VALUES(0);
PRAGMA user_version = 2;
"""


async def test_a_node_serves_with_t1_in_its_hands_and_not_before(economy: Any, tmp_path: Path) -> None:
    node, infohashes = await economy.content_node({"a.bin": content(1 << 20)})
    wallet = await economy.wallet()
    gathered: list[bytes | None] = []
    true: Callable[..., Awaitable[int]] = node.ledger.gather

    async def failing(key: PrivateKey, *, channel_id: bytes | None = None) -> int:
        raise StorageError("The disk is full.")

    async def watched(key: PrivateKey, *, channel_id: bytes | None = None) -> int:
        assert channel_id is not None
        assert await node.store.channel(channel_id) is None, "no books, and so no credit, before T1 is kept"
        gathered.append(channel_id)
        return await true(key, channel_id=channel_id)

    node.ledger.gather = failing
    async with economy.client(node, wallet) as btt:
        with pytest.raises(StorageError):
            await btt.session(1)
        assert await node.store.channels() == []
        node.ledger.gather = watched
        async with btt.content.fetch(infohashes["a.bin"], tmp_path / "out"):
            pass
    assert len(gathered) == 1


async def test_a_node_lends_on_a_top_up_with_its_receipt_in_its_hands_and_not_before(economy: Any) -> None:
    node, _ = await economy.content_node({"a.bin": content(1 << 20)})
    wallet = await economy.wallet()
    asked: list[int] = []
    true: Callable[..., Awaitable[int]] = node.ledger.gather

    async def watched(key: PrivateKey, *, channel_id: bytes | None = None) -> int:
        found = await node.store.channel(channel_id)
        asked.append(found[0].deposit if found else 0)
        return await true(key, channel_id=channel_id)

    node.ledger.gather = watched
    async with economy.client(node, wallet, keep_channels=True) as btt:
        session = await btt.session(1000)
        before = session.payer.deposit
        await session.provide(2 * before)
        during = session.payer.deposit
        await btt.close_session()
        await top_up(await btt.purse(), session.payer.channel_id, during)
        await btt.session(1)
    assert asked == [0, before, during]
