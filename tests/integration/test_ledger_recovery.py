"""A ledger that lost its newest books: what a backup and the holders' evidence bring back, and what not."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.cli import main
from btt.sdk.errors import (
    BttError,
    ConfigError,
    EvidenceInvalid,
    IdentityError,
    InsufficientFunds,
    LedgerEquivocated,
    LedgerRolledBack,
    WrongLedger,
)
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerAddress, evidence
from btt.sdk.ledger.evidence import Evidence
from btt.sdk.ledger.keeping import EvidenceStore
from btt.sdk.ledger.proving import prove
from btt.sdk.ledger.receipt import SignedReceipt
from btt.sdk.ledger.rotation import follow
from btt.sdk.signing import (
    ChannelClose,
    ChannelCommit,
    ChannelFinalize,
    ChannelRefund,
    ChannelUpdate,
    CloseRequest,
    KeyRotation,
    LedgerRecovery,
    Receipt,
    TopUp,
    Transfer,
    sign,
)
from btt.services.ledger import audit, books, export, folder, journal, recovery
from btt.services.ledger.backup import backup
from btt.services.ledger.books import Terms
from btt.services.ledger.check import entries as stored_entries
from btt.services.ledger.journal import Entry, Head, Kind
from btt.services.ledger.reading import connect
from btt.services.ledger.recovery import recover
from btt.services.ledger.store import Store
from btt.services.ledger.verify import Operation, Verifier

NOW, HOUR, WINDOW = 1_800_000_000_000, 3_600_000, 5000
ALICE, BOB, CAROL, K1, K2, STRANGER = (PrivateKey(n.to_bytes(32, "big")) for n in (11, 12, 13, 21, 22, 99))


def cli(words: list[str]) -> object:
    """Runs a command; returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(words))
    return ended.value.code


@dataclass
class Lost:
    """A ledger, its backup, and everything it did since; `evidence_of` is what a holder could have kept."""

    root: Path
    home: Path
    ledger_id: bytes
    now_ms: int = NOW

    @property
    def database(self) -> Path:
        return self.home / "ledger.sqlite3"

    @property
    def backup(self) -> Path:
        return self.root / "backup"

    @property
    def verifier(self) -> Verifier:
        return Verifier(self.ledger_id)

    def do(self, *operations: Operation) -> None:
        """Each in a batch of its own, a second apart."""
        with Store.open(self.database) as ledger:
            for operation in operations:
                self.now_ms += 1000
                batch = ledger.begin(self.now_ms)
                outcome = batch.run(operation)
                assert not isinstance(outcome, BttError), outcome
                ledger.commit(batch)

    def lose(self, *, mark: bool = True) -> list[Entry]:
        """The disk dies. Returns what was on it."""
        with export.journal(self.home) as (_, entries, _):
            found = list(entries)
        for path in self.home.glob("ledger.sqlite3*"):
            if mark and path.suffix == ".mark":
                continue
            shutil.move(path, self.root / f"lost{path.name.removeprefix('ledger')}")
        return found

    def evidence(self, entries: Iterable[Entry], *, key: PrivateKey | None = None) -> list[Evidence]:
        operator = key or folder.LedgerFolder.open(self.home).operator_key
        return [
            Evidence(entry.kind, entry.body, entry.signatures, receipt(entry, operator, self.ledger_id))
            for entry in entries
        ]

    def file(self, name: str, operations: Iterable[Evidence]) -> Path:
        path = self.root / name
        evidence.export(path, pb.EvidenceHeader(ledger_id=self.ledger_id), operations)
        return path

    def balance(self, key: PrivateKey) -> int:
        with Store.open(self.database) as ledger:
            account = ledger.account(books.user(key.address.data))
            return account.balance if account else 0

    def audit(self) -> audit.Report:
        with export.journal(self.home) as (description, entries, database):
            report, auditor = audit.audit(description, entries)
            assert database is not None
            audit.compare(auditor, database)
        return report

    # What people sign

    def pay(self, sender: PrivateKey, to: PrivateKey, amount: int, name: int) -> Operation:
        message = Transfer(
            sender=sender.address,
            recipient=to.address,
            amount=amount,
            request_id=name.to_bytes(16, "big"),
            valid_until_ms=self.now_ms + HOUR,
            memo=bytes(32),
        )
        return self.verifier.transfer(
            message.encode(), signer=sender.public.data, signature=sign(sender, message, self.ledger_id)
        )

    def open(self, name: int, amount: int = 100) -> Operation:
        t1 = ChannelCommit(
            payer=ALICE.address,
            payee=BOB.address,
            k1=K1.public,
            k2=K2.public,
            amount=amount,
            expires_ms=NOW + HOUR,
            challenge_ms=WINDOW,
            flags=1,
            fee=0,
            nonce=name.to_bytes(16, "big"),
            service_ref=bytes(32),
        )
        t2 = ChannelRefund(channel=t1.channel_id(self.ledger_id), not_before_ms=t1.expires_ms)
        return self.verifier.open_channel(
            t1.encode(),
            signer=ALICE.public.data,
            signature=sign(ALICE, t1, self.ledger_id),
            refund_signature=sign(K2, t2, self.ledger_id),
        )

    def top_up(self, channel: bytes, amount: int) -> Operation:
        message = TopUp(
            channel=channel, amount=amount, request_id=b"t" * 16, valid_until_ms=self.now_ms + HOUR
        )
        return self.verifier.top_up(
            message.encode(), signer=ALICE.public.data, signature=sign(ALICE, message, self.ledger_id)
        )

    def update(self, channel: bytes, cumulative: int) -> Operation:
        message = ChannelUpdate(channel=channel, cumulative=cumulative)
        return self.verifier.update(
            message.encode(), k1=K1.public.data, signature=sign(K1, message, self.ledger_id)
        )

    def ask(self, channel: bytes) -> Operation:
        message = CloseRequest(channel=channel, request_id=b"c" * 16, valid_until_ms=self.now_ms + HOUR)
        return self.verifier.request_close(
            message.encode(), signer=ALICE.public.data, signature=sign(ALICE, message, self.ledger_id)
        )

    def close(self, channel: bytes, capture: int) -> Operation:
        message = ChannelClose(channel=channel, capture=capture)
        t3 = ChannelUpdate(channel=channel, cumulative=capture)
        return self.verifier.close_channel(
            message.encode(),
            signer=K2.public.data,
            signature=sign(K2, message, self.ledger_id),
            cumulative=capture,
            update_signature=sign(K1, t3, self.ledger_id),
            k1=K1.public.data,
        )

    def finalize(self, channel: bytes) -> Operation:
        return self.verifier.finalize(ChannelFinalize(channel=channel).encode())


def receipt(entry: Entry, operator: PrivateKey, ledger_id: bytes, **changes: Any) -> SignedReceipt:
    said = Receipt(
        request_digest=entry.request_digest,
        seq=entry.seq,
        entry_hash=entry.hash,
        time_ms=entry.time_ms,
        code=0,
        epoch=entry.epoch,
        operator_key_id=operator.address,
    )
    said = replace(said, **changes)
    return SignedReceipt(said, sign(operator, said, ledger_id))


def new_ledger(root: Path, name: str = "test", *, least_raise: int = 1) -> Lost:
    root.mkdir(exist_ok=True)
    made, identity = folder.init(
        root / "ledger",
        name=name,
        supply_to=ALICE.address,
        amount=1000,
        terms=Terms(min_challenge_ms=1000, min_lifetime_ms=1000, min_update_delta=least_raise),
        clock=lambda: NOW,
    )
    return Lost(root, made.path, identity.ledger_id)


@pytest.fixture
def ledger(tmp_path: Path) -> Lost:
    """Entry 1 issues; 2 pays Bob 10; then comes the backup."""
    made = new_ledger(tmp_path / "one")
    made.do(made.pay(ALICE, BOB, 10, 1))
    assert backup(made.home, made.backup).seq == 2
    return made


def everything_since(ledger: Lost) -> None:
    """Entries 3 to 11: one of every kind, among them a channel that was paid out."""
    first, second = ledger.open(1), ledger.open(2)
    ledger.do(first, ledger.pay(ALICE, CAROL, 300, 2), second)
    ledger.do(ledger.top_up(first.digest, 50), ledger.update(first.digest, 60), ledger.ask(first.digest))
    ledger.now_ms += WINDOW
    ledger.do(ledger.finalize(first.digest), ledger.close(second.digest, 70), ledger.pay(BOB, CAROL, 130, 3))


BALANCES = {ALICE: 1000 - 10 - 300 - 60 - 70, BOB: 10 + 60 + 70 - 130, CAROL: 300 + 130}


def check_balances(ledger: Lost) -> None:
    assert {key: ledger.balance(key) for key in BALANCES} == BALANCES


def test_what_everybody_shows_is_restored_as_it_was(ledger: Lost) -> None:
    everything_since(ledger)
    check_balances(ledger)
    lost = ledger.lose()
    shown = ledger.file("all", reversed(ledger.evidence(lost[2:])))
    report = recover(ledger.home, source=ledger.backup, evidence=[shown])
    assert report is not None
    assert (report.restored, report.repeated, report.missing, report.refused) == (9, 0, [], [])
    with pytest.raises(ConfigError, match="--finish"):
        Store.open(ledger.database)
    report = recover(ledger.home, finish=True)
    assert report is not None
    assert (report.finished, report.epoch, report.ended_seq, report.reached_seq) == (True, 2, 11, 11)
    check_balances(ledger)
    assert ledger.audit().entries == 12
    with export.journal(ledger.home) as (_, entries, _):
        found = list(entries)
    assert found[:11] == lost
    said = LedgerRecovery.decode(found[11].body)
    assert (found[11].kind, said.epoch, said.ended_seq, said.ended_hash) == (
        Kind.RECOVER, 2, 11, lost[10].hash,
    )  # fmt: skip
    # The newest receipts are the ledger's still, for whoever follows its keys.
    ledger.do(ledger.pay(CAROL, ALICE, 1, 9))


def test_what_is_missing_ends_the_epoch_and_the_rest_is_done_again(ledger: Lost) -> None:
    everything_since(ledger)
    lost = ledger.lose()
    nobody = 3  # the first channel's T1; its top-up, update, request and payout cannot stand without it
    shown = ledger.file("some", ledger.evidence(entry for entry in lost[2:] if entry.seq != nobody))
    report = recover(ledger.home, source=ledger.backup, evidence=[shown], finish=True)
    assert report is not None
    assert (report.ended_seq, report.reached_seq, report.missing) == (2, 11, [(3, 3)])
    assert report.repeated == 3
    assert [type(error).__name__ for _, error in report.refused] == [
        "ChannelUnknown", "ChannelUnknown", "ChannelUnknown", "ChannelUnknown", "InsufficientFunds",
    ]  # fmt: skip
    assert (ledger.balance(ALICE), ledger.balance(BOB), ledger.balance(CAROL)) == (620, 80, 300)
    assert ledger.audit().head.epoch == 2
    with export.journal(ledger.home) as (_, entries, _):
        found = list(entries)
    assert [entry.kind for entry in found[2:]] == [
        Kind.RECOVER, Kind.TRANSFER, Kind.OPEN_CHANNEL, Kind.CLOSE_CHANNEL,
    ]  # fmt: skip
    # Each at the time at which it was acknowledged, so that its deadlines mean what they meant.
    assert [entry.time_ms for entry in found[3:]] == [lost[seq - 1].time_ms for seq in (4, 5, 10)]


def test_how_far_the_lost_books_had_come(ledger: Lost, capsys: Any) -> None:
    """The mark knows it even where no holder comes; without it only those who come do."""
    everything_since(ledger)
    lost = ledger.lose()
    one = ledger.file("one", ledger.evidence(lost[3:4]))
    twin = ledger.root / "twin"
    shutil.copytree(ledger.home, twin)
    (twin / "ledger.sqlite3.mark").unlink()
    for home, missing in ((ledger.home, [(3, 3), (5, 11)]), (twin, [(3, 3)])):
        report = recover(home, source=ledger.backup, evidence=[one])
        assert report is not None
        assert report.missing == missing
    words = ["ledger", "recover", str(ledger.home)]
    assert cli(words) == 0
    told = capsys.readouterr().out
    assert "entry 2; the lost books had come to 11." in told
    assert "Nobody showed entry 3." in told
    assert "Nobody showed 5 to 11." in told
    assert "Nothing is served yet." in told
    assert cli([*words, "--finish"]) == 0
    assert "Epoch 2 begins after entry 2" in capsys.readouterr().out
    assert cli(words) == 3
    assert LedgerRecovery.decode(entries_of(ledger)[2].body).reached_seq == 11


def test_a_hash_that_was_not_acknowledged_restores_nothing(ledger: Lost) -> None:
    """The copy is of another history than the receipt: the request counts, its old place does not."""
    ledger.do(ledger.pay(ALICE, CAROL, 300, 2))
    lost = ledger.lose()
    other = ledger.file("other", with_receipt(ledger, lost[2], entry_hash=b"x" * 32))
    report = recover(ledger.home, source=ledger.backup, evidence=[other], finish=True)
    assert report is not None
    assert (report.ended_seq, report.restored, report.repeated) == (2, 0, 1)
    assert ledger.balance(CAROL) == 300


@pytest.mark.parametrize("seed", range(5))
def test_any_history_and_any_part_of_it(tmp_path: Path, seed: int) -> None:
    """Whatever is shown, the books add up, hold before the audit, and depend on nothing else."""
    dice = random.Random(seed)
    ledger = new_ledger(tmp_path / "one")
    channels: list[bytes] = []

    def any_operation(name: int) -> Operation:
        people = dice.sample([ALICE, BOB, CAROL], 2)
        choice = dice.randrange(8) if channels else dice.choice([0, 1])
        if choice == 0:
            opening = ledger.open(name, dice.randrange(1, 200))
            channels.append(opening.digest)
            return opening
        if choice <= 3:
            return ledger.pay(*people, dice.randrange(1, 400), name)
        channel = dice.choice(channels)
        if choice == 4:
            return ledger.update(channel, dice.randrange(1, 150))
        if choice == 5:
            return ledger.close(channel, dice.randrange(1, 150))
        return ledger.ask(channel) if choice == 6 else ledger.finalize(channel)

    cut = dice.randrange(2, 12)
    with Store.open(ledger.database, durable=False) as books_:
        for name in range(40):
            ledger.now_ms += dice.randrange(WINDOW)
            batch = books_.begin(ledger.now_ms)
            batch.run(any_operation(name))  # many are refused, and leave no trace
            if batch.entries:
                books_.commit(batch)
            if name == cut:
                backup(ledger.home, ledger.backup)
    lost = ledger.lose(mark=dice.random() < 0.5)
    with closing(connect(ledger.backup, read_only=True)) as connection:
        last = len(list(stored_entries(connection)))
    recover(ledger.home, source=ledger.backup)
    for part in (1.0, 0.5):
        homes = [ledger.root / f"{part}-{twin}" for twin in (1, 2)]
        shown = [entry for entry in lost[last:] if dice.random() < part]
        heads = []
        for home in homes:
            shutil.copytree(ledger.home, home)
            twin = replace(ledger, home=home)
            dice.shuffle(shown)
            half = dice.randrange(len(shown) + 1)
            for n, some in enumerate((shown[:half], shown[half:])):
                recover(home, evidence=[twin.file(f"{home.name}-{n}", twin.evidence(some))])
            report = recover(home, finish=True)
            assert report is not None
            assert len(shown) == report.restored + report.repeated + len(report.refused)
            if part == 1.0:
                assert entries_of(twin)[:-1] == lost
            assert twin.audit().issued == 1000
            with Store.open(twin.database) as found:  # checks every row
                heads.append(found.head)
        assert heads[0] == heads[1]


def test_what_was_paid_cannot_be_spent_again(ledger: Lost) -> None:
    """Alice paid Carol all she had after the backup; only Carol has an interest to remember it."""
    ledger.do(ledger.pay(ALICE, BOB, 5, 2), ledger.pay(ALICE, CAROL, 985, 3))
    lost = ledger.lose()
    again = ledger.pay(ALICE, STRANGER, 985, 4)
    carols = ledger.file("carol", ledger.evidence(lost[3:]))
    assert recover(ledger.home, source=ledger.backup) is not None
    with pytest.raises(ConfigError):
        ledger.do(again)  # nothing leaves any account while the recovery is open
    report = recover(ledger.home, evidence=[carols], finish=True)
    assert report is not None
    assert (report.missing, report.repeated) == ([(3, 3)], 1)
    assert (ledger.balance(ALICE), ledger.balance(CAROL)) == (5, 985)
    with pytest.raises(AssertionError, match=r"holds 0\.000005 BTT"):
        ledger.do(again)


def test_nothing_is_served_before_the_operator_ends_it(ledger: Lost) -> None:
    """Even where an old copy lies in its place and no mark is left to speak against it."""
    ledger.lose(mark=False)
    shutil.copy(ledger.backup, ledger.database)
    assert recover(ledger.home) is not None
    for touch in (lambda: Store.open(ledger.database), lambda: folder.rotate(ledger.home)):
        with pytest.raises(ConfigError, match="recovery"):
            touch()
    assert recover(ledger.home, finish=True) is not None
    with Store.open(ledger.database) as books_:
        assert books_.head.epoch == 2


def test_neither_the_lost_nor_the_old_books_start_beside_the_recovered(ledger: Lost) -> None:
    everything_since(ledger)
    lost = ledger.lose()
    recover(
        ledger.home,
        source=ledger.backup,
        evidence=[ledger.file("a", ledger.evidence(lost[2:5]))],
        finish=True,
    )
    new = ledger.database.read_bytes()
    for other in (ledger.root / "lost.sqlite3", ledger.backup):
        shutil.copy(other, ledger.database)
        with pytest.raises(LedgerRolledBack):
            Store.open(ledger.database)
    # Elsewhere, without the mark, they start; and nobody follows them there.
    (ledger.home / "ledger.sqlite3.mark").unlink()
    with Store.open(ledger.database) as old, pytest.raises(ConfigError, match="current operator key"):
        folder.LedgerFolder.open(ledger.home).settled(old.operator_key)
    ledger.database.write_bytes(new)


@pytest.mark.parametrize(
    "order", [lambda parts: parts, lambda parts: parts[::-1], lambda parts: [*parts, *parts[::2]]]
)
def test_the_same_evidence_gives_the_same_books(ledger: Lost, order: Any) -> None:
    everything_since(ledger)
    lost = ledger.lose()
    recover(ledger.home, source=ledger.backup)
    twin = ledger.root / "twin"
    shutil.copytree(ledger.home, twin)
    parts = [
        ledger.file(f"part{entry.seq}", ledger.evidence([entry])) for entry in lost[2:] if entry.seq != 6
    ]
    first = recover(ledger.home, evidence=parts, finish=True)
    second = None
    for part in order(parts):  # one call each, and one of them ends it
        second = recover(twin, source=ledger.backup, evidence=[part])
    second = recover(twin, finish=True)
    assert first is not None
    assert second is not None
    assert first.head == second.head
    assert first.missing == second.missing == [(6, 6)]


class PowerCut(Exception):
    pass


@pytest.mark.parametrize("step", ["sync", "built", "renamed", "mark", "put away"])
def test_a_recovery_that_breaks_off_goes_on(ledger: Lost, step: str, monkeypatch: Any) -> None:
    everything_since(ledger)
    lost = ledger.lose()
    (ledger.home / "ledger.sqlite3-wal").write_bytes(b"of the lost books")
    shown = ledger.file("all", ledger.evidence(lost[2:8]))
    recover(ledger.home, source=ledger.backup, evidence=[shown])
    twin = ledger.root / "twin"
    shutil.copytree(ledger.home, twin)
    expected = recover(twin, finish=True)

    def cut(*_: object, **__: object) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        if step == "sync":
            patch.setattr(recovery, "sync", cut)
        elif step == "built":
            patch.setattr(recovery, "_install", cut)
        elif step == "renamed":
            patch.setattr(recovery.mark, "MarkWriter", cut)
        elif step == "mark":
            patch.setattr(recovery, "_put_away", cut)
        else:
            patch.setattr(folder.LedgerFolder, "settled", cut)
        with pytest.raises(PowerCut):
            recover(ledger.home, finish=True)
    if step == "put away":  # the next start takes the new key by itself
        with pytest.raises(ConfigError, match="nothing to recover"):
            recover(ledger.home)
    else:
        with pytest.raises((ConfigError, LedgerRolledBack)):
            Store.open(ledger.database)
        again = recover(ledger.home, finish=True)
        assert (again is None) == (step == "mark")
    logs = [path.read_bytes() for path in ledger.home.glob("*-wal")]
    assert b"of the lost books" not in b"".join(logs), "SQLite would replay it over the recovered ones"
    with Store.open(ledger.database) as found:
        assert expected is not None
        assert found.head == expected.head
        assert folder.LedgerFolder.open(ledger.home).settled(found.operator_key)
    ledger.audit()
    assert not (ledger.home / "recovery").exists()


@pytest.mark.parametrize("moves", range(4))
def test_no_cut_between_two_renames_leaves_the_lost_log_beside_the_recovered_books(
    ledger: Lost, moves: int, monkeypatch: Any
) -> None:
    """The lost books are damaged, and their log is whole: SQLite would replay it over any database."""
    names = [f"ledger.sqlite3{end}" for end in ("", "-wal", "-shm")]
    with Store.open(ledger.database) as running:
        for name in range(3):
            batch = running.begin(ledger.now_ms + name)
            batch.run(ledger.pay(ALICE, CAROL, 5, 10 + name))
            running.commit(batch)
        files = {name: (ledger.home / name).read_bytes() for name in names}  # as a crash leaves them
    lost = ledger.lose()
    files[names[0]] = files[names[0]][: 3 * 4096]
    for name, data in files.items():
        (ledger.home / name).write_bytes(data)
    shown = ledger.file("all", ledger.evidence(lost[2:4]))  # nobody shows entry 5
    recover(ledger.home, source=ledger.backup, evidence=[shown])
    rename, left = Path.rename, [moves]

    def some(self: Path, target: Path) -> Path:
        if not left[0]:
            raise PowerCut
        left[0] -= 1
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", some)
        with pytest.raises(PowerCut):
            recover(ledger.home, finish=True)
    report = recover(ledger.home, finish=True)
    assert report is not None
    with Store.open(ledger.database) as found:
        assert (found.head, report.missing) == (report.head, [(5, 5)])
    ledger.audit()
    kept = ledger.home / "recovered-epoch-2"
    for name in names[:2]:  # every reader writes in the third
        assert (kept / name.replace("ledger", "replaced")).read_bytes() == files[name]


def test_where_nothing_is_lost_nothing_is_recovered(ledger: Lost, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to recover"):
        recover(ledger.home, source=ledger.backup)
    with Store.open(ledger.database), pytest.raises(ConfigError, match="Another process"):
        recover(ledger.home, source=ledger.backup)
    ledger.lose()
    with pytest.raises(ConfigError, match="--from"):
        recover(ledger.home)
    with pytest.raises(ConfigError, match="There is no ledger at"):
        recover(ledger.home, source=tmp_path / "mistyped")
    assert not (ledger.home / "recovery").exists()
    other = new_ledger(tmp_path / "two", "other")
    with pytest.raises(ConfigError, match="operator key"):
        recover(ledger.home, source=other.home)
    shutil.rmtree(ledger.home / "recovery")
    assert recover(ledger.home, source=ledger.backup) is not None
    with pytest.raises(ConfigError, match="another copy"):
        recover(ledger.home, source=other.home)


FORGERIES: dict[str, tuple[type[BttError], Any]] = {
    "signed by another operator": (EvidenceInvalid, lambda led, e: led.evidence([e], key=STRANGER)),
    "of an epoch that did not begin": (EvidenceInvalid, lambda led, e: with_receipt(led, e, epoch=2)),
    "altered": (EvidenceInvalid, lambda led, e: altered(led, e)),
    "for another request": (EvidenceInvalid, lambda led, e: with_receipt(led, e, request_digest=bytes(32))),
    "of a refusal": (EvidenceInvalid, lambda led, e: with_receipt(led, e, code=1)),
    "request not signed": (
        EvidenceInvalid,
        lambda led, e: [replace(one, signatures=one.signatures[:-1] + b"\2") for one in led.evidence([e])],
    ),
    "signed by another than its sender": (
        EvidenceInvalid,
        lambda led, e: [resigned(led, one, STRANGER) for one in led.evidence([e])],
    ),
    "more than signatures": (
        EvidenceInvalid,
        lambda led, e: [replace(one, signatures=one.signatures + b"\0") for one in led.evidence([e])],
    ),
    "two entries of one number": (
        LedgerEquivocated,
        lambda led, e: [*led.evidence([e]), *with_receipt(led, e, entry_hash=b"x" * 32)],
    ),
    "one request in two entries": (
        LedgerEquivocated,
        lambda led, e: [*led.evidence([e]), *with_receipt(led, e, seq=e.seq + 1, entry_hash=b"x" * 32)],
    ),
    "another history than the copy": (
        LedgerEquivocated,
        lambda led, e: with_receipt(led, e, seq=2, entry_hash=b"x" * 32),
    ),
}


def with_receipt(ledger: Lost, entry: Entry, **changes: Any) -> list[Evidence]:
    operator = folder.LedgerFolder.open(ledger.home).operator_key
    [one] = ledger.evidence([entry])
    return [replace(one, receipt=receipt(entry, operator, ledger.ledger_id, **changes))]


def altered(ledger: Lost, entry: Entry) -> list[Evidence]:
    [one] = ledger.evidence([entry])
    assert one.receipt is not None
    said = replace(one.receipt.receipt, seq=one.receipt.seq + 1)
    return [replace(one, receipt=SignedReceipt(said, one.receipt.signature))]


def resigned(ledger: Lost, one: Evidence, *keys: PrivateKey) -> Evidence:
    """The same request and receipt with the signature of another; with two keys, a T1 and its T2."""
    message = one.message
    proof = keys[0].public.data + sign(keys[0], message, ledger.ledger_id) + one.signatures[98:]
    if isinstance(message, ChannelCommit):
        t2 = ChannelRefund(channel=message.channel_id(ledger.ledger_id), not_before_ms=message.expires_ms)
        proof = proof[:98] + sign(keys[1], t2, ledger.ledger_id)
    return replace(one, signatures=proof)


@pytest.mark.parametrize("keys", [(STRANGER, K2), (ALICE, STRANGER)])
def test_a_channel_that_its_parties_did_not_sign_is_no_evidence(ledger: Lost, keys: Any) -> None:
    ledger.do(ledger.open(1))
    [one] = ledger.evidence(ledger.lose()[2:])
    for name, proof in (("true", (ALICE, K2)), ("forged", keys)):
        ledger.file(name, [resigned(ledger, one, *proof)])
    report = recover(ledger.home, source=ledger.backup, evidence=[ledger.root / "true"])
    assert report is not None
    assert report.restored == 1
    with pytest.raises(EvidenceInvalid, match="not signed as it must be"):
        recover(ledger.home, evidence=[ledger.root / "forged"])


@pytest.mark.parametrize("order", [("forged", "true"), ("true", "forged")])
def test_a_receipt_with_other_signatures_takes_no_place_from_the_true_ones(
    ledger: Lost, order: tuple[str, str]
) -> None:
    """The receipt is genuine, and covers the request alone: whoever has it can show it with any signature."""
    everything_since(ledger)
    lost = ledger.lose()
    true = ledger.evidence(lost[2:])
    forged = [
        resigned(ledger, one, PrivateKey(n.to_bytes(32, "big")))
        for one in true
        if one.kind in (Kind.TOP_UP, Kind.UPDATE, Kind.REQUEST_CLOSE, Kind.CLOSE_CHANNEL)
        for n in range(90, 98)  # some sort before the true key, and some behind it
    ]
    [close] = [one for one in true if one.kind == Kind.CLOSE_CHANNEL]
    unsigned = replace(close, signatures=close.signatures[:98] + bytes(8))  # without the update it needs
    files = {"true": true, "forged": [*forged, unsigned]}
    reports = [
        recover(ledger.home, source=ledger.backup, evidence=[ledger.file(name, files[name])])
        for name in order
    ]
    assert reports[-1] is not None
    assert (reports[-1].restored, reports[-1].refused) == (9, [])
    if order[0] == "forged":  # alone they restore nothing, and hide no number
        assert reports[0] is not None
        assert (reports[0].restored, reports[0].missing) == (0, [(3, 5), (9, 9), (11, 11)])
        assert len(reports[0].refused) == 4
    recover(ledger.home, finish=True)
    check_balances(ledger)
    assert entries_of(ledger)[:-1] == lost
    ledger.audit()


def test_why_an_operation_is_refused_the_true_version_says(ledger: Lost) -> None:
    channel = ledger.open(1)
    ledger.do(channel, ledger.pay(BOB, ALICE, 10, 2), ledger.top_up(channel.digest, 900))
    lost = ledger.lose()
    true = ledger.evidence(entry for entry in lost[2:] if entry.seq != 4)
    forged = [resigned(ledger, true[-1], PrivateKey(n.to_bytes(32, "big"))) for n in range(90, 98)]
    report = recover(ledger.home, source=ledger.backup, evidence=[ledger.file("both", [*forged, *true])])
    assert report is not None
    [(what, error)] = report.refused
    assert isinstance(error, InsufficientFunds)
    assert "entry 5: top-up" in what


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_evidence_is_refused_as_a_whole(ledger: Lost, forgery: str) -> None:
    ledger.do(ledger.pay(ALICE, CAROL, 300, 2), ledger.pay(ALICE, BOB, 1, 3))
    lost = ledger.lose()
    kind, forge = FORGERIES[forgery]
    good = ledger.evidence(lost[3:])
    bad = ledger.file("bad", [*good, *forge(ledger, lost[2])])
    with pytest.raises(kind, match="bad"):
        recover(ledger.home, source=ledger.backup, evidence=[bad])
    report = recover(ledger.home)
    assert report is not None
    assert (report.restored, report.repeated) == (0, 0), "the good part of a bad file waits for a good file"
    report = recover(ledger.home, evidence=[ledger.file("good", ledger.evidence(lost[2:]))])
    assert report is not None
    assert report.restored == 2


def test_foreign_and_damaged_files_are_refused(ledger: Lost, tmp_path: Path) -> None:
    other = new_ledger(tmp_path / "two", "other")
    other.do(other.pay(ALICE, BOB, 10, 1))
    ledger.lose()
    foreign = other.file("foreign", other.evidence(other.lose()[1:]))
    recover(ledger.home, source=ledger.backup)
    with pytest.raises(WrongLedger):
        recover(ledger.home, evidence=[foreign])
    # The same operations under our ledger's name: the digests are of the other one.
    renamed = ledger.root / "renamed"
    renamed.write_bytes(foreign.read_bytes().replace(other.ledger_id, ledger.ledger_id, 1))
    with pytest.raises(EvidenceInvalid):
        recover(ledger.home, evidence=[renamed])
    data = foreign.read_bytes()
    for damaged in (data[:-1], data[:-20], data + b"\xff\xff\xff\xff", data + b"\0\0\0\1x"):
        (ledger.root / "damaged").write_bytes(damaged.replace(other.ledger_id, ledger.ledger_id, 1))
        with pytest.raises(EvidenceInvalid):
            recover(ledger.home, evidence=[ledger.root / "damaged"])
    (ledger.root / "text").write_text("hello")
    for none in (ledger.root / "text", ledger.root / "missing"):
        with pytest.raises(ConfigError):
            recover(ledger.home, evidence=[none])


def test_what_cannot_both_have_happened_is_refused_by_the_books(ledger: Lost) -> None:
    """Evidence is signed and acknowledged; the rules still decide, and nothing goes below zero."""
    ledger.do(ledger.pay(BOB, ALICE, 10, 2))  # nobody shows this one
    ledger.do(ledger.pay(ALICE, CAROL, 1000, 3))
    lost = ledger.lose()
    shown = ledger.file("carol", ledger.evidence(lost[3:]))
    report = recover(ledger.home, source=ledger.backup, evidence=[shown], finish=True)
    assert report is not None
    [(what, error)] = report.refused
    assert isinstance(error, InsufficientFunds)
    assert "entry 4: transfer" in what
    assert ledger.balance(CAROL) == 0
    # Refused for lack of an entry, not for ever: the same signed request does it when the money is there.
    ledger.do(ledger.pay(BOB, ALICE, 10, 2))
    ledger.do(
        ledger.verifier.transfer(
            lost[3].body, signer=lost[3].signatures[:33], signature=lost[3].signatures[33:]
        )
    )
    assert ledger.balance(CAROL) == 1000


def unshown(ledger: Lost, channel: Operation, cumulative: int) -> Evidence:
    update = ledger.update(channel.digest, cumulative)
    return Evidence(Kind.UPDATE, update.body, update.signatures, None)


def test_a_payees_best_update_counts_without_a_receipt(ledger: Lost) -> None:
    first, second, unknown = ledger.open(1), ledger.open(2), ledger.open(3)
    ledger.do(first, second, ledger.close(second.digest, 20))
    lost = ledger.lose()

    pays = ((first, 55), (first, 80), (second, 20), (unknown, 5))
    best = [unshown(ledger, channel, cumulative) for channel, cumulative in pays]
    # The same payment with the signatures of strangers takes nobody's place.
    strangers = [resigned(ledger, best[1], PrivateKey(n.to_bytes(32, "big"))) for n in range(90, 98)]
    recover(ledger.home, source=ledger.backup, evidence=[ledger.file("strangers", strangers)])
    shown = ledger.file("node", [*best, *ledger.evidence(lost[2:])])
    report = recover(ledger.home, source=ledger.backup, evidence=[shown], finish=True)
    assert report is not None
    assert (report.restored, report.updates <= 2, [type(e).__name__ for _, e in report.refused]) == (
        3, True, ["ChannelUnknown"],
    )  # fmt: skip
    with Store.open(ledger.database) as found:
        channel = found.channel(first.digest)
        assert channel is not None
        assert channel.best == 80
    forged = replace(unshown(ledger, first, 100), signatures=K2.public.data + bytes(65))
    recovered = ledger.lose()
    assert recovered[-1].kind is Kind.UPDATE
    with pytest.raises(EvidenceInvalid):
        recover(ledger.home, source=ledger.backup, evidence=[ledger.file("forged", [forged])])


@pytest.mark.parametrize(
    ("missing", "bob", "refused"),
    [
        ({7}, 10 + 1 + 140, []),
        ({3, 7}, 10 + 140, []),  # the channel itself is opened again
        ({5, 7}, 10 + 1 + 90, ["ChannelClosed"]),  # the deposit is too small, and that is said
        ({6, 7}, 10 + 1, ["ChannelLocked"]),  # it is not paid out, and the payee has its update in the books
    ],
)
def test_what_a_channel_pays_out_again_is_its_best_update(
    ledger: Lost, missing: set[int], bob: int, refused: list[str]
) -> None:
    """Nobody signs a payout, so it says nothing about what it paid; and nobody shows the update's receipt."""
    channel = ledger.open(1)
    ledger.do(
        ledger.pay(ALICE, BOB, 1, 2), channel, ledger.top_up(channel.digest, 50), ledger.ask(channel.digest)
    )
    ledger.do(ledger.update(channel.digest, 140))
    ledger.now_ms += WINDOW
    ledger.do(ledger.finalize(channel.digest))
    lost = ledger.lose()
    best = [unshown(ledger, channel, 90), unshown(ledger, channel, 140)]
    strangers = [
        resigned(ledger, one, PrivateKey(n.to_bytes(32, "big"))) for one in best for n in range(90, 98)
    ]
    shown = ledger.file("payee", [*best, *strangers])
    others = ledger.file("payer", ledger.evidence(entry for entry in lost[2:] if entry.seq not in missing))
    report = recover(ledger.home, source=ledger.backup, evidence=[others, shown], finish=True)
    assert report is not None
    assert [type(error).__name__ for _, error in report.refused] == refused
    assert ledger.balance(BOB) == bob
    with Store.open(ledger.database) as found:
        settled = found.channel(channel.digest)
        assert settled is not None
        assert settled.best == (90 if 5 in missing else 140)
    ledger.audit()


@pytest.mark.parametrize(("least_raise", "paid", "refused"), [(1, 60, []), (70, 0, ["ChannelClosed"])])
def test_an_abandoned_channel_pays_its_best_update(
    tmp_path: Path, least_raise: int, paid: int, refused: list[str]
) -> None:
    """Between its opening and its payout nothing happens to it; what a payee loses by that is said."""
    ledger = new_ledger(tmp_path / "one", least_raise=least_raise)
    backup(ledger.home, ledger.backup)
    channel = ledger.open(1)
    ledger.do(ledger.pay(ALICE, BOB, 1, 2), channel)
    ledger.now_ms = NOW + HOUR + 2 * WINDOW
    ledger.do(ledger.finalize(channel.digest))
    shown = [unshown(ledger, channel, 60), *ledger.evidence(ledger.lose()[2:])]
    report = recover(ledger.home, source=ledger.backup, evidence=[ledger.file("payee", shown)], finish=True)
    assert report is not None
    assert (report.updates, report.repeated) == (1 if paid else 0, 2)
    assert [type(error).__name__ for _, error in report.refused] == refused
    assert ledger.balance(BOB) == paid


@pytest.mark.parametrize("pays", [20, 60])
def test_a_raise_that_is_too_small_counts_once_the_channel_closes(tmp_path: Path, pays: int) -> None:
    ledger = new_ledger(tmp_path / "one", least_raise=50)
    channel, other = ledger.open(1), ledger.open(2)
    ledger.do(channel, other, ledger.pay(ALICE, BOB, 10, 1))
    backup(ledger.home, ledger.backup)
    ledger.do(ledger.pay(ALICE, CAROL, 1, 2), ledger.ask(channel.digest))
    ledger.now_ms += WINDOW
    ledger.do(ledger.finalize(channel.digest))
    shown = [unshown(ledger, one, pays) for one in (channel, other)]
    shown += ledger.evidence(ledger.lose()[5:])
    report = recover(ledger.home, source=ledger.backup, evidence=[ledger.file("some", shown)], finish=True)
    assert report is not None
    assert (report.missing, report.refused) == ([(5, 5)], []), "the payee of the open one can still show it"
    assert ledger.balance(BOB) == 10 + pays


def test_updates_that_take_nothing_from_anybody_are_not_reported(ledger: Lost) -> None:
    first, second = ledger.open(1), ledger.open(2)
    ledger.do(first, ledger.ask(first.digest))
    ledger.now_ms += WINDOW
    ledger.do(
        ledger.finalize(first.digest), ledger.pay(ALICE, BOB, 1, 2), second, ledger.update(second.digest, 40)
    )
    # The first one was paid out before its payee showed anything; of the second there is a higher one.
    shown = [unshown(ledger, first, 60), unshown(ledger, second, 70)]
    lost = ledger.lose()
    shown += ledger.evidence(entry for entry in lost[2:] if entry.seq != 6)
    report = recover(ledger.home, source=ledger.backup, evidence=[ledger.file("some", shown)], finish=True)
    assert report is not None
    assert (report.restored, report.missing, report.refused) == (3, [(6, 6)], [])
    with Store.open(ledger.database) as found:
        channels = [found.channel(one.digest) for one in (first, second)]
    assert [channel and channel.best for channel in channels] == [0, 70]


def test_a_second_recovery_goes_on_from_the_first(ledger: Lost) -> None:
    """Receipts that the first one went back behind are no news in the second."""
    everything_since(ledger)
    old = ledger.lose()
    first = ledger.evidence(old[2:5])
    void = ledger.evidence(old[7:8])
    recover(ledger.home, source=ledger.backup, evidence=[ledger.file("first", first)], finish=True)
    ledger.do(ledger.pay(ALICE, CAROL, 7, 20))
    second_backup = ledger.root / "backup2"
    backup(ledger.home, second_backup)
    ledger.do(ledger.pay(ALICE, CAROL, 8, 21))
    lost = ledger.lose()
    newest = ledger.evidence(lost[7:])
    shown = ledger.file("second", [*first, *void, *newest])
    report = recover(ledger.home, source=second_backup, evidence=[shown], finish=True)
    assert report is not None
    assert (report.epoch, report.restored, report.repeated, report.undone) == (3, 1, 0, 1)
    assert ledger.balance(CAROL) == 300 + 7 + 8
    assert [entry.kind for entry in entries_of(ledger)].count(Kind.RECOVER) == 2
    ledger.audit()


def test_no_two_recoveries_begin_the_same_number_of_epoch(ledger: Lost) -> None:
    """Not even from the same backup, with nobody who knows of the others, and their marks lost as well."""
    everything_since(ledger)
    ledger.lose()
    (ledger.home / "recovered-epoch-2.copy").mkdir()  # somebody was careful
    epochs = []
    for _ in range(4):
        report = recover(ledger.home, source=ledger.backup, finish=True)
        assert report is not None
        epochs.append(report.epoch)
        ledger.database.unlink()
        (ledger.home / "ledger.sqlite3.mark").unlink()
    assert epochs == sorted(set(epochs))


def test_a_key_that_began_another_epoch_elsewhere_is_still_the_operators(ledger: Lost) -> None:
    """From an older copy the last recovery's key is handed the ledger anew, under a smaller number."""
    ledger.lose()
    for _ in range(2):
        assert recover(ledger.home, source=ledger.backup, finish=True) is not None
        ledger.do(ledger.pay(ALICE, CAROL, 7, 20))
        held = ledger.evidence(entries_of(ledger)[-1:])
        ledger.lose()
    assert recover(ledger.home, source=ledger.backup, finish=True) is not None
    copy = ledger.root / "third"
    backup(ledger.home, copy)
    ledger.lose()
    report = recover(ledger.home, source=copy, evidence=[ledger.file("carol", held)], finish=True)
    assert report is not None
    assert (report.epoch, report.undone) == (5, 1)
    ledger.audit()


def test_a_copy_that_a_recovery_went_back_behind_is_no_backup(ledger: Lost) -> None:
    """The history went on from an older copy, as receipts of it prove; nobody equivocated."""
    ledger.do(ledger.pay(ALICE, CAROL, 300, 2), ledger.pay(ALICE, BOB, 1, 3))
    behind = ledger.root / "behind"
    backup(ledger.home, behind)
    ledger.lose()
    report = recover(ledger.home, source=ledger.backup, finish=True)
    assert report is not None
    ledger.do(ledger.pay(ALICE, BOB, 5, 4))
    lost = ledger.lose()
    shown = ledger.file("bob", with_receipt(ledger, lost[-1], epoch=report.epoch))
    with pytest.raises(ConfigError, match="no backup any more"):
        recover(ledger.home, source=behind, evidence=[shown])
    shutil.rmtree(ledger.home / "recovery")
    report = recover(ledger.home, source=ledger.backup, evidence=[shown], finish=True)
    assert report is not None
    assert report.repeated == 1
    ledger.audit()


def test_a_lost_change_of_the_operators_key_is_made_again(ledger: Lost) -> None:
    """The copy knows the first key, customers the second; the chain they follow must not break."""
    first = folder.LedgerFolder.open(ledger.home).operator_key
    folder.rotate(ledger.home, clock=lambda: ledger.now_ms)
    second = folder.LedgerFolder.open(ledger.home).operator_key
    ledger.do(ledger.pay(ALICE, CAROL, 300, 2))
    lost = ledger.lose()
    shown = ledger.file("carol", ledger.evidence(lost[3:]))
    report = recover(ledger.home, source=ledger.backup, evidence=[shown], finish=True)
    assert report is not None
    assert (report.epoch, report.repeated, ledger.balance(CAROL)) == (3, 1, 300)
    keys = operator_keys(ledger, first)
    assert [key.key for key in keys[:2]] == [first.public, second.public]
    assert (keys[1].last_seq, keys[2].resumed_after, keys[2].epoch) == (3, 3, 3)
    ledger.audit()


def entries_of(ledger: Lost) -> list[Entry]:
    with closing(connect(ledger.database, read_only=True)) as connection:
        return list(stored_entries(connection))


def header_of(ledger: Lost) -> pb.EvidenceHeader:
    rotations = [
        pb.OperatorRotation(
            body=entry.body,
            old_key=entry.signatures[:33],
            old_signature=entry.signatures[33:98],
            new_signature=entry.signatures[98:],
            seq=entry.seq,
        )
        for entry in entries_of(ledger)
        if entry.kind in (Kind.ROTATE_KEY, Kind.RECOVER)
    ]
    current = folder.LedgerFolder.open(ledger.home).operator_key.public
    return pb.EvidenceHeader(ledger_id=ledger.ledger_id, operator_key=current.data, rotations=rotations)


def operator_keys(ledger: Lost, first: PrivateKey) -> Any:
    header = header_of(ledger)
    current = folder.LedgerFolder.open(ledger.home).operator_key.public
    return follow(first.address, current, header.rotations, ledger_id=ledger.ledger_id)


def test_a_recovery_among_the_hand_overs_names_its_own_place(ledger: Lost) -> None:
    first = folder.LedgerFolder.open(ledger.home).operator_key
    ledger.lose()
    recover(ledger.home, source=ledger.backup, finish=True)
    header = header_of(ledger)
    [_, key] = operator_keys(ledger, first)
    assert (key.epoch, key.resumed_after) == (2, 2)
    header.rotations[0].seq = 9
    with pytest.raises(IdentityError, match="follow one another"):
        follow(first.address, key.key, header.rotations, ledger_id=ledger.ledger_id)


def address_of(ledger: Lost, first: PrivateKey) -> LedgerAddress:
    return LedgerAddress(first.address, "nowhere.invalid", 1, ledger.ledger_id)


def test_what_receipts_prove_offline(ledger: Lost, capsys: Any) -> None:
    first = folder.LedgerFolder.open(ledger.home).operator_key
    ledger.do(ledger.pay(ALICE, CAROL, 300, 2), ledger.pay(ALICE, CAROL, 1, 3))
    before = header_of(ledger)
    lost = ledger.lose()
    kept = ledger.evidence(lost[1:], key=first)
    path = ledger.root / "kept"
    evidence.export(path, before, kept)
    address = address_of(ledger, first)
    proof = prove([path], address)
    assert [one.receipt.seq for one in proof.acknowledged if one.receipt] == [2, 3, 4]
    assert (proof.undone, proof.equivocations) == ((), ())

    # Two copies of the ledger ran, or its operator cheats: either way, two receipts say so.
    rival = with_receipt(ledger, lost[3], request_digest=lost[3].request_digest, entry_hash=b"x" * 32)
    other = ledger.root / "other"
    evidence.export(other, before, rival)
    [(one, two)] = prove([path, other], address).equivocations
    assert one.receipt is not None
    assert two.receipt is not None
    assert (one.receipt.seq, two.receipt.seq) == (4, 4)
    words = ["ledger", "verify-receipts", str(path), str(other), "--ledger", str(address)]
    assert cli(words) == 0
    assert "TWO HISTORIES" in capsys.readouterr().out
    assert cli([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["equivocations"]) == 1

    # The rival's own file may show the same receipts with other signatures: it is one pair all the same.
    again = [replace(one, signatures=one.signatures[:-1] + b"\2") for one in rival]
    with closing(EvidenceStore(ledger.root / "kept.db")) as store:
        store.keep(before, [*kept, *rival, *again])
        assert len(store.equivocations(ledger.ledger_id)) == 1

    # Without a receipt there is only a signature, of anybody.
    update = ledger.update(b"c" * 32, 60)
    unshown = resigned(ledger, Evidence(Kind.UPDATE, update.body, update.signatures, None), STRANGER)
    evidence.export(ledger.root / "unshown", before, [unshown])
    assert cli(["ledger", "verify-receipts", str(ledger.root / "unshown"), "--ledger", str(address)]) == 0
    told = capsys.readouterr().out
    assert f"Signed by {STRANGER.address}, never shown: payment" in told
    assert "T1 says which key that is" in told

    for forge in (
        "signed by another operator", "altered", "for another request", "request not signed",
        "signed by another than its sender",
    ):  # fmt: skip
        _, make = FORGERIES[forge]
        bad = ledger.root / forge.replace(" ", "-")
        evidence.export(bad, before, make(ledger, lost[2]))
        with pytest.raises(EvidenceInvalid):
            prove([bad], address)

    # A recovery that lost them says so itself; they prove that it did.
    recover(ledger.home, source=ledger.backup, finish=True)
    evidence.export(ledger.root / "after", header_of(ledger), kept)
    proof = prove([ledger.root / "after"], address)
    assert [one.receipt.seq for one in proof.acknowledged if one.receipt] == [2]
    assert [one.receipt.seq for one in proof.undone if one.receipt] == [3, 4]

    with pytest.raises(EvidenceInvalid, match="expected operator"):
        prove([path], replace(address, operator=STRANGER.address))
    with pytest.raises(WrongLedger):
        prove([path], replace(address, ledger_id=bytes(32)))


def test_the_audit_judges_a_recovery(ledger: Lost) -> None:
    """An operator with both keys still cannot go on from elsewhere, or in an epoch that was."""
    old = folder.LedgerFolder.open(ledger.home).operator_key
    ledger.lose()
    recover(ledger.home, source=ledger.backup, finish=True)
    new = folder.LedgerFolder.open(ledger.home).operator_key
    with Store.open(ledger.database) as found:
        description = found.identity.genesis
    *before, last = entries_of(ledger)
    said = LedgerRecovery.decode(last.body)

    def check(
        message: LedgerRecovery | KeyRotation,
        first: PrivateKey = old,
        second: PrivateKey = new,
        kind: Kind = Kind.RECOVER,
    ) -> None:
        digest = message.digest(ledger.ledger_id)
        forged = journal.append(
            Head(1, 2, before[-1].hash, before[-1].time_ms),
            time_ms=last.time_ms,
            kind=kind,
            request_digest=digest,
            body=message.encode(),
            signatures=old.public.data + first.sign(digest) + second.sign(digest),
            postings=(),
        )
        audit.audit(description, [*before, forged])

    check(said)
    for forgery in (
        lambda: check(replace(said, ended_seq=1)),
        lambda: check(replace(said, ended_hash=bytes(32))),
        lambda: check(replace(said, epoch=1)),
        lambda: check(said, kind=Kind.ROTATE_KEY),
        lambda: check(KeyRotation(epoch=2, next_key=new.public)),
        lambda: check(said, first=new),
        lambda: check(said, second=old),
    ):
        with pytest.raises(audit.AuditFailed) as failed:
            forgery()
        assert failed.value.seq == 3
