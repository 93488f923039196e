"""TRON addresses: 20 bytes, shown as base58check with the prefix byte 0x41, so that they begin with T."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from btt.sdk.errors import InvalidRequest

ADDRESS_SIZE: Final = 20

_PREFIX: Final = 0x41
_ALPHABET: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_VALUE: Final = {letter: value for value, letter in enumerate(_ALPHABET)}
_TEXT_SIZE: Final = 34  # 25 bytes that begin with 0x41 always take 34 letters


def _checksum(data: bytes) -> bytes:
    return sha256(sha256(data).digest()).digest()[:4]


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """The address of a key. Hashable, ordered by its bytes; `str` is the form people see.

    Args:
        data: 20 bytes, without TRON's prefix byte.

    Raises:
        InvalidRequest: The data is not 20 bytes.
    """

    data: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.data, bytes) or len(self.data) != ADDRESS_SIZE:
            raise InvalidRequest("An address is 20 bytes.")

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads a "T..." address and checks its checksum.

        Args:
            text: 34 letters of base58.

        Raises:
            InvalidRequest: It is no TRON address, or a letter is wrong.
        """
        if len(text) != _TEXT_SIZE or not all(letter in _VALUE for letter in text):
            raise InvalidRequest(f'"{text[:64]}" is no address: one has 34 letters and begins with T.')
        number = 0
        for letter in text:
            number = number * 58 + _VALUE[letter]
        # 34 letters can hold more than 25 bytes; those never begin with the prefix.
        data = number.to_bytes(26, "big")
        if data[:2] != bytes([0, _PREFIX]):
            raise InvalidRequest(f'"{text}" is no TRON address: it must begin with T.')
        if _checksum(data[1:22]) != data[22:]:
            raise InvalidRequest(f'"{text}" is mistyped: its checksum is wrong.')
        return cls(data[2:22])

    def __str__(self) -> str:
        body = bytes([_PREFIX]) + self.data
        number = int.from_bytes(body + _checksum(body), "big")
        letters = []
        while number:
            number, value = divmod(number, 58)
            letters.append(_ALPHABET[value])
        return "".join(reversed(letters))

    def __repr__(self) -> str:
        return f"Address({self})"
