"""The folder of a node: its configuration, its keys, its certificate and its books.

The identity key, the payee key (K2) and the TLS key are three different keys. One process at a
time runs a node: it holds a lock on a file of the folder, and writes into it where it listens.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import tomlkit

from btt.node import config as node_config
from btt.node.config import NodeConfig
from btt.sdk.errors import ConfigError, InvalidRequest, StorageError
from btt.sdk.identity import NodeAddress, tls_name
from btt.sdk.keys import Address, PrivateKey
from btt.sdk.tls import make_certificate
from btt.sdk.wallet import Keystore

CONFIG: Final = "node.toml"
IDENTITY_KEY: Final = "identity.key"
PAYEE_KEY: Final = "payee.key"
TLS_KEY: Final = "tls.key"
CERTIFICATE: Final = "tls.crt"
BOOKS: Final = "payments.db"
LOCK: Final = "node.lock"
_TOLD_BYTES: Final = 16384
_LOCK_TRIES: Final = 5
_LOCK_PAUSE_S: Final = 0.02
PASSWORD_ENV: Final = "BTT_NODE_PASSWORD"  # noqa: S105 - a variable's name


def default_folder() -> Path:
    """Returns where a node lives unless told otherwise."""
    from platformdirs import user_data_path

    return user_data_path("btt") / "node"


@dataclass(frozen=True, slots=True)
class NodeFolder:
    """An opened folder; whoever can read it is the node.

    Attributes:
        path: Of the folder.
        config: As read from the file and the environment.
        identity: Signs offers and statements.
        payee_key: K2.
        tls_key: PEM.
        certificate: PEM.
    """

    path: Path
    config: NodeConfig
    identity: PrivateKey
    payee_key: PrivateKey
    tls_key: bytes = field(repr=False)
    certificate: bytes

    @property
    def payee(self) -> Address:
        """The account that is paid."""
        return self.config.payments.payee or self.payee_key.address

    @property
    def books(self) -> Path:
        """Where the payments are kept."""
        return self.path / BOOKS

    @classmethod
    def open(cls, path: Path) -> NodeFolder:
        """Reads configuration and keys; the password of the keys is `BTT_NODE_PASSWORD`.

        Raises:
            ConfigError: There is no node, its configuration is wrong, or the password is.
        """
        config = node_config.load(path / CONFIG)
        password = os.environ.get(PASSWORD_ENV, "")
        try:
            return cls(
                path,
                config,
                Keystore.open(path / IDENTITY_KEY, password).key(),
                Keystore.open(path / PAYEE_KEY, password).key(),
                (path / TLS_KEY).read_bytes(),
                (path / CERTIFICATE).read_bytes(),
            )
        except OSError as error:
            raise ConfigError(f"The certificate of the node in {path} cannot be read: {error}.") from error

    @contextmanager
    def lock(self) -> Iterator[Running]:
        """Takes the node for this process.

        Raises:
            ConfigError: Another process runs it.
            StorageError: Its lock cannot be opened.
        """
        try:
            handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"{self.path / LOCK} cannot be opened ({error.strerror}).") from error
        try:
            if not _take(handle):
                raise ConfigError(
                    f"The node in {self.path} is running already.",
                    hint="Stop it first, or look at it with `btt node status`.",
                )
            os.ftruncate(handle, 0)
            running = Running(handle)
            running.tell()
            yield running
            os.ftruncate(handle, 0)
        finally:
            os.close(handle)


def _take(handle: int) -> bool:
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(_LOCK_PAUSE_S)  # whoever looks whether the node runs holds it for an instant
        else:
            return True
    return False


class Running:
    """The lock of a running node, and what it tells others.

    Args:
        handle: Of the locked file.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._facts: dict[str, object] = {"pid": os.getpid()}

    def tell(self, **facts: object) -> None:
        """Writes down where the node listens, and what else changes while it runs."""
        self._facts |= facts
        text = json.dumps(self._facts).encode()
        # Some file systems need room even to write over; without it a node goes on, and stops, all the same.
        with suppress(OSError):
            os.pwrite(self._handle, text.ljust(_TOLD_BYTES), 0)


def running_address(path: Path, fact: str = "address") -> NodeAddress | None:
    """Returns where the node of a folder said that it listens, or None if no process holds it.

    Args:
        path: Of the folder.
        fact: "address" for where others find it, "local" for this machine.
    """
    try:
        return NodeAddress.parse(str((running_facts(path) or {})[fact]))
    except (KeyError, InvalidRequest):
        return None


def running_facts(path: Path) -> dict[str, Any] | None:
    """Returns what the node of a folder says about itself, or None if no process holds it.

    Returns:
        At least its process id `pid`, unless it has only just begun.
    """
    try:
        handle = os.open(path / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            found = json.loads(os.pread(handle, _TOLD_BYTES, 0))
            return found if isinstance(found, dict) else {}
        else:
            return None
    except ValueError:
        return {}  # it has not come so far as to listen
    finally:
        os.close(handle)


def init(path: Path, *, config: dict[str, Any]) -> NodeFolder:
    """Makes a new node.

    An attempt that broke off is taken up again: keys that exist are kept.

    Args:
        path: Of the folder; made if it is missing, readable by its owner alone.
        config: Tables of the configuration file.

    Raises:
        ConfigError: There is a node already, or the configuration does not do.
        StorageError: The disk failed.
    """
    if (path / CONFIG).exists():
        raise ConfigError(f"There is a node in {path} already.", hint=f"Start it: btt node start {path}.")
    node_config.parse(config, source="The configuration")
    password = os.environ.get(PASSWORD_ENV, "")
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in (IDENTITY_KEY, PAYEE_KEY):
            if not (path / name).exists():
                Keystore.create(path / name, password)
        if not (path / CERTIFICATE).exists():
            identity = Keystore.open(path / IDENTITY_KEY, password).key()
            key, certificate = make_certificate(tls_name(identity.address))
            write_private(path / TLS_KEY, key)
            write_private(path / CERTIFICATE, certificate)
        # Last: a folder with a configuration is a whole node.
        write_private(path / CONFIG, _toml(config).encode())
    except OSError as error:
        raise StorageError(f"The node's folder {path} cannot be made: {error}.") from error
    return NodeFolder.open(path)


def _toml(config: dict[str, Any]) -> str:
    document = tomlkit.document()
    document.add(tomlkit.comment("A BTT node. Every key can be overridden: BTT_NODE__SECTION__KEY=value."))
    for name, table in config.items():
        document.add(tomlkit.nl())
        document.add(name, tomlkit.item(table))
    return tomlkit.dumps(document)


def write_private(path: Path, data: bytes) -> None:
    """Writes a file for its owner alone; it appears complete or not at all."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
