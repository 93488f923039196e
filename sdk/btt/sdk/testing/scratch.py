"""Temporary folders that do not outlive their process for long, not even one that was killed.

Whoever makes one holds a lock in it, which ends with the process; the next one to make one
removes those that nobody holds.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path
from typing import Final

_PREFIX: Final = "btt-devnet-"
_LOCK: Final = "alive"


def make_scratch(stack: ExitStack | AsyncExitStack) -> Path:
    """Makes a folder, and removes what dead processes of this user left.

    Args:
        stack: Removes the folder when it closes.
    """
    # Nothing waits here: a cancelled task cannot leave the folder behind.
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    # Seen by others when it is locked, and not before.
    new = folder / f"{_LOCK}.new"
    lock = os.open(new, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, lock)
    fcntl.flock(lock, fcntl.LOCK_EX)
    new.rename(folder / _LOCK)
    for other in folder.parent.glob(f"{_PREFIX}*"):
        # Others' are none of our business, and what somebody else put there is no folder of ours.
        with suppress(OSError):
            if other.lstat().st_uid == os.getuid():
                _remove_dead(other)
    return folder


def _remove_dead(folder: Path) -> None:
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(lock)
