"""Which library does the curve arithmetic, and what it must offer.

A backend is a module with two functions. Keys keep the handle they were made with, so that a
change of the backend touches new keys only.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal, Protocol, cast

ORDER: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
"""Order of the group of secp256k1 (SEC 2, 2.4.1)."""

BackendName = Literal["coincurve", "cryptography"]
_MODULES: Final[dict[BackendName, str]] = {
    "coincurve": "btt.sdk.keys._coincurve",
    "cryptography": "btt.sdk.keys._cryptography",
}


class PublicHandle(Protocol):
    """A parsed public key."""

    def verify(self, digest: bytes, signature: bytes) -> bool:
        """Verifies r || s || v, 65 bytes; refuses r and s out of range and a high s, and ignores v."""

    def coordinates(self) -> bytes:
        """Returns x || y, 64 bytes."""


class SecretHandle(Protocol):
    """A loaded secret key."""

    def public_data(self) -> bytes:
        """Returns the compressed public key, 33 bytes."""

    def sign(self, digest: bytes) -> bytes:
        """Signs 32 bytes: r || s || v with a low s and an RFC 6979 nonce."""


class Backend(Protocol):
    """The two functions of a backend module."""

    def load_public(self, data: bytes) -> PublicHandle:
        """Parses 33 bytes; ValueError if they are no point."""

    def load_secret(self, secret: bytes) -> SecretHandle:
        """Loads a secret in range."""


_current: Backend | None = None


def _load(name: BackendName) -> Backend:
    return cast(Backend, importlib.import_module(_MODULES[name]))


def current() -> Backend:
    """Returns the backend in use: coincurve, else `cryptography` where it is not installed."""
    global _current
    if _current is None:
        try:
            _current = _load("coincurve")
        except ImportError:
            _current = _load("cryptography")
    return _current


@contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """Makes new keys with one backend while the context is open; for tests and comparisons.

    It applies to the whole process, not to one task.

    Args:
        name: "coincurve" or "cryptography".

    Raises:
        ImportError: The library is not installed.
    """
    global _current
    before, _current = _current, _load(name)
    try:
        yield
    finally:
        _current = before
