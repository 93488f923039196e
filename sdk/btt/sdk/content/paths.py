"""Names from a torrent, made safe: nothing a torrent says can write outside its destination.

A torrent is a stranger's text. Its names are refused, not repaired, so that the same torrent
means the same files everywhere. What is on the disk already is the business of `files`.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from btt.sdk.errors import InvalidRequest

PART_SUFFIX = ".btt-part"
"""Ends the name of a file that is not complete yet."""

MAX_NAME = 255
"""Bytes of one name, the limit of common file systems."""

MAX_PATH = 3072
"""Bytes of one path in a torrent: leaves room for the destination within PATH_MAX."""

_DRIVE = re.compile(r"[A-Za-z]:")
_DEVICE = re.compile(
    r"(?:CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|CLOCK\$|(?:COM|LPT)[0-9\u00b9\u00b2\u00b3])\Z", re.I
)
# Marks that reorder text on a screen: "fdp.exe" can be shown as "exe.pdf".
_REORDER = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def check_name(name: bytes) -> str:
    """Checks one name of a file tree.

    Args:
        name: The bytes in the torrent.

    Returns:
        The name as text.

    Raises:
        InvalidRequest: If the name is not UTF-8, empty, `.` or `..`, holds a separator, control
            or reordering character, begins with a drive letter, is a device on Windows, is
            longer than 255 bytes or looks like one of our part files.
    """
    if len(name) > MAX_NAME:
        raise _refuse(name[:40] + b"...", f"is longer than {MAX_NAME} bytes")
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        raise _refuse(name, "is not UTF-8") from None
    # Windows drops dots and spaces at the end, so "..." and ".. " would mean "..".
    if not text.rstrip(". "):
        raise _refuse(name, "names no file")
    if any(c in "/\\" for c in text):
        raise _refuse(name, "holds a path separator")
    if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") or c in _REORDER for c in text):
        raise _refuse(name, "holds control characters")
    if _DRIVE.match(text):
        raise _refuse(name, "begins with a drive letter")
    if _DEVICE.match(text.split(".", 1)[0].rstrip()):
        raise _refuse(name, "is a device on Windows")
    if text.casefold().rstrip(". ").endswith(PART_SUFFIX):
        raise _refuse(name, "is kept for incomplete files")
    return text


def check_siblings(names: Iterable[str]) -> None:
    """Checks that the names in one folder stay apart on every file system.

    Raises:
        InvalidRequest: If two differ only by case, normal form, or dots and spaces at the end.
    """
    seen: dict[str, str] = {}
    for name in names:
        # Canonical caseless matching (Unicode 3.13, D145).
        key = unicodedata.normalize("NFD", name).casefold()
        key = unicodedata.normalize("NFD", key).rstrip(". ")
        other = seen.setdefault(key, name)
        if other != name:
            raise InvalidRequest(f"Two names in the torrent can mean the same file: {other!r} and {name!r}.")


def check_path(path: Sequence[str]) -> None:
    """Checks the length of a whole path.

    Raises:
        InvalidRequest: If it is longer than file systems take.
    """
    if sum(len(part.encode()) + 1 for part in path) > MAX_PATH:
        raise InvalidRequest(f"A path in the torrent is longer than {MAX_PATH} bytes: {path[0]!r}...")


def part_name(name: str, infohash: bytes) -> str:
    """Names the incomplete form of a file, so that other content of the same name has another one.

    Args:
        name: The file's name; one too long for what is added to it is replaced by its hash.
        infohash: Of the torrent, 32 bytes.
    """
    end = f".{infohash[:4].hex()}{PART_SUFFIX}"
    if len(name.encode()) + len(end) > MAX_NAME:
        name = hashlib.sha256(name.encode()).hexdigest()
    return name + end


def rivals(part: str, names: Iterable[str]) -> list[str]:
    """Finds the incomplete forms that other content of the same name has.

    Args:
        part: From `part_name`.
        names: What lies in its folder.
    """
    end = len(".01234567") + len(PART_SUFFIX)
    return [n for n in names if n != part and n[:-end] == part[:-end] and n.endswith(PART_SUFFIX)]


def _refuse(name: bytes, why: str) -> InvalidRequest:
    return InvalidRequest(f"The torrent is refused: the name {name!r} {why}.")
