"""secp256k1 by libsecp256k1.

Only coincurve's documented calls are used, so that its releases, which differ inside, all work.
They verify DER, so r and s are wrapped in it here.
"""

from __future__ import annotations

import coincurve


class _Public:
    __slots__ = ("_key",)

    def __init__(self, key: coincurve.PublicKey) -> None:
        self._key = key

    def verify(self, digest: bytes, r: bytes, s: bytes) -> bool:
        first, second = _der_integer(r), _der_integer(s)
        der = b"\x30%c%b%b" % (len(first) + len(second), first, second)
        return self._key.verify(der, digest, None)

    def coordinates(self) -> bytes:
        return self._key.format(compressed=False)[1:]


class _Secret:
    __slots__ = ("_key",)

    def __init__(self, key: coincurve.PrivateKey) -> None:
        self._key = key

    def public_data(self) -> bytes:
        return self._key.public_key.format(compressed=True)

    def sign(self, digest: bytes) -> bytes:
        return self._key.sign_recoverable(digest, None)


def _der_integer(number: bytes) -> bytes:
    # Shortest form: no leading zeros, but one where the top bit would read as a sign.
    digits = number.lstrip(b"\0")
    if digits[0] > 127:
        return b"\x02%c\x00%b" % (len(digits) + 1, digits)
    return b"\x02%c%b" % (len(digits), digits)


def load_public(data: bytes) -> _Public:
    """Parses a compressed public key; ValueError if it is no point."""
    return _Public(coincurve.PublicKey(data))


def load_secret(secret: bytes) -> _Secret:
    """Loads a secret in range."""
    return _Secret(coincurve.PrivateKey(secret))
