"""Whether a digest occurs twice among any number: in files, so that memory stays flat."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from btt.sdk.errors import StorageError

_PARTS: Final = 256
_DIGEST: Final = struct.Struct(">32sQ")


@contextmanager
def _notes() -> Iterator[None]:
    """Tells files of our own that fail from the journal's."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"The audit cannot write its temporary files: {error.strerror}.",
            hint="Make room, or set TMPDIR to a folder that has some: 40 bytes for each entry.",
        ) from error


class Digests:
    """Finds digests that occur twice. A context manager.

    Raises:
        StorageError: There is no room for the files; any method raises it, too.
    """

    def __init__(self) -> None:
        with _notes():
            self._folder = tempfile.TemporaryDirectory(prefix="btt-audit-")
            self._parts: list[IO[bytes]] = [
                (Path(self._folder.name) / str(n)).open("w+b", buffering=4096) for n in range(_PARTS)
            ]

    def add(self, digest: bytes, seq: int) -> None:
        """Takes note of the digest (32 bytes) of an entry."""
        with _notes():
            self._parts[digest[0]].write(_DIGEST.pack(digest, seq))

    def first_repeat(self) -> int | None:
        """Returns the number of the first entry whose digest was there before."""
        first: int | None = None
        for part in self._parts:
            seen: set[bytes] = set()
            with _notes():
                part.seek(0)
                written = part.read()
            for digest, seq in _DIGEST.iter_unpack(written):
                if digest in seen:
                    first = seq if first is None else min(first, seq)
                    break
                seen.add(digest)
        return first

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in self._parts:
            with suppress(OSError):  # what it could not write, nobody reads any more
                part.close()
        self._folder.cleanup()
