"""The books on a real disk: durable or not there, always consistent, one writer."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from btt.sdk.errors import BttError, ConfigError, InvariantBroken, StorageError
from btt.sdk.keys import PrivateKey
from btt.sdk.signing import ChannelClose, ChannelCommit, ChannelRefund, ChannelUpdate, Transfer, sign
from btt.services.ledger import books, genesis, store
from btt.services.ledger.books import Terms
from btt.services.ledger.journal import EntryRef, Kind, Posting, Side
from btt.services.ledger.overlay import Batch
from btt.services.ledger.reading import Reader
from btt.services.ledger.store import Store
from btt.services.ledger.verify import Operation, Verifier

NOW = 1_800_000_000_000
HOUR = 3_600_000
OPERATOR, ALICE, BOB, K1, K2 = (PrivateKey(n.to_bytes(32, "big")) for n in (1, 11, 12, 21, 22))
ISSUE = 1_000_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "ledger.sqlite3"
    store.create(
        made,
        name="test",
        operator_key=OPERATOR,
        supply_to=ALICE.address,
        amount=ISSUE,
        clock=lambda: NOW,
        random=bytes,
        terms=Terms(min_challenge_ms=1000, min_lifetime_ms=1000),
    )
    return made


@pytest.fixture
def ledger(path: Path) -> Iterator[Store]:
    with Store.open(path) as opened:
        yield opened


def transfer(ledger_id: bytes, amount: int, *, name: int = 1, until: int = NOW + HOUR) -> Operation:
    message = Transfer(
        sender=ALICE.address,
        recipient=BOB.address,
        amount=amount,
        request_id=name.to_bytes(16, "big"),
        valid_until_ms=until,
        memo=bytes(32),
    )
    signature = sign(ALICE, message, ledger_id)
    return Verifier(ledger_id).transfer(message.encode(), signer=ALICE.public.data, signature=signature)


def opening(ledger_id: bytes, amount: int = 100, *, name: int = 0) -> Operation:
    t1 = ChannelCommit(
        payer=ALICE.address,
        payee=BOB.address,
        k1=K1.public,
        k2=K2.public,
        amount=amount,
        expires_ms=NOW + 24 * HOUR,
        challenge_ms=5000,
        flags=1,
        fee=0,
        nonce=name.to_bytes(16, "big"),
        service_ref=bytes(32),
    )
    t2 = ChannelRefund(channel=t1.channel_id(ledger_id), not_before_ms=t1.expires_ms)
    return Verifier(ledger_id).open_channel(
        t1.encode(),
        signer=ALICE.public.data,
        signature=sign(ALICE, t1, ledger_id),
        refund_signature=sign(K2, t2, ledger_id),
    )


def close(ledger_id: bytes, channel: bytes, capture: int) -> Operation:
    message = ChannelClose(channel=channel, capture=capture)
    update = ChannelUpdate(channel=channel, cumulative=capture)
    return Verifier(ledger_id).close_channel(
        message.encode(),
        signer=K2.public.data,
        signature=sign(K2, message, ledger_id),
        cumulative=capture,
        update_signature=sign(K1, update, ledger_id),
        k1=K1.public.data,
    )


def run(ledger: Store, *operations: Operation, now_ms: int = NOW) -> list[EntryRef | BttError]:
    batch = ledger.begin(now_ms)
    outcomes = [batch.run(operation) for operation in operations]
    ledger.commit(batch)
    return outcomes


def balance(ledger: Store, owner: PrivateKey) -> int:
    account = ledger.account(books.user(owner.address.data))
    return account.balance if account else 0


def fill(path: Path) -> None:
    """A transfer, an open channel and a closed one."""
    with Store.open(path) as ledger:
        ledger_id = ledger.identity.ledger_id
        first = opening(ledger_id, 100)
        run(ledger, transfer(ledger_id, 10), first, opening(ledger_id, 200, name=1))
        run(ledger, close(ledger_id, first.digest, 60))


def test_create_and_open(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(p.name for p in path.parent.iterdir()) == ["ledger.sqlite3"]
    with Store.open(path) as ledger:
        assert ledger.identity.name == "test"
        assert ledger.identity.unbacked
        assert (ledger.head.seq, ledger.head.epoch, ledger.head.time_ms) == (1, 1, NOW)
        assert balance(ledger, ALICE) == ISSUE
        with closing(Reader(path)) as reader:
            _, totals = reader.head()
        assert (totals.issued, totals.accounts, totals.channels) == (ISSUE, ISSUE, 0)


def test_the_id_is_the_hash_of_what_the_ledger_is(path: Path, tmp_path: Path) -> None:
    def other(name: str, key: PrivateKey, random: Callable[[int], bytes]) -> bytes:
        return store.create(
            tmp_path / f"{name}.{key.secret[-1]}.{random(1).hex()}",
            name=name,
            operator_key=key,
            supply_to=ALICE.address,
            amount=ISSUE,
            clock=lambda: NOW,
            random=random,
        ).ledger_id

    with Store.open(path) as ledger:
        same = ledger.identity.ledger_id
    assert other("test", OPERATOR, bytes) == same
    assert len({same, other("text", OPERATOR, bytes), other("test", BOB, bytes)}) == 3
    assert other("test", OPERATOR, lambda n: b"\1" * n) != same


@pytest.mark.parametrize("name", ["", "a\nb", "\udcff", 33 * "ü"])
def test_a_name_that_does_not_do(name: str) -> None:
    with pytest.raises(ConfigError, match="printable and takes 1 to 64 bytes"):
        genesis.describe(name, operator_key=OPERATOR.public.data, nonce=bytes(32))
    assert genesis.describe(32 * "ü", operator_key=OPERATOR.public.data, nonce=bytes(32))


def test_create_never_overwrites_and_forgets_broken_attempts(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="already"):
        create_again(path)
    fresh = tmp_path / "fresh"
    for end in ("", "-wal", "-shm"):
        fresh.with_name(f"fresh.new{end}").write_bytes(b"half written")
    create_again(fresh)
    Store.open(fresh).close()
    with pytest.raises(ConfigError, match="issue"):
        create_again(tmp_path / "none", amount=0)


def create_again(path: Path, amount: int = 1) -> None:
    store.create(
        path, name="x", operator_key=OPERATOR, supply_to=ALICE.address, amount=amount, clock=lambda: NOW
    )


def test_commits_survive_and_reads_see_only_them(path: Path) -> None:
    with Store.open(path) as ledger, closing(Reader(path)) as reader:
        batch = ledger.begin(NOW)
        batch.run(transfer(ledger.identity.ledger_id, 10))
        assert reader.account(BOB.address.data) is None
        ledger.commit(batch)
        account = reader.account(BOB.address.data)
        assert account is not None
        assert account.balance == 10
    with Store.open(path) as ledger:
        assert (balance(ledger, ALICE), balance(ledger, BOB)) == (ISSUE - 10, 10)


def test_repeats_are_known_after_a_restart(path: Path) -> None:
    with Store.open(path) as ledger:
        ledger_id = ledger.identity.ledger_id
        operations = [transfer(ledger_id, 10), opening(ledger_id), transfer(ledger_id, ISSUE, name=2)]
        first = run(ledger, *operations)
    with Store.open(path) as ledger:
        batch = ledger.begin(NOW + 1)
        again = [batch.run(operation) for operation in operations]
        assert batch.empty
    assert again[:2] == first[:2]
    assert str(again[2]) == str(first[2])


def test_one_process_at_a_time(path: Path) -> None:
    with Store.open(path), pytest.raises(ConfigError, match="Another process"):
        Store.open(path)
    Store.open(path).close()


def test_a_writer_that_lost_its_lease_cannot_commit(ledger: Store, path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("UPDATE head SET writer = x'00'")
    with pytest.raises(InvariantBroken, match="Another writer"):
        run(ledger, transfer(ledger.identity.ledger_id, 10))
    with closing(Reader(path)) as reader:
        assert reader.account(BOB.address.data) is None


def test_disk_settings(ledger: Store) -> None:
    connection = ledger._connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)


@pytest.mark.parametrize("table", ["entries", "postings"])
@pytest.mark.parametrize("statement", ["DELETE FROM {}", "UPDATE {} SET seq = seq + 1"])
def test_the_journal_is_append_only(path: Path, table: str, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.IntegrityError, match="append"):
        connection.execute(statement.format(table))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET body = zeroblob(92) WHERE seq = 2",
        "UPDATE entries SET hash = zeroblob(32) WHERE seq = 3",
        "UPDATE entries SET time_ms = time_ms - 1 WHERE seq = 3",
        "UPDATE postings SET amount = amount + 1 WHERE seq = 2",
        "UPDATE postings SET acct = 2 WHERE seq = 2 AND leg = 1",
        "DELETE FROM postings WHERE seq = 5",
        (
            "DELETE FROM postings WHERE seq = 5; DELETE FROM entries WHERE seq = 5; "
            "UPDATE channels SET closed_seq = 4 WHERE closed_seq = 5"
        ),
        "UPDATE accounts SET balance = balance + 1 WHERE acct = 2",
        "UPDATE accounts SET locked = locked + 1 WHERE acct = 2",
        "UPDATE accounts SET open_channels = open_channels + 1 WHERE acct = 2",
        "UPDATE channels SET expires_ms = expires_ms + 1",
        "UPDATE channels SET challenge_ms = challenge_ms + 1",
        "UPDATE channels SET phase = 2, deadline_ms = 5 WHERE phase = 1",
        "UPDATE epochs SET operator_key = (SELECT k1 FROM channels LIMIT 1)",
        "INSERT INTO accounts VALUES (99, x'01aa', 5, 0, NULL, 0, 0)",
        "UPDATE channels SET deposit = deposit + 1 WHERE phase = 1",
        "UPDATE channels SET best = 5, best_signature = zeroblob(65), captured = 5 WHERE phase = 1",
        "UPDATE channels SET best = 61, captured = 61 WHERE phase = 3",
        "UPDATE channels SET opened_seq = 1",
        "UPDATE channels SET k1 = k2",
        "UPDATE channels SET payee = payer",
        "UPDATE channels SET phase = 1, closed_seq = NULL WHERE phase = 3",
        "DELETE FROM channels WHERE phase = 3",
        "UPDATE head SET seq = seq - 1",
        "UPDATE head SET hash = zeroblob(32)",
        "UPDATE head SET issued = issued + 1, accounts = accounts + 1",
        "UPDATE head SET closed_channels = 0",
        "UPDATE ledger SET genesis = x'00'",
        "DELETE FROM concerns WHERE seq = 5",
        "UPDATE concerns SET party = x'00' WHERE seq = 5 AND length(party) = 33",
        "INSERT INTO concerns VALUES (x'00', 5)",
    ],
)
def test_changed_books_are_refused_at_the_start(path: Path, statement: str) -> None:
    fill(path)
    Store.open(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for table in ("entries", "postings"):
            connection.execute(f"DROP TRIGGER {table}_stay")
            connection.execute(f"DROP TRIGGER {table}_remain")
        before = connection.total_changes
        connection.executescript(statement)
        assert connection.total_changes > before
    with pytest.raises(InvariantBroken):
        Store.open(path)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE accounts SET balance = -1 WHERE acct = 2",
        "UPDATE accounts SET balance = 990000000000000001 WHERE acct = 2",
        "UPDATE accounts SET balance = 'x' WHERE acct = 2",
        "UPDATE channels SET captured = best + 1",
        "UPDATE channels SET best = deposit + 1",
        "UPDATE head SET accounts = accounts - 1",
        "INSERT INTO postings VALUES (2, 7, 2, 0, 0)",
        (
            "INSERT INTO entries SELECT 99, time_ms, epoch, kind, request_digest, body, signatures, "
            "prev_hash, hash FROM entries WHERE seq = 2"
        ),
        "INSERT INTO postings VALUES (2, 7, 12345, 0, 1)",
    ],
)
def test_tables_refuse_what_cannot_be(path: Path, statement: str) -> None:
    fill(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute(statement)


def _overdraw(batch: Batch) -> None:
    user = books.user(ALICE.address.data)
    batch.accounts[user] = replace(batch.accounts[user], balance=-1)


def _gift(batch: Batch) -> None:
    user = books.user(BOB.address.data)
    batch.accounts[user] = replace(batch.accounts[user], balance=batch.accounts[user].balance + 1)


def _lopsided(batch: Batch) -> None:
    entry = batch.entries[0]
    legs = (entry.postings[0], replace(entry.postings[1], amount=entry.postings[1].amount + 1))
    batch.entries[0] = replace(entry, postings=legs)
    _gift(batch)


def _unlocked(batch: Batch) -> None:
    user = books.user(ALICE.address.data)
    batch.accounts[user] = replace(batch.accounts[user], locked=0)


def _hollow(batch: Batch) -> None:
    ((name, channel),) = batch.channels.items()
    batch.channels[name] = replace(channel, deposit=channel.deposit + 1)


def _twice(batch: Batch) -> None:
    batch.entries.append(replace(batch.entries[0], seq=batch.head.seq + 1))


def _theft(batch: Batch) -> None:
    """All sums stay as they are, but the postings do not say so."""
    user = books.user(ALICE.address.data)
    batch.accounts[user] = replace(batch.accounts[user], balance=batch.accounts[user].balance - 1)
    _gift(batch)


def _two_wrongs(batch: Batch) -> None:
    """Two entries that are off by one in opposite directions."""
    for index, change in ((0, 1), (2, -1)):
        entry = batch.entries[index]
        debit, credit = entry.postings
        legs = (debit, replace(credit, amount=credit.amount + change))
        batch.entries[index] = replace(entry, postings=legs)


DEFECTS = [_overdraw, _gift, _lopsided, _unlocked, _hollow, _twice, _theft, _two_wrongs]


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_above_is_rolled_back(path: Path, ledger: Store, defect: Callable[[Batch], None]) -> None:
    ledger_id = ledger.identity.ledger_id
    batch = ledger.begin(NOW)
    batch.run(transfer(ledger_id, 10))
    batch.run(opening(ledger_id))
    batch.run(transfer(ledger_id, 10, name=2))
    defect(batch)
    with pytest.raises(InvariantBroken):
        ledger.commit(batch)
    with closing(Reader(path)) as reader:
        head, totals = reader.head()
        assert (head.seq, totals.accounts) == (1, ISSUE)
        assert reader.account(BOB.address.data) is None


def test_a_balance_that_was_negative_for_a_moment_is_found(path: Path) -> None:
    with Store.open(path) as ledger:
        ledger_id = ledger.identity.ledger_id
        batch = ledger.begin(NOW)
        alice, bob = books.user(ALICE.address.data), books.user(BOB.address.data)
        for name, (source, to) in enumerate([(bob, alice), (alice, bob)]):
            op = transfer(ledger_id, 5, name=name)
            legs = (Posting(source, Side.DEBIT, 5), Posting(to, Side.CREDIT, 5))
            effect = books.Effect(Kind.TRANSFER, legs)
            batch.absorb(effect, digest=op.digest, body=op.body, signatures=op.signatures)
        ledger.commit(batch)
    with pytest.raises(InvariantBroken, match="more than the account holds"):
        Store.open(path)


def test_a_row_changed_under_the_writer_is_noticed(path: Path, ledger: Store) -> None:
    run(ledger, transfer(ledger.identity.ledger_id, 10))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("UPDATE accounts SET balance = balance - 1 WHERE acct = 2")
    with pytest.raises(InvariantBroken, match="computed from"):
        run(ledger, transfer(ledger.identity.ledger_id, 10, name=2))


def test_a_full_disk_loses_nothing(path: Path) -> None:
    with Store.open(path) as ledger:
        ledger_id = ledger.identity.ledger_id
        done = run(ledger, transfer(ledger_id, 10))
        pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        many = [transfer(ledger_id, 1, name=n) for n in range(100, 200)]
        with pytest.raises(StorageError) as failed:
            run(ledger, *many)
        assert failed.value.retryable
        ledger._connection.execute("PRAGMA max_page_count = 1000000")
        assert run(ledger, transfer(ledger_id, 10), *many)[0] == done[0]
        assert balance(ledger, BOB) == 110
    with Store.open(path) as ledger:
        assert balance(ledger, BOB) == 110


def test_request_ids_are_purged_when_nobody_can_use_them(path: Path, ledger: Store) -> None:
    def kept() -> int:
        with closing(sqlite3.connect(path)) as connection:
            found: int = connection.execute("SELECT count(*) FROM requests").fetchone()[0]
            return found

    ledger_id = ledger.identity.ledger_id
    until = NOW + HOUR
    run(ledger, transfer(ledger_id, 10, until=until))
    limit = until + books.REQUEST_MARGIN_MS
    run(ledger, transfer(ledger_id, 10, name=2, until=limit + HOUR), now_ms=limit)
    assert kept() == 2
    later = limit + 60_001
    run(ledger, transfer(ledger_id, 10, name=3, until=later + HOUR), now_ms=later)
    assert kept() == 2
    batch = ledger.begin(later)
    assert isinstance(batch.run(transfer(ledger_id, 10, until=until)), EntryRef)
    assert batch.empty


def test_nothing_to_open(tmp_path: Path, path: Path) -> None:
    with pytest.raises(ConfigError, match="no ledger"):
        Store.open(tmp_path / "missing")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="schema 99"):
        Store.open(path)
