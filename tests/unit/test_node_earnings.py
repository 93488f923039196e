"""Earnings are differences of states of the books: they add up however they are told."""

from __future__ import annotations

import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btt.node.earnings import By, Sums, date_of, read_entries, split, told_by, total_of
from btt.node.payments.days import DAY_MS, DAYS_SCHEMA
from btt.node.payments.lent import LENT_SCHEMA
from btt.node.payments.store import _SCHEMA, ChannelRecord, PayeeStore
from btt.node.quota import QUOTA_SCHEMA
from btt.node.refusals import CANCELLED, KEPT_DAYS, REFUSALS_SCHEMA, SERVED, Refusals, read_refusals
from btt.sdk.channel import Line, Segment, Tally
from btt.sdk.errors import StorageError
from btt.sdk.keys import Address
from btt.sdk.money import Rate, Unit
from btt.sdk.payment.bans import BANS_SCHEMA
from btt.sdk.payment.counts import COUNTS_SCHEMA

A, B = "acme.v1.A", "acme.v1.B"
APP = Address(bytes([9]) * 20)


class Books:
    """The books of a node, written day by day."""

    def __init__(self, path):
        self.path = path
        self.now = 20_000 * DAY_MS
        self.store = PayeeStore(path, clock=lambda: self.now)
        self.tallies: dict[bytes, Tally] = {}

    async def channel(self, number: int) -> bytes:
        channel = bytes([number]) * 32
        record = ChannelRecord(
            channel, Address(bytes([number]) * 20), b"", 10**12, 1, 0, None, 0, "open", None, 0
        )
        await self.store.add_channel(record)
        self.tallies[channel] = Tally()
        return channel

    async def deliver(self, channel: bytes, service: str, units: int, rate: Rate, *, offer: int = 1) -> None:
        segment = Segment(bytes([offer]) * 32, Line(service, rate.unit))
        self.tallies[channel].price(segment, rate)
        self.tallies[channel].add(segment, units)
        await self.store.save_books(channel, self.tallies[channel], 0)

    async def sign(self, channel: bytes, best: int) -> None:
        await self.store.run(
            lambda db: db.execute(
                "UPDATE channels SET best = ?, best_signature = x'00' WHERE channel_id = ?", (best, channel)
            )
        )

    def entries(self):
        with sqlite3.connect(self.path) as db:
            return list(read_entries(db))


@pytest.fixture
def books(tmp_path):
    made = Books(tmp_path / "payments.db")
    yield made
    made.store.close()


@given(st.integers(0, 2**60), st.dictionaries(st.text(max_size=3), st.integers(0, 2**60), max_size=5))
def test_a_split_adds_up_to_what_was_split(amount, weights):
    parts = split(amount, weights)
    assert sum(parts.values()) == amount
    assert all(part >= 0 for part in parts.values())
    total = sum(weights.values())
    for key, weight in weights.items():
        if total:
            assert abs(parts[key] * total - amount * weight) < total


async def test_what_was_accrued_signed_settled_and_lost_by_every_key(books):
    one, two = await books.channel(1), await books.channel(2)
    await books.store.next_epoch(two, APP)
    await books.deliver(one, A, 10, Rate(3, 1, Unit.COUNT))
    await books.sign(one, 20)
    books.now += DAY_MS
    await books.deliver(one, B, 7, Rate(1, 2, Unit.BYTE))  # ceil(3.5) = 4
    await books.deliver(one, A, 5, Rate(4, 1, Unit.COUNT), offer=2)  # a new price counts anew
    await books.sign(one, 50)
    await books.deliver(two, A, 60, Rate(1, 1, Unit.COUNT))
    await books.deliver(two, A, 40, Rate(1, 1, Unit.COUNT))
    books.now += DAY_MS
    await books.store.begin_close(one, 50, 4)
    await books.store.end_close(one, b"", b"")
    await books.sign(two, 200)  # half of it is prepaid, and not earned

    entries = books.entries()
    by_service = told_by(entries, By.SERVICE)
    assert by_service[B].accrued == 4
    assert by_service[A].accrued == 30 + 20 + 100
    by_peer = told_by(entries, By.PEER)
    assert by_peer[str(Address(bytes([1]) * 20))] == Sums(54, 50, 50, 4, 4, 0)
    assert by_peer[str(Address(bytes([2]) * 20))] == Sums(100, 100, 0, 0, 0, 0)
    assert told_by(entries, By.APP).keys() == {"unknown", str(APP)}
    by_day = told_by(entries, By.DAY)
    assert [sums.accrued for sums in by_day.values()] == [30, 124, 0]
    assert [sums.signed for sums in by_day.values()] == [20, 30, 100]
    assert [sums.settled for sums in by_day.values()] == [0, 0, 50]
    assert list(by_day) == [date_of(20_000), date_of(20_001), date_of(20_002)]
    for by in By:
        assert total_of(told_by(entries, by)) == Sums(154, 150, 50, 4, 4, 0)
        assert total_of(told_by(entries, by, since_day=20_001)).accrued == 124


async def test_the_ledger_closing_without_us_counts_what_it_paid(books):
    channel = await books.channel(1)
    await books.deliver(channel, A, 10, Rate(1, 1, Unit.COUNT))
    await books.sign(channel, 15)
    await books.store.closed_elsewhere(channel, 15, 0)
    assert total_of(told_by(books.entries(), By.SERVICE)) == Sums(10, 15, 15, 0, 0, 0)


async def test_books_of_before_begin_with_what_they_hold(tmp_path):
    path = tmp_path / "payments.db"
    with sqlite3.connect(path) as db:
        db.executescript(
            _SCHEMA
            + COUNTS_SCHEMA
            + BANS_SCHEMA
            + "PRAGMA user_version = 2; CREATE TABLE log_room(times INTEGER NOT NULL);"
            + "INSERT INTO log_room VALUES(0);"
        )
        db.execute(
            "INSERT INTO channels(channel_id, payer, commit_body, deposit, expires_ms, best, state, capture)"
            " VALUES(zeroblob(32), zeroblob(20), x'00', 100, 1, 9, 'closed', 9)"
        )
        db.execute("INSERT INTO counts VALUES(zeroblob(32), zeroblob(32), ?, 2, 1, 1, 9)", (A,))
    books = Books(path)
    assert total_of(told_by(books.entries(), By.SERVICE)) == Sums(9, 9, 9, 0, 0, 0)
    books.store.close()


async def test_books_that_kept_the_running_day_apart_tell_the_same(tmp_path):
    path, channel = tmp_path / "payments.db", bytes([1]) * 32
    with sqlite3.connect(path) as db:
        db.executescript(
            _SCHEMA
            + COUNTS_SCHEMA
            + BANS_SCHEMA
            + DAYS_SCHEMA
            + REFUSALS_SCHEMA
            + QUOTA_SCHEMA
            + LENT_SCHEMA
            + "PRAGMA user_version = 4; CREATE TABLE log_room(times INTEGER NOT NULL);"
            + "INSERT INTO log_room VALUES(0);"
        )
        db.execute(
            "INSERT INTO channels(channel_id, payer, commit_body, deposit, expires_ms, best, written_off)"
            " VALUES(?, zeroblob(20), x'00', 100, 1, 9, 2)",
            (channel,),
        )
        db.execute("INSERT INTO counts VALUES(?, zeroblob(32), ?, 2, 1, 1, 12)", (channel, A))
        for day, best, written_off, units in ((20_000, 3, 0, 4), (20_001, 9, 2, 12)):
            db.execute("INSERT INTO channel_days VALUES(?, ?, ?, 0, 0, ?)", (channel, day, best, written_off))
            db.execute("INSERT INTO count_days VALUES(?, ?, zeroblob(32), ?, 2, ?)", (channel, day, A, units))
    books = Books(path)
    books.now = 20_001 * DAY_MS
    assert list(told_by(books.entries(), By.DAY).values()) == [Sums(4, 3, 0, 1), Sums(8, 6, 0, 2, 0, 2)]
    books.tallies[channel] = Tally()
    await books.deliver(channel, A, 20, Rate(1, 1, Unit.COUNT), offer=0)
    books.now += DAY_MS
    await books.sign(channel, 20)
    days = told_by(books.entries(), By.DAY)
    books.store.close()
    assert list(days) == [date_of(20_000), date_of(20_001), date_of(20_002)]
    assert list(days.values()) == [Sums(4, 3, 0, 1), Sums(16, 6, 0, 10), Sums(0, 11, 0, -11)]


async def test_only_the_first_write_of_a_day_writes_the_day_before(books):
    channel = await books.channel(1)
    rows = "SELECT (SELECT count(*) FROM channel_days), (SELECT count(*) FROM count_days)"
    for day in range(3):
        for _ in range(4):
            await books.deliver(channel, A, 5, Rate(1, 1, Unit.COUNT))
            await books.sign(channel, books.tallies[channel].owed)
        with sqlite3.connect(books.path) as db:
            assert db.execute(rows).fetchone() == (day, day)
        books.now += DAY_MS
    books.now -= 10 * DAY_MS  # a clock that goes back changes no day that is over
    await books.deliver(channel, A, 5, Rate(1, 1, Unit.COUNT))
    assert [sums.accrued for sums in told_by(books.entries(), By.DAY).values()] == [20, 20, 25]


# Refusals


async def test_refusals_are_counted_by_day_and_survive(books):
    refusals = Refusals(store=books.store, clock=lambda: books.now)
    for reason in ("RATE_LIMITED", "RATE_LIMITED", SERVED, CANCELLED, "what a stranger made up"):
        refusals.count("content", reason)
    await refusals.flush()
    books.now += DAY_MS
    refusals.count("content", "RATE_LIMITED")
    refusals.count("payments", "BANNED")
    refusals.count("other", "BANNED")
    await refusals.flush()
    with sqlite3.connect(books.path) as db:
        found = [(r.day, r.service, r.reason, r.calls) for r in read_refusals(db, service="content")]
        assert len(read_refusals(db)) == 6
        assert len(read_refusals(db, since_day=20_001)) == 3
    assert found == [
        (20_001, "content", "RATE_LIMITED", 1),
        (20_001, "payments", "BANNED", 1),
        (20_000, "content", "RATE_LIMITED", 2),
        (20_000, "content", "INTERNAL", 1),
        (20_000, "content", SERVED, 1),
    ]


async def test_a_refusal_costs_no_commit_and_one_that_cannot_be_written_is_kept(books, monkeypatch):
    refusals = Refusals(store=books.store, clock=lambda: books.now)
    commits = []

    async def full(job):
        commits.append(job)
        raise StorageError("full")

    monkeypatch.setattr(books.store, "run", full)
    for _ in range(1000):
        refusals.count("content", "BANNED")
    assert commits == []
    with pytest.raises(StorageError):
        await refusals.flush()
    monkeypatch.undo()
    refusals.count("content", "BANNED")
    await refusals.flush()
    await refusals.flush()
    with sqlite3.connect(books.path) as db:
        assert [r.calls for r in read_refusals(db)] == [1001]


async def test_old_days_go(books):
    refusals = Refusals(store=books.store, clock=lambda: books.now)
    for _ in range(2):
        refusals.count("content", "BANNED")
        await refusals.flush()
        books.now += (KEPT_DAYS + 1) * DAY_MS
    with sqlite3.connect(books.path) as db:
        assert len(read_refusals(db)) == 1
