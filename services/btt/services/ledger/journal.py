"""The hash chain: why nobody, the operator included, can rewrite what a receipt promised.

Every operation that moved money or changed a channel is one entry. An entry's hash covers the hash
before it, the digest of the signed request and the postings; a receipt signs the hash. Two receipts
with one sequence number and different hashes, or a head below a receipt, prove that history changed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

NO_HASH: Final = bytes(32)
"""What stands before the first entry."""
_TAG: Final = b"btt/v1/entry"
_HEAD: Final = struct.Struct(">QQIH32sB")
_POSTING: Final = struct.Struct(">BBQ")


class Kind(IntEnum):
    """What an entry records. Numbers are for ever; they are part of the entry's hash."""

    GENESIS = 1
    TRANSFER = 2
    OPEN_CHANNEL = 3
    CLOSE_CHANNEL = 4
    TOP_UP = 5
    UPDATE = 6
    REQUEST_CLOSE = 7
    FINALIZE = 8
    ROTATE_KEY = 9
    RECOVER = 10
    EXTEND = 11


MOVES_NOTHING: Final = frozenset(
    (Kind.UPDATE, Kind.REQUEST_CLOSE, Kind.ROTATE_KEY, Kind.RECOVER, Kind.EXTEND)
)
"""Entries that have no postings; all others have two or more."""
NAMES_A_CHANNEL: Final = frozenset(
    (Kind.CLOSE_CHANNEL, Kind.TOP_UP, Kind.UPDATE, Kind.REQUEST_CLOSE, Kind.FINALIZE, Kind.EXTEND)
)
"""Entries whose bodies begin with the id of a channel."""
BY_THE_LEDGER: Final = frozenset((Kind.GENESIS, Kind.ROTATE_KEY, Kind.RECOVER))
"""Entries that concern the whole ledger; no user's request made them."""


class Side(IntEnum):
    """A posting's side; part of the entry's hash."""

    DEBIT = 0
    CREDIT = 1


@dataclass(frozen=True, slots=True)
class Posting:
    """One leg of an entry.

    Args:
        account: Id of the account: one byte of code, then its owner (`books`).
        side: Debit or credit.
        amount: Base units, at least 1.
    """

    account: bytes
    side: Side
    amount: int


@dataclass(frozen=True, slots=True)
class Head:
    """The end of the chain.

    Args:
        epoch: Of the ledger; grows when it is recovered from a backup.
        seq: Number of the last entry; the first one is 1.
        hash: Of the last entry, 32 bytes.
        time_ms: Of the last entry, Unix milliseconds.
    """

    epoch: int
    seq: int
    hash: bytes
    time_ms: int


@dataclass(frozen=True, slots=True)
class EntryRef:
    """What a receipt says about an entry; fields as in `Entry`."""

    seq: int
    time_ms: int
    epoch: int
    request_digest: bytes
    hash: bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One operation that moved money or changed a channel.

    Args:
        seq: Its number, without gaps.
        time_ms: Ledger time, Unix milliseconds.
        epoch: Of the ledger.
        kind: What it records.
        request_digest: The digest that was signed, 32 bytes; no two entries have the same.
        body: The canonical body that was signed.
        signatures: Keys and signatures that prove the body, in the layout of `verify`.
        postings: The money that moved, if any; debits equal credits.
        prev_hash: Hash of the entry before.
        hash: Of this entry.
    """

    seq: int
    time_ms: int
    epoch: int
    kind: Kind
    request_digest: bytes
    body: bytes
    signatures: bytes
    postings: tuple[Posting, ...]
    prev_hash: bytes
    hash: bytes

    @property
    def ref(self) -> EntryRef:
        """The part that a receipt names."""
        return EntryRef(self.seq, self.time_ms, self.epoch, self.request_digest, self.hash)


def entry_hash(
    prev_hash: bytes,
    *,
    seq: int,
    time_ms: int,
    epoch: int,
    kind: int,
    request_digest: bytes,
    postings: Sequence[Posting],
) -> bytes:
    """Hashes an entry: SHA-256(0x00 || u8 len || "btt/v1/entry" || prev || fields || postings).

    Fields are seq8, time8, epoch4, kind2, request_digest32 and the number of postings; a posting
    is side1, length of the account id1, amount8 and the account id. All big-endian.

    Returns:
        32 bytes.
    """
    digest = hashlib.sha256(bytes((0, len(_TAG))) + _TAG + prev_hash)
    digest.update(_HEAD.pack(seq, time_ms, epoch, kind, request_digest, len(postings)))
    for leg in postings:
        digest.update(_POSTING.pack(leg.side, len(leg.account), leg.amount) + leg.account)
    return digest.digest()


def append(
    head: Head,
    *,
    time_ms: int,
    kind: Kind,
    request_digest: bytes,
    body: bytes,
    signatures: bytes,
    postings: tuple[Posting, ...],
) -> Entry:
    """Makes the entry that follows `head`."""
    seq = head.seq + 1
    return Entry(
        seq=seq,
        time_ms=time_ms,
        epoch=head.epoch,
        kind=kind,
        request_digest=request_digest,
        body=body,
        signatures=signatures,
        postings=postings,
        prev_hash=head.hash,
        hash=entry_hash(
            head.hash,
            seq=seq,
            time_ms=time_ms,
            epoch=head.epoch,
            kind=kind,
            request_digest=request_digest,
            postings=postings,
        ),
    )


def broken(entry: Entry, before: Head) -> str | None:
    """Says what is wrong with an entry that should follow `before`, or None.

    Args:
        entry: As it was stored.
        before: The chain up to it.
    """
    debited = sum(leg.amount for leg in entry.postings if leg.side is Side.DEBIT)
    credited = sum(leg.amount for leg in entry.postings if leg.side is Side.CREDIT)
    try:
        computed = entry_hash(
            entry.prev_hash,
            seq=entry.seq,
            time_ms=entry.time_ms,
            epoch=entry.epoch,
            kind=entry.kind,
            request_digest=entry.request_digest,
            postings=entry.postings,
        )
    except struct.error:
        return f"Entry {entry.seq}: a posting or a number in it does not fit an entry."
    checks = (
        (entry.seq == before.seq + 1, "its number does not follow"),
        (entry.prev_hash == before.hash, "it does not name the hash before it"),
        (entry.time_ms >= before.time_ms, "its time runs backwards"),
        (entry.epoch >= before.epoch, "its epoch runs backwards"),
        (debited == credited, "its debits and credits differ"),
        (
            not entry.postings if entry.kind in MOVES_NOTHING else len(entry.postings) >= 2,
            "its postings are not those of its kind",
        ),
        (all(leg.amount > 0 for leg in entry.postings), "it has an empty posting"),
        (computed == entry.hash, "its hash does not match its content"),
    )
    return next((f"Entry {entry.seq}: {what}." for holds, what in checks if not holds), None)
