"""What only one process of a wallet does at a time: use a channel, or send a transfer.

A claim is a lock on a file in the wallet's folder, so it ends with its process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from btt.sdk.errors import StorageError


class Claim:
    """Something that this process alone uses; `release` gives it up."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def release(self) -> None:
        """Gives it up; more than once is fine."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def make_room(folder: Path) -> None:
    """Makes the folder of a wallet's books, for its owner alone, and the one for claims in it.

    Raises:
        StorageError: They could not be made.
    """
    try:
        (folder / "claims").mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(f"The wallet's books cannot be kept in {folder}: {error.strerror}.") from error


def take(folder: Path, name: str, *, wait: bool = False) -> Claim | None:
    """Claims something.

    Args:
        folder: Of the wallet's books.
        name: Of what is claimed; a file name.
        wait: Until no other process has it.

    Returns:
        The claim; None when another process has it.

    Raises:
        StorageError: The file or the lock could not be had.
    """
    path = folder / "claims" / name
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BaseException:
            os.close(handle)
            raise
    except BlockingIOError:
        return None
    except OSError as error:
        raise StorageError(f"{path} cannot be locked: {error.strerror}.") from error
    return Claim(handle)
