"""Makes durable what was written: a file's bytes, or which names a folder holds."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Returns once a file, or the names in a folder, would survive a loss of power.

    Args:
        path: Of the file or folder.

    Raises:
        OSError: The disk failed, or there is nothing at the path.
    """
    if os.name != "posix" and path.is_dir():
        return  # elsewhere folders cannot be opened, nor need to be
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
