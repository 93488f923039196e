"""What a torrent says, checked: the files of a BEP 52 info dictionary and the proof of every run.

The bytes come from a node that nobody trusts. They are bounded before they are decoded, the
info dictionary must hash to the infohash the user asked for, and each piece layer must fold
to its file's pieces root. After that a run of 1 MiB is verified alone, in any order and from
any node, before it is paid. No libtorrent: this is part of the base install.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import bencode2

from btt.sdk.content import merkle, paths
from btt.sdk.errors import ContentMismatch, InvalidRequest

RUN = 1 << 20
"""Bytes of a run, and of a piece: the only piece length that is served."""

MAX_INFO = 16 << 20
"""Most bytes of an info dictionary."""

MAX_LAYERS = 16 << 20
"""Most bytes of all piece layers together: 512 GiB of content."""

MAX_FILES = 100_000
MAX_DEPTH = 32

_RUN_HEIGHT = 6  # 64 leaves under a run
_RUN_LEAVES = RUN // merkle.LEAF
_MAX_VALUES = 4_000_000  # decoded values and containers a dictionary may have: what 100,000 files of
_MAX_CONTAINERS = 1_000_000  # a hybrid torrent need, with room; bounds memory before decoding
_MAX_NESTING = 2 * MAX_DEPTH


@dataclass(frozen=True, slots=True)
class File:
    """One file of a torrent.

    Attributes:
        index: Position in the order of the file tree, from 0.
        path: Checked names from the torrent's folder down to the file.
        length: Bytes.
        pieces_root: Root of its Merkle tree, 32 bytes; None for an empty file.
    """

    index: int
    path: tuple[str, ...]
    length: int
    pieces_root: bytes | None


@dataclass(frozen=True, slots=True)
class Torrent:
    """A verified torrent; make it with `from_info` or `from_torrent`.

    Attributes:
        infohash: SHA-256 of the info dictionary, 32 bytes.
        name: Name of the file, or of the folder that holds all files.
        files: In the order of the file tree.
        is_single: Whether it is one file that lies directly in the destination.
        total_bytes: Length of all files together.
        layers_bytes: Length of all piece layers together.
        info: The info dictionary as it was hashed.
    """

    infohash: bytes
    name: str
    files: tuple[File, ...]
    is_single: bool
    total_bytes: int
    layers_bytes: int
    info: bytes = field(repr=False)
    _layers: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def from_info(cls, info: bytes, layers: bytes | Mapping[bytes, bytes], *, infohash: bytes) -> Torrent:
        """Checks an info dictionary and its piece layers.

        Args:
            info: The bencoded info dictionary.
            layers: The layers of all files longer than 1 MiB, one after the other in the order
                of the file tree; or by pieces root, as in a torrent file.
            infohash: What the user asked for, 32 bytes.

        Raises:
            ContentMismatch: If info or layers are not what the infohash stands for.
            InvalidRequest: If they are, but the content is outside what can be fetched here:
                another version or piece length, too large, or with dangerous names.
        """
        if len(info) > MAX_INFO:
            raise InvalidRequest(f"The info dictionary is longer than {MAX_INFO >> 20} MiB.")
        if len(infohash) != 32:
            raise InvalidRequest("A v2 infohash has 32 bytes.")
        if hashlib.sha256(info).digest() != infohash:
            raise ContentMismatch("The info dictionary does not belong to this infohash.")
        fields = _decode(info)
        if fields.get(b"meta version") != 2 or not isinstance(fields.get(b"file tree"), dict):
            raise InvalidRequest("The torrent is not BitTorrent v2 (BEP 52).")
        if fields.get(b"piece length") != RUN:
            raise InvalidRequest(
                f"The torrent has pieces of {fields.get(b'piece length')!r} bytes, not 1 MiB."
            )
        raw_name = fields.get(b"name")
        if not isinstance(raw_name, bytes):
            raise InvalidRequest("The torrent has no name.")
        name = paths.check_name(raw_name)
        files = tuple(_files(fields[b"file tree"]))
        is_single = len(files) == 1 and files[0].path == (name,)
        layers_bytes = sum(_layer_bytes(f.length) for f in files)
        if layers_bytes > MAX_LAYERS:
            raise InvalidRequest(f"The torrent needs more than {MAX_LAYERS >> 20} MiB of piece layers.")
        return cls(
            infohash=infohash,
            name=name,
            files=files,
            is_single=is_single,
            total_bytes=sum(f.length for f in files),
            layers_bytes=layers_bytes,
            info=info,
            _layers=_check_layers(files, layers, layers_bytes),
        )

    @classmethod
    def from_torrent(cls, data: bytes) -> tuple[Torrent, bytes]:
        """Reads a torrent file.

        Args:
            data: The bencoded torrent file.

        Returns:
            The torrent and its info dictionary as it was hashed.

        Raises:
            ContentMismatch: If the layers in it do not belong to the info dictionary.
            InvalidRequest: If it is not a torrent that can be fetched here.
        """
        if len(data) > MAX_INFO + MAX_LAYERS:
            raise InvalidRequest("The torrent file is too large.")
        fields = _decode(data)
        info, layers = fields.get(b"info"), fields.get(b"piece layers", {})
        if not isinstance(info, dict) or not isinstance(layers, dict):
            raise InvalidRequest("The torrent file has no info dictionary.")
        # The decoder takes only the canonical form, so encoding gives the same bytes back.
        raw = bencode2.bencode(info)
        return cls.from_info(raw, layers, infohash=hashlib.sha256(raw).digest()), raw

    def torrent_file(self) -> bytes:
        """Returns the torrent file of this content, as any BitTorrent client reads it."""
        layers = {
            entry.pieces_root: layer for entry, layer in zip(self.files, self._layers, strict=True) if layer
        }
        encoded = bencode2.bencode(dict(sorted((root, layer) for root, layer in layers.items() if root)))
        return b"d4:info" + self.info + b"12:piece layers" + encoded + b"e"

    def layers(self) -> bytes:
        """The piece layers of all files, one after the other in the order of the file tree."""
        return b"".join(self._layers)

    def runs(self, file: int) -> int:
        """How many runs a file has; an empty one has none."""
        return -(-self.files[file].length // RUN)

    def run_length(self, file: int, run: int) -> int:
        """Bytes of one run: 1 MiB, or less at the end of the file.

        Raises:
            IndexError: If the file has no such run.
        """
        rest = self.files[file].length - run * RUN
        if run < 0 or rest <= 0:
            raise IndexError(f"file {file} has no run {run}")
        return min(rest, RUN)

    def verify_run(self, file: int, run: int, data: bytes | bytearray | memoryview) -> bool:
        """Says whether these bytes are that run.

        Args:
            file: Index of the file.
            run: Number of the run in the file.
            data: What arrived; any length.
        """
        entry = self.files[file]
        if not 0 <= run * RUN < entry.length or len(data) != self.run_length(file, run):
            return False
        if entry.length <= RUN:
            return merkle.root(merkle.leaves(data)) == entry.pieces_root
        found = merkle.root(merkle.leaves(data), width=_RUN_LEAVES)
        at = run * merkle.HASH
        return found == self._layers[file][at : at + merkle.HASH]


def _decode(data: bytes) -> dict[bytes, Any]:
    _check_bounds(data)
    try:
        value = bencode2.bdecode(data)
    except (ValueError, RecursionError, OverflowError) as bad:
        raise InvalidRequest("The torrent is not valid bencode.") from bad
    if not isinstance(value, dict):
        raise InvalidRequest("The torrent is not a dictionary.")
    return value


def _check_bounds(data: bytes) -> None:
    """Counts what decoding would build, so that a small input cannot take much memory."""
    at, end, depth, containers, values = 0, len(data), 0, 0, 0
    while at < end:
        values += 1
        kind = data[at]
        if kind in b"dl":
            depth += 1
            containers += 1
            at += 1
        elif kind == ord("e"):
            depth -= 1
            at += 1
        else:
            integer = kind == ord("i")
            stop = data.find(b"e" if integer else b":", at, at + 24)
            length = b"0" if integer else data[at:stop]
            if stop < 0 or not length.isdigit():
                raise InvalidRequest("The torrent is not valid bencode.")
            at = stop + 1 + int(length)
        if depth > _MAX_NESTING or containers > _MAX_CONTAINERS or values > _MAX_VALUES:
            raise InvalidRequest("The torrent is too complex.")


def _files(tree: dict[bytes, Any]) -> Iterator[File]:
    index = 0
    for path, leaf in _walk(tree, ()):
        if index >= MAX_FILES:
            raise InvalidRequest(f"The torrent has more than {MAX_FILES} files.")
        length, root = leaf.get(b"length"), leaf.get(b"pieces root")
        attributes = leaf.get(b"attr", b"")
        # BEP 47: links and padding have no place in a v2 tree; a link would write elsewhere.
        if (
            not isinstance(attributes, bytes)
            or b"l" in attributes
            or b"p" in attributes
            or b"symlink path" in leaf
        ):
            raise InvalidRequest(f"The torrent has a link or padding in its file tree: {path[-1]!r}.")
        if not isinstance(length, int) or not 0 <= length < 1 << 63:
            raise InvalidRequest(f"The file {path[-1]!r} has no valid length.")
        if length and (not isinstance(root, bytes) or len(root) != merkle.HASH):
            raise InvalidRequest(f"The file {path[-1]!r} has no pieces root.")
        yield File(index=index, path=path, length=length, pieces_root=root if length else None)
        index += 1
    if not index:
        raise InvalidRequest("The torrent has no files.")


def _walk(
    tree: dict[bytes, Any], above: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[bytes, Any]]]:
    if len(above) >= MAX_DEPTH:
        raise InvalidRequest(f"The torrent's folders are deeper than {MAX_DEPTH}.")
    names = {raw: paths.check_name(raw) for raw in tree}
    paths.check_siblings(names.values())
    # The decoder keeps the order of the torrent: names sorted as bytes, folder by folder.
    for raw, node in tree.items():
        path = (*above, names[raw])
        if not isinstance(node, dict) or not node:
            raise InvalidRequest(f"The file tree is broken at {names[raw]!r}.")
        if b"" not in node:
            yield from _walk(node, path)
            continue
        leaf = node[b""]
        if len(node) != 1 or not isinstance(leaf, dict):
            raise InvalidRequest(f"The file tree is broken at {names[raw]!r}.")
        paths.check_path(path)
        yield path, leaf


def _layer_bytes(length: int) -> int:
    return -(-length // RUN) * merkle.HASH if length > RUN else 0


def _check_layers(
    files: tuple[File, ...], layers: bytes | Mapping[bytes, bytes], layers_bytes: int
) -> tuple[bytes, ...]:
    joined = None if isinstance(layers, Mapping) else layers
    if joined is not None and len(joined) != layers_bytes:
        raise ContentMismatch(f"The piece layers have {len(joined)} bytes, not {layers_bytes}.")
    found: list[bytes] = []
    at = 0
    for entry in files:
        size = _layer_bytes(entry.length)
        if not size or entry.pieces_root is None:
            found.append(b"")
            continue
        if joined is not None:
            layer = joined[at : at + size]
            at += size
        else:
            layer = layers.get(entry.pieces_root, b"")  # type: ignore[union-attr]
        if not isinstance(layer, bytes) or len(layer) != size:
            raise ContentMismatch(f"The piece layer of {entry.path[-1]!r} is missing or of the wrong length.")
        nodes = [layer[i : i + merkle.HASH] for i in range(0, size, merkle.HASH)]
        if merkle.root(nodes, height=_RUN_HEIGHT) != entry.pieces_root:
            raise ContentMismatch(f"The piece layer of {entry.path[-1]!r} does not belong to this infohash.")
        found.append(layer)
    return tuple(found)
