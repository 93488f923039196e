"""A file that is read while it is fetched: what is read next comes first, verified and paid.

A reader may seek anywhere. Where it reads, and some way ahead, is asked for before all else; what
was asked for elsewhere and has not been given to a node is not wanted any more. The bytes lie in the
destination of an ordinary transfer and are read from there.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, Final

from btt.sdk.content import files
from btt.sdk.content.feed import Work
from btt.sdk.content.plan import within
from btt.sdk.content.store import Destination
from btt.sdk.content.torrent import RUN
from btt.sdk.content.transfer import Transfer
from btt.sdk.errors import InvalidRequest, SessionEnded, StorageError

READ_AHEAD: Final = 16
"""Runs that are fetched ahead of the reader."""
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class ContentStream:
    """A file of some content; made by `open`. One task reads at a time.

    Args:
        transfer: What fetches; it runs.
        work: Of that transfer.
        file: Index of the file.
    """

    def __init__(self, transfer: Transfer, work: Work, file: int) -> None:
        self.size = work.torrent.files[file].length
        self._transfer = transfer
        self._work = work
        self._file = file
        self._at = 0

    @classmethod
    async def open(cls, transfer: Transfer, file: int = 0) -> ContentStream:
        """Opens a file of a transfer that runs, once what is on disk has been checked.

        Args:
            transfer: Fetches the whole content, or only what its readers want.
            file: Index of the file.

        Raises:
            BttError: What ended the transfer.
        """
        ended = asyncio.ensure_future(transfer.ended())
        try:
            started: list[asyncio.Future[Any]] = [ended, transfer.work]
            await asyncio.wait(started, return_when=asyncio.FIRST_COMPLETED)
            if not transfer.work.done():
                ended.result()
        finally:
            ended.cancel()
        return cls(transfer, transfer.work.result(), file)

    def tell(self) -> int:
        """Returns where the next read begins, bytes."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to another place; costs nothing before something is read there.

        Args:
            offset: Bytes.
            whence: os.SEEK_SET, os.SEEK_CUR or os.SEEK_END.

        Returns:
            The new place.

        Raises:
            InvalidRequest: It lies before the start.
        """
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise InvalidRequest("A file begins at 0.")
        self._at = base + offset
        return self._at

    async def read(self, count: int = -1) -> bytes:
        """Reads from here on.

        Args:
            count: Most bytes; negative: to the end. Fewer come only at the end of the file.

        Raises:
            BttError: What ended the transfer before these bytes were there.
        """
        stop = self.size if count < 0 else min(self.size, self._at + count)
        parts = []
        while self._at < stop:
            # Run by run: what was read is dropped from memory only by whoever reads.
            run = self._at // RUN
            await self._arrived(run)
            end = min(stop, (run + 1) * RUN)
            parts.append(
                await asyncio.to_thread(_read, self._work.destination, self._file, self._at, end - self._at)
            )
            self._at = end
        return b"".join(parts)

    async def _arrived(self, run: int) -> None:
        work, file = self._work, self._file
        last = min(run + READ_AHEAD, work.torrent.runs(file))
        while True:
            missing = self._missing(run, last)
            if work.plan.want(self, file, missing):
                work.notify()
            if not missing or missing[0].start > run:
                return
            ended = asyncio.ensure_future(self._transfer.ended())
            changed = asyncio.ensure_future(work.changed())
            try:
                await asyncio.wait([ended, changed], return_when=asyncio.FIRST_COMPLETED)
                if ended.done():
                    ended.result()
                    if not self._missing(run, run + 1):
                        return
                    raise SessionEnded("The transfer ended before these bytes came.")
            finally:
                ended.cancel()
                changed.cancel()

    def _missing(self, start: int, stop: int) -> list[range]:
        return within(self._work.destination.missing(self._file), start, stop)

    async def close(self) -> None:
        """Wants nothing any more; what arrived is kept."""
        self._work.plan.forget(self)
        self._work.notify()


def _read(destination: Destination, file: int, at: int, count: int) -> bytes:
    """Reads what is stored, whatever the file is called by now. Blocks."""
    final = destination.file_path(file)
    with files.on_disk(final):
        try:
            fd = os.open(destination.part_path(file), _READ)
        except FileNotFoundError:
            fd = os.open(final, _READ)
        try:
            data = os.pread(fd, count, at)
        finally:
            os.close(fd)
    if len(data) != count:
        raise StorageError(f"{final} was changed meanwhile.")
    return data
