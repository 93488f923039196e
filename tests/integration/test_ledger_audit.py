"""The offline audit names the first wrong entry; backups, the high-water mark, old schemas."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.cli import main
from btt.sdk.errors import BttError, ConfigError, InvariantBroken, LedgerRolledBack, StorageError
from btt.sdk.keys import PrivateKey
from btt.sdk.money import SUPPLY
from btt.sdk.signing import (
    ChannelClose,
    ChannelCommit,
    ChannelExtension,
    ChannelFinalize,
    ChannelRefund,
    ChannelUpdate,
    CloseRequest,
    KeyRotation,
    TopUp,
    Transfer,
    document_digest,
    sign,
)
from btt.services.ledger import (
    audit,
    backup,
    books,
    check,
    export,
    folder,
    genesis,
    journal,
    mark,
    proving,
    rows,
    schema,
    store,
)
from btt.services.ledger.audit import AuditFailed
from btt.services.ledger.books import Terms
from btt.services.ledger.cli import _provers
from btt.services.ledger.folder import DATABASE
from btt.services.ledger.journal import Entry, Head, Kind, Posting, Side
from btt.services.ledger.reading import connect
from btt.services.ledger.store import Store
from btt.services.ledger.verify import Operation, Verifier
from btt.services.ledger.watching import journal_entry

NOW = 1_800_000_000_000
HOUR, WINDOW = 3_600_000, 5000
ALICE, BOB, CAROL, K1, K2 = (PrivateKey(n.to_bytes(32, "big")) for n in (11, 12, 13, 21, 22))


def cli(words: list[str]) -> object:
    """Runs a command; returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(words))
    return ended.value.code


class People:
    """Signs what the tests need."""

    def __init__(self, ledger_id: bytes) -> None:
        self.id = ledger_id
        self.verifier = Verifier(ledger_id)

    def transfer(self, amount: int, name: int, *, until: int = NOW + HOUR) -> Operation:
        message = Transfer(
            sender=ALICE.address,
            recipient=BOB.address,
            amount=amount,
            request_id=name.to_bytes(16, "big"),
            valid_until_ms=until,
            memo=bytes(32),
        )
        return self.verifier.transfer(
            message.encode(), signer=ALICE.public.data, signature=sign(ALICE, message, self.id)
        )

    def open(self, name: int) -> Operation:
        t1 = ChannelCommit(
            payer=ALICE.address,
            payee=BOB.address,
            k1=K1.public,
            k2=K2.public,
            amount=100,
            expires_ms=NOW + HOUR,
            challenge_ms=WINDOW,
            flags=1,
            fee=0,
            nonce=name.to_bytes(16, "big"),
            service_ref=bytes(32),
        )
        t2 = ChannelRefund(channel=t1.channel_id(self.id), not_before_ms=t1.expires_ms)
        return self.verifier.open_channel(
            t1.encode(),
            signer=ALICE.public.data,
            signature=sign(ALICE, t1, self.id),
            refund_signature=sign(K2, t2, self.id),
        )

    def top_up(self, channel: bytes, amount: int) -> Operation:
        message = TopUp(channel=channel, amount=amount, request_id=b"t" * 16, valid_until_ms=NOW + HOUR)
        return self.verifier.top_up(
            message.encode(), signer=ALICE.public.data, signature=sign(ALICE, message, self.id)
        )

    def update(self, channel: bytes, cumulative: int) -> Operation:
        message = ChannelUpdate(channel=channel, cumulative=cumulative)
        return self.verifier.update(message.encode(), k1=K1.public.data, signature=sign(K1, message, self.id))

    def ask(self, channel: bytes) -> Operation:
        message = CloseRequest(channel=channel, request_id=b"c" * 16, valid_until_ms=NOW + HOUR)
        return self.verifier.request_close(
            message.encode(), signer=ALICE.public.data, signature=sign(ALICE, message, self.id)
        )

    def close(self, channel: bytes, capture: int) -> Operation:
        message = ChannelClose(channel=channel, capture=capture)
        t3 = ChannelUpdate(channel=channel, cumulative=capture)
        return self.verifier.close_channel(
            message.encode(),
            signer=K2.public.data,
            signature=sign(K2, message, self.id),
            cumulative=capture,
            update_signature=sign(K1, t3, self.id),
            k1=K1.public.data,
        )

    def finalize(self, channel: bytes) -> Operation:
        return self.verifier.finalize(ChannelFinalize(channel=channel).encode())


def run(ledger: Store, *operations: Operation, now_ms: int = NOW) -> None:
    batch = ledger.begin(now_ms)
    for operation in operations:
        outcome = batch.run(operation)
        assert not isinstance(outcome, BttError), outcome
    ledger.commit(batch)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A ledger with one entry of every kind: 1 to 10."""
    home = tmp_path / "ledger"
    made, identity = folder.init(
        home,
        name="test",
        supply_to=ALICE.address,
        amount=10_000,
        terms=Terms(min_challenge_ms=1000, min_lifetime_ms=1000),
        clock=lambda: NOW,
    )
    people = People(identity.ledger_id)
    with Store.open(made.database) as ledger:
        first, second = people.open(1), people.open(2)
        run(ledger, people.transfer(10, 1), first, second)
        run(ledger, people.top_up(first.digest, 50), people.update(first.digest, 60))
        run(ledger, people.ask(first.digest))
        run(ledger, people.finalize(first.digest), now_ms=NOW + WINDOW)
    folder.rotate(home, clock=lambda: NOW + WINDOW)
    with Store.open(made.database) as ledger:
        run(ledger, people.close(second.digest, 70), people.open(3), now_ms=NOW + WINDOW)
    return home


def entries_of(home: Path) -> tuple[bytes, list[Entry]]:
    with export.journal(home) as (description, entries, _):
        return description, list(entries)


def rehash(entries: list[Entry]) -> list[Entry]:
    """What an operator could write who forges everything but other people's signatures."""
    found: list[Entry] = []
    head = Head(1, 0, journal.NO_HASH, 0)
    for entry in entries:
        try:
            made = journal.append(
                Head(entry.epoch, head.seq, head.hash, head.time_ms),
                time_ms=entry.time_ms,
                kind=entry.kind,
                request_digest=entry.request_digest,
                body=entry.body,
                signatures=entry.signatures,
                postings=entry.postings,
            )
        except struct.error:  # it has no hash
            made = replace(entry, seq=head.seq + 1, prev_hash=head.hash)
        found.append(made)
        head = Head(made.epoch, made.seq, made.hash, made.time_ms)
    return found


def test_a_journal_that_holds(home: Path, tmp_path: Path, capsys: Any) -> None:
    description, entries = entries_of(home)
    assert {entry.kind for entry in entries} == set(Kind) - {Kind.RECOVER, Kind.EXTEND}
    assert entries == rehash(entries)
    report, auditor = audit.audit(description, entries)
    assert (report.entries, report.issued, report.open_channels, report.locked) == (11, 10_000, 1, 100)
    assert auditor.balances[books.user(BOB.address.data)] == 10 + 60 + 70
    exported = tmp_path / "journal"
    assert cli(["ledger", "export", str(home), str(exported), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"entries": 11}
    for place in (home, home / "ledger.sqlite3", exported):
        assert cli(["ledger", "audit", str(place), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["ok"], told["entries"], told["epoch"]) == (True, 11, 2)
    assert cli(["ledger", "audit", str(exported)]) == 0
    assert "11 entries hold" in capsys.readouterr().out


def test_after_a_hand_over_the_audit_names_the_epoch_that_began(home: Path, capsys: Any) -> None:
    folder.rotate(home, clock=lambda: NOW + WINDOW)
    with Store.open(home / "ledger.sqlite3") as ledger:
        assert ledger.head.epoch == 3
    assert cli(["ledger", "audit", str(home), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epoch"] == 3
    assert cli(["ledger", "audit", str(home)]) == 0
    assert ", epoch 3\n" in capsys.readouterr().out


def test_where_a_copy_cannot_be_written_is_told(home: Path, tmp_path: Path, capsys: Any) -> None:
    for command in ("export", "backup"):
        assert cli(["ledger", command, str(home), str(tmp_path / "nope" / "file")]) == 3
        told = " ".join(capsys.readouterr().err.split())
        assert "cannot be written: No such file or directory" in told
        assert str(tmp_path / "nope" / "file") in told.replace(" ", "")


def test_what_is_no_ledger_is_no_copy_to_recover_from(home: Path, tmp_path: Path, capsys: Any) -> None:
    (home / "ledger.sqlite3").unlink()
    (tmp_path / "film.mkv").write_bytes(b"moving pictures")
    assert cli(["ledger", "recover", str(home), "--from", str(tmp_path / "film.mkv")]) == 3
    assert "film.mkv is no ledger's database" in capsys.readouterr().err


def test_a_ledger_that_lost_a_part_is_told_how_it_gets_it_back(home: Path, tmp_path: Path) -> None:
    books = home / "ledger.sqlite3"
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "operator.key").write_text("")
    with pytest.raises(ConfigError, match=f"ledger init.*ledger recover {bare} --help"):
        Store.open(bare / "ledger.sqlite3")
    books.unlink()
    with pytest.raises(ConfigError, match=f"database is lost: see btt ledger recover {home} --help"):
        Store.open(books)
    (home / "recovery").mkdir()
    with pytest.raises(ConfigError, match=f"btt ledger recover {home} --finish"):
        Store.open(books)
    (home / "operator.key").unlink()
    with pytest.raises(ConfigError, match=r"Put operator\.key, tls\.key and tls\.pem back"):
        folder.LedgerFolder.open(home)


def test_nothing_to_audit(tmp_path: Path) -> None:
    other = tmp_path / "text"
    other.write_text("nothing")
    for place in (other, tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError), export.journal(place):
            pass


def change(index: int, **fields: Any) -> Callable[[list[Entry]], None]:
    def apply(entries: list[Entry]) -> None:
        entries[index - 1] = replace(entries[index - 1], **fields)

    return apply


def _swap(entries: list[Entry], index: int, old: PrivateKey, new: PrivateKey) -> None:
    entry = entries[index - 1]
    legs = tuple(
        replace(leg, account=books.user(new.address.data))
        if leg.account == books.user(old.address.data)
        else leg
        for leg in entry.postings
    )
    entries[index - 1] = replace(entry, postings=legs)


def _more(entries: list[Entry], index: int, extra: int) -> None:
    legs = tuple(replace(leg, amount=leg.amount + extra) for leg in entries[index - 1].postings)
    entries[index - 1] = replace(entries[index - 1], postings=legs)


def _flip(entries: list[Entry], index: int, field: str, place: int) -> None:
    data = bytearray(getattr(entries[index - 1], field))
    data[place] ^= 1
    entries[index - 1] = replace(entries[index - 1], **{field: bytes(data)})


def _proof(entries: list[Entry], index: int, signatures: bytes) -> None:
    entries[index - 1] = replace(entries[index - 1], signatures=signatures)


FORGERIES: dict[str, tuple[int, Callable[[list[Entry]], Any]]] = {
    "issue to another": (1, lambda e: _swap(e, 1, ALICE, CAROL)),
    "larger issue": (1, lambda e: _more(e, 1, 1)),
    "issue signed by nobody": (1, lambda e: _flip(e, 1, "signatures", 40)),
    "transfer to another": (2, lambda e: _swap(e, 2, BOB, CAROL)),
    "transfer of more": (2, lambda e: _more(e, 2, 1)),
    "transfer body": (2, lambda e: _flip(e, 2, "body", 45)),
    "transfer signature": (2, lambda e: _flip(e, 2, "signatures", 50)),
    "transfer digest": (2, lambda e: _flip(e, 2, "request_digest", 3)),
    "transfer with more proof than there is": (2, lambda e: _proof(e, 2, e[1].signatures + b"x")),
    "update with more proof than there is": (6, lambda e: _proof(e, 6, e[5].signatures + b"x")),
    "finalize with a proof": (8, change(8, signatures=b"x")),
    "rotation that names another key": (9, lambda e: _proof(e, 9, BOB.public.data + e[8].signatures[33:])),
    "transfer signer": (2, change(2, signatures=BOB.public.data + bytes(65))),
    "transfer twice": (12, lambda e: e.append(replace(e[1], epoch=2, time_ms=e[-1].time_ms))),
    "open without consent": (3, lambda e: _flip(e, 3, "signatures", 100)),
    "open of more": (3, lambda e: _more(e, 3, 1)),
    "top up by another": (5, change(5, signatures=BOB.public.data + bytes(65))),
    "update without k1": (6, lambda e: _flip(e, 6, "signatures", 40)),
    "update left out": (7, lambda e: e.pop(5)),
    "close request left out": (7, lambda e: e.pop(6)),
    "finalize too early": (8, change(8, time_ms=NOW + WINDOW - 1)),
    "finalize with less for the payee": (8, lambda e: _pay(e, 8, 59, 91)),
    "finalize with more for the payee": (8, lambda e: _pay(e, 8, 61, 89)),
    "rotation by another key": (9, lambda e: _flip(e, 9, "signatures", 40)),
    "rotation without the new key": (9, lambda e: _flip(e, 9, "signatures", 100)),
    "rotation left out": (9, lambda e: e.pop(8)),
    "close with more": (10, lambda e: _pay(e, 10, 71, 29)),
    "close by another": (10, lambda e: _flip(e, 10, "signatures", 40)),
    "open epoch": (11, change(11, epoch=1)),
    "kind": (11, change(11, kind=Kind.TRANSFER)),
    "account longer than any": (2, lambda e: _legs(e, 2, lambda a, b: (replace(a, account=bytes(300)), b))),
    "account without a name": (2, lambda e: _legs(e, 2, lambda a, b: (replace(a, account=b""), b))),
    "more legs than any": (2, lambda e: _legs(e, 2, lambda a, b: (a, b) * 150)),
    "longer digest": (2, lambda e: change(2, request_digest=e[1].request_digest + b"x")(e)),
    "time runs back": (11, change(11, time_ms=NOW)),
}


def _legs(entries: list[Entry], index: int, changed: Callable[..., tuple[Posting, ...]]) -> None:
    entries[index - 1] = replace(entries[index - 1], postings=changed(*entries[index - 1].postings))


def _pay(entries: list[Entry], index: int, payee: int, payer: int) -> None:
    taken, *_ = entries[index - 1].postings
    legs = (
        taken,
        Posting(books.user(BOB.address.data), Side.CREDIT, payee),
        Posting(books.user(ALICE.address.data), Side.CREDIT, payer),
    )
    entries[index - 1] = replace(entries[index - 1], postings=legs)


class Here:
    """A pool of processes that is none."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*args))
        return future

    def shutdown(self, *, cancel_futures: bool) -> None:
        pass


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("forgery", FORGERIES)
def test_the_first_wrong_entry_is_named(
    home: Path, forgery: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether signatures are verified here or were ahead, in parts of three entries."""
    monkeypatch.setattr(audit, "_SHORT", 0)
    monkeypatch.setattr(proving, "CHUNK", 3)
    monkeypatch.setattr(proving, "ProcessPoolExecutor", Here)
    description, entries = entries_of(home)
    wrong, apply = FORGERIES[forgery]
    apply(entries)
    with pytest.raises(AuditFailed) as failed:
        audit.audit(description, rehash(entries), workers=workers)
    assert failed.value.seq == wrong


def test_other_processes_verify_a_long_journal(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_SHORT", 1)
    monkeypatch.setattr(proving, "CHUNK", 4)
    monkeypatch.setattr(Verifier, "_holds", lambda *_: False)
    description, entries = entries_of(home)
    report, _ = audit.audit(description, entries[:8], workers=1)
    assert report.entries == 8
    with pytest.raises(AuditFailed) as failed:
        audit.audit(description, entries[:8])
    assert failed.value.seq == 2


@pytest.mark.parametrize(("cores", "processes"), [(None, 0), (1, 0), (2, 1), (3, 2), (64, 2)])
def test_the_audit_keeps_a_core_for_itself(
    cores: int | None, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert _provers() == processes


def test_a_proof_of_another_signature_proves_nothing(home: Path) -> None:
    description, entries = entries_of(home)
    ledger_id = genesis.ledger_id(description)
    proven = proving.claims(ledger_id, [(entries[1].kind, entries[1].body, entries[1].signatures, b"")])
    assert len(proven) == 1
    _flip(entries, 2, "signatures", 50)
    auditor = audit.Auditor(description)
    auditor.believe(proven)
    auditor.take(entries[0])
    with pytest.raises(AuditFailed, match="not signed"):
        auditor.take(entries[1])


def test_an_entry_that_cannot_be_read_is_named_after_those_before_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "_SHORT", 0)
    monkeypatch.setattr(proving, "ProcessPoolExecutor", Here)
    description, entries = entries_of(home)

    def damaged(upto: int) -> Iterator[Entry]:
        yield from entries[:upto]
        raise ValueError("damaged")

    for workers in (0, 2):
        with pytest.raises(AuditFailed, match="cannot be read") as failed:
            audit.audit(description, damaged(5), workers=workers)
        assert failed.value.seq == 6


@pytest.mark.parametrize("index", [1, 4, 11])
@pytest.mark.parametrize("field", ["hash", "prev_hash", "request_digest"])
def test_a_broken_chain_is_named(home: Path, index: int, field: str) -> None:
    description, entries = entries_of(home)
    _flip(entries, index, field, 3)
    with pytest.raises(AuditFailed) as failed:
        audit.audit(description, entries)
    assert failed.value.seq == index


def test_another_ledgers_journal(home: Path) -> None:
    description, entries = entries_of(home)
    with pytest.raises(AuditFailed) as failed:
        audit.audit(description[:-1] + bytes([description[-1] ^ 1]), entries)
    assert failed.value.seq == 1
    with pytest.raises(AuditFailed):
        audit.audit(description, [])
    for damaged in (b"", b"x", description[:-1], description + b"\0"):
        with pytest.raises(ConfigError):
            audit.audit(damaged, entries)


def test_a_repeated_request_is_found_among_many(home: Path) -> None:
    """A replay that the rules alone would let pass: its account has the money, and it is in time."""
    description, entries = entries_of(home)
    again = replace(entries[1], time_ms=entries[2].time_ms)
    with pytest.raises(AuditFailed, match="carried out before") as failed:
        audit.audit(description, rehash([*entries[:2], again, *entries[2:]]))
    assert failed.value.seq == 3


def test_an_operator_that_breaks_its_own_rules(home: Path) -> None:
    """He signs with his own key what the rules forbid him."""
    description, entries = entries_of(home)
    operator = next(PrivateKey(bytes.fromhex(path.read_text())) for path in home.glob("operator.T*.key"))
    ledger = ledger_id(home)

    issue, _ = genesis.issue(ALICE.address.data, SUPPLY + 1)
    digest = document_digest(genesis.DOCUMENT, ledger, issue)
    legs = tuple(replace(leg, amount=SUPPLY + 1) for leg in entries[0].postings)
    first = replace(
        entries[0],
        body=issue,
        request_digest=digest,
        signatures=operator.public.data + operator.sign(digest),
        postings=legs,
    )
    with pytest.raises(AuditFailed) as failed:
        audit.audit(description, rehash([first, *entries[1:]]))
    assert failed.value.seq == 1

    skipped = KeyRotation(epoch=3, next_key=BOB.public)
    digest = skipped.digest(ledger)
    proof = operator.public.data + operator.sign(digest) + BOB.sign(digest)
    rotation = replace(entries[8], body=skipped.encode(), request_digest=digest, signatures=proof)
    with pytest.raises(AuditFailed) as failed:
        audit.audit(description, rehash([*entries[:8], rotation, *entries[9:]]))
    assert failed.value.seq == 9

    second = replace(entries[0], time_ms=entries[1].time_ms)
    with pytest.raises(AuditFailed) as failed:
        audit.audit(description, rehash([*entries[:1], second]))
    assert failed.value.seq == 2


def test_an_export_that_does_not_fit_on_the_disk_leaves_nothing(
    home: Path, tmp_path: Path, capsys: Any
) -> None:
    target = tmp_path / "out" / "journal"
    target.parent.mkdir()
    (target.parent / "journal.new").write_text("somebody's")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(connect(home / DATABASE, read_only=True)) as reader:
        reader.execute("SELECT count(*) FROM sqlite_master").fetchone()  # so that its index file is there
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            status = cli(["ledger", "export", str(home), str(target)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = capsys.readouterr().err
    assert status == 1
    assert str(target) in told
    assert "cannot be written: File too large" in told
    assert [path.name for path in target.parent.iterdir()] == ["journal.new"]
    assert cli(["ledger", "export", str(home), str(target)]) == 0
    assert sorted(path.name for path in target.parent.iterdir()) == ["journal", "journal.new"]


def test_a_backup_without_room_says_where(home: Path, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "out" / "copy.db"
    target.parent.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(connect(home / DATABASE, read_only=True)) as reader:
        reader.execute("SELECT count(*) FROM sqlite_master").fetchone()  # so that its index file is there
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            status = cli(["ledger", "backup", str(home), str(target)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    assert f"The books could not be copied to {target}: disk I/O error." in capsys.readouterr().err
    assert not list(target.parent.iterdir())
    assert cli(["ledger", "backup", str(home), str(target)]) == 0


def test_an_audit_without_room_says_whose_files_do_not_fit(home: Path, tmp_path: Path, capsys: Any) -> None:
    target, room = tmp_path / "journal", tmp_path / "room"
    room.mkdir()
    export.export(home, target)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tempfile.tempdir", str(room))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            status = cli(["ledger", "audit", str(target)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = capsys.readouterr().err
    assert status == 1
    assert "The audit cannot write its temporary files: File too large." in told
    assert not list(room.iterdir())
    assert cli(["ledger", "audit", str(target)]) == 0


def test_a_damaged_export(home: Path, tmp_path: Path, capsys: Any) -> None:
    description, entries = entries_of(home)
    path = tmp_path / "journal"
    with path.open("wb") as file:
        export.write(file, description, map(journal_entry, entries[:5]))
        file.write(b"\0\0\0\5\xff\xff\xff\xff\xff")
    assert cli(["ledger", "audit", str(path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["wrong_entry"]) == (False, 6)
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    assert cli(["ledger", "audit", str(path), "--json"]) == 1
    path.write_bytes(data[:-9] + b"\xff\xff\xff\xff")
    assert cli(["ledger", "audit", str(path), "--json"]) == 1
    unknown = journal_entry(entries[0])
    unknown.kind = pb.EntryKind.ValueType(77)
    with path.open("wb") as file:
        export.write(file, description, [unknown])
    capsys.readouterr()
    assert cli(["ledger", "audit", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["wrong_entry"] == 1
    for head in (b"", b"\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x09short"):
        path.write_bytes(export.MAGIC + head)
        assert cli(["ledger", "audit", str(path), "--json"]) not in (0, None)
        assert json.loads(capsys.readouterr().out)["error"]["reason"] == "CONFIG"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE accounts SET balance = balance + 1 WHERE acct = 2",
        "INSERT INTO accounts (acct, id, balance, locked) VALUES (99, x'01aa', 5, 0)",
        "UPDATE channels SET best = 5, best_signature = zeroblob(65) WHERE phase = 1",
        "UPDATE head SET seq = seq - 1",
    ],
)
def test_tables_that_say_something_else(home: Path, statement: str, capsys: Any) -> None:
    with closing(sqlite3.connect(home / "ledger.sqlite3", isolation_level=None)) as connection:
        connection.execute(statement)
    assert cli(["ledger", "audit", str(home), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["wrong_entry"]) == (False, None)


class TestBackup:
    def test_while_the_ledger_runs(self, home: Path, tmp_path: Path, capsys: Any) -> None:
        copy = tmp_path / "copy.sqlite3"
        people = People(ledger_id(home))
        with Store.open(home / "ledger.sqlite3") as ledger:
            run(ledger, people.transfer(1, 5), now_ms=NOW + WINDOW)
            assert cli(["ledger", "backup", str(home), str(copy), "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["head_seq"] == 12
            run(ledger, people.transfer(1, 6), now_ms=NOW + WINDOW)
        assert copy.stat().st_mode & 0o777 == 0o600
        assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.sqlite3", "ledger"]
        assert cli(["ledger", "audit", str(copy)]) == 0
        with pytest.raises(ConfigError, match="exists"):
            backup.backup(home, copy)
        with pytest.raises(ConfigError, match="no ledger"):
            backup.backup(tmp_path / "none", tmp_path / "other")

    def test_a_copy_of_broken_books_is_none(self, home: Path, tmp_path: Path) -> None:
        with closing(sqlite3.connect(home / "ledger.sqlite3", isolation_level=None)) as connection:
            connection.execute("UPDATE accounts SET balance = balance + 1 WHERE acct = 2")
        with pytest.raises(InvariantBroken):
            backup.backup(home, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()


def ledger_id(home: Path) -> bytes:
    with closing(sqlite3.connect(home / "ledger.sqlite3")) as connection:
        found: bytes = connection.execute("SELECT ledger_id FROM ledger").fetchone()[0]
        return found


@pytest.mark.parametrize("command", ["serve", "recover"])
def test_a_lock_that_cannot_be_made_is_a_failing_disk(home: Path, command: str, capsys: Any) -> None:
    lock = home / f"{DATABASE}.lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()
    assert cli(["ledger", command, str(home)]) == 1
    assert f"The ledger's lock {lock} cannot be taken: Is a directory." in capsys.readouterr().err


def test_a_file_system_without_locks_is_not_another_process(
    home: Path, monkeypatch: Any, capsys: Any
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(store.fcntl, "flock", refuse)
    assert cli(["ledger", "serve", str(home)]) == 1
    assert "cannot be taken: No locks available." in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["init", "{}", "--name", "new", "--max-open-channels", str(2**63)],
        ["serve", "{}", "--listen", "127.0.0.1:²"],
    ],
)
def test_a_number_that_is_none_is_a_usage_error(tmp_path: Path, words: list[str]) -> None:
    assert cli(["ledger", *(word.format(tmp_path / "new") for word in words)]) == 2
    assert not list(tmp_path.iterdir())


class TestMark:
    @pytest.fixture
    def people(self, home: Path) -> People:
        return People(ledger_id(home))

    def test_a_restored_copy_does_not_start(self, home: Path, tmp_path: Path, people: People) -> None:
        copy = tmp_path / "copy"
        backup.backup(home, copy)
        database = home / "ledger.sqlite3"
        with Store.open(database) as ledger:
            run(ledger, people.transfer(1, 5), now_ms=NOW + WINDOW)
        for leftover in home.glob("ledger.sqlite3-*"):
            leftover.unlink()
        newest = database.read_bytes()
        shutil.copy(copy, database)
        with pytest.raises(LedgerRolledBack, match="entry 11, but this ledger had come to entry 12"):
            Store.open(database)
        with pytest.raises(LedgerRolledBack):
            folder.rotate(home, clock=lambda: NOW)
        database.write_bytes(newest)
        Store.open(database).close()

    def test_another_history_of_the_same_length(self, home: Path, tmp_path: Path, people: People) -> None:
        database, other = home / "ledger.sqlite3", tmp_path / "other"
        shutil.copytree(home, other)
        for place, name in ((home, 5), (other, 6)):
            with Store.open(place / "ledger.sqlite3") as ledger:
                run(ledger, people.transfer(1, name), now_ms=NOW + WINDOW)
        shutil.copy(other / "ledger.sqlite3", database)
        with pytest.raises(LedgerRolledBack, match="another history"):
            Store.open(database)

    def test_a_lost_database_is_not_replaced(self, home: Path) -> None:
        (home / "ledger.sqlite3").unlink()
        with pytest.raises(ConfigError, match="its database is gone"):
            folder.init(home, name="test")

    def test_it_costs_one_write_an_interval(self, tmp_path: Path) -> None:
        clock, path = [0.0], tmp_path / "mark"
        writer = mark.MarkWriter(path, interval=1.0, clock=lambda: clock[0])
        for seq in range(1, 11):
            writer.note(Head(1, seq, bytes([seq]) * 32, NOW))
        found = mark.read(path)
        assert found is not None
        assert found.seq == 1
        assert writer.dirty
        clock[0] = 1.0
        writer.note(Head(1, 11, b"x" * 32, NOW))
        assert mark.read(path) == mark.Mark(1, 11, NOW, b"x" * 32)
        writer.note(Head(1, 12, b"y" * 32, NOW))
        writer.close()
        assert mark.read(path) == mark.Mark(1, 12, NOW, b"y" * 32)

    def test_a_torn_write_leaves_the_mark_before(self, tmp_path: Path) -> None:
        path = tmp_path / "mark"
        writer = mark.MarkWriter(path, interval=0.0)
        for seq in (1, 2, 3):
            writer.note(Head(1, seq, bytes(32), NOW))
        writer.close()
        data = bytearray(path.read_bytes())
        data[20] ^= 1  # in the slot of 3
        path.write_bytes(data)
        found = mark.read(path)
        assert found is not None
        assert found.seq == 2
        path.write_bytes(b"")
        with pytest.raises(StorageError, match="damaged"):
            mark.read(path)
        path.unlink()
        assert mark.read(path) is None

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_the_first_write_after_a_start_leaves_the_newest_mark(self, tmp_path: Path, count: int) -> None:
        path = tmp_path / "mark"
        writer = mark.MarkWriter(path, interval=0.0)
        for seq in range(1, count + 1):
            writer.note(Head(1, seq, bytes(32), NOW))
        writer.close()
        before = path.read_bytes().ljust(1024, b"\0")
        writer = mark.MarkWriter(path)
        writer.note(Head(1, 9, bytes(32), NOW))
        writer.close()
        after = path.read_bytes().ljust(1024, b"\0")
        path.write_bytes(bytes(0 if old != new else new for old, new in zip(before, after, strict=True)))
        found = mark.read(path)  # what it wrote was torn
        assert found is not None
        assert found.seq == count

    def test_it_is_on_the_disk(self, tmp_path: Path, monkeypatch: Any) -> None:
        synced: list[int] = []
        real = os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: (synced.append(file), real(file))[1])
        writer = mark.MarkWriter(tmp_path / "mark")
        writer.note(Head(1, 1, bytes(32), NOW))
        assert len(synced) == 1
        writer.close()

    def test_a_mark_that_cannot_be_written_fails_no_commit(
        self, home: Path, people: People, monkeypatch: Any
    ) -> None:
        with Store.open(home / "ledger.sqlite3") as ledger:

            def full(*_: object) -> int:
                raise OSError(28, "No space left on device")

            assert ledger.mark is not None
            ledger.mark._next = 0.0
            with monkeypatch.context() as patch:
                patch.setattr(mark.os, "pwrite", full)
                run(ledger, people.transfer(1, 5), now_ms=NOW + WINDOW)
            assert ledger.head.seq == 12
            assert ledger.mark.dirty
        found = mark.read(mark.path_of(home / "ledger.sqlite3"))
        assert found is not None
        assert found.seq == 12


def check_events(database: Path) -> None:
    """Pages of any size, from anywhere, tell everyone all that concerns him, in order and once."""
    with closing(connect(database)) as connection:
        entries = list(check.entries(connection))
        opened = {
            e.request_digest: ChannelCommit.decode(e.body) for e in entries if e.kind is Kind.OPEN_CHANNEL
        }

        def channel_of(entry: Entry) -> bytes:
            return next((c for c in (entry.request_digest, entry.body[:32]) if c in opened), b"")

        def concerns(entry: Entry, key: PrivateKey) -> bool:
            t1 = opened.get(channel_of(entry))
            return any(leg.account == books.user(key.address.data) for leg in entry.postings) or (
                t1 is not None and (key.address in (t1.payer, t1.payee) or key.public == t1.k2)
            )

        for key in (ALICE, BOB, CAROL, K1, K2):
            told = [(e.seq, e.hash, channel_of(e)) for e in entries if concerns(e, key)]
            assert bool(told) is (key in (ALICE, BOB, K2))
            for after, most in product(range(len(entries) + 1), (1, 2, 256)):
                page = rows.read_events(
                    connection, address=key.address.data, k2=key.public.data, after=after, most=most
                )
                wanted = [event for event in told if event[0] > after][:most]
                assert [(seq, own_hash, channel) for seq, _, _, _, own_hash, channel in page] == wanted


def test_everyone_is_told_all_that_concerns_him(home: Path) -> None:
    with Store.open(home / "ledger.sqlite3") as ledger:
        people = People(ledger.identity.ledger_id)
        later = ChannelExtension(channel=people.open(3).digest, deadline_ms=NOW + HOUR + WINDOW)
        extended = people.verifier.extension(
            later.encode(), signer=CAROL.public.data, signature=sign(CAROL, later, people.id)
        )
        run(ledger, people.open(4), people.update(people.open(4).digest, 5), now_ms=NOW + WINDOW)
        run(ledger, extended, now_ms=NOW + HOUR)
    Store.open(home / "ledger.sqlite3").close()
    check_events(home / "ledger.sqlite3")


def test_a_page_costs_what_is_on_it_however_many_channels_there_are(home: Path) -> None:
    def cost(after: int, most: int) -> int:
        """Steps of SQLite's machine."""
        steps: list[None] = []
        connection.set_progress_handler(lambda: steps.append(None), 1)
        rows.read_events(connection, address=BOB.address.data, k2=K2.public.data, after=after, most=most)
        connection.set_progress_handler(None, 1)
        return len(steps)

    with (
        Store.open(home / "ledger.sqlite3") as ledger,
        closing(connect(home / "ledger.sqlite3")) as connection,
    ):
        people = People(ledger.identity.ledger_id)
        few = cost(0, 3), cost(ledger.head.seq - 1, 256), cost(ledger.head.seq, 256)
        run(ledger, *(people.open(name) for name in range(4, 44)), now_ms=NOW + WINDOW)
        assert (cost(0, 3), cost(ledger.head.seq - 1, 256), cost(ledger.head.seq, 256)) == few


class TestSchema:
    @pytest.fixture
    def old(self, tmp_path: Path, monkeypatch: Any) -> Iterator[Path]:
        """A ledger of version 1: an open channel, a closed one."""
        path = tmp_path / "old.sqlite3"
        store.create(
            path,
            name="old",
            operator_key=PrivateKey(bytes(31) + b"\1"),
            supply_to=ALICE.address,
            amount=10_000,
            clock=lambda: NOW,
            terms=Terms(min_challenge_ms=1000, min_lifetime_ms=1000),
        )
        with Store.open(path) as ledger:
            people = People(ledger.identity.ledger_id)
            first = people.open(1)
            run(ledger, people.transfer(5, 1), first, people.open(2))
            run(ledger, people.close(first.digest, 10))
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for index in ("postings_by_account", "entries_by_channel", "channels_by_abandonment"):
                connection.execute(f"DROP INDEX {index}")
            connection.execute("DROP TABLE concerns")
            connection.execute("CREATE INDEX channels_by_payer ON channels (payer, phase)")
            connection.execute("CREATE INDEX channels_by_payee ON channels (payee, phase)")
            connection.execute("ALTER TABLE accounts DROP COLUMN open_channels")
            for column in ("max_locked", "max_open_channels", "min_update_delta"):
                connection.execute(f"ALTER TABLE ledger DROP COLUMN {column}")
            connection.execute("PRAGMA user_version = 1")
        return path

    def test_an_old_database_is_brought_up_to_date(self, old: Path) -> None:
        with Store.open(old) as ledger:
            people = People(ledger.identity.ledger_id)
            account = ledger.account(books.user(ALICE.address.data))
            assert account is not None
            assert (account.open_channels, account.locked) == (1, 100)
            assert ledger.identity.terms.min_update_delta == 1
            run(ledger, people.transfer(5, 2))
        Store.open(old).close()
        check_events(old)

    def test_a_migration_that_fails_changes_nothing(self, old: Path, monkeypatch: Any) -> None:
        statements = (*schema.MIGRATIONS[1][:3], "THIS IS NO SQL")
        with monkeypatch.context() as patch:
            patch.setitem(schema.MIGRATIONS, 1, statements)
            with pytest.raises(StorageError):
                Store.open(old)
        with closing(sqlite3.connect(old)) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        Store.open(old).close()


def test_an_audit_of_nothing_says_what_to_name_instead(tmp_path, capsys):
    for wrong in (tmp_path / "nothing", tmp_path):
        assert cli(["ledger", "audit", str(wrong)]) != 0
        told = " ".join(capsys.readouterr().err.split())
        assert "There is no journal at" in told
        assert "btt ledger export" in told
    (tmp_path / "text").write_text("no journal")
    assert cli(["ledger", "audit", str(tmp_path / "text")]) != 0
    assert "btt ledger export" in " ".join(capsys.readouterr().err.split())
    # A ledger whose database is lost has its mark still.
    mark.path_of(tmp_path / "ledger.sqlite3").write_bytes(b"")
    assert cli(["ledger", "audit", str(tmp_path)]) != 0
    assert f"btt ledger recover {tmp_path}" in "".join(capsys.readouterr().err.split("\n"))
