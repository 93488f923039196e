"""secp256k1 by libsecp256k1, as coincurve builds it.

Its functions are called directly: coincurve's own calls take DER, which would have to be made from
every r || s only to be parsed again. They and the names used here are the same in all its releases
that pyproject.toml allows. Nothing is shared between calls: they let go of the GIL.
"""

from __future__ import annotations

from typing import Any, Final

import coincurve
from coincurve._libsecp256k1 import ffi, lib

_SIGNATURE: Final = ffi.typeof("secp256k1_ecdsa_signature *")
_RECOVERABLE: Final = ffi.typeof("secp256k1_ecdsa_recoverable_signature *")
_COMPACT: Final = ffi.typeof("unsigned char[64]")
_RECOVERY_ID: Final = ffi.typeof("int *")
_new: Final = ffi.new
_context: Final = coincurve.context.GLOBAL_CONTEXT.ctx


class _Public:
    __slots__ = ("_key", "_point")

    def __init__(self, key: coincurve.PublicKey) -> None:
        self._key = key
        self._point: Any = key.public_key  # parsed once

    def verify(self, digest: bytes, signature: bytes) -> bool:
        parsed = _new(_SIGNATURE)
        return bool(
            lib.secp256k1_ecdsa_signature_parse_compact(_context, parsed, signature)  # r || s; v is not read
            and lib.secp256k1_ecdsa_verify(_context, parsed, digest, self._point)
        )

    def coordinates(self) -> bytes:
        return self._key.format(compressed=False)[1:]


class _Secret:
    __slots__ = ("_key", "_secret")

    def __init__(self, key: coincurve.PrivateKey) -> None:
        self._key = key
        self._secret = key.secret

    def public_data(self) -> bytes:
        return self._key.public_key.format(compressed=True)

    def sign(self, digest: bytes) -> bytes:
        made, compact, recovery_id = _new(_RECOVERABLE), _new(_COMPACT), _new(_RECOVERY_ID)
        # Without a nonce function it is RFC 6979.
        if not lib.secp256k1_ecdsa_sign_recoverable(_context, made, digest, self._secret, ffi.NULL, ffi.NULL):
            raise ValueError("the key cannot sign")
        lib.secp256k1_ecdsa_recoverable_signature_serialize_compact(_context, compact, recovery_id, made)
        return bytes(ffi.buffer(compact)) + bytes((recovery_id[0],))


def load_public(data: bytes) -> _Public:
    """Parses a compressed public key; ValueError if it is no point."""
    return _Public(coincurve.PublicKey(data))


def load_secret(secret: bytes) -> _Secret:
    """Loads a secret in range."""
    return _Secret(coincurve.PrivateKey(secret))
