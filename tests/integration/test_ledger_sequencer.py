"""Group commit: one order, one fsync for many, no answer before the disk has it."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from btt.sdk.errors import (
    BttError,
    Draining,
    InsufficientFunds,
    InvariantBroken,
    RateLimited,
    SignatureInvalid,
    StorageError,
)
from btt.sdk.keys import PrivateKey
from btt.sdk.signing import Transfer, sign
from btt.services.ledger import books, mark, rules, sequencer, store
from btt.services.ledger.journal import EntryRef
from btt.services.ledger.overlay import Batch
from btt.services.ledger.reading import Reader
from btt.services.ledger.sequencer import Sequencer
from btt.services.ledger.store import Store
from btt.services.ledger.verify import Operation, Verifier

NOW = 1_800_000_000_000
OPERATOR, ALICE, BOB = (PrivateKey(n.to_bytes(32, "big")) for n in (1, 11, 12))
ISSUE = 10_000

Order = Callable[[int, int], Operation]


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
    )
    return made


@pytest.fixture
async def books_and_line(path: Path) -> AsyncIterator[tuple[Store, Sequencer]]:
    opened = Store.open(path)
    async with Sequencer(opened, clock=lambda: NOW) as line:
        yield opened, line


@pytest.fixture
def line(books_and_line: tuple[Store, Sequencer]) -> Sequencer:
    return books_and_line[1]


@pytest.fixture
def order(books_and_line: tuple[Store, Sequencer]) -> Order:
    ledger_id = books_and_line[0].identity.ledger_id

    def make(name: int, amount: int = 1) -> Operation:
        message = Transfer(
            sender=ALICE.address,
            recipient=BOB.address,
            amount=amount,
            request_id=name.to_bytes(16, "big"),
            valid_until_ms=NOW + 1000,
            memo=bytes(32),
        )
        signature = sign(ALICE, message, ledger_id)
        return Verifier(ledger_id).transfer(message.encode(), signer=ALICE.public.data, signature=signature)

    return make


async def all_of(line: Sequencer, *operations: Operation) -> list[EntryRef | BaseException]:
    return await asyncio.gather(*(line.submit(op) for op in operations), return_exceptions=True)


def stored(path: Path) -> tuple[int, int]:
    """Number of the last entry, and what BOB holds, on the disk."""
    with closing(Reader(path)) as reader:
        account = reader.account(BOB.address.data)
        return reader.head()[0].seq, account.balance if account else 0


async def test_many_share_a_commit(path: Path, line: Sequencer, order: Order) -> None:
    entries = await all_of(line, *(order(n, 1) for n in range(300)))
    assert sorted(e.seq for e in entries if isinstance(e, EntryRef)) == list(range(2, 302))
    assert line.batches <= 2
    assert stored(path) == (301, 300)


async def test_batches_are_bounded(line: Sequencer, order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequencer, "MOST_IN_BATCH", 10)
    await all_of(line, *(order(n, 1) for n in range(35)))
    assert line.batches == 4


async def test_an_operation_fails_alone(path: Path, line: Sequencer, order: Order) -> None:
    outcomes = await all_of(line, order(1, 6000), order(2, 6000), order(3, 4000), order(1, 6000))
    assert [type(outcome) for outcome in outcomes] == [EntryRef, InsufficientFunds, EntryRef, EntryRef]
    assert outcomes[0] == outcomes[3]
    assert line.batches == 1
    assert stored(path) == (3, 10_000)


async def test_no_answer_before_the_commit(
    path: Path,
    books_and_line: tuple[Store, Sequencer],
    order: Order,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger, line = books_and_line
    entered, go = threading.Event(), threading.Event()
    commit = ledger.commit

    def slowly(batch: Batch) -> None:
        entered.set()
        assert go.wait(30)
        commit(batch)

    monkeypatch.setattr(ledger, "commit", slowly)
    waiting = asyncio.create_task(all_of(line, order(1, 1), order(2, 99_999), order(1, 1)))
    await asyncio.to_thread(entered.wait, 30)
    assert not waiting.done()
    assert stored(path) == (1, 0)
    go.set()
    await waiting
    assert stored(path) == (2, 1)


async def test_a_failed_commit_is_retryable_and_changes_nothing(
    path: Path,
    books_and_line: tuple[Store, Sequencer],
    order: Order,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger, line = books_and_line
    (page_count,) = ledger._connection.execute("PRAGMA page_count").fetchone()
    ledger._connection.execute(f"PRAGMA max_page_count = {page_count}")
    operations = [order(n, 1) for n in range(100)]
    outcomes = await all_of(line, *operations)
    assert {type(outcome) for outcome in outcomes} == {StorageError}
    assert len(set(map(id, outcomes))) == len(outcomes)
    assert stored(path) == (1, 0)
    ledger._connection.execute("PRAGMA max_page_count = 100000")
    assert {type(outcome) for outcome in await all_of(line, *operations)} == {EntryRef}
    assert stored(path) == (101, 100)


async def test_broken_books_stop_the_ledger(
    path: Path, line: Sequencer, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide = rules.decide

    def generous(*args: object, **kwargs: object) -> books.Decision:
        effect = decide(*args, **kwargs)  # type: ignore[arg-type]
        assert isinstance(effect, books.Effect)
        debit, credit = effect.postings
        return replace(effect, postings=(debit, replace(credit, amount=credit.amount + 1)))

    with monkeypatch.context() as patch:
        patch.setattr(rules, "decide", generous)
        outcomes = await all_of(line, order(1, 1), order(2, 1))
    assert {type(outcome) for outcome in outcomes} == {InvariantBroken}
    with pytest.raises(InvariantBroken):
        await line.submit(order(3, 1))
    assert stored(path) == (1, 0)


async def test_a_defect_stops_the_ledger_with_a_typed_error(
    line: Sequencer, order: Order, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **kwargs: object) -> books.Decision:
        raise KeyError("defect")

    with monkeypatch.context() as patch:
        patch.setattr(rules, "decide", broken)
        with pytest.raises(InvariantBroken) as told:
            await line.submit(order(1, 1))
    assert "defect" in caplog.text, "the operator is told"
    assert "defect" not in str(told.value), "it may name other people's accounts"
    with pytest.raises(InvariantBroken):
        await line.submit(order(2, 1))


async def test_unverified_requests_are_not_applied(path: Path, line: Sequencer, order: Order) -> None:
    class Lookalike:
        digest = bytes(32)

    with pytest.raises(BttError):
        await line.submit(Lookalike())  # type: ignore[arg-type]
    assert stored(path) == (1, 0)


async def test_stop_finishes_what_waits(path: Path, order: Order, line: Sequencer) -> None:
    waiting = [asyncio.create_task(line.submit(order(n, 1))) for n in range(50)]
    await asyncio.sleep(0)  # each has queued its operation
    await line.stop()
    assert {type(task.result()) for task in waiting} == {EntryRef}
    with pytest.raises(Draining):
        await line.submit(order(99, 1))
    Store.open(path).close()


async def test_the_queue_is_bounded(line: Sequencer, order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequencer, "MOST_QUEUED", 5)
    outcomes = await all_of(line, *(order(n, 1) for n in range(8)))
    assert [type(outcome) for outcome in outcomes].count(RateLimited) == 3


async def test_a_caller_that_leaves_disturbs_nobody(path: Path, line: Sequencer, order: Order) -> None:
    leaving = asyncio.create_task(line.submit(order(1, 1)))
    staying = asyncio.create_task(line.submit(order(2, 1)))
    await asyncio.sleep(0)
    leaving.cancel()
    assert isinstance(await staying, EntryRef)
    assert isinstance(await line.submit(order(1, 1)), EntryRef)
    assert stored(path)[1] == 2


async def test_what_comes_during_a_commit_shares_the_next(
    path: Path,
    books_and_line: tuple[Store, Sequencer],
    order: Order,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger, line = books_and_line
    entered, go = threading.Event(), threading.Event()
    commit = ledger.commit

    def slowly(batch: Batch) -> None:
        entered.set()
        assert go.wait(30)
        commit(batch)

    monkeypatch.setattr(ledger, "commit", slowly)
    waiting = [asyncio.create_task(line.submit(order(0)))]
    await asyncio.to_thread(entered.wait, 30)
    for number in range(1, 6):
        waiting.append(asyncio.create_task(line.submit(order(number))))
        await asyncio.to_thread(lambda: None)  # each comes in a turn of its own
    go.set()
    entries = await asyncio.gather(*waiting)
    assert [entry.seq for entry in entries] == [2, 3, 4, 5, 6, 7]
    assert line.batches == 2


@pytest.fixture
def carried_out_in(
    books_and_line: tuple[Store, Sequencer], monkeypatch: pytest.MonkeyPatch
) -> list[threading.Thread]:
    """The thread of each commit, on a disk that is quick unless a test says otherwise."""
    ledger, _ = books_and_line
    threads: list[threading.Thread] = []
    commit = ledger.commit

    def quickly(batch: Batch) -> None:
        threads.append(threading.current_thread())
        commit(batch)
        ledger.commit_s = 0.0

    monkeypatch.setattr(ledger, "commit", quickly)
    return threads


async def test_who_is_alone_is_served_in_the_loop_while_the_disk_is_quick(
    path: Path,
    books_and_line: tuple[Store, Sequencer],
    order: Order,
    carried_out_in: list[threading.Thread],
) -> None:
    ledger, line = books_and_line
    for number in range(4):
        await line.submit(order(number))
    ledger.commit_s = sequencer.IN_PLACE_S
    for number in range(4, 6):
        await line.submit(order(number))
    here = [thread is threading.current_thread() for thread in carried_out_in]
    # The first commit is the disk's trial; after a slow one comes another.
    assert here == [False, True, True, True, False, True]
    assert stored(path) == (7, 6)


async def test_who_has_company_is_not_served_in_the_loop(
    line: Sequencer, order: Order, carried_out_in: list[threading.Thread]
) -> None:
    await line.submit(order(1))
    await all_of(line, order(2), order(3))
    await line.submit(order(4))
    assert threading.current_thread() not in carried_out_in
    await line.submit(order(5))
    assert carried_out_in[3:] == [threading.current_thread()]


async def test_after_a_commit_that_failed_the_disk_is_not_quick(
    path: Path, books_and_line: tuple[Store, Sequencer], order: Order
) -> None:
    ledger, line = books_and_line
    assert ledger.commit_s == math.inf, "nothing is known yet"
    await line.submit(order(1))
    assert 0 < ledger.commit_s < math.inf
    (page_count,) = ledger._connection.execute("PRAGMA page_count").fetchone()
    ledger._connection.execute(f"PRAGMA max_page_count = {page_count}")
    await all_of(line, *(order(n) for n in range(2, 102)))
    assert stored(path) == (2, 1)
    assert ledger.commit_s == math.inf


async def test_the_mark_is_written_by_one_at_a_time(
    books_and_line: tuple[Store, Sequencer],
    order: Order,
    carried_out_in: list[threading.Thread],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sequencer, "INTERVAL", 0.0)
    ledger, line = books_and_line
    assert ledger.mark is not None
    entered, go = threading.Event(), threading.Event()
    flush = ledger.mark.flush

    def slowly() -> None:
        entered.set()
        assert go.wait(30)
        flush()

    ledger.mark._next = math.inf  # commits leave it to the flush
    await line.submit(order(1))
    monkeypatch.setattr(ledger.mark, "flush", slowly)
    await asyncio.to_thread(entered.wait, 30)
    waiting = asyncio.create_task(line.submit(order(2)))
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(carried_out_in) == 1
    go.set()
    await waiting
    assert len(carried_out_in) == 2


async def test_the_mark_follows_the_last_commit_before_a_rest(
    books_and_line: tuple[Store, Sequencer], order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequencer, "INTERVAL", 0.0)
    ledger, line = books_and_line
    assert ledger.mark is not None
    written = asyncio.Event()
    flush, loop = ledger.mark.flush, asyncio.get_running_loop()

    def flushed() -> None:
        flush()
        noted = mark.read(mark.path_of(ledger.path))
        if noted is not None and noted.seq == 3:
            loop.call_soon_threadsafe(written.set)

    monkeypatch.setattr(ledger.mark, "flush", flushed)
    await line.submit(order(1))
    await line.submit(order(2))
    async with asyncio.timeout(30):
        await written.wait()


async def test_what_fails_its_check_fails_alone(path: Path, line: Sequencer, order: Order) -> None:
    def forged() -> Operation:
        raise SignatureInvalid("It is not signed.")

    outcomes = await asyncio.gather(
        line.carry_out(forged, lambda entry: entry.seq),
        line.carry_out(lambda: order(1, 5), lambda entry: entry.seq),
        return_exceptions=True,
    )
    assert isinstance(outcomes[0], SignatureInvalid)
    assert outcomes[1] == 2
    assert stored(path) == (2, 5)


async def test_an_answer_is_made_of_what_is_durable(path: Path, line: Sequencer, order: Order) -> None:
    assert await line.carry_out(lambda: order(1, 5), lambda entry: (entry.seq, stored(path))) == (2, (2, 5))


async def test_looking_up_many_requests_reads_no_table_as_a_whole(
    books_and_line: tuple[Store, Sequencer], order: Order
) -> None:
    ledger, line = books_and_line
    seen: list[str] = []
    ledger._connection.set_trace_callback(seen.append)
    await all_of(line, order(1, 1), order(2, 1))
    ledger._connection.set_trace_callback(None)
    queries = [query for query in seen if query.startswith(("SELECT", "WITH"))]
    assert any("request_id" in query for query in queries)
    for query in queries:
        plan = ledger._connection.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
        assert not [row[3] for row in plan if row[3].startswith(("SCAN requests", "SCAN entries"))]
