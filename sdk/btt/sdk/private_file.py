"""Writes a file that holds a secret: readable by its owner alone, whole or not there, never over another."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from btt.sdk.disk import sync
from btt.sdk.errors import ConfigError, StorageError


def write_new(path: Path, data: bytes, *, what: str) -> None:
    """Writes a file that must not exist; it is on disk when this returns.

    Args:
        path: Of the file; missing folders are made, for their owner alone.
        data: All of it.
        what: It is, for the message.

    Raises:
        ConfigError: There is such a file.
        StorageError: It could not be written; none is left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            # Unlike a rename, a link never replaces what another process has just put there.
            os.link(temporary, path)
            try:
                sync(path.parent)
            except OSError:
                path.unlink()
                raise
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
    except FileExistsError:
        raise exists(path, what) from None
    except OSError as error:
        raise StorageError(f"{what} {path} cannot be written: {error.strerror}.") from error


def exists(path: Path, what: str) -> ConfigError:
    """Returns the error that says that a file is there already."""
    hint = f"Choose another path, or use {what.lower()} that is there."
    return ConfigError(f"{path} exists already.", hint=hint)
