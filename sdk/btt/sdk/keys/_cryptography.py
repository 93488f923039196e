"""secp256k1 by `cryptography`: the fallback where coincurve has no build. Slower, same bytes.

OpenSSL neither lowers s, nor refuses a high one, nor returns v: all three are done here.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    Prehashed,
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from btt.sdk.keys._backend import ORDER

_CURVE = ec.SECP256K1()
_VERIFY = ec.ECDSA(Prehashed(SHA256()))
_SIGN = ec.ECDSA(Prehashed(SHA256()), deterministic_signing=True)


class _Public:
    __slots__ = ("_key",)

    def __init__(self, key: ec.EllipticCurvePublicKey) -> None:
        self._key = key

    def verify(self, digest: bytes, signature: bytes) -> bool:
        r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:64], "big")
        if s > ORDER // 2:
            return False
        try:
            self._key.verify(encode_dss_signature(r, s), digest, _VERIFY)
        except InvalidSignature:
            return False
        return True

    def coordinates(self) -> bytes:
        return self._key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]


class _Secret:
    __slots__ = ("_key", "_secret")

    def __init__(self, secret: bytes) -> None:
        self._secret = int.from_bytes(secret, "big")
        self._key = ec.derive_private_key(self._secret, _CURVE)

    def public_data(self) -> bytes:
        return self._key.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)

    def sign(self, digest: bytes) -> bytes:
        r, s = decode_dss_signature(self._key.sign(digest, _SIGN))
        s = min(s, ORDER - s)
        # s = (digest + r * secret) / nonce, so the signer can solve for the nonce, and the parity of its
        # point is v. Lowering s negates the nonce, which this includes.
        nonce = (int.from_bytes(digest, "big") + r * self._secret) * pow(s, -1, ORDER) % ORDER
        point = ec.derive_private_key(nonce, _CURVE).public_key().public_numbers()
        return r.to_bytes(32, "big") + s.to_bytes(32, "big") + bytes([point.y & 1])


def load_public(data: bytes) -> _Public:
    """Parses a compressed public key; ValueError if it is no point."""
    return _Public(ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, data))


def load_secret(secret: bytes) -> _Secret:
    """Loads a secret in range."""
    return _Secret(secret)
