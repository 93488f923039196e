"""Publishing real files, checked with a real libtorrent."""

from __future__ import annotations

import errno
import os
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import libtorrent as lt
import pytest

from btt.sdk.content import torrent
from btt.sdk.content.torrent import RUN, Torrent
from btt.sdk.errors import ConfigError, StorageError
from btt.services.content import stock
from btt.services.content.catalogue import Catalogue
from btt.services.content.publish import publish

SIZES = [1, 16383, 16384, 16385, RUN - 1, RUN, RUN + 1, 2 * RUN, 5 * RUN + 7]


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    found = Catalogue(tmp_path / "node" / "catalogue")
    yield found
    found.close()


def write(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(random.Random(size).randbytes(size))
    return path


@pytest.mark.parametrize("size", SIZES)
def test_a_file_becomes_a_torrent_that_libtorrent_takes_under_our_infohash(
    tmp_path: Path, catalogue: Catalogue, size: int
) -> None:
    source = write(tmp_path / "src" / "film.bin", size)
    seen: list[tuple[int, int]] = []
    made = publish(source, catalogue, progress=lambda done, total: seen.append((done, total)))

    data = made.torrent_path.read_bytes()
    theirs = lt.load_torrent_buffer(data).ti
    hashes = theirs.info_hashes()
    assert hashes.has_v1()
    assert (hashes.v2.to_bytes(), hashes.v1.to_bytes()) == (made.infohash, made.infohash_v1)
    assert (theirs.name(), theirs.total_size(), theirs.piece_length()) == ("film.bin", size, RUN)
    assert (made.name, made.total_bytes) == ("film.bin", size)
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)
    ours, info = Torrent.from_torrent(data)
    entry = catalogue.get(made.infohash)
    assert entry is not None
    assert (entry.source, entry.info_bytes, entry.layers_bytes) == (source, len(info), ours.layers_bytes)
    about = source.stat()
    kept = catalogue.file(made.infohash, 0)
    assert kept is not None
    assert (kept.path, kept.length, kept.mtime_ns) == (source, size, about.st_mtime_ns)


def test_libtorrent_seeds_what_was_published(tmp_path: Path, catalogue: Catalogue) -> None:
    """A session of libtorrent checks the source against the torrent and finds every piece."""
    root = tmp_path / "src" / "album"
    for at, size in enumerate([0, *SIZES]):
        write(root / f"{at % 3}" / f"{size}.bin", size)
    made = publish(root, catalogue)
    session = lt.session(
        {"listen_interfaces": "", "enable_dht": False, "enable_lsd": False, "enable_upnp": False,
         "enable_natpmp": False, "alert_mask": lt.alert.category_t.status_notification}
    )  # fmt: skip
    params = lt.load_torrent_file(str(made.torrent_path))
    params.save_path = str(root.parent)
    handle = session.add_torrent(params)
    done = False
    while not done and session.wait_for_alert(30_000):
        done = any(isinstance(a, lt.torrent_checked_alert) for a in session.pop_alerts())
    assert done
    status = handle.status()
    assert status.is_seeding
    assert handle.info_hashes().v2.to_bytes() == made.infohash


def test_a_folder_keeps_all_files_in_tree_order(tmp_path: Path, catalogue: Catalogue) -> None:
    root = tmp_path / "folder"
    for name, size in {"a/z": RUN + 1, "a.b": 0, "b/c/d": 5, "b.txt": 7, "\u00e9": 1}.items():
        write(root / name, size)
    made = publish(root, catalogue)
    torrent, _ = Torrent.from_torrent(made.torrent_path.read_bytes())
    assert ["/".join(f.path) for f in torrent.files] == ["a/z", "a.b", "b/c/d", "b.txt", "\u00e9"]
    assert [f.path for f in catalogue.files(made.infohash)] == [root.joinpath(*f.path) for f in torrent.files]
    assert [f.path for f in catalogue.files(made.infohash, first=3, count=1)] == [root / "b.txt"]
    assert catalogue.file(made.infohash, 5) is None


def test_publishing_twice_is_the_same_and_follows_a_move(tmp_path: Path, catalogue: Catalogue) -> None:
    source = write(tmp_path / "one" / "f", 5000)
    first = publish(source, catalogue)
    assert publish(source, catalogue) == first
    moved = write(tmp_path / "two" / "f", 5000)
    assert publish(moved, catalogue).infohash == first.infohash
    assert [e.source for e in catalogue.list()] == [moved]
    assert sorted(p.suffix for p in catalogue.folder.iterdir() if "sqlite" not in p.name) == [".torrent"]


def test_removing_leaves_the_source(tmp_path: Path, catalogue: Catalogue) -> None:
    source = write(tmp_path / "f", 5)
    made = publish(source, catalogue)
    assert catalogue.remove(made.infohash)
    assert not catalogue.remove(made.infohash)
    assert catalogue.get(made.infohash) is None
    assert catalogue.files(made.infohash) == []
    assert not made.torrent_path.exists()
    assert source.exists()


def test_removing_what_was_bought_in_part_deletes_it_and_says_so(
    tmp_path: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    infohash = bytes(32)
    assert not stock.remove(infohash, catalogue)
    part = write(stock.place_of(catalogue, infohash) / "film.btt-part", 5)
    with monkeypatch.context() as broken:
        broken.setattr(stock.shutil, "rmtree", refuse)
        with pytest.raises(StorageError, match="could not be deleted"):
            stock.remove(infohash, catalogue)
    assert stock.remove(infohash, catalogue)
    assert not part.parent.exists()


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_folder_with_only_a_file_of_its_own_name_is_refused_before_it_is_hashed(
    tmp_path: Path, catalogue: Catalogue
) -> None:
    seen: list[int] = []
    write(tmp_path / "foo/foo", RUN)
    (tmp_path / "foo/empty").mkdir()
    with pytest.raises(ConfigError, match="file of its own name") as refused:
        publish(tmp_path / "foo", catalogue, progress=lambda done, total: seen.append(done))
    assert refused.value.hint == "Publish the file itself."
    assert seen == []
    assert publish(tmp_path / "foo/foo", catalogue).name == "foo"
    write(tmp_path / "bar/bar/bar", 1)
    assert publish(tmp_path / "bar", catalogue).name == "bar"
    write(tmp_path / "foo/other", 1)
    assert publish(tmp_path / "foo", catalogue).total_bytes == RUN + 1


def test_what_cannot_be_published_is_said(tmp_path: Path, catalogue: Catalogue) -> None:
    write(tmp_path / "real", 5)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "with_link").mkdir()
    (tmp_path / "with_link/x").symlink_to("../real")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "no_files").mkdir()
    (tmp_path / "only_empty/a").mkdir(parents=True)
    write(tmp_path / "only_empty/f", 0)
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path / "cases/a", 1)
    write(tmp_path / "cases/A", 1)
    write(tmp_path / "names/a\\b", 1)
    write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/bytes/\xff")), 1)
    write(tmp_path / "deep" / "/".join(["d"] * 32) / "f", 1)
    os.utime(write(tmp_path / "dated", 1), ns=(0, 1 << 63))
    cases = {
        "missing": "does not exist",
        "link": "a link",
        "with_link": "a link",
        "empty": "empty",
        "no_files": "empty",
        "only_empty": "empty",
        "pipe": "no file",
        "cases": "same file",
        "names": "separator",
        "bytes": "UTF-8",
        "deep": "deep",
        "dated": "year 2262",
    }
    for name, says in cases.items():
        with pytest.raises(ConfigError, match=says):
            publish(tmp_path / name, catalogue)
    assert catalogue.list() == []


def test_more_names_than_a_torrent_holds_are_said(
    tmp_path: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torrent, "MAX_INFO", 1000)
    for at in range(10):
        write(tmp_path / "many" / f"{at}", 5)
    with pytest.raises(ConfigError, match=r"info dictionary is longer.*in parts"):
        publish(tmp_path / "many", catalogue)


def test_an_unreadable_file_is_said(
    tmp_path: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "f", 5)
    real = os.open

    def refuse(path: str | Path, *rest: object, **more: object) -> int:
        if Path(path) == source:
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)  # tests run as root, whom the system never refuses
    with pytest.raises(ConfigError, match="Permission denied"):
        publish(source, catalogue)


@pytest.mark.parametrize("change", ["grow", "touch", "remove"])
def test_a_source_that_changes_meanwhile_is_not_published(
    tmp_path: Path, catalogue: Catalogue, change: str
) -> None:
    source = write(tmp_path / "d" / "f", 3 * RUN)
    write(tmp_path / "d" / "g", RUN)

    def meddle(done: int, total: int) -> None:
        if done > RUN:
            return
        if change == "grow":
            source.write_bytes(source.read_bytes() + b"x")
        elif change == "touch":
            os.utime(source, ns=(1, 1))
        else:
            (tmp_path / "d" / "g").unlink()

    with pytest.raises(ConfigError, match="changed"):
        publish(tmp_path / "d", catalogue, progress=meddle)
    assert catalogue.list() == []


@pytest.mark.parametrize(("gone", "error"), [(True, ConfigError), (False, StorageError)])
def test_a_read_that_fails_is_told_from_a_source_that_changed(
    tmp_path: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch, gone: bool, error: type[Exception]
) -> None:
    source = write(tmp_path / "f", 5)

    def broken(*rest: object) -> None:
        if gone:
            source.unlink()
        raise RuntimeError("No such file or directory [system:2]")

    monkeypatch.setattr(lt, "set_piece_hashes", broken)
    with pytest.raises(error):
        publish(source, catalogue)
    assert catalogue.list() == []


def test_progress_can_end_it(tmp_path: Path, catalogue: Catalogue) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(write(tmp_path / "f", 3 * RUN), catalogue, progress=stop)
    assert catalogue.list() == []


def test_a_running_node_sees_what_another_process_publishes(tmp_path: Path, catalogue: Catalogue) -> None:
    node = Catalogue(catalogue.folder)
    try:
        made = publish(write(tmp_path / "f", 5), catalogue)
        assert node.get(made.infohash) == catalogue.get(made.infohash) is not None
    finally:
        node.close()


def test_a_catalogue_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    Catalogue(tmp_path).close()
    with sqlite3.connect(tmp_path / "catalogue.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(ConfigError, match="newer"):
        Catalogue(tmp_path)


def test_a_broken_catalogue_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "catalogue.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(StorageError):
        Catalogue(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        Catalogue(tmp_path / "file")
