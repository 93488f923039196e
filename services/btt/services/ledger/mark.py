"""The high-water mark: how far this ledger has come, told by a file outside its database.

A database restored from a copy is sound in itself, and yet it has forgotten what it promised since.
The mark beside it remembers. It is never ahead of the database, because it is written after a
commit; it may be behind by what was committed in the last interval, so that it costs one more
fsync a second and not one for each commit. Keep it out of backups, or on another disk.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from btt.sdk.errors import StorageError
from btt.services.ledger.journal import Head

INTERVAL: Final = 1.0
"""Seconds between two writes of the mark."""
_SLOT: Final = struct.Struct(">8sIQQ32sI")
_MAGIC: Final = b"bttmark1"
_SLOT_SIZE: Final = 512
"""One disk sector each: a torn write spoils one of the two."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a mark says; fields as in `journal.Head`."""

    epoch: int
    seq: int
    time_ms: int
    hash: bytes


def path_of(database: Path) -> Path:
    """Returns where the mark of a database is."""
    return database.with_name(database.name + ".mark")


def read(path: Path) -> Mark | None:
    """Reads a mark; None when there is none.

    Raises:
        StorageError: There is one, but it cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"The ledger's mark {path} cannot be read: {error}.") from error
    newest, _ = _newest(data)
    if newest is None:
        raise StorageError(f"The ledger's mark {path} is damaged.")
    return newest


def _newest(data: bytes) -> tuple[Mark | None, int]:
    """Returns the newest mark of a file, and the slot it is in."""
    found = [(mark, slot) for slot in (0, 1) if (mark := _decode(data[slot * _SLOT_SIZE :])) is not None]
    # A ledger that was recovered goes on from an older entry, in a newer epoch.
    return max(found, key=lambda one: (one[0].epoch, one[0].seq), default=(None, 1))


def _decode(data: bytes) -> Mark | None:
    if len(data) < _SLOT.size:
        return None
    magic, epoch, seq, time_ms, head_hash, checksum = _SLOT.unpack(data[: _SLOT.size])
    if magic != _MAGIC or checksum != zlib.crc32(data[: _SLOT.size - 4]):
        return None
    return Mark(epoch, seq, time_ms, head_hash)


class MarkWriter:
    """Keeps the mark of a running ledger. Not thread-safe.

    Args:
        path: Of the mark.
        interval: Seconds between writes.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, path: Path, *, interval: float = INTERVAL, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval = interval
        self._clock = clock
        self._next = 0.0
        self._pending: Head | None = None
        try:
            self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            _, newest = _newest(os.pread(self._file, 2 * _SLOT_SIZE, 0))
        except OSError as error:
            raise StorageError(f"The ledger's mark {path} cannot be written: {error}.") from error
        self._slot = newest ^ 1

    @property
    def dirty(self) -> bool:
        """True when the newest commit is not in the mark."""
        return self._pending is not None

    def note(self, head: Head) -> None:
        """Takes note of a commit; writes the mark when the last write is long enough ago.

        Raises:
            StorageError: The disk failed.
        """
        self._pending = head
        if self._clock() >= self._next:
            self.flush()

    def flush(self) -> None:
        """Writes what was noted.

        Raises:
            StorageError: The disk failed.
        """
        head = self._pending
        if head is None:
            return
        data = _SLOT.pack(_MAGIC, head.epoch, head.seq, head.time_ms, head.hash, 0)[:-4]
        data += zlib.crc32(data).to_bytes(4, "big")
        try:
            os.pwrite(self._file, data.ljust(_SLOT_SIZE, b"\0"), self._slot * _SLOT_SIZE)
            os.fsync(self._file)
        except OSError as error:
            raise StorageError(f"The ledger's mark cannot be written: {error}.") from error
        self._slot ^= 1
        self._pending = None
        self._next = self._clock() + self._interval

    def close(self) -> None:
        """Writes what is left and closes the file.

        Raises:
            StorageError: The disk failed.
        """
        try:
            self.flush()
        finally:
            os.close(self._file)
