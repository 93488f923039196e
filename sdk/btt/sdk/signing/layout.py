"""Fixed-width bytes that get signed: how a message is declared, checked, encoded and decoded.

Protobuf is not canonical, so nothing that moves money is signed as protobuf. A message is a class of
annotated fields; its body is the fields in order, big-endian, each of one width. Exactly one byte
string stands for one message and the reverse, so a decoded body can be compared and hashed as bytes.

    preimage = 0x00 || u8 len(tag) || tag || ledger_id[32] || body
    digest   = SHA-256(preimage)

The leading zero is no valid protobuf key, so no TRON transaction of the same key shares a preimage.
The tag separates message types, schemes and versions; the ledger id separates ledgers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from hashlib import sha256
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Final, Self, TypeVar, cast, dataclass_transform, get_type_hints

from btt.sdk.errors import InvalidRequest
from btt.sdk.keys import Address, PublicKey
from btt.sdk.money import SUPPLY, Amount

LEDGER_ID_SIZE: Final = 32
SCHEME: Final = "btt/v1/secp256k1/"
"""Begins every tag: the version of the layouts and the signature scheme."""
MAX_INT: Final = 2**63 - 1
"""The highest value of an 8-byte field: every database and language holds it."""


def tag(name: str) -> bytes:
    """Returns the tag of a message or document type.

    Args:
        name: The type's name, 1 to 64 ASCII letters and digits.

    Raises:
        ValueError: It is no such name.
    """
    if not (name.isascii() and name.isalnum() and len(name) <= 64):
        raise ValueError(f'"{name}" cannot name a signed type')
    return (SCHEME + name).encode()


def preimage(tag: bytes, ledger_id: bytes, body: bytes) -> bytes:
    """Returns the bytes whose SHA-256 is signed.

    Args:
        tag: Of the message type; at most 255 bytes.
        ledger_id: 32 bytes.
        body: The encoded message, or a document's payload.

    Raises:
        InvalidRequest: The ledger id is not 32 bytes.
    """
    if len(ledger_id) != LEDGER_ID_SIZE:
        raise InvalidRequest("A ledger id is 32 bytes.")
    return b"\0%c%b%b%b" % (len(tag), tag, ledger_id, body)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of field.

    Args:
        code: Its `struct` code.
        accepts: Tells whether a value may stand in a message.
        expects: What a valid value is, for the error text.
        pack: Turns a value into what `struct` takes; None if it is that already.
        unpack: The reverse, and raises ValueError for what a message may not hold; None where
            all that `struct` gives is a valid value.
    """

    code: str
    accepts: Callable[[Any], bool]
    expects: str
    pack: Callable[[Any], Any] | None = None
    unpack: Callable[[Any], Any] | None = None


def _bytes(size: int) -> Kind:
    return Kind(f"{size}s", lambda value: type(value) is bytes and len(value) == size, f"{size} bytes")


def _number(code: str, highest: int, made: Callable[[Any], Any] = int) -> Kind:
    def accepts(value: object) -> bool:
        return type(value) in _INTEGERS and 0 <= value <= highest  # type: ignore[operator]

    def unpack(value: int) -> int:
        if value > highest:
            raise ValueError
        return cast(int, made(value))

    every = highest == 2 ** (8 * struct.calcsize(code)) - 1
    return Kind(code, accepts, f"an integer from 0 to {highest}", unpack=None if every else unpack)


def _flags(known: int) -> Kind:
    def accepts(value: object) -> bool:
        return type(value) in _INTEGERS and value & ~known == 0 <= value  # type: ignore[operator]

    def unpack(value: int) -> int:
        if value & ~known:
            raise ValueError
        return value

    return Kind("I", accepts, f"known flags only (mask {known:#x})", unpack=unpack)


_INTEGERS: Final = (int, Amount)
"""A bool is no number, and neither is what only pretends to be an integer."""
Bytes16 = Annotated[bytes, _bytes(16)]
Bytes32 = Annotated[bytes, _bytes(32)]
U16 = Annotated[int, _number("H", 2**16 - 1)]
U32 = Annotated[int, _number("I", 2**32 - 1)]
U64 = Annotated[int, _number("Q", MAX_INT)]
TimeMs = Annotated[int, _number("Q", MAX_INT)]
"""Unix time in milliseconds."""
Money = Annotated[int, _number("Q", SUPPLY, Amount)]
"""Base units, at most the supply; decoded as Amount."""
ChannelFlags = Annotated[int, _flags(0b1)]
"""Bit 0: EARLY_CLOSE. Every other bit is refused."""

# Types that are a kind by themselves.
_KINDS: Final[dict[type, Kind]] = {
    Address: Kind("20s", lambda a: type(a) is Address, "an Address", lambda a: a.data, Address),
    PublicKey: Kind(
        "33s", lambda value: type(value) is PublicKey, "a PublicKey", lambda k: k.data, PublicKey
    ),
}


class Message:
    """Base of all signed messages; make one with the `message` decorator.

    A message checks its fields when it is made, so one that exists can be encoded.
    """

    __slots__ = ()

    TAG: ClassVar[bytes]
    """Separates this type from all others."""
    SIZE: ClassVar[int]
    """Bytes of the encoded body."""
    _FIELDS: ClassVar[tuple[tuple[str, Kind], ...]]
    _STRUCT: ClassVar[struct.Struct]
    _values: ClassVar[Callable[..., tuple[Any, ...]]]
    """Reads all fields."""
    _PACKED: ClassVar[tuple[tuple[int, Callable[[Any], Any]], ...]]
    """Which fields `struct` does not take as they are, and what it takes."""
    _UNPACKED: ClassVar[tuple[tuple[int, Callable[[Any], Any]], ...]]
    """Which fields are not what `struct` gives, or may hold less than it gives."""
    _SETTERS: ClassVar[tuple[Callable[[Any, Any], None], ...]]

    def __post_init__(self) -> None:
        for value, (name, kind) in zip(self._values(self), self._FIELDS, strict=True):
            if not kind.accepts(value):
                raise InvalidRequest(f"{type(self).__name__}.{name} must be {kind.expects}.")

    def encode(self) -> bytes:
        """Returns the body, SIZE bytes."""
        values = self._values(self)
        if self._PACKED:
            packed = list(values)
            for index, pack in self._PACKED:
                packed[index] = pack(values[index])
            return self._STRUCT.pack(*packed)
        return self._STRUCT.pack(*values)

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Reads a body.

        Args:
            body: Exactly SIZE bytes.

        Raises:
            InvalidRequest: The length is wrong or a field is out of range.
        """
        if len(body) != cls.SIZE:
            raise InvalidRequest(f"{cls.__name__} is {cls.SIZE} bytes, not {len(body)}.")
        values = list(cls._STRUCT.unpack(body))
        for index, unpack in cls._UNPACKED:
            try:
                values[index] = unpack(values[index])
            except ValueError:
                name, kind = cls._FIELDS[index]
                raise InvalidRequest(f"{cls.__name__}.{name} must be {kind.expects}.") from None
        # Each value was checked as it was read, so the constructor need not do it again.
        made = object.__new__(cls)
        for put, value in zip(cls._SETTERS, values, strict=True):
            put(made, value)
        return made

    def preimage(self, ledger_id: bytes) -> bytes:
        """Returns the bytes whose SHA-256 is signed on a ledger.

        Args:
            ledger_id: 32 bytes.

        Raises:
            InvalidRequest: The ledger id is not 32 bytes.
        """
        return preimage(self.TAG, ledger_id, self.encode())

    def digest(self, ledger_id: bytes) -> bytes:
        """Returns the 32 bytes that are signed on a ledger.

        Args:
            ledger_id: 32 bytes.

        Raises:
            InvalidRequest: The ledger id is not 32 bytes.
        """
        return sha256(preimage(self.TAG, ledger_id, self.encode())).digest()


M = TypeVar("M", bound=Message)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def message(cls: type[M]) -> type[M]:
    """Makes a frozen, keyword-only dataclass of a declaration, and its codec.

    Args:
        cls: A subclass of Message with a TAG, whose fields are annotated with the kinds above.

    Raises:
        TypeError: A field has no kind.
    """
    made = dataclass(frozen=True, slots=True, kw_only=True)(cls)
    hints = get_type_hints(made, include_extras=True)
    layout = []
    for field in fields(cast(Any, made)):
        hint = hints[field.name]
        kind = next((part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Kind)), None)
        kind = kind or _KINDS.get(hint)
        if kind is None:
            raise TypeError(f"{cls.__name__}.{field.name} has no kind")
        layout.append((field.name, kind))
    made._FIELDS = tuple(layout)
    made._STRUCT = struct.Struct(">" + "".join(kind.code for _, kind in layout))
    made.SIZE = made._STRUCT.size
    read = attrgetter(*(name for name, _ in layout))
    made._values = staticmethod(read if len(layout) > 1 else lambda found: (read(found),))
    made._PACKED = tuple((index, kind.pack) for index, (_, kind) in enumerate(layout) if kind.pack)
    made._UNPACKED = tuple((index, kind.unpack) for index, (_, kind) in enumerate(layout) if kind.unpack)
    made._SETTERS = tuple(getattr(made, name).__set__ for name, _ in layout)  # the class itself is frozen
    return made
