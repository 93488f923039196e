"""What a node has published: a small SQLite catalogue that the CLI writes while a running node reads.

Beside the database, in the same folder, lies `<infohash>.torrent` for each entry: the file
that any BitTorrent client can use, and where the metadata to serve is read from.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from btt.sdk.disk import sync
from btt.sdk.errors import ConfigError, StorageError

_VERSION = 1
_SCHEMA = """
CREATE TABLE content (
    infohash     BLOB PRIMARY KEY CHECK (length(infohash) = 32),
    infohash_v1  BLOB NOT NULL CHECK (length(infohash_v1) = 20),
    name         TEXT NOT NULL,
    source       TEXT NOT NULL,
    total_bytes  INTEGER NOT NULL,
    info_bytes   INTEGER NOT NULL,
    layers_bytes INTEGER NOT NULL,
    files        INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE file (
    infohash BLOB NOT NULL REFERENCES content (infohash) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    path     TEXT NOT NULL,
    length   INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    PRIMARY KEY (infohash, position)
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """Some published content.

    Attributes:
        infohash: v2, 32 bytes.
        infohash_v1: 20 bytes.
        name: Name of the file or folder.
        source: Where it lies: the file, or the folder of all files.
        total_bytes: Length of all files together.
        info_bytes: Length of the info dictionary.
        layers_bytes: Length of all piece layers together.
        files: How many files.
    """

    infohash: bytes
    infohash_v1: bytes
    name: str
    source: Path
    total_bytes: int
    info_bytes: int
    layers_bytes: int
    files: int


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of published content, as it was when it was hashed.

    Attributes:
        path: Where it lies.
        length: Bytes.
        mtime_ns: Time of its last change.
    """

    path: Path
    length: int
    mtime_ns: int


class Catalogue:
    """The published content of one node; safe for use by several threads and processes.

    Args:
        folder: Holds the database and the torrent files; it is created.

    Raises:
        ConfigError: If a newer version of this software wrote it.
        StorageError: If it cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        with _database(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                folder / "catalogue.sqlite", timeout=10, isolation_level=None, check_same_thread=False
            )
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        with self._transaction() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > _VERSION:
                raise ConfigError(
                    f"{self.folder} was written by a newer version of this software.",
                    hint="Upgrade, then start again.",
                )
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_VERSION}")

    def close(self) -> None:
        """Closes the database; doing it twice is harmless."""
        with self._lock:
            self._db.close()

    def torrent_path(self, infohash: bytes) -> Path:
        """Where the torrent file of this content lies."""
        return self.folder / f"{infohash.hex()}.torrent"

    def add(self, entry: Entry, files: Sequence[SourceFile], *, torrent: bytes) -> None:
        """Adds content, or takes over a new place of content that is there already.

        Args:
            entry: What it is.
            files: Its files in the order of the file tree.
            torrent: The torrent file.

        Raises:
            StorageError: If the disk or database fails; then nothing was added.
        """
        path = self.torrent_path(entry.infohash)
        with _database(self.folder):
            _write(path, torrent)
        row = (
            entry.infohash,
            entry.infohash_v1,
            entry.name,
            str(entry.source),
            entry.total_bytes,
            entry.info_bytes,
            entry.layers_bytes,
            entry.files,
        )
        with _database(self.folder), self._lock, self._transaction() as db:
            db.execute("DELETE FROM content WHERE infohash = ?", (entry.infohash,))
            db.execute("INSERT INTO content VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            db.executemany(
                "INSERT INTO file VALUES (?, ?, ?, ?, ?)",
                ((entry.infohash, at, str(f.path), f.length, f.mtime_ns) for at, f in enumerate(files)),
            )

    def get(self, infohash: bytes) -> Entry | None:
        """Finds content; None if it is not published here."""
        with _database(self.folder), self._lock:
            row = self._db.execute("SELECT * FROM content WHERE infohash = ?", (infohash,)).fetchone()
        return _entry(row) if row else None

    def list(self) -> list[Entry]:
        """All content, by name."""
        with _database(self.folder), self._lock:
            rows = self._db.execute("SELECT * FROM content ORDER BY name, infohash").fetchall()
        return [_entry(row) for row in rows]

    def file(self, infohash: bytes, position: int) -> SourceFile | None:
        """Finds one file by its position in the file tree; None if there is none."""
        found = self.files(infohash, first=position, count=1)
        return found[0] if found else None

    def files(self, infohash: bytes, *, first: int = 0, count: int = -1) -> Sequence[SourceFile]:
        """Some files of content in the order of the file tree.

        Args:
            infohash: v2, 32 bytes.
            first: Position of the first.
            count: How many at most; negative: all.
        """
        with _database(self.folder), self._lock:
            rows = self._db.execute(
                "SELECT path, length, mtime_ns FROM file WHERE infohash = ? AND position >= ?"
                " ORDER BY position LIMIT ?",
                (infohash, first, count),
            ).fetchall()
        return [SourceFile(path=Path(path), length=length, mtime_ns=mtime) for path, length, mtime in rows]

    def remove(self, infohash: bytes) -> bool:
        """Takes content out; its source stays.

        Returns:
            Whether it was there.

        Raises:
            StorageError: If the disk or database fails.
        """
        with _database(self.folder), self._lock, self._transaction() as db:
            found = db.execute("DELETE FROM content WHERE infohash = ?", (infohash,)).rowcount > 0
        with _database(self.folder):
            self.torrent_path(infohash).unlink(missing_ok=True)
        return found

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _entry(row: tuple[bytes, bytes, str, str, int, int, int, int]) -> Entry:
    infohash, infohash_v1, name, source, total, info, layers, files = row
    return Entry(
        infohash=infohash,
        infohash_v1=infohash_v1,
        name=name,
        source=Path(source),
        total_bytes=total,
        info_bytes=info,
        layers_bytes=layers,
        files=files,
    )


def _write(path: Path, data: bytes) -> None:
    part = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
    try:
        with part.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def _database(folder: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as failed:
        raise StorageError(f"The catalogue in {folder} failed: {failed}.") from failed
