"""The folder of a ledger: its keys, its certificate and its books. Whoever reads it is the ledger."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from btt.sdk.clock import SYSTEM
from btt.sdk.disk import sync
from btt.sdk.errors import ConfigError, InvalidRequest, StorageError
from btt.sdk.keys import Address, PrivateKey
from btt.sdk.ledger.address import tls_name
from btt.sdk.money import SUPPLY
from btt.sdk.tls import make_certificate
from btt.services.ledger import mark, outage, store
from btt.services.ledger.books import Terms
from btt.services.ledger.genesis import Identity
from btt.services.ledger.journal import EntryRef

DATABASE: Final = "ledger.sqlite3"
OPERATOR_KEY: Final = "operator.key"
TLS_KEY: Final = "tls.key"
CERTIFICATE: Final = "tls.pem"
NEXT_KEY: Final = "operator.key.next"
RECOVERED: Final = "recovered-epoch-"
"""Begins the names of folders that keep what a finished recovery was made of; the epoch follows."""


@dataclass(frozen=True, slots=True)
class LedgerFolder:
    """An opened folder.

    Args:
        path: Of the folder.
        operator_key: Signs receipts and documents.
        tls_key: PEM.
        certificate: PEM.
    """

    path: Path
    operator_key: PrivateKey
    tls_key: bytes
    certificate: bytes

    @property
    def database(self) -> Path:
        """Where the books are."""
        return self.path / DATABASE

    @classmethod
    def open(cls, path: Path) -> LedgerFolder:
        """Reads the keys of a ledger.

        Raises:
            ConfigError: There is no ledger in the folder, or its keys are unreadable.
        """
        try:
            return cls(
                path,
                PrivateKey(bytes.fromhex((path / OPERATOR_KEY).read_text("ascii"))),
                (path / TLS_KEY).read_bytes(),
                (path / CERTIFICATE).read_bytes(),
            )
        except FileNotFoundError:
            database = path / DATABASE
            if database.exists() or mark.path_of(database).exists():
                raise ConfigError(
                    f"The keys of the ledger in {path} are missing.",
                    hint=f"Put {OPERATOR_KEY}, {TLS_KEY} and {CERTIFICATE} back.",
                ) from None
            raise ConfigError(
                f"There is no ledger in {path}.", hint="Make one with `btt ledger init`."
            ) from None
        except (OSError, ValueError, InvalidRequest) as error:
            raise ConfigError(f"The keys of the ledger in {path} cannot be read: {error}.") from error

    def key_of(self, operator_key: bytes) -> PrivateKey:
        """Returns the secret of a key that signs, or signed, for the ledger.

        Args:
            operator_key: Its public key, 33 bytes.

        Raises:
            ConfigError: The folder does not hold it.
        """
        for key in self.operator_keys():
            if key.public.data == operator_key:
                return key
        raise ConfigError(
            f"The folder {self.path} does not hold the operator key of these books.",
            hint="Put the key that signed for the ledger into operator.key.",
        )

    def operator_keys(self) -> list[PrivateKey]:
        """Returns the current operator key and those that were handed over before.

        Raises:
            ConfigError: One of them cannot be read.
        """
        try:
            retired = [_read_key(path) for path in sorted(self.path.glob("operator.T*.key"))]
        except (OSError, ValueError, InvalidRequest) as error:
            raise ConfigError(f"The keys of the ledger in {self.path} cannot be read: {error}.") from error
        return [self.operator_key, *retired]

    def recovered_epochs(self) -> list[int]:
        """Returns the epochs that recoveries in this folder began: no other may have their numbers."""
        ends = (path.name.removeprefix(RECOVERED) for path in self.path.glob(f"{RECOVERED}*"))
        return [int(end) for end in ends if end.isdecimal()]  # somebody may keep a copy beside

    def following_key(self) -> PrivateKey:
        """Returns the key that the ledger will be handed to; made and kept at the first call.

        Raises:
            StorageError: It cannot be written or read.
        """
        path = self.path / NEXT_KEY
        try:
            if not path.exists():
                _write_secret(path, PrivateKey.generate().secret.hex().encode())
            # The only copy: before anything names this key, a power cut must find it here.
            sync(self.path)
            return _read_key(path)
        except OSError as error:
            raise StorageError(f"The new key cannot be written: {error}.") from error

    def settled(self, operator_key: bytes) -> LedgerFolder:
        """Returns the folder with the operator key that the books name.

        A hand-over that broke off after the books had it is finished here.

        Args:
            operator_key: The ledger's current key, 33 bytes.

        Raises:
            ConfigError: The folder does not hold that key.
            StorageError: The disk failed.
        """
        if self.operator_key.public.data == operator_key:
            return self
        try:
            following = _read_key(self.path / NEXT_KEY)
            if following.public.data == operator_key:
                retired = self.path / f"operator.{self.operator_key.address}.key"
                if not retired.exists():
                    _write_secret(retired, self.operator_key.secret.hex().encode())
                sync(self.path)  # the old key has its new name before it loses its own
                (self.path / NEXT_KEY).rename(self.path / OPERATOR_KEY)
                return replace(self, operator_key=following)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StorageError(f"The ledger's key could not be changed: {error}.") from error
        raise ConfigError(
            f"The folder {self.path} does not hold the ledger's current operator key.",
            hint="Put the key that signs for the ledger into operator.key.",
        )


def rotate(path: Path, *, clock: Callable[[], int] = SYSTEM) -> tuple[Address, EntryRef]:
    """Hands a ledger that does not run to a fresh operator key.

    The ledger's address stays; clients follow the hand-over. The old key stays in the folder under
    its address, for whoever has to prove something with it; without need, destroy it.

    Args:
        path: Of the folder.
        clock: Unix milliseconds.

    Returns:
        The new operator's address, and the journal entry.

    Raises:
        ConfigError: There is no ledger, or it runs.
        StorageError: The disk failed; the same call again finishes it.
    """
    folder = LedgerFolder.open(path)
    with store.Store.open(folder.database) as books:
        folder = folder.settled(books.operator_key)
        following = folder.following_key()
        outage.give_back(books, folder.operator_key, clock_ms=clock())
        entry = books.rotate(following, folder.operator_key, clock_ms=clock())
        folder.settled(following.public.data)
    return following.address, entry


def _read_key(path: Path) -> PrivateKey:
    return PrivateKey(bytes.fromhex(path.read_text("ascii")))


def init(
    path: Path,
    *,
    name: str,
    supply_to: Address | None = None,
    amount: int = SUPPLY,
    terms: Terms | None = None,
    clock: Callable[[], int] = SYSTEM,
) -> tuple[LedgerFolder, Identity]:
    """Makes a new ledger with an unbacked issue.

    An attempt that broke off is taken up again: keys that exist are kept.

    Args:
        path: Of the folder; made if it is missing, readable by its owner alone.
        name: Of the ledger, for people.
        supply_to: Gets the issue; the operator's own account by default.
        amount: Base units issued.
        terms: What the ledger accepts in a T1.
        clock: Unix milliseconds.

    Raises:
        ConfigError: There is a ledger already, or an argument does not do.
        StorageError: The disk failed.
    """
    if (path / DATABASE).exists():
        raise ConfigError(f"There is a ledger in {path} already.")
    if mark.path_of(path / DATABASE).exists():
        raise ConfigError(
            f"There was a ledger in {path}; its database is gone.",
            hint="Restore the database, or use another folder.",
        )
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (path / OPERATOR_KEY).exists():
            _write_secret(path / OPERATOR_KEY, PrivateKey.generate().secret.hex().encode())
        operator = PrivateKey(bytes.fromhex((path / OPERATOR_KEY).read_text("ascii")))
        if not (path / CERTIFICATE).exists():
            key, certificate = make_certificate(tls_name(operator.address))
            _write_secret(path / TLS_KEY, key)
            _write_secret(path / CERTIFICATE, certificate)
    except OSError as error:
        raise StorageError(f"The ledger's folder {path} cannot be made: {error}.") from error
    folder = LedgerFolder.open(path)
    identity = store.create(
        folder.database,
        name=name,
        operator_key=operator,
        supply_to=supply_to or operator.address,
        amount=amount,
        clock=clock,
        terms=terms,
    )
    return folder, identity


def _write_secret(path: Path, data: bytes) -> None:
    """Writes a file for its owner alone; it appears complete or not at all."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
