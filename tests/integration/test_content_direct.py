"""Direct writes: the same bytes on disk, whatever address, place and file system."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from btt.sdk.content.direct import ALIGNED, DirectWriter

RUN = 1 << 20


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "part", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


def test_bytes_at_any_address_arrive(fd: int) -> None:
    data = random.Random(1).randbytes(RUN + 3)
    writer = DirectWriter(fd)
    for shift in range(3):
        written = writer.write(memoryview(data)[shift : shift + RUN], shift * RUN)
        assert written in (0, RUN)  # 0: this file system has no direct writes
        os.pwrite(fd, data[shift + written : shift + RUN], shift * RUN + written)
    writer.close()
    assert os.pread(fd, 4 * RUN, 0) == data[:RUN] + data[1 : RUN + 1] + data[2 : RUN + 2]


def test_threads_do_not_share_what_they_write_from(fd: int) -> None:
    runs = [random.Random(seed).randbytes(RUN) for seed in range(16)]
    writer = DirectWriter(fd)

    def write(run: int) -> None:
        written = writer.write(runs[run], run * RUN)
        os.pwrite(fd, runs[run][written:], run * RUN + written)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(16)))
    writer.close()
    assert os.pread(fd, 16 * RUN, 0) == b"".join(runs)


def test_what_is_not_aligned_is_left_to_the_caller(fd: int) -> None:
    writer = DirectWriter(fd)
    data = bytes(2 * ALIGNED + 5)
    assert writer.write(data, 1) == 0
    assert writer.write(data[:5], 0) == 0
    assert writer.write(data, 0) in (0, 2 * ALIGNED)
    writer.close()


def test_a_file_without_direct_writes_is_written_as_usual(
    fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, pipe = os.pipe()
    try:
        writer = DirectWriter(pipe)
        writer.close()
        assert writer.write(bytes(ALIGNED), 0) == 0
    finally:
        os.close(read)
        os.close(pipe)
    monkeypatch.setattr("btt.sdk.content.direct._O_DIRECT", 0)
    assert DirectWriter(fd).write(bytes(ALIGNED), 0) == 0


def test_a_disk_that_fails_is_no_reason_to_write_as_usual(fd: int) -> None:
    writer = DirectWriter(fd)
    if not writer.write(bytes(ALIGNED), 0):
        pytest.skip("the file system of the temporary folder has no direct writes")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * ALIGNED, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            writer.write(bytes(ALIGNED), 2 * ALIGNED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        writer.close()
