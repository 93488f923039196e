"""Changes a node's configuration file as its operator would: comments and order stay.

What would not do is never written; a node that runs is told, and what it says to it is returned.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import tomlkit
from tomlkit.exceptions import TOMLKitError

from btt.node import config as node_config
from btt.node.folder import CONFIG, running_facts, write_private
from btt.node.reload import Reloaded
from btt.sdk.errors import ConfigError, StorageError

_ANSWER_S: Final = 60.0  # above what a service may take to start, and another one to stop
_LOOK_S: Final = 0.02


def edit(folder: Path, changes: Mapping[str, Any]) -> None:
    """Writes values into the file, after checking that the whole of it does.

    Args:
        folder: Of the node.
        changes: Value by key, such as "payments.grace"; None removes the key.

    Raises:
        ConfigError: The result would not do; nothing was written.
        StorageError: The disk failed.
    """
    path = folder / CONFIG
    try:
        document = tomlkit.parse(path.read_text("utf-8"))
        for key, value in changes.items():
            _put(document, key.split("."), value)
        text = tomlkit.dumps(document)
    except FileNotFoundError:
        raise ConfigError(f"There is no node in {folder}.", hint="Make one with `btt node init`.") from None
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}).") from error
    node_config.parse(tomllib.loads(text), source=str(path))
    write(folder, text.encode())


def write(folder: Path, text: bytes) -> None:
    """Replaces the file; whoever looks meanwhile, or after a crash, sees one or the other.

    Raises:
        StorageError: The disk failed; nothing has changed.
    """
    path = folder / CONFIG
    try:
        write_private(path, text)
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror}).") from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits for other commands that change the file, and keeps them waiting, so that no change is lost."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _put(document: Any, parts: Sequence[str], value: Any) -> None:
    if not all(parts):
        raise ConfigError("A key has a section and a name.", hint='Such as "payments.grace".')
    table = document
    for part in parts[:-1]:
        if part not in table:
            if value is None:
                return
            table[part] = tomlkit.table()
        table = table[part]
        if not isinstance(table, dict):
            raise ConfigError(f"{part} is a value, and has no keys.")
    if value is not None:
        table[parts[-1]] = value
    elif parts[-1] in table:
        del table[parts[-1]]


def parse_value(text: str) -> Any:
    """Reads a value from a command line: as TOML if it is that, else as text."""
    try:
        return tomlkit.value(text).unwrap()
    except (TOMLKitError, ValueError):
        return text


def signal_node(folder: Path, number: signal.Signals) -> bool:
    """Sends a signal to the node of a folder, if one runs.

    Raises:
        ConfigError: Somebody else's node runs there.
    """
    facts = running_facts(folder)
    if not facts or "pid" not in facts:
        return False
    try:
        os.kill(int(facts["pid"]), number)
    except ProcessLookupError:
        return False
    except PermissionError:
        raise ConfigError("The node runs as another user.", hint="Become that user.") from None
    return True


def reload_node(folder: Path) -> Reloaded | None:
    """Makes a running node read its configuration.

    Returns:
        What came of it; None if no node runs.

    Raises:
        ConfigError: It did not answer in time.
    """
    before = (running_facts(folder) or {}).get("reloads", 0)
    if not signal_node(folder, signal.SIGHUP):
        return None
    end = time.monotonic() + _ANSWER_S
    while time.monotonic() < end:
        facts = running_facts(folder)
        if facts is None:
            return None
        if facts.get("reloads", 0) > before:
            found = facts["reloaded"]
            return Reloaded(tuple(found["applied"]), tuple(found["restart"]), found["error"])
        time.sleep(_LOOK_S)
    raise ConfigError(
        "The node did not answer; what was written stays, and it may still take it.",
        hint="Look into its log.",
    )


def wait_until_stopped(folder: Path, seconds: float | None) -> bool:
    """Waits for a node to end, and says whether it did.

    Args:
        folder: Of the node.
        seconds: For how long; for ever if None.
    """
    end = None if seconds is None else time.monotonic() + seconds
    while running_facts(folder) is not None:
        if end is not None and time.monotonic() >= end:
            return False
        time.sleep(_LOOK_S)
    return True
