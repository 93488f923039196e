"""One open file that is being served: read in runs, never trusted to stay as it was.

Read with pread and not through a mapping: a mapped file that shrinks kills the process. What
is not as it was published is not sent, since the caller would refuse it and would be right.
"""

from __future__ import annotations

import os
import stat
import threading

from btt.sdk.content.torrent import RUN
from btt.sdk.errors import ContentUnavailable
from btt.services.content.catalogue import SourceFile

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class OpenSource:
    """A published file, open for one call; blocks, so use it in worker threads.

    Closing while a thread reads is safe: the descriptor goes when the last read ends.

    Args:
        file: The file as it was published.

    Raises:
        ContentUnavailable: If it is gone, unreadable or has changed.
    """

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._readers = 0
        self._closing = False
        try:
            self._fd = os.open(file.path, _FLAGS)
        except OSError as failed:
            raise ContentUnavailable("The node can no longer read this content.") from failed
        try:
            self._check()
        except BaseException:
            os.close(self._fd)
            raise

    def read(self, run: int) -> bytes:
        """Reads one run.

        Args:
            run: Its number in the file.

        Raises:
            ContentUnavailable: If the file has changed or cannot be read, or was closed.
        """
        size = min(RUN, self._file.length - run * RUN)
        with self._lock:
            if self._closing:
                raise ContentUnavailable("The call has ended.")
            self._readers += 1
        try:
            data = os.pread(self._fd, size, run * RUN)
            self._check()
        except OSError as failed:
            raise ContentUnavailable("The node can no longer read this content.") from failed
        finally:
            with self._lock:
                self._readers -= 1
                last = self._closing and not self._readers
            if last:
                os.close(self._fd)
        if len(data) != size:
            raise ContentUnavailable("The content has changed at the node.")
        return data

    def close(self) -> None:
        """Lets go of the file; doing it twice is harmless."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            last = not self._readers
        if last:
            os.close(self._fd)

    def _check(self) -> None:
        about = os.fstat(self._fd)
        same = (about.st_size, about.st_mtime_ns) == (self._file.length, self._file.mtime_ns)
        if not same or not stat.S_ISREG(about.st_mode):
            raise ContentUnavailable("The content has changed at the node.")
