"""Writes that come together share one sync, on quick disks and slow ones; nobody hears before it."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from btt.sdk import group_commit
from btt.sdk.errors import StorageError
from btt.sdk.group_commit import GroupCommit, Job


class Books:
    """A table of numbers, and what was said to the database."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("CREATE TABLE numbers(n INTEGER NOT NULL UNIQUE)")
        self.said: list[str] = []
        self.db.set_trace_callback(self.said.append)
        self.group = GroupCommit(self.db, threading.Lock(), whose="The test's books")

    @property
    def commits(self) -> int:
        return self.said.count("COMMIT")

    def stored(self) -> list[int]:
        with closing(sqlite3.connect(self.path)) as other:
            return [n for (n,) in other.execute("SELECT n FROM numbers ORDER BY rowid")]


def put(number: int | None) -> Job:
    def job(db: sqlite3.Connection) -> int | None:
        db.execute("INSERT INTO numbers VALUES(?)", (number,))
        return number

    return job


@pytest.fixture(params=["quick", "slow"])
def books(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Books]:
    monkeypatch.setattr(group_commit, "IN_PLACE_S", 3600.0 if request.param == "quick" else 0.0)
    made = Books(tmp_path / "books.db")
    yield made
    made.group.close()
    made.db.close()


async def test_who_comes_in_one_turn_shares_a_commit(books: Books) -> None:
    numbers = list(range(300))
    assert await asyncio.gather(*(books.group.run(put(n)) for n in numbers)) == numbers
    assert books.stored() == numbers
    assert books.commits == 1


async def test_who_was_alone_is_written_at_once_and_a_crowd_together_again(books: Books) -> None:
    await books.group.run(put(0))
    before = books.commits
    is_quick = group_commit.IN_PLACE_S > 0
    lone = books.group.run(put(1))
    assert lone.done() == is_quick, "a slow disk gets it in its thread"
    await lone
    assert books.commits - before == 1
    for first in (2, 12, 22):
        before = books.commits
        await asyncio.gather(*(books.group.run(put(n)) for n in range(first, first + 10)))
        assert books.commits - before <= (2 if first == 2 else 1)
    assert sorted(books.stored()) == list(range(32))
    await books.group.run(put(32))
    again = books.group.run(put(33))
    assert again.done() == is_quick
    await again


async def test_a_result_is_there_when_it_is_committed(books: Books) -> None:
    async def save(number: int) -> None:
        await books.group.run(put(number))
        assert number in books.stored()

    await asyncio.gather(*(save(n) for n in range(20)))


async def test_who_comes_during_a_commit_shares_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "IN_PLACE_S", 0.0)
    made = Books(tmp_path / "books.db")
    entered, go = threading.Event(), threading.Event()

    def slow(db: sqlite3.Connection) -> None:
        entered.set()
        assert go.wait(30)

    first = made.group.run(slow)
    await asyncio.to_thread(entered.wait, 30)
    later = []
    for n in range(10):
        later.append(made.group.run(put(n)))
        await asyncio.sleep(0)
    assert not any(future.done() for future in (first, *later))
    go.set()
    await asyncio.gather(first, *later)
    assert made.commits == 2
    made.group.close()
    made.db.close()


async def test_one_that_is_wrong_fails_alone(books: Books) -> None:
    jobs = [put(1), put(None), put(2), put(2**63)]  # what SQLite refuses, and what it cannot even be given
    found = await asyncio.gather(*(books.group.run(job) for job in jobs), return_exceptions=True)
    assert found[::2] == [1, 2]
    assert [type(error) for error in found[1::2]] == [StorageError] * 2
    assert books.stored() == [1, 2]


async def test_a_full_disk_is_told_to_all_and_leaves_nothing(books: Books) -> None:
    [(pages,)] = books.db.execute("PRAGMA page_count")
    books.db.execute(f"PRAGMA max_page_count = {pages}")
    jobs = [put(2**60 + n) for n in range(500)]
    found = await asyncio.gather(*map(books.group.run, jobs), return_exceptions=True)
    assert [type(error) for error in found] == [StorageError] * 500
    assert len(set(map(id, found))) == 500
    assert books.stored() == []
    books.db.execute("PRAGMA max_page_count = 1000")
    assert await books.group.run(put(3)) == 3


async def test_everyone_hears_though_the_database_cannot_even_go_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(sqlite3.Connection):
        def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
            if sql == "ROLLBACK":
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(sql, *rest)

    monkeypatch.setattr(group_commit, "IN_PLACE_S", 0.0)
    with closing(
        sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False, factory=Broken)
    ) as db:
        db.execute("CREATE TABLE numbers(n INTEGER NOT NULL)")
        group = GroupCommit(db, threading.Lock(), whose="The test's books")
        for _ in range(2):
            asked = [group.run(put(n)) for n in (1, None)]
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert [type(error) for error in found] == [StorageError] * 2
        group.close()


def put_all(db: sqlite3.Connection, numbers: list[int]) -> None:
    assert numbers
    db.executemany("INSERT INTO numbers VALUES(?)", [(number,) for number in numbers])


def negate_all(db: sqlite3.Connection, _: list[None]) -> None:
    db.execute("UPDATE numbers SET n = -n")


async def test_values_are_written_together_and_in_order(books: Books) -> None:
    asked = [books.group.put(put_all, n) for n in (1, 2)]
    asked += [books.group.put(negate_all, None), books.group.run(put(3))]
    asked += [books.group.put(put_all, n) for n in (4, 5)]
    assert await asyncio.gather(*asked) == [None, None, None, 3, None, None]
    assert books.stored() == [-1, -2, 3, 4, 5]
    assert books.commits == 1


async def test_a_value_that_is_wrong_fails_alone(books: Books) -> None:
    asked = [books.group.put(put_all, n) for n in (1, 1, 2)]
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(error) for error in found] == [type(None), StorageError, type(None)]
    assert books.stored() == [1, 2]


async def test_a_blocking_write_comes_after_those_before_it(books: Books) -> None:
    before = books.group.run(put(1))
    books.group.run_now(put(2))
    assert books.stored() == [1, 2]
    assert await before == 1


async def test_closing_commits_what_waits(books: Books) -> None:
    waiting = [books.group.run(put(n)) for n in range(3)]
    books.group.close()
    assert books.stored() == [0, 1, 2]
    assert await asyncio.gather(*waiting) == [0, 1, 2]
    with pytest.raises(StorageError, match="closed"):
        await books.group.run(put(4))


def test_another_loop_goes_on_where_one_ended(books: Books) -> None:
    async def save(number: int) -> None:
        await books.group.run(put(number))

    for n in range(5):
        asyncio.run(save(n))
    assert books.stored() == [0, 1, 2, 3, 4]
