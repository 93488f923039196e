"""Torrents from strangers: what libtorrent makes is read and verified, what is wrong is refused."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bencode2
import libtorrent as lt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from btt.sdk.content import merkle, torrent
from btt.sdk.content.torrent import RUN, Torrent
from btt.sdk.errors import ContentMismatch, InvalidRequest

SIZES = [1, 16383, 16384, 16385, RUN - 1, RUN, RUN + 1, 2 * RUN, 5 * RUN + 7]


def data_of(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def make(path: Path) -> bytes:
    builder = lt.create_torrent(lt.list_files(str(path)), RUN)
    lt.set_piece_hashes(builder, str(path.parent))
    return bytes(lt.bencode(builder.generate()))


def leaf(length: Any = 5, root: Any = b"r" * 32, **more: Any) -> dict[bytes, Any]:
    extra = {key.replace("_", " ").encode(): value for key, value in more.items()}
    return {b"": {b"length": length, b"pieces root": root, **extra}}


def info_of(tree: Any, **changes: Any) -> bytes:
    fields = {b"file tree": tree, b"meta version": 2, b"name": b"n", b"piece length": RUN}
    fields.update({key.replace("_", " ").encode(): value for key, value in changes.items()})
    return bencode2.bencode({k: v for k, v in fields.items() if v is not None})


def read(info: bytes, layers: Any = b"") -> Torrent:
    return Torrent.from_info(info, layers, infohash=hashlib.sha256(info).digest())


@pytest.mark.parametrize("size", SIZES)
def test_every_run_of_a_file_verifies_against_what_libtorrent_hashed(tmp_path: Path, size: int) -> None:
    data = data_of(size)
    path = tmp_path / "file.bin"
    path.write_bytes(data)
    made = make(path)
    found, info = Torrent.from_torrent(made)

    theirs = lt.load_torrent_buffer(made).ti
    assert found.infohash == theirs.info_hashes().v2.to_bytes() == hashlib.sha256(info).digest()
    assert (found.is_single, found.name, found.total_bytes) == (True, "file.bin", size)
    assert found.layers_bytes == len(found.layers()) == (32 * -(-size // RUN) if size > RUN else 0)
    assert found.runs(0) == -(-size // RUN)
    assert sum(found.run_length(0, run) for run in range(found.runs(0))) == size
    for run in range(found.runs(0)):
        piece = data[run * RUN : (run + 1) * RUN]
        assert found.verify_run(0, run, piece)
        assert found.verify_run(0, run, memoryview(bytearray(piece)))
        assert not found.verify_run(0, run, piece[:-1])
        assert not found.verify_run(0, run, piece + b"\0")
        assert not found.verify_run(0, run, b"")
        for at in {0, len(piece) // 2, len(piece) - 1}:
            wrong = bytearray(piece)
            wrong[at] ^= 1
            assert not found.verify_run(0, run, wrong)
    assert not found.verify_run(0, found.runs(0), b"")
    assert not found.verify_run(0, -1, data[-RUN:])
    with pytest.raises(IndexError):
        found.run_length(0, found.runs(0))
    with pytest.raises(IndexError):
        found.run_length(0, -1)

    again = Torrent.from_info(info, found.layers(), infohash=found.infohash)
    assert again == found


def test_a_run_is_accepted_only_at_its_own_place(tmp_path: Path) -> None:
    data = data_of(3 * RUN)
    (tmp_path / "f").write_bytes(data)
    found, _ = Torrent.from_torrent(make(tmp_path / "f"))
    assert not found.verify_run(0, 1, data[:RUN])


def test_a_folder_keeps_the_order_of_the_file_tree(tmp_path: Path) -> None:
    root = tmp_path / "folder"
    sizes = {
        "a/z": 3 * RUN + 1,
        "a.b": 0,
        "a": None,
        "b/c/d": RUN,
        "b/same": 2 * RUN,
        "same": 2 * RUN,
        "\u00e9": 1,
    }
    for name, size in sizes.items():
        if size is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data_of(size))
    found, info = Torrent.from_torrent(make(root))
    assert not found.is_single
    # Folder by folder, names as bytes: "a" and all in it come before "a.b".
    assert ["/".join(f.path) for f in found.files] == ["a/z", "a.b", "b/c/d", "b/same", "same", "\u00e9"]
    assert [f.index for f in found.files] == list(range(6))
    assert found.layers_bytes == 32 * (4 + 2 + 2)
    assert found.files[1].pieces_root is None
    assert found.runs(1) == 0
    again = Torrent.from_info(info, found.layers(), infohash=found.infohash)
    for entry in again.files:
        data = data_of(entry.length)
        for run in range(again.runs(entry.index)):
            assert again.verify_run(entry.index, run, data[run * RUN : (run + 1) * RUN])


def test_one_file_in_a_folder_is_not_a_single_file() -> None:
    assert not read(info_of({b"other": leaf()})).is_single
    assert not read(info_of({b"n": {b"n": leaf()}})).is_single
    assert read(info_of({b"n": leaf()})).is_single


def test_a_changed_info_or_layer_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(data_of(3 * RUN))
    found, info = Torrent.from_torrent(make(tmp_path / "f"))
    layers = found.layers()
    for at in (0, 40, len(layers) - 1):
        wrong = bytearray(layers)
        wrong[at] ^= 1
        with pytest.raises(ContentMismatch):
            Torrent.from_info(info, bytes(wrong), infohash=found.infohash)
    for bad in (
        b"",
        layers[:-1],
        layers + bytes(32),
        layers[:64],
        {},
        {found.files[0].pieces_root: layers[:64]},
    ):
        with pytest.raises(ContentMismatch):
            Torrent.from_info(info, bad, infohash=found.infohash)  # type: ignore[arg-type]
    with pytest.raises(ContentMismatch):
        Torrent.from_info(info[:-1] + b"x", layers, infohash=found.infohash)
    with pytest.raises(InvalidRequest):
        Torrent.from_info(info, layers, infohash=found.infohash[:20])


def deep(levels: int) -> dict[bytes, Any]:
    tree: dict[bytes, Any] = leaf()
    for _ in range(levels):
        tree = {b"d": tree}
    return tree


def long_path(levels: int) -> dict[bytes, Any]:
    tree: dict[bytes, Any] = leaf()
    for _ in range(levels):
        tree = {b"z" * 255: tree}
    return tree


BAD_INFO: dict[str, bytes] = {
    "v1 only": info_of(None, meta_version=None),
    "version 3": info_of({b"n": leaf()}, meta_version=3),
    "no tree": info_of(None),
    "tree is a list": info_of([]),
    "no files": info_of({}),
    "piece length 512 KiB": info_of({b"n": leaf()}, piece_length=RUN // 2),
    "piece length 2 MiB": info_of({b"n": leaf()}, piece_length=RUN * 2),
    "no piece length": info_of({b"n": leaf()}, piece_length=None),
    "no name": info_of({b"n": leaf()}, name=None),
    "name is a number": info_of({b"n": leaf()}, name=5),
    "name climbs": info_of({b"n": leaf()}, name=b".."),
    "name is absolute": info_of({b"n": leaf()}, name=b"/etc"),
    "file climbs": info_of({b"..": leaf()}),
    "folder climbs": info_of({b"a": {b"..": leaf()}}),
    "separator": info_of({b"a/../../b": leaf()}),
    "root is a file": info_of(leaf()),
    "file and folder": info_of({b"a": {**leaf(), b"b": leaf()}}),
    "empty folder": info_of({b"a": {}}),
    "leaf is no dict": info_of({b"a": {b"": 5}}),
    "node is no dict": info_of({b"a": 5}),
    "names meet": info_of({b"a": leaf(), b"A": leaf()}),
    "folders meet": info_of({b"x": {b"f": leaf()}, b"X": {b"g": leaf()}}),
    "link": info_of({b"a": leaf(attr=b"l")}),
    "link path": info_of({b"a": leaf(symlink_path=[b"..", b"x"])}),
    "padding": info_of({b"a": leaf(attr=b"p")}),
    "attr is a number": info_of({b"a": leaf(attr=1)}),
    "no length": info_of({b"a": leaf(length=b"5")}),
    "negative length": info_of({b"a": leaf(length=-1)}),
    "huge length": info_of({b"a": leaf(length=1 << 63)}),
    "more than 512 GiB": info_of({b"a": leaf(length=(1 << 39) + 1)}),
    "short root": info_of({b"a": leaf(root=b"r" * 31)}),
    "root is a number": info_of({b"a": leaf(root=1)}),
    "too deep": info_of(deep(33)),
    "long name": info_of({b"y": leaf()}, name=b"x" * 256),
    "long path": info_of({b"x" * 255: {b"y" * 255: long_path(11)}}),
    "not a dictionary": b"le",
    "text": b"hello",
    "cut": info_of({b"n": leaf()})[:-1],
    "unsorted": b"d1:b1:x1:a1:ye",
    "twice": b"d1:ai1e1:ai2ee",
    "big int": b"d1:ai" + b"9" * 5000 + b"ee",
    "bad length": b"d-1:ai1ee",
    "length beyond the end": b"d999999999:ae",
    "lists in lists": b"l" * 100_000 + b"e" * 100_000,
    "dicts in dicts": b"d1:a" * 100_000 + b"de" + b"e" * 100_000,
    "empty": b"",
}


@pytest.mark.parametrize("case", BAD_INFO)
def test_an_info_dictionary_outside_the_bounds_is_refused(case: str) -> None:
    with pytest.raises(InvalidRequest):
        read(BAD_INFO[case])


def test_too_long_is_refused_before_it_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torrent, "MAX_INFO", 100)
    info = info_of({b"n" * 50: leaf()})
    with pytest.raises(InvalidRequest, match="longer"):
        Torrent.from_info(info, b"", infohash=bytes(32))


@pytest.mark.parametrize("bomb", [b"le" * 1_500_000, b"2:ab" * 4_000_001])
def test_what_decodes_to_very_much_is_refused_undecoded(bomb: bytes) -> None:
    with pytest.raises(InvalidRequest, match="too complex"):
        read(b"l" + bomb + b"e")


def test_a_bomb_takes_little_memory() -> None:
    bomb = b"l" + b"le" * 8_000_000 + b"e"
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest):
            read(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_number_of_files_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torrent, "MAX_FILES", 10)
    assert len(read(info_of({b"f%02d" % i: leaf() for i in range(10)})).files) == 10
    with pytest.raises(InvalidRequest, match="more than 10 files"):
        read(info_of({b"f%02d" % i: leaf() for i in range(11)}))


def test_the_deepest_tree_and_harmless_extras_are_read() -> None:
    assert len(read(info_of(deep(32))).files[0].path) == 32
    found = read(info_of({b"n": leaf(attr=b"x", mtime=5)}, private=1, source=b"x"))
    assert found.files[0].length == 5


def test_an_empty_file_needs_no_root() -> None:
    found = read(info_of({b"a": {b"": {b"length": 0}}}))
    assert (found.total_bytes, found.runs(0), found.files[0].pieces_root) == (0, 0, None)
    assert not found.verify_run(0, 0, b"")


def test_a_torrent_file_without_info_is_refused() -> None:
    for bad in (b"de", b"d4:infoi1ee", b"d4:infode12:piece layersi1ee"):
        with pytest.raises(InvalidRequest):
            Torrent.from_torrent(bad)


@given(st.binary(max_size=200))
def test_no_input_escapes_the_typed_errors(data: bytes) -> None:
    with pytest.raises((InvalidRequest, ContentMismatch)):
        read(data)


trees = st.recursive(
    st.none() | st.integers(-1, 1 << 70) | st.binary(max_size=6) | st.just(leaf()[b""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.binary(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(trees)
def test_no_file_tree_escapes_the_typed_errors(tree: Any) -> None:
    def clean(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: clean(v) for k, v in node.items()}
        if isinstance(node, list):
            return [clean(v) for v in node]
        return 0 if node is None else node

    info = info_of(clean(tree))
    try:
        found = read(info)
    except (InvalidRequest, ContentMismatch):
        return
    for entry in found.files:
        assert not {"", ".", ".."} & set(entry.path)


@given(st.integers(2, 40), st.data())
def test_a_layer_folds_to_the_root_for_any_number_of_pieces(count: int, draw: st.DataObject) -> None:
    nodes = [hashlib.sha256(b"%d" % i).digest() for i in range(count)]
    # The definition of BEP 52: a tree over all leaves; a missing piece is 64 zero leaves.
    zero = bytes(32)
    for _ in range(6):
        zero = hashlib.sha256(zero * 2).digest()
    level = nodes + [zero] * ((1 << (count - 1).bit_length()) - count)
    while len(level) > 1:
        level = [hashlib.sha256(a + b).digest() for a, b in zip(level[::2], level[1::2], strict=True)]
    length = draw.draw(st.integers((count - 1) * RUN + 1, count * RUN))
    info = info_of({b"n": leaf(length=length, root=level[0])})
    assert read(info, b"".join(nodes)).runs(0) == count
    swapped = [nodes[1], nodes[0], *nodes[2:]]
    with pytest.raises(ContentMismatch):
        read(info, b"".join(swapped))


def test_hashing_copies_nothing() -> None:
    data = bytearray(RUN)
    info = info_of({b"n": leaf(length=RUN, root=merkle.root(merkle.leaves(data)))})
    found = read(info)
    check: Callable[[], bool] = lambda: found.verify_run(0, 0, data)  # noqa: E731
    check()
    tracemalloc.start()
    try:
        assert check()
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
