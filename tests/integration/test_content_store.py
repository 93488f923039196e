"""The destination of a fetch: what survives, what is refused, what is never overwritten."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import libtorrent as lt
import pytest

from btt.sdk.content import files
from btt.sdk.content.resuming import ResumeToken
from btt.sdk.content.store import Destination
from btt.sdk.content.torrent import RUN, Torrent
from btt.sdk.content.transfer import Transfer
from btt.sdk.errors import ConfigError, StorageError
from btt.sdk.money import Rate, Unit

SIZES = [0, 1, 16383, 16384, 16385, RUN - 1, RUN, RUN + 1, 2 * RUN, 5 * RUN + 7]


def data_of(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def torrent_of(path: Path) -> Torrent:
    builder = lt.create_torrent(lt.list_files(str(path)), RUN)
    lt.set_piece_hashes(builder, str(path.parent))
    return Torrent.from_torrent(bytes(lt.bencode(builder.generate())))[0]


def single(tmp_path: Path, data: bytes) -> Torrent:
    source = tmp_path / "source" / "film.bin"
    source.parent.mkdir(exist_ok=True)
    source.write_bytes(data)
    return torrent_of(source)


def folder(tmp_path: Path) -> Torrent:
    root = tmp_path / "source" / "album"
    for at, size in enumerate(SIZES):
        path = root / "abc"[at % 3] / f"{size}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data_of(size))
    return torrent_of(root)


def part_of(torrent: Torrent) -> str:
    return f"film.bin.{torrent.infohash.hex()[:8]}.btt-part"


def put(place: Destination, file: int, run: int, data: bytes) -> None:
    place.write_run(file, run, data)
    place.keep(file, run)


def run_of(data: bytes, run: int) -> bytes:
    return data[run * RUN : (run + 1) * RUN]


def fill(place: Destination, torrent: Torrent, file: int, data: bytes) -> None:
    for runs in place.missing(file):
        for run in runs:
            put(place, file, run, run_of(data, run))


def everything(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*")) if root.exists() else []


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_file_written_in_any_order_gets_its_name_when_whole(tmp_path: Path, size: int) -> None:
    data = data_of(size)
    torrent = single(tmp_path, data)
    out = tmp_path / "deep" / "out"
    with Destination(out, torrent) as place:
        place.scan()
        assert place.missing_bytes == size
        assert place.missing(0) == [range(torrent.runs(0))]
        order = list(range(torrent.runs(0)))
        random.Random(1).shuffle(order)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda run: put(place, 0, run, run_of(data, run)), order))
        assert place.missing(0) == []
        assert everything(out) == [part_of(torrent)]
        assert place.finish(0) == out / "film.bin" == place.path
        assert place.finish(0) == out / "film.bin"
        assert place.is_finished(0)
    assert (out / "film.bin").read_bytes() == data
    assert everything(out) == ["film.bin"]


def test_a_folder_is_rebuilt_with_all_its_files(tmp_path: Path) -> None:
    torrent = folder(tmp_path)
    out = tmp_path / "out"
    with Destination(out, torrent) as place:
        place.scan()
        assert place.missing_bytes == sum(SIZES)
        for entry in torrent.files:
            fill(place, torrent, entry.index, data_of(entry.length))
            place.finish(entry.index)
        assert place.missing_bytes == 0
    source = tmp_path / "source"
    assert everything(out) == everything(source)
    for path in source.rglob("*.bin"):
        assert (out / path.relative_to(source)).read_bytes() == path.read_bytes()


def test_a_second_attempt_keeps_what_verifies_and_nothing_else(tmp_path: Path) -> None:
    data = data_of(5 * RUN + 7)
    torrent = single(tmp_path, data)
    with Destination(tmp_path / "out", torrent) as place:
        place.scan()
        for run in (0, 2, 3, 5):
            put(place, 0, run, run_of(data, run))
    part = tmp_path / "out" / part_of(torrent)
    with part.open("r+b") as broken:  # as a crash may leave it
        broken.seek(2 * RUN + 5)
        broken.write(b"xyz")
    seen: list[tuple[int, int]] = []
    with Destination(tmp_path / "out", torrent) as place:
        assert place.missing(0) == [range(6)]
        place.scan(progress=lambda done, total: seen.append((done, total)))
        assert place.missing(0) == [range(1, 3), range(4, 5)]
        assert place.missing_bytes == 3 * RUN
        fill(place, torrent, 0, data)
        place.finish(0)
    assert seen == sorted(seen)
    assert seen[-1] == (len(data), len(data))
    assert (tmp_path / "out/film.bin").read_bytes() == data
    with Destination(tmp_path / "out", torrent) as place:
        place.scan()
        assert place.is_finished(0)
        assert place.missing(0) == []
        assert place.finish(0).read_bytes() == data
    assert everything(tmp_path / "out") == ["film.bin"]


def test_a_folder_resumes_file_by_file(tmp_path: Path) -> None:
    torrent = folder(tmp_path)
    out = tmp_path / "out"
    large = max(torrent.files, key=lambda f: f.length)
    with Destination(out, torrent) as place:
        place.scan()
        for entry in torrent.files[:3]:
            fill(place, torrent, entry.index, data_of(entry.length))
        for entry in torrent.files[:2]:
            place.finish(entry.index)
        put(place, large.index, 1, run_of(data_of(large.length), 1))
    with Destination(out, torrent) as place:
        place.scan()
        assert [place.is_finished(f.index) for f in torrent.files[:3]] == [True, True, False]
        assert place.missing(2) == []
        assert place.missing(large.index) == [range(1), range(2, 6)]
        for entry in torrent.files:
            fill(place, torrent, entry.index, data_of(entry.length))
            place.finish(entry.index)
    assert everything(out) == everything(tmp_path / "source")


def test_a_part_that_is_removed_meanwhile_is_not_made_again_without_what_it_held(tmp_path: Path) -> None:
    torrent = folder(tmp_path)
    out = tmp_path / "out"
    large = max(torrent.files, key=lambda f: f.length)
    data = data_of(large.length)
    with Destination(out, torrent) as place:
        place.scan()
        put(place, large.index, 0, run_of(data, 0))
    with Destination(out, torrent) as place:
        place.scan()
        place.part_path(large.index).unlink()
        with pytest.raises(StorageError, match="was removed meanwhile"):
            put(place, large.index, 1, run_of(data, 1))
    with Destination(out, torrent) as place:
        place.scan()
        fill(place, torrent, large.index, data)
        assert place.finish(large.index).read_bytes() == data


def test_small_files_that_come_faster_than_they_are_named_do_not_use_up_the_descriptors(
    tmp_path: Path,
) -> None:
    root = tmp_path / "source" / "album"
    root.mkdir(parents=True)
    for at in range(300):
        (root / f"{at}").write_bytes(b"%d" % at)
    torrent = torrent_of(root)
    before = len(list(Path("/dev/fd").iterdir()))
    with Destination(tmp_path / "out", torrent) as place:
        place.scan()
        for entry in torrent.files:
            fill(place, torrent, entry.index, entry.path[-1].encode())
        assert len(list(Path("/dev/fd").iterdir())) < before + 150
        for entry in torrent.files:
            assert place.finish(entry.index).read_bytes() == entry.path[-1].encode()
    assert everything(tmp_path / "out") == everything(tmp_path / "source")


def test_holes_of_a_large_part_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(3 * RUN)
    torrent = single(tmp_path, data)
    part = tmp_path / "out" / part_of(torrent)
    part.parent.mkdir()
    with part.open("wb") as sparse:
        sparse.truncate(4 << 30)
        sparse.seek(RUN)
        sparse.write(run_of(data, 1))
        sparse.seek((4 << 30) - 5)
        sparse.write(b"trash")
    read: list[int] = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: read.append(at) or real(fd, b, at))  # type: ignore[func-returns-value]
    with Destination(tmp_path / "out", torrent) as place:
        place.scan()
        assert place.missing(0) == [range(1), range(2, 3)]
        assert read == [RUN]
        fill(place, torrent, 0, data)
        assert place.finish(0).read_bytes() == data  # what lay behind the end is gone


@pytest.mark.parametrize("name", ["film.bin", "f" * 255])
@pytest.mark.parametrize("kind", ["single", "folder"])
def test_other_content_of_the_same_name_leaves_a_part_alone(tmp_path: Path, name: str, kind: str) -> None:
    """What was paid for one is still there when the other came between."""
    out, data, torrents = tmp_path / "out", [data_of(8 * RUN), data_of(8 * RUN + 1)], []
    for content in data:
        source = tmp_path / "source" / ("" if kind == "single" else "album/of") / name
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_bytes(content)
        torrents.append(torrent_of(source if kind == "single" else tmp_path / "source/album"))
    one, other = torrents
    with Destination(out, one) as place:
        place.scan()
        for run in range(6):
            put(place, 0, run, run_of(data[0], run))
    with Destination(out, other) as place:
        place.scan()
        assert place.missing(0) == [range(9)]
        put(place, 0, 0, run_of(data[1], 0))
    for torrent, content, missing in ((one, data[0], range(6, 8)), (other, data[1], range(1, 9))):
        with Destination(out, torrent) as place:
            place.scan()
            assert place.missing(0) == [missing]
            fill(place, torrent, 0, content)
            final = place.finish(0)
            assert final.name == name
        assert final.read_bytes() == content
        final.rename(tmp_path / "elsewhere")
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_of_two_contents_with_the_same_name_one_is_fetched_at_a_time(tmp_path: Path) -> None:
    """The other could not get its name at the end, after it was paid."""
    torrent = single(tmp_path, data_of(RUN))
    other = single(tmp_path, data_of(2 * RUN))
    out = tmp_path / "out"
    out.mkdir()
    (out / "film.bin.00000000.btt-part").symlink_to("nowhere")  # nobody's

    def fetch() -> None:
        with Destination(out, other) as place:
            place.scan()

    with Destination(out, torrent) as place:
        place.scan()
        with pytest.raises(ConfigError, match="Another fetch"):
            fetch()
        assert everything(out) == sorted(["film.bin.00000000.btt-part", part_of(torrent)])
        fill(place, torrent, 0, data_of(RUN))
    fetch()


def test_another_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    data = data_of(2 * RUN)
    torrent = single(tmp_path, data)
    out = tmp_path / "out"
    out.mkdir()
    for other in (b"mine", data[:-1] + b"?", data + b"x", b""):
        (out / "film.bin").write_bytes(other)
        with Destination(out, torrent) as place, pytest.raises(ConfigError, match="something else"):
            place.scan()
        assert (out / "film.bin").read_bytes() == other
    assert everything(out) == ["film.bin"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    data = data_of(RUN)
    torrent = single(tmp_path, data)
    with Destination(tmp_path / "out", torrent) as place:
        place.scan()
        fill(place, torrent, 0, data)
        place.path.write_bytes(b"mine")
        with pytest.raises(ConfigError):
            place.finish(0)
        assert place.path.read_bytes() == b"mine"
        place.path.unlink()
        assert place.finish(0).read_bytes() == data


def test_a_crash_between_naming_and_dropping_the_part_is_tidied(tmp_path: Path) -> None:
    data = data_of(RUN)
    torrent = single(tmp_path, data)
    out = tmp_path / "out"
    out.mkdir()
    (out / "film.bin").write_bytes(data)
    (out / part_of(torrent)).hardlink_to(out / "film.bin")
    with Destination(out, torrent) as place:
        place.scan()
        assert place.is_finished(0)
    assert everything(out) == ["film.bin"]


def test_a_link_to_the_right_bytes_is_not_the_file(tmp_path: Path) -> None:
    torrent = single(tmp_path, data_of(RUN))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/film.bin").symlink_to(tmp_path / "source/film.bin")
    with Destination(tmp_path / "out", torrent) as place, pytest.raises(ConfigError, match="link"):
        place.scan()


def test_a_disk_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*names: str, **more: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    data = data_of(RUN)
    torrent = single(tmp_path, data)
    monkeypatch.setattr(os, "link", no_links)
    with Destination(tmp_path / "out", torrent) as place:
        place.scan()
        fill(place, torrent, 0, data)
        place.path.write_bytes(b"mine")
        with pytest.raises(ConfigError):
            place.finish(0)
        assert place.path.read_bytes() == b"mine"
        place.path.unlink()
        assert place.finish(0).read_bytes() == data
    assert everything(tmp_path / "out") == ["film.bin"]


@pytest.mark.parametrize("where", ["film.bin", "the part"])
@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe", "hard link"])
def test_nothing_is_written_through_what_is_no_plain_file(tmp_path: Path, where: str, kind: str) -> None:
    data = data_of(RUN)
    torrent = single(tmp_path, data)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    out = tmp_path / "out"
    out.mkdir()
    trap = out / (where if where == "film.bin" else part_of(torrent))
    make: dict[str, Callable[[], Any]] = {
        "link": lambda: trap.symlink_to(victim),
        "dangling": lambda: trap.symlink_to(tmp_path / "nowhere"),
        "folder": trap.mkdir,
        "pipe": lambda: os.mkfifo(trap),
        "hard link": lambda: trap.hardlink_to(victim),
    }
    make[kind]()

    def fetch() -> None:
        with Destination(out, torrent) as place:
            place.scan()
            fill(place, torrent, 0, data)
            place.finish(0)

    with pytest.raises(ConfigError):
        fetch()
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("where", ["album", "album/a", "album/b"])
def test_no_folder_of_a_torrent_is_entered_through_a_link(tmp_path: Path, where: str) -> None:
    torrent = folder(tmp_path)
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    (out / where).parent.mkdir(parents=True)
    (out / where).symlink_to(outside)

    def fetch() -> None:
        with Destination(out, torrent) as place:
            place.scan()

    with pytest.raises(ConfigError):
        fetch()
    assert everything(outside) == []


def test_a_link_that_appears_during_the_fetch_is_not_followed(tmp_path: Path) -> None:
    torrent = folder(tmp_path)
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    with Destination(out, torrent) as place:
        place.scan()
        (out / "album" / "b").symlink_to(outside)
        entry = next(f for f in torrent.files if f.path[0] == "b" and f.length)
        with pytest.raises(ConfigError):
            put(place, entry.index, 0, data_of(entry.length)[:RUN])
    assert everything(outside) == []


@pytest.mark.parametrize("kind", ["single", "folder"])
def test_two_fetches_do_not_write_to_the_same_place(tmp_path: Path, kind: str) -> None:
    torrent = single(tmp_path, data_of(2 * RUN)) if kind == "single" else folder(tmp_path)
    out = tmp_path / "out"

    def second() -> None:
        with Destination(out, torrent) as place:
            place.scan()

    with Destination(out, torrent) as first:
        first.scan()
        with pytest.raises(ConfigError, match="Another fetch"):
            second()
    second()


def test_a_lock_on_a_part_that_was_finished_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other fetch names the file between our open and our lock: we must not write into it."""
    data = data_of(RUN)
    torrent = single(tmp_path, data)
    out = tmp_path / "out"
    out.mkdir()
    part = out / part_of(torrent)
    part.write_bytes(b"")
    real = fcntl.flock

    def late(fd: int, how: int) -> None:
        part.rename(out / "film.bin")
        real(fd, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with Destination(out, torrent) as place, pytest.raises(ConfigError, match="Another fetch"):
        place.scan()


def test_nothing_is_left_when_nothing_arrived(tmp_path: Path) -> None:
    torrent = single(tmp_path, data_of(RUN))
    with Destination(tmp_path / "out", torrent) as place:
        place.scan()
    assert everything(tmp_path / "out") == []


def test_a_full_disk_keeps_what_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(3 * RUN)
    torrent = single(tmp_path, data)
    real = os.pwrite
    with Destination(tmp_path / "out", torrent) as place:
        place.scan()
        put(place, 0, 0, run_of(data, 0))

        def full(fd: int, data: bytes, at: int) -> int:
            if at == RUN:
                return real(fd, data[:1000], at)  # a short write comes first
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match="full"):
            put(place, 0, 1, run_of(data, 1))
        assert place.missing(0) == [range(1, 3)]
    monkeypatch.undo()
    with Destination(tmp_path / "out", torrent) as place:
        place.scan()
        assert place.missing(0) == [range(1, 3)]
        fill(place, torrent, 0, data)
        assert place.finish(0).read_bytes() == data


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(RUN)
    torrent = single(tmp_path, data)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:300_000], at))
    with Destination(tmp_path / "out", torrent) as place:
        place.scan()
        fill(place, torrent, 0, data)
        assert place.finish(0).read_bytes() == data


def test_too_little_space_is_said_before_anything_is_paid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(5 * RUN)
    torrent = single(tmp_path, data)
    with Destination(tmp_path / "out", torrent) as place:
        place.scan()
        for run in range(3):
            put(place, 0, run, run_of(data, run))
    real = os.fstatvfs

    class Small:
        def __init__(self, free: int) -> None:
            self.f_bavail, self.f_frsize = free // 512, 512

    monkeypatch.setattr(os, "fstatvfs", lambda fd: real(fd) and Small(2 * RUN - 512))
    with Destination(tmp_path / "out", torrent) as place, pytest.raises(StorageError, match="bytes free"):
        place.scan()
    monkeypatch.setattr(os, "fstatvfs", lambda fd: real(fd) and Small(2 * RUN))
    with Destination(tmp_path / "out", torrent) as place:
        place.scan()  # three runs have their space already


def test_a_failing_sync_leaves_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(RUN)
    torrent = single(tmp_path, data)

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with Destination(tmp_path / "out", torrent) as place:
        place.scan()
        fill(place, torrent, 0, data)
        monkeypatch.setattr(os, "fsync", broken)
        with pytest.raises(StorageError):
            place.finish(0)
        assert not place.is_finished(0)
    assert everything(tmp_path / "out") == [part_of(torrent)]


def test_data_and_folder_are_synced_around_the_naming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(RUN)
    torrent = single(tmp_path, data)
    events: list[str] = []
    sync, name = os.fsync, files.give_name
    with Destination(tmp_path / "out", torrent) as place:
        place.scan()
        fill(place, torrent, 0, data)
        monkeypatch.setattr(os, "fsync", lambda fd: events.append("sync") or sync(fd))  # type: ignore[func-returns-value]
        monkeypatch.setattr(files, "give_name", lambda *a, **k: events.append("name") or name(*a, **k))  # type: ignore[func-returns-value]
        place.finish(0)
    assert events == ["sync", "name", "sync"]


def test_the_order_of_use_is_checked(tmp_path: Path) -> None:
    data = data_of(2 * RUN)
    torrent = single(tmp_path, data)
    place = Destination(tmp_path / "out", torrent)
    with pytest.raises(ValueError, match="not open"):
        place.scan()
    with place:
        with pytest.raises(ValueError, match="scan"):
            put(place, 0, 0, run_of(data, 0))
        place.scan()
        with pytest.raises(ValueError, match="length"):
            put(place, 0, 0, b"short")
        with pytest.raises(IndexError):
            put(place, 0, 2, run_of(data, 0))
        put(place, 0, 0, run_of(data, 0))
        with pytest.raises(ValueError, match="missing"):
            place.finish(0)
        fill(place, torrent, 0, data)
    with pytest.raises(ValueError, match="not open"):
        place.finish(0)


def test_a_run_that_comes_twice_is_harmless_even_after_the_end(tmp_path: Path) -> None:
    data = data_of(2 * RUN)
    torrent = single(tmp_path, data)
    with Destination(tmp_path / "out", torrent) as place:
        place.scan()
        fill(place, torrent, 0, data)
        put(place, 0, 0, bytes(RUN))  # not written: the run is there
        place.finish(0)
        put(place, 0, 1, run_of(data, 1))
    assert place.path.read_bytes() == data
    assert everything(tmp_path / "out") == ["film.bin"]


def test_progress_can_end_the_scan(tmp_path: Path) -> None:
    data = data_of(2 * RUN)
    torrent = single(tmp_path, data)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / part_of(torrent)).write_bytes(data)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with Destination(tmp_path / "out", torrent) as place, pytest.raises(KeyboardInterrupt):
        place.scan(progress=stop)


def test_closing_waits_for_writes_and_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(RUN)
    before = len(list(Path("/dev/fd").iterdir()))
    started, go = threading.Event(), threading.Event()
    real = os.pwrite

    def slow(fd: int, data: bytes, at: int) -> int:
        started.set()
        go.wait(10)
        return real(fd, data, at)

    torrent = single(tmp_path, data)
    monkeypatch.setattr(os, "pwrite", slow)
    with ThreadPoolExecutor(2) as threads, Destination(tmp_path / "out", torrent) as place:
        place.scan()
        writing = threads.submit(place.write_run, 0, 0, data)
        assert started.wait(10)
        closing = threads.submit(place.close)
        assert not closing.done()
        go.set()
        writing.result(10)
        closing.result(10)
    assert (tmp_path / "out" / part_of(torrent)).read_bytes() == data
    assert len(list(Path("/dev/fd").iterdir())) == before


class WatchedLock:
    """A lock that tells when somebody finds it held."""

    def __init__(self, met: threading.Event) -> None:
        self.lock, self.met = threading.Lock(), met

    def __enter__(self) -> None:
        if self.lock.locked():
            self.met.set()
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.lock.release()


@pytest.mark.parametrize("whole", [False, True])
def test_closing_ends_a_scan_and_closes_nothing_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    data = data_of(5 * RUN)
    torrent = single(tmp_path, data)
    name = "film.bin" if whole else part_of(torrent)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(data)
    before = len(list(Path("/dev/fd").iterdir()))
    place = Destination(tmp_path / "out", torrent)
    met = threading.Event()
    monkeypatch.setattr(place, "_scanning", WatchedLock(met))
    real, reads = os.preadv, []
    with ThreadPoolExecutor(1) as threads, place:

        def read(fd: int, buffers: Any, at: int) -> int:
            reads.append(at)
            if at == RUN:
                threads.submit(place.close).add_done_callback(lambda _: met.set())
                assert met.wait(10)
            return real(fd, buffers, at)

        monkeypatch.setattr(os, "preadv", read)
        with pytest.raises(ValueError, match="not open"):
            place.scan()
    assert reads == [0, RUN]
    assert len(list(Path("/dev/fd").iterdir())) == before
    assert everything(tmp_path / "out") == [name]


async def test_leaving_a_transfer_that_checks_ends_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(8 * RUN)
    torrent = single(tmp_path, data)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / part_of(torrent)).write_bytes(data)
    token = ResumeToken(infohash=torrent.infohash, first=(), rate=Rate(1, 1, Unit.BYTE), nodes=())
    transfer = Transfer(torrent, tmp_path / "out", [], token=token)
    checking = asyncio.Event()
    loop = asyncio.get_running_loop()
    real, reads = os.preadv, []

    def read(fd: int, buffers: Any, at: int) -> int:
        reads.append(at)
        loop.call_soon_threadsafe(checking.set)
        while not transfer.destination._closed:
            os.sched_yield()  # the test's time limit ends it
        return real(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", read)
    with pytest.raises(RuntimeError, match="left"):
        async with transfer:
            await checking.wait()
            raise RuntimeError("left")
    assert reads == [0]


def test_what_is_written_and_not_kept_is_missing_and_a_later_attempt_judges_it_by_itself(
    tmp_path: Path,
) -> None:
    data = data_of(3 * RUN)
    torrent = single(tmp_path, data)
    with Destination(tmp_path / "out", torrent) as place:
        place.scan()
        put(place, 0, 0, run_of(data, 0))
        place.write_run(0, 1, bytes(RUN))  # it did not verify
        place.write_run(0, 2, run_of(data, 2))  # nobody has looked at it yet
        assert place.missing(0) == [range(1, 3)]
        with pytest.raises(ValueError, match="missing runs"):
            place.finish(0)
    with Destination(tmp_path / "out", torrent) as place:
        place.scan()
        assert place.missing(0) == [range(1, 2)]
        put(place, 0, 1, run_of(data, 1))
        assert place.finish(0).read_bytes() == data
