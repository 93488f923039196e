"""What a call brings is kept and accepted whatever ends it, and what fails ends it."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from btt.sdk.content.intake import AHEAD, Intake
from btt.sdk.content.run import Run
from btt.sdk.errors import ContentMismatch, SessionEnded, StorageError


class Desk:
    """Notes what becomes of runs; writing waits for `go`."""

    def __init__(self) -> None:
        self.wrong: set[int] = set()
        self.full: set[int] = set()
        self.verified: list[int] = []
        self.written: list[int] = []
        self.accepted: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.room = asyncio.Semaphore(AHEAD)
        self.thread = ThreadPoolExecutor(1)
        self.begun, self.crowded = asyncio.Event(), asyncio.Event()

    def intake(self) -> Intake:
        return Intake(
            room=self.room, verify=self.verify, write=self.write, writer=self.thread, accept=self.accept
        )

    def verify(self, run: Run) -> None:
        self.begun.set()
        if run.run in self.wrong:
            raise ContentMismatch("no")
        self.verified.append(run.run)
        if len(self.verified) == AHEAD:
            self.crowded.set()

    def write(self, run: Run) -> None:
        assert self.go.wait(20)
        if run.run in self.full:
            raise StorageError("full")
        self.written.append(run.run)

    def accept(self, run: Run) -> None:
        assert run.run in self.verified
        assert run.run in self.written
        self.accepted.append(run.run)


@pytest.fixture
def desk():
    made = Desk()
    yield made
    made.go.set()
    made.thread.shutdown()


def run(number: int) -> Run:
    return Run(number, memoryview(b"data"))


async def brings(desk: Desk, count: int, error: Exception | None = None) -> None:
    async with desk.intake() as intake:
        for number in range(count):
            await intake.take(run(number))
        if error is not None:
            raise error
        await asyncio.sleep(0)


async def test_what_verifies_is_written_and_then_accepted_in_order(desk):
    await brings(desk, 50)
    assert desk.accepted == list(range(50))
    assert not desk.room.locked()


async def test_one_that_does_not_verify_ends_the_loop_and_is_never_accepted(desk):
    desk.wrong = {3, 5}
    with pytest.raises(ContentMismatch):
        await brings(desk, 1000)
    assert desk.accepted == [0, 1, 2]
    assert len(desk.written) < 12, "the loop was broken off"
    await asyncio.gather(*(desk.room.acquire() for _ in range(AHEAD)))


async def test_a_reader_that_waits_for_its_next_run_is_broken_off_too(desk):
    desk.full = {0}
    with pytest.raises(StorageError):
        async with desk.intake() as intake:
            await intake.take(run(0))
            await asyncio.Event().wait()
    assert desk.accepted == []
    task = asyncio.current_task()
    assert not task.cancelling()


async def test_whoever_cancels_it_waits_for_what_is_being_written_and_that_is_accepted(desk):
    desk.go.clear()
    fetching = asyncio.create_task(brings(desk, 1000))
    await desk.crowded.wait()
    for _ in range(3):
        fetching.cancel()
        await asyncio.sleep(0)
    assert not fetching.done()
    desk.go.set()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert desk.accepted == list(range(AHEAD))


async def test_a_cancel_at_the_very_end_is_still_one(desk):
    desk.go.clear()
    fetching = asyncio.create_task(brings(desk, 1))
    await desk.begun.wait()
    fetching.cancel()
    await asyncio.sleep(0)
    desk.go.set()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert desk.accepted == [0]


async def test_a_lie_is_told_though_the_call_is_broken_off_meanwhile(desk):
    desk.wrong = {0}
    desk.go.clear()
    fetching = asyncio.create_task(brings(desk, 1000))
    await desk.begun.wait()
    fetching.cancel()
    await asyncio.sleep(0)
    desk.go.set()
    with pytest.raises(ContentMismatch):
        await fetching
    assert desk.accepted == []


@pytest.mark.parametrize("of_the_node", [SessionEnded("gone"), ValueError("defect")])
async def test_a_lie_is_told_and_not_what_ended_the_call_after_it(desk, of_the_node):
    desk.wrong = {0}
    with pytest.raises(ContentMismatch):
        await brings(desk, 1, of_the_node)


async def test_an_error_that_cannot_be_mended_is_not_hidden_by_a_passing_one(desk):
    def passing(_: Run) -> None:
        raise SessionEnded("for now")

    desk.accept = passing

    async def fails() -> None:
        async with desk.intake() as intake:
            await intake.take(run(0))
            raise ContentMismatch("for good")

    with pytest.raises(ContentMismatch):
        await fails()
