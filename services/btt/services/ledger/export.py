"""A journal as one file, for auditors: nothing but the ledger's description and its entries.

Layout: 12 bytes of magic, then records of a big-endian u32 length and that many bytes: first the
canonical description, then one serialised JournalEntry each.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Final

from google.protobuf.message import DecodeError

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.disk import appearing
from btt.sdk.errors import ConfigError, StorageError
from btt.services.ledger import mark, rows
from btt.services.ledger.check import entries as stored_entries
from btt.services.ledger.folder import DATABASE
from btt.services.ledger.journal import Entry, Kind, Posting, Side
from btt.services.ledger.reading import connect, storage
from btt.services.ledger.watching import journal_entry

MAGIC: Final = b"bttjournal1\n"
_LENGTH: Final = struct.Struct(">I")
_LONGEST: Final = 64 * 1024
_SQLITE: Final = b"SQLite form"
_NAME_A_DATABASE: Final = "Name a ledger's folder, its database, or a copy of `btt ledger backup`."
_NAME_ONE: Final = "Name a ledger's folder, a copy of `btt ledger backup`, or a file of `btt ledger export`."


def database_of(place: Path) -> Path:
    """Returns the database in a ledger's folder, or the path itself."""
    return place / DATABASE if place.is_dir() else place


def existing_database(place: Path) -> Path:
    """The same, if it is a database.

    Raises:
        ConfigError: It is none.
        StorageError: It cannot be read.
    """
    path = database_of(place)
    if not path.is_file():
        raise ConfigError(f"There is no ledger at {place}.")
    try:
        with path.open("rb") as file:
            head = file.read(len(_SQLITE))
    except OSError as error:
        raise StorageError(f"The database {path} cannot be read: {error}.") from error
    if head != _SQLITE:
        raise ConfigError(f"{path} is no ledger's database.", hint=_NAME_A_DATABASE)
    return path


def write(target: IO[bytes], description: bytes, entries: Iterable[pb.JournalEntry]) -> int:
    """Writes a journal; returns how many entries it has.

    Args:
        target: Open for writing.
        description: The canonical description of the ledger.
        entries: In order.
    """
    target.write(MAGIC + _LENGTH.pack(len(description)) + description)
    count = 0
    for entry in entries:
        data = entry.SerializeToString()
        target.write(_LENGTH.pack(len(data)) + data)
        count += 1
    return count


def export(place: Path, target: Path) -> int:
    """Writes the journal of a ledger's folder or database to a file; returns its entries.

    Args:
        place: The folder or database.
        target: New file; it appears complete, or not at all.

    Raises:
        ConfigError: There is no ledger, or the file cannot be made.
        StorageError: The disk failed.
    """
    database = existing_database(place)
    with closing(connect(database, read_only=True)) as connection, storage():
        description = rows.read_identity(connection).genesis
        connection.execute("BEGIN")
        try:
            with appearing(target) as path, path.open("wb") as file:
                return write(file, description, map(journal_entry, stored_entries(connection)))
        except OSError as error:
            raise StorageError(
                f"The file {target} cannot be written: {error.strerror}.",
                hint="Make room, or choose another place for it.",
            ) from error


@contextmanager
def journal(place: Path) -> Iterator[tuple[bytes, Iterator[Entry], sqlite3.Connection | None]]:
    """Opens the journal of a ledger's folder, of a database or backup, or of an exported file.

    Args:
        place: What to open; it is never changed.

    Yields:
        The ledger's description, its entries, and the database if it is one.

    Raises:
        ConfigError: It is none of these.
        StorageError: It cannot be read.
    """
    path = database_of(place)
    try:
        with path.open("rb") as file:
            head = file.read(len(MAGIC))
            if head == MAGIC:
                yield _description(file, path), _read(file), None
                return
    except FileNotFoundError:
        raise ConfigError(f"There is no journal at {place}.", hint=_missing(path)) from None
    except OSError as error:
        raise StorageError(f"The journal {path} cannot be read: {error}.") from error
    if not head.startswith(_SQLITE):
        raise ConfigError(f"{path} is neither a ledger's database nor an exported journal.", hint=_NAME_ONE)
    with closing(connect(path, read_only=True)) as connection, storage():
        connection.execute("BEGIN")  # one moment, whatever a running ledger adds
        yield rows.read_identity(connection).genesis, stored_entries(connection), connection


def _missing(path: Path) -> str:
    if mark.path_of(path).exists():
        return f"A ledger was there, and its database is lost: see btt ledger recover {path.parent} --help."
    return _NAME_ONE


def _description(file: IO[bytes], path: Path) -> bytes:
    try:
        return _record(file) or b""
    except ValueError as error:
        raise ConfigError(
            f"{path} does not begin with a ledger's description: {error}.", hint=_NAME_ONE
        ) from None


def _record(file: IO[bytes]) -> bytes | None:
    length = file.read(_LENGTH.size)
    if not length:
        return None
    if len(length) < _LENGTH.size or (size := _LENGTH.unpack(length)[0]) > _LONGEST:
        raise ValueError("the file is damaged")
    data = file.read(size)
    if len(data) < size:
        raise ValueError("the file ends within an entry")
    return data


def _read(file: IO[bytes]) -> Iterator[Entry]:
    while (data := _record(file)) is not None:
        found = pb.JournalEntry()
        try:
            found.ParseFromString(data)
        except DecodeError as error:
            raise ValueError(str(error)) from error
        yield Entry(
            seq=found.seq,
            time_ms=found.time_ms,
            epoch=found.epoch,
            kind=Kind(found.kind),
            request_digest=found.request_digest,
            body=found.body,
            signatures=found.signatures,
            postings=tuple(
                Posting(leg.account, Side.CREDIT if leg.credit else Side.DEBIT, leg.amount)
                for leg in found.postings
            ),
            prev_hash=found.prev_hash,
            hash=found.hash,
        )
