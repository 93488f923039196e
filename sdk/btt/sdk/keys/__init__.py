"""Keys, signatures and addresses: the only place that touches secp256k1.

A signature is 65 bytes, r || s || v, over a 32-byte digest; nonces are deterministic (RFC 6979), s
is in the lower half of the order, and v (0 or 1) is the parity of the nonce point. Verification
uses the known public key and never recovers one: `v` is only checked for its range, since checking
it would cost as much as the verification. So two signatures of one message may differ in `v`, and
nothing may ever take its identity from signature bytes.

An address is that of TRON: 0x41 || keccak256(x || y)[12:], shown in base58check ("T...").

Two backends give identical bytes: coincurve (libsecp256k1, the default) and `cryptography` (OpenSSL,
ten times slower, used where coincurve has no build). A digest at or above the group order would give
two different nonces, but nobody can find one: digests come from SHA-256.
"""

from __future__ import annotations

from typing import Final, NoReturn

from btt.sdk.errors import InvalidRequest
from btt.sdk.keys import _backend
from btt.sdk.keys._address import Address
from btt.sdk.keys._backend import ORDER, use_backend

__all__ = ["ORDER", "Address", "PrivateKey", "PublicKey", "use_backend"]

SIGNATURE_SIZE: Final = 65
PUBLIC_KEY_SIZE: Final = 33
SECRET_SIZE: Final = 32
DIGEST_SIZE: Final = 32

_ZERO = bytes(32)
_ORDER_BYTES = ORDER.to_bytes(32, "big")


class PublicKey:
    """A point of secp256k1, checked when made. Immutable, hashable, equal by its bytes.

    Args:
        data: 33 bytes, compressed.

    Raises:
        InvalidRequest: The bytes are no compressed point of the curve.
    """

    __slots__ = ("_address", "_data", "_handle")

    def __init__(self, data: bytes) -> None:
        if not isinstance(data, bytes) or len(data) != PUBLIC_KEY_SIZE:
            raise InvalidRequest("A public key is 33 bytes, compressed.")
        try:
            self._handle = _backend.current().load_public(data)
        except ValueError:
            raise InvalidRequest("The public key is not a point of secp256k1.") from None
        self._data = data
        self._address: Address | None = None

    @property
    def data(self) -> bytes:
        """33 bytes, compressed."""
        return self._data

    @property
    def address(self) -> Address:
        """The TRON address of the key; computed once."""
        if self._address is None:
            from Crypto.Hash import keccak  # a slow import that verifying does without

            digest = keccak.new(digest_bits=256, data=self._handle.coordinates()).digest()
            self._address = Address(digest[12:])
        return self._address

    def verify(self, digest: bytes, signature: bytes) -> bool:
        """Tells whether a signature of this key is over a digest.

        Args:
            digest: 32 bytes.
            signature: 65 bytes, r || s || v. Refused: another length, r or s outside 1..n-1, s in the
                upper half, v other than 0 or 1. A `v` of the wrong parity is not noticed.
        """
        if len(signature) != SIGNATURE_SIZE or len(digest) != DIGEST_SIZE or signature[64] > 1:
            return False
        return self._handle.verify(digest, signature)

    def __eq__(self, other: object) -> bool:
        return self._data == other._data if isinstance(other, PublicKey) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._data)

    def __repr__(self) -> str:
        return f"PublicKey({self._data.hex()})"

    def __reduce__(self) -> tuple[type[PublicKey], tuple[bytes]]:
        return PublicKey, (self._data,)


class PrivateKey:
    """A secret key. Its text forms never show the secret, and it does not pickle.

    Args:
        secret: 32 bytes, 1 <= secret < group order.

    Raises:
        InvalidRequest: The secret is no valid key.
    """

    __slots__ = ("_handle", "_public", "_secret")

    def __init__(self, secret: bytes) -> None:
        if not isinstance(secret, bytes) or len(secret) != SECRET_SIZE or not _ZERO < secret < _ORDER_BYTES:
            raise InvalidRequest("A private key is 32 bytes, from 1 to the order of secp256k1.")
        self._secret = secret
        self._handle = _backend.current().load_secret(secret)
        self._public = PublicKey(self._handle.public_data())

    @classmethod
    def generate(cls) -> PrivateKey:
        """Makes a key from the system's randomness."""
        import secrets

        return cls((secrets.randbelow(ORDER - 1) + 1).to_bytes(SECRET_SIZE, "big"))

    @property
    def secret(self) -> bytes:
        """32 bytes. Whoever has them is the owner."""
        return self._secret

    @property
    def public(self) -> PublicKey:
        """The public key."""
        return self._public

    @property
    def address(self) -> Address:
        """The TRON address of the public key."""
        return self._public.address

    def sign(self, digest: bytes) -> bytes:
        """Signs a digest; the same digest always gives the same bytes.

        Args:
            digest: 32 bytes, from SHA-256.

        Returns:
            65 bytes, r || s || v.

        Raises:
            InvalidRequest: The digest is not 32 bytes.
        """
        if not isinstance(digest, bytes) or len(digest) != DIGEST_SIZE:
            raise InvalidRequest("A digest is 32 bytes.")
        return self._handle.sign(digest)

    def __eq__(self, other: object) -> bool:
        return self._public == other._public if isinstance(other, PrivateKey) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._public)

    def __repr__(self) -> str:
        return f"PrivateKey(of {self._public.data.hex()})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private key is not pickled")
