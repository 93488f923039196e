"""Clocks: this machine's, a test's, and the one that the processes of a devnet share."""

from __future__ import annotations

import asyncio
import heapq
import subprocess
import sys
import time
from pathlib import Path

import pytest

from btt.sdk import clock as clocks
from btt.sdk.clock import SYSTEM, FakeClock, SharedClock
from btt.sdk.errors import ConfigError
from kit.hanging import ends

DAY = 86_400_000


def test_a_shared_clock_shows_this_machines_time_until_it_is_moved(tmp_path: Path) -> None:
    clock = SharedClock.create(tmp_path / "clock")
    before = SYSTEM()
    assert before <= clock() <= SYSTEM()
    clock.advance(30 * DAY)
    assert before + 30 * DAY <= clock() <= SYSTEM() + 30 * DAY
    assert SharedClock(tmp_path / "clock").offset_ms == 30 * DAY, "it outlives who moved it"


def test_another_process_sees_the_clock_move(tmp_path: Path) -> None:
    clock = SharedClock.create(tmp_path / "clock")
    code = (
        "import asyncio, sys, pathlib\n"
        "from btt.sdk.clock import SharedClock\n"
        "clock = SharedClock(pathlib.Path(sys.argv[1]))\n"
        "async def main():\n"
        f"    sleeping = asyncio.ensure_future(clock.sleep({3 * DAY // 1000}))\n"
        "    await asyncio.sleep(0)\n"
        "    print('ready', flush=True)\n"
        "    await sleeping\n"
        "asyncio.run(main())\n"
        "print(clock.offset_ms)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(clock.path)], stdout=subprocess.PIPE, text=True
    ) as sleeper:
        assert sleeper.stdout is not None
        assert sleeper.stdout.readline() == "ready\n"
        clock.advance(4 * DAY)
        assert sleeper.communicate(timeout=60)[0] == f"{4 * DAY}\n", "it slept until then, and woke"


@pytest.mark.parametrize("milliseconds", [-1, clocks.LONGEST_MS + 1])
def test_a_clock_goes_ahead_only_and_not_for_ever(tmp_path: Path, milliseconds: int) -> None:
    clock = SharedClock.create(tmp_path / "clock")
    with pytest.raises(ValueError, match="ahead"):
        clock.advance(milliseconds)
    assert clock.offset_ms == 0
    with pytest.raises(ValueError, match="ahead"):
        FakeClock(5).advance(-1)


@pytest.mark.parametrize("data", [None, b"", b"1234567", b"123456789"])
def test_what_is_no_clock_is_refused(tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "clock").write_bytes(data)
    with pytest.raises(ConfigError, match="clock"):
        SharedClock(tmp_path / "clock")


async def test_a_fake_clock_wakes_those_whose_time_has_come_and_no_other() -> None:
    clock = FakeClock(1_000)
    woken: list[int] = []

    async def sleeper(seconds: int) -> None:
        await clock.sleep(seconds)
        woken.append(seconds)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(sleeper(seconds)) for seconds in (3, 1, 2)]
        await asyncio.sleep(0)
        clock.advance(2_000)
        await asyncio.wait(tasks[1:])
        assert clock() == 3_000
        assert woken == [1, 2]
        clock.advance(1_000)
    assert woken == [1, 2, 3]


async def test_a_clock_that_another_thread_moves_while_somebody_lies_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, push = FakeClock(0), heapq.heappush

    def between(heap: list[object], entry: object) -> None:
        clock.advance(1_000)
        push(heap, entry)

    monkeypatch.setattr(clocks.heapq, "heappush", between)
    async with ends("sleeping until a time that has passed"):
        await clock.sleep(1)


async def test_many_who_sleep_share_one_look_and_leave_none_behind(tmp_path: Path) -> None:
    clock = SharedClock.create(tmp_path / "clock")
    sleepers = [asyncio.create_task(clock.sleep(DAY / 1000)) for _ in range(3)]
    await asyncio.sleep(0)
    assert len(clock._moves) == 1
    sleepers[0].cancel()
    SharedClock(clock.path).advance(DAY)  # as another process does
    async with ends("sleeping on a clock that was moved"):
        await asyncio.gather(*sleepers[1:])
    assert not clock._moves


async def test_who_was_cancelled_is_not_woken() -> None:
    clock = FakeClock(0)
    task = asyncio.create_task(clock.sleep(1))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    clock.advance(1_000)
    await asyncio.sleep(0)


async def test_a_clock_that_only_tells_the_time_sleeps_by_this_machines() -> None:
    began = time.monotonic()
    await clocks.sleep(lambda: 0, 0.01)
    assert time.monotonic() - began >= 0.01
    fake = FakeClock(0)
    task = asyncio.create_task(clocks.sleep(fake, 3600))
    await asyncio.sleep(0)
    fake.advance(3_600_000)
    await task


def test_a_dapp_takes_the_clock_of_the_devnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(clocks.VARIABLE, raising=False)
    assert clocks.configured() is SYSTEM
    clock = SharedClock.create(tmp_path / "clock")
    clock.advance(DAY)
    monkeypatch.setenv(clocks.VARIABLE, str(clock.path))
    assert clocks.configured()() >= SYSTEM() + DAY
    monkeypatch.setenv(clocks.VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="devnet"):
        clocks.configured()
