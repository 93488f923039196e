"""What a ledger is from its first moment: its id, its terms, and the issue that starts the books."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

from btt.sdk.errors import ConfigError
from btt.sdk.money import DECIMALS, SUPPLY
from btt.services.ledger import books
from btt.services.ledger.books import Effect, Terms
from btt.services.ledger.journal import Kind, Posting, Side

ASSET: Final = b"BTT"
LONGEST_NAME: Final = 64
_TAG: Final = b"btt/v1/ledger"
DOCUMENT: Final = "Genesis"
"""The first entry is a document of this type, signed by the operator."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What never changes about a ledger.

    Args:
        ledger_id: 32 bytes, the hash of `genesis`.
        genesis: The canonical description.
        name: For people.
        unbacked: True when the supply is a genesis issue with nothing behind it.
        terms: What it accepts in a T1.
    """

    ledger_id: bytes
    genesis: bytes
    name: str
    unbacked: bool
    terms: Terms


def describe(name: str, *, operator_key: bytes, nonce: bytes) -> bytes:
    """Returns the canonical description of a new ledger.

    Args:
        name: For people; printable, 1 to 64 bytes in UTF-8.
        operator_key: 33 bytes.
        nonce: 32 random bytes.

    Returns:
        u8 length and name, u8 length and asset, decimals1, supply8, operator key33, nonce32.

    Raises:
        ConfigError: The name does not do.
    """
    text = name.encode(errors="replace")
    if not 0 < len(text) <= LONGEST_NAME or not name.isprintable():
        raise ConfigError(f"A ledger's name is printable and takes 1 to {LONGEST_NAME} bytes in UTF-8.")
    return b"".join(
        (
            bytes((len(text),)),
            text,
            bytes((len(ASSET),)),
            ASSET,
            struct.pack(">BQ", DECIMALS, SUPPLY),
            operator_key,
            nonce,
        )
    )


def operator_key(description: bytes) -> bytes:
    """Returns the first operator's key, 33 bytes, from a canonical description.

    Raises:
        ConfigError: It is no such description.
    """
    name = description[0] if description else 0
    asset = description[1 + name] if len(description) > 1 + name else 0
    start = 2 + name + asset + 9
    if not name or len(description) != start + 33 + 32:
        raise ConfigError("This is no description of a ledger.")
    return description[start : start + 33]


def ledger_id(genesis: bytes) -> bytes:
    """Returns SHA-256(0x00 || u8 len || "btt/v1/ledger" || genesis), 32 bytes."""
    return hashlib.sha256(bytes((0, len(_TAG))) + _TAG + genesis).digest()


def issue(supply_to: bytes, amount: int) -> tuple[bytes, Effect]:
    """Returns body and effect of the first entry.

    Args:
        supply_to: Address, 20 bytes.
        amount: Base units.
    """
    postings = (
        Posting(books.GENESIS, Side.DEBIT, amount),
        Posting(books.user(supply_to), Side.CREDIT, amount),
    )
    return supply_to + struct.pack(">Q", amount), Effect(Kind.GENESIS, postings)
