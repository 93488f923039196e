"""Names in a torrent cannot write outside the destination."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from btt.sdk.content import files, paths
from btt.sdk.content.magnet import magnet_link, parse_infohash
from btt.sdk.errors import ConfigError, InvalidRequest

BAD = [
    b"",
    b".",
    b"..",
    b"...",
    b". ",
    b".. .",
    b" ",
    b"/",
    b"/etc",
    b"a/b",
    b"a\\b",
    b"..\\x",
    b"\0",
    b"a\0b",
    b"a\nb",
    b"a\x7f",
    b"a\x1b[2J",
    "a\x85b".encode(),
    "a\u2028b".encode(),
    "fdp\u202eexe".encode(),
    b"C:",
    b"c:evil",
    b"CON",
    b"nul.txt",
    b"Com1 .x",
    "lpt\u00b9".encode(),
    b"\xff\xfe",
    b"\xed\xa0\x80",  # a lone surrogate
    b"x" * 256,
    "\u00e9".encode() * 128,
    b"film.mkv.btt-part",
    b"film.mkv.BTT-PART",
    b"film.mkv.btt-part. ",
]
GOOD = [
    b"a",
    b".hidden",
    b"a..b",
    b"CONSOLE",
    b"com",
    b"com10.txt",
    b"a b.c",
    "caf\u00e9".encode(),
    b"x" * 255,
]


@pytest.mark.parametrize("name", BAD)
def test_a_dangerous_name_is_refused(name: bytes) -> None:
    with pytest.raises(InvalidRequest):
        paths.check_name(name)


@pytest.mark.parametrize("name", GOOD)
def test_an_ordinary_name_is_kept(name: bytes) -> None:
    assert paths.check_name(name).encode() == name


@given(st.binary(max_size=300) | st.text(max_size=20).map(lambda s: s.encode("utf-8", "surrogatepass")))
@example(b"../../etc/passwd")
def test_a_name_that_passes_stays_in_its_folder(name: bytes) -> None:
    try:
        text = paths.check_name(name)
    except InvalidRequest:
        return
    base = "/some/folder"
    part = paths.part_name(text, bytes(32))
    for whole in (os.path.join(base, text), os.path.join(base, part)):  # noqa: PTH118
        assert os.path.dirname(os.path.normpath(whole)) == base  # noqa: PTH120
    assert len(part.encode()) <= 255
    assert part != text
    with pytest.raises(InvalidRequest):
        paths.check_name(part.encode())
    other = paths.part_name(text, b"\1" * 32)
    assert paths.rivals(part, [part, text, other, "x" + other, other[1:]]) == [other]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("a", "A"),
        ("stra\u00dfe", "STRASSE"),
        ("caf\u00e9", "cafe\u0301"),
        ("a", "a."),
        ("a", "a "),
        ("\u00c5", "\u212b"),
    ],
)
def test_names_that_can_meet_on_some_disk_are_refused(one: str, two: str) -> None:
    with pytest.raises(InvalidRequest):
        paths.check_siblings([one, "other", two])


@given(st.lists(st.text(min_size=1, max_size=4), max_size=8, unique=True))
def test_siblings_that_pass_differ_in_every_normal_form(names: list[str]) -> None:
    try:
        paths.check_siblings(names)
    except InvalidRequest:
        return
    for form in ("NFC", "NFD"):
        for fold in (str.lower, str.casefold):
            assert len({fold(unicodedata.normalize(form, n)).rstrip(". ") for n in names}) == len(names)


def test_a_path_has_a_bounded_length() -> None:
    paths.check_path(["x" * 255] * 12)
    with pytest.raises(InvalidRequest):
        paths.check_path(["x" * 255] * 13)


def test_folders_are_made_and_entered(tmp_path: Path) -> None:
    fd = files.open_folder(tmp_path / "new", ("a", "b"))
    assert fd is not None
    os.close(fd)
    assert (tmp_path / "new/a/b").is_dir()
    assert files.open_folder(tmp_path / "new", ("a", "c"), create=False) is None
    assert files.open_folder(tmp_path / "none", (), create=False) is None


@pytest.mark.parametrize("parts", [(), ("a",)])
def test_a_folder_that_cannot_be_made_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[str, ...]
) -> None:
    """Else runs would be paid that nobody keeps."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    try:
        with pytest.raises(ConfigError, match="cannot be written"):
            files.open_folder(Path("downloads"), parts)
    finally:
        monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("parts", [("link",), ("link", "down"), ("a", "link")])
@pytest.mark.parametrize("create", [True, False])
def test_no_folder_is_entered_through_a_link(tmp_path: Path, parts: tuple[str, ...], create: bool) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    (outside / "down").mkdir()
    root.joinpath(*parts[: parts.index("link")]).mkdir(parents=True)
    root.joinpath(*parts[: parts.index("link") + 1]).symlink_to(outside)
    with pytest.raises(ConfigError):
        files.open_folder(root, parts, create=create)
    assert [p.name for p in outside.iterdir()] == ["down"]


def test_the_destination_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fd = files.open_folder(tmp_path / "link", ("a",))
    assert fd is not None
    os.close(fd)
    assert (tmp_path / "real/a").is_dir()


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(ConfigError):
        files.open_folder(tmp_path, ("a", "b"))


def test_a_finished_file_takes_no_name_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"new")
    (tmp_path / "name").write_bytes(b"old")
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(ConfigError):
            files.give_name("part", "name", folder=folder, target=tmp_path / "name")
        assert (tmp_path / "name").read_bytes() == b"old"
        assert (tmp_path / "part").read_bytes() == b"new"
    finally:
        os.close(folder)


H = bytes(range(32))


@pytest.mark.parametrize(
    "text",
    [
        H.hex(),
        H.hex().upper(),
        f" {H.hex()}\n",
        "1220" + H.hex(),
        f"magnet:?xt=urn:btmh:1220{H.hex()}",
        f"magnet:?xt=urn:btih:{'ab' * 20}&xt=urn:btmh:1220{H.hex()}&dn=a%20b",
        f"MAGNET:?dn=x&xt.1=URN:BTMH:1220{H.hex()}&xt.2=urn:btih:x",
        magnet_link(H, infohash_v1=bytes(20), name="a&b=c"),
        magnet_link(H),
    ],
)
def test_an_infohash_is_read(text: str) -> None:
    assert parse_infohash(text) == H


@pytest.mark.parametrize(
    "text",
    [
        "",
        "xyz",
        "ab" * 20,
        H.hex()[:-1],
        H.hex() + "00",
        "z" * 64,
        "\u0661" * 64,
        f"magnet:?xt=urn:btih:{'ab' * 20}",
        "magnet:?xt=urn:btmh:1220abcd",
        f"magnet:?xt=urn:btmh:1620{H.hex()}",
        f"magnet:?xt=urn:btmh:1220{H.hex()}&xt=urn:btmh:1220{'ab' * 32}",
        "magnet:?" + "&".join(["a=b"] * 2000),
        f"magnet://[?xt=urn:btmh:1220{H.hex()}",
    ],
)
def test_what_is_no_v2_infohash_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_infohash(text)
