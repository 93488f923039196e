"""Publishing: a file or folder becomes a hybrid torrent and an entry of the node's catalogue.

Hybrid (BEP 52) with 1 MiB pieces: the same bytes are paid runs here and ordinary pieces to
every old BitTorrent client. What the fetching side would refuse, such as links or dangerous
names, is refused here first, while the publisher can still do something about it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from btt.sdk.content import paths
from btt.sdk.content.merkle import HASH
from btt.sdk.content.torrent import MAX_DEPTH, MAX_FILES, MAX_LAYERS, RUN, Torrent
from btt.sdk.errors import ConfigError, InvalidRequest, StorageError
from btt.services.content.catalogue import Catalogue, Entry, SourceFile

Progress = Callable[[int, int], None]
"""Called with the bytes hashed and the bytes in all; what it raises ends the work."""


@dataclass(frozen=True, slots=True)
class Published:
    """What was published.

    Attributes:
        infohash: v2, 32 bytes: the address of the content.
        infohash_v1: 20 bytes, for clients that know no v2.
        name: Name of the file or folder.
        total_bytes: Length of all files together.
        torrent_path: The torrent file, for any BitTorrent client.
    """

    infohash: bytes
    infohash_v1: bytes
    name: str
    total_bytes: int
    torrent_path: Path


def publish(source: Path, catalogue: Catalogue, *, progress: Progress | None = None) -> Published:
    """Hashes a file or folder and adds it to the catalogue; the source stays where it is.

    Doing it again for unchanged files gives the same answer. It blocks, and the hashing keeps
    the interpreter lock: a process that serves calls must let another process publish.

    Args:
        source: A file, or a folder with everything below it.
        catalogue: Where to enter it.
        progress: Told after each piece.

    Raises:
        ConfigError: If it cannot be published as it is: missing, unreadable, empty, with links
            or dangerous names, too large, or changed while it was hashed.
        StorageError: If a disk fails.
    """
    import libtorrent as lt  # a part of the node's installation that few commands need

    source = Path(os.path.abspath(source))  # noqa: PTH100 - resolve() would hide that the source is a link
    found = _collect(source)
    if list(found) == [(source.name,)]:
        # BEP 52 writes a file alone and a folder with only a file of its own name alike.
        raise ConfigError(
            f"{source} holds nothing but a file of its own name, which a torrent cannot tell from the file.",
            hint="Publish the file itself.",
        )
    total = sum(f.length for f in found.values())
    if not total:
        raise ConfigError(f"{source} is empty: there is nothing to publish.")
    layers = sum(-(-f.length // RUN) * HASH for f in found.values() if f.length > RUN)
    if layers > MAX_LAYERS:
        raise ConfigError(
            f"{source} is too large: at most {MAX_LAYERS // HASH * RUN >> 30} GiB can be published at once."
        )

    def hashed(piece: int) -> None:
        if progress is not None:
            progress(total * (piece + 1) // builder.num_pieces(), total)

    try:
        entries = [
            lt.create_file_entry("/".join((source.name, *path)), f.length) for path, f in found.items()
        ]
        builder = lt.create_torrent(entries, RUN)
        lt.set_piece_hashes(builder, str(source.parent), hashed)
        data = bytes(lt.bencode(builder.generate()))
    except UnicodeError as bad:
        raise ConfigError(f"The path {source!r} is not valid text.", hint="Rename it.") from bad
    except RuntimeError as failed:  # what libtorrent raises for every failure of the disk
        _check_unchanged(found)
        raise StorageError(f"{source} could not be read: {failed}.") from failed
    _check_unchanged(found)
    try:
        torrent, info = Torrent.from_torrent(data)
    except InvalidRequest as bad:  # names that are long, or many
        raise ConfigError(
            f"{source} cannot be published. {bad.message}", hint="Publish it in parts, or with shorter names."
        ) from None
    files = [found[() if torrent.is_single else entry.path] for entry in torrent.files]
    assert [f.length for f in files] == [entry.length for entry in torrent.files]
    entry = Entry(
        infohash=torrent.infohash,
        infohash_v1=hashlib.sha1(info, usedforsecurity=False).digest(),
        name=torrent.name,
        source=source,
        total_bytes=torrent.total_bytes,
        info_bytes=len(info),
        layers_bytes=torrent.layers_bytes,
        files=len(files),
    )
    catalogue.add(entry, files, torrent=data)
    return Published(
        infohash=entry.infohash,
        infohash_v1=entry.infohash_v1,
        name=entry.name,
        total_bytes=entry.total_bytes,
        torrent_path=catalogue.torrent_path(entry.infohash),
    )


def _collect(source: Path) -> dict[tuple[str, ...], SourceFile]:
    """Finds all files, by their path below the source; a single file has the path ()."""
    found: dict[tuple[str, ...], SourceFile] = {}

    def visit(path: Path, below: tuple[str, ...]) -> None:
        try:
            about = path.lstat()
            if stat.S_ISDIR(about.st_mode):
                names = sorted(os.listdir(path))  # noqa: PTH208 - the names are wanted, not paths
            elif stat.S_ISREG(about.st_mode):
                os.close(os.open(path, os.O_RDONLY | os.O_NOFOLLOW))
            else:
                kind = "a link" if stat.S_ISLNK(about.st_mode) else "no file"
                raise ConfigError(
                    f"{path} is {kind} and cannot be published.", hint="Copy the files themselves."
                )
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist.") from None
        except OSError as failed:
            raise ConfigError(f"{path} cannot be read: {failed.strerror}.") from failed
        if stat.S_ISREG(about.st_mode):
            if len(found) >= MAX_FILES:
                raise ConfigError(f"{source} has more than {MAX_FILES:,} files.")
            if about.st_mtime_ns >= 1 << 63:
                raise ConfigError(f"{path} has a date after the year 2262.", hint="Set it with `touch`.")
            found[below] = SourceFile(path=path, length=about.st_size, mtime_ns=about.st_mtime_ns)
            return
        if len(below) >= MAX_DEPTH:
            raise ConfigError(f"{path} lies more than {MAX_DEPTH} folders deep.")
        _check_names(path, names)
        for name in names:
            visit(path / name, (*below, name))

    _check_names(source.parent, [source.name])
    visit(source, ())
    return found


def _check_names(folder: Path, names: list[str]) -> None:
    try:
        paths.check_siblings([paths.check_name(os.fsencode(name)) for name in names])
    except InvalidRequest as bad:
        raise ConfigError(f"{folder} cannot be published. {bad.message}", hint="Rename the file.") from None


def _check_unchanged(found: dict[tuple[str, ...], SourceFile]) -> None:
    for entry in found.values():
        try:
            about = entry.path.lstat()
        except OSError:
            about = None
        if about is None or (about.st_size, about.st_mtime_ns) != (entry.length, entry.mtime_ns):
            raise ConfigError(
                f"{entry.path} changed while it was published.", hint="Try again when it rests."
            )
