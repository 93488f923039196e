"""Makes durable what was written: a file's bytes, or which names a folder holds; a new file as a whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from btt.sdk.errors import ConfigError


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


@contextmanager
def appearing(target: Path, *, mode: int = 0o666) -> Iterator[Path]:
    """Gives the path to write a new file at, which then appears whole under its name, or not at all.

    Args:
        target: Where it is to be.
        mode: Who may read it, as `os.open` takes it.

    Raises:
        ConfigError: It exists, or cannot be made.
    """
    if target.exists():
        raise ConfigError(f"The file {target} exists already.", hint="Choose another place for it.")
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    except OSError as error:
        raise ConfigError(
            f"The file {target} cannot be written: {error.strerror}.", hint="Choose another place for it."
        ) from None
    try:
        yield unfinished
        sync(unfinished)
        unfinished.rename(target)
        sync(target.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
