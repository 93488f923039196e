"""Writes runs past the page cache, straight to the disk.

What a fetch writes is rarely read back soon. Through the page cache every megabyte is copied
into pages that the kernel must find first, and the last sync then waits for all of them;
payments that are saved meanwhile wait with it. Written directly, the bytes are on their way
while the next run is verified. Where that is impossible (no Linux, or a file system without
it) the caller writes as usual.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading

ALIGNED = 4096
"""Length, place and memory of a direct write are multiples of this, bytes."""
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_buffers = threading.local()


class DirectWriter:
    """A second, direct way into a file that is open already; many threads may write at once.

    Args:
        fd: The file, open for writing; it stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        self._fd = -1
        if not _O_DIRECT:
            return
        try:
            # By descriptor: a name could lead elsewhere by now.
            self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | _O_DIRECT | os.O_CLOEXEC)
        except OSError as failed:
            if failed.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT, errno.EMFILE):
                raise

    def write(self, data: bytes | bytearray | memoryview, at: int) -> int:
        """Writes from the start of `data`, as far as direct writing is possible.

        Args:
            data: Bytes, at any address.
            at: Offset in the file.

        Returns:
            Bytes written; the caller writes the rest.

        Raises:
            OSError: The disk failed or is full.
        """
        length = len(data) - len(data) % ALIGNED
        if self._fd < 0 or at % ALIGNED or not length:
            return 0
        buffer = _aligned(length)
        buffer[:length] = data[:length]
        done = 0
        try:
            with memoryview(buffer) as view:
                # A short write is followed by what went wrong, or by the rest.
                while done < length and done % ALIGNED == 0:
                    done += os.pwrite(self._fd, view[done:length], at + done)
        except OSError as failed:
            if failed.errno != errno.EINVAL:
                raise
        return done

    def close(self) -> None:
        """Closes it; the file itself stays open."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _aligned(length: int) -> mmap.mmap:
    """Returns this thread's page-aligned buffer."""
    buffer: mmap.mmap | None = getattr(_buffers, "buffer", None)
    if buffer is None or len(buffer) < length:
        buffer = _buffers.buffer = mmap.mmap(-1, length)
    return buffer
