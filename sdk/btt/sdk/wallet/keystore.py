"""The wallet file: BIP-39 words, encrypted with a password.

JSON, so that a person can see what it is. The words are sealed with AES-256-GCM under a key that
scrypt makes of the password (RFC 7914); everything else in the file is authenticated with them.
The cost of scrypt stands in the file and is bounded when read: a hostile file cannot ask for the
memory of the machine. An existing file is never overwritten.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from btt.sdk.errors import ConfigError, StorageError
from btt.sdk.keys import Address, PrivateKey
from btt.sdk.private_file import exists, write_new
from btt.sdk.wallet.mnemonic import account_key, check_words, new_words

VERSION: Final = 1

_FILE_KEYS: Final = {"btt_wallet", "kdf", "n", "r", "p", "salt", "cipher", "nonce", "ciphertext"}
_KDF: Final = "scrypt"
_CIPHER: Final = "aes-256-gcm"
_SALT_SIZE: Final = 16
_NONCE_SIZE: Final = 12
_LARGEST_FILE: Final = 64 * 2**10
_MOST_MEMORY: Final = 256 * 2**20
_MOST_PARALLEL: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """All of the file but the ciphertext."""

    n: int = 2**15
    r: int = 8
    p: int = 1
    salt: bytes
    nonce: bytes

    def as_json(self) -> dict[str, Any]:
        return {
            "btt_wallet": VERSION,
            "kdf": _KDF,
            "n": self.n,
            "r": self.r,
            "p": self.p,
            "salt": self.salt.hex(),
            "cipher": _CIPHER,
            "nonce": self.nonce.hex(),
        }

    def authenticated(self) -> bytes:
        return json.dumps(self.as_json(), sort_keys=True, separators=(",", ":")).encode()

    def memory(self) -> int:
        return 128 * self.n * self.r

    def key(self, password: str) -> bytes:
        # NFKC: the same password typed on another system may come as other code points.
        try:
            typed = unicodedata.normalize("NFKC", password).encode()
        except UnicodeEncodeError:
            raise ConfigError(
                "The password is not valid text in this environment's encoding.",
                hint="Write it in UTF-8.",
            ) from None
        limit = self.memory() + 128 * self.r * (self.p + 2) + 2**20
        try:
            return hashlib.scrypt(typed, salt=self.salt, n=self.n, r=self.r, p=self.p, maxmem=limit, dklen=32)
        except ValueError:
            raise ConfigError("The wallet file asks for parameters that scrypt does not have.") from None


class Keystore:
    """An open wallet: its words are in memory, so keep it no longer than needed.

    Make one with `create` or `open`. Both take about a tenth of a second, on purpose.
    """

    __slots__ = ("_keys", "_words")

    def __init__(self, words: str) -> None:
        self._words = words
        self._keys: dict[int, PrivateKey] = {}

    @classmethod
    def create(cls, path: Path, password: str, *, words: str | None = None) -> Keystore:
        """Makes a wallet file, readable by its owner alone.

        Args:
            path: Of the new file; missing folders are made.
            password: May be empty, which protects nothing but the shape of the file.
            words: A BIP-39 phrase to restore; by default twelve new words.

        Raises:
            ConfigError: The file exists, or the words are not valid.
            StorageError: The file could not be written; none is left behind.
        """
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        # Looked at first because it is cheap; what decides is the link in write_new.
        if path.exists():
            raise exists(path, "The wallet")
        phrase = new_words() if words is None else check_words(words)
        header = _Header(salt=secrets.token_bytes(_SALT_SIZE), nonce=secrets.token_bytes(_NONCE_SIZE))
        sealed = AESGCM(header.key(password)).encrypt(header.nonce, phrase.encode(), header.authenticated())
        document = {**header.as_json(), "ciphertext": sealed.hex()}
        write_new(path, json.dumps(document, indent=2).encode() + b"\n", what="The wallet")
        return cls(phrase)

    @classmethod
    def open(cls, path: Path, password: str) -> Keystore:
        """Opens a wallet file.

        Args:
            path: Of the file.
            password: As given to `create`.

        Raises:
            ConfigError: There is no such file, it is no wallet, or the password is wrong.
            StorageError: The file could not be read.
        """
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        header, sealed = _parse(path, _read(path))
        try:
            phrase = AESGCM(header.key(password)).decrypt(header.nonce, sealed, header.authenticated())
        except InvalidTag:
            raise ConfigError(
                f"The password of the wallet {path} is wrong, or the file was altered.",
                hint="Try the password again, or restore the wallet from its words.",
            ) from None
        return cls(check_words(phrase.decode()))

    @property
    def words(self) -> str:
        """The phrase. Whoever has it owns everything; show it only when the user asks."""
        return self._words

    def key(self, index: int = 0) -> PrivateKey:
        """Returns the key of an account.

        Args:
            index: Number of the account, from 0.

        Raises:
            ConfigError: The index is out of range.
        """
        if index not in self._keys:
            self._keys[index] = account_key(self._words, index)
        return self._keys[index]

    @property
    def address(self) -> Address:
        """The address of account 0."""
        return self.key().address

    def __repr__(self) -> str:
        return f"Keystore(of {self.address})"


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(f"There is no wallet at {path}.", hint="Make one: btt wallet create.") from None
    except OSError as error:
        raise StorageError(f"The wallet {path} cannot be read: {error.strerror}.") from error


def _parse(path: Path, data: bytes) -> tuple[_Header, bytes]:
    broken = ConfigError(f"{path} is not a wallet file.", hint="Check the path, or restore from the words.")
    if len(data) > _LARGEST_FILE:
        raise broken
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise broken from None
    if not isinstance(found, dict) or "btt_wallet" not in found:
        raise broken
    if found["btt_wallet"] != VERSION:
        raise ConfigError(f"{path} was made by another version.", hint="Use a newer version of this program.")
    if set(found) != _FILE_KEYS or found["kdf"] != _KDF or found["cipher"] != _CIPHER:
        raise broken
    n, r, p = found["n"], found["r"], found["p"]
    if not all(type(value) is int and value > 0 for value in (n, r, p)):
        raise broken
    try:
        salt, nonce, sealed = (bytes.fromhex(found[name]) for name in ("salt", "nonce", "ciphertext"))
    except (TypeError, ValueError):
        raise broken from None
    header = _Header(n=n, r=r, p=p, salt=salt, nonce=nonce)
    if header.memory() > _MOST_MEMORY or p > _MOST_PARALLEL:
        raise ConfigError(
            f"{path} asks for more work than any wallet of this program needs.", hint=broken.hint
        )
    if len(salt) != _SALT_SIZE or len(nonce) != _NONCE_SIZE:
        raise broken
    return header, sealed
