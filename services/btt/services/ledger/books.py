"""What the books are made of: accounts, terms, and what an operation may do to them.

Double entry: every entry that moves money has at least two legs and its debits equal its credits.
The chart of accounts:

    A genesis        debit normal    issued without backing (a ledger without a chain)
    L user <address> credit normal   what an address can spend; begins with its first credit
    L channel <id>   credit normal   locked by T1
    L fees           credit normal   fees of channel openings, where the ledger takes one

The rules are in `rules`; what may happen to a channel is the table in `machine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from btt.sdk.errors import BttError
from btt.sdk.money import SUPPLY
from btt.services.ledger.journal import EntryRef, Kind, Posting, Side
from btt.services.ledger.machine import Channel

HOUR_MS: Final = 3_600_000
LONGEST_VALIDITY_MS: Final = 24 * HOUR_MS
"""A request may not be valid for longer than this from now: request ids are kept no longer."""
REQUEST_MARGIN_MS: Final = HOUR_MS
"""How long a request id is kept after its request expired."""

_USER, _CHANNEL, _FEES, _ASSET = 0x01, 0x02, 0x03, 0x80
FEES: Final = bytes((_FEES,))
GENESIS: Final = bytes((_ASSET | 0x01,))


def user(address: bytes) -> bytes:
    """Returns the account id of an address (20 bytes)."""
    return bytes((_USER,)) + address


def locked_in(channel_id: bytes) -> bytes:
    """Returns the account id of a channel (id of 32 bytes)."""
    return bytes((_CHANNEL,)) + channel_id


def is_asset(account: bytes) -> bool:
    """True for debit-normal accounts."""
    return account[0] >= _ASSET


def change_of(leg: Posting) -> int:
    """Returns by how much a posting raises the balance of its account, base units."""
    normal = Side.DEBIT if is_asset(leg.account) else Side.CREDIT
    return leg.amount if leg.side is normal else -leg.amount


def is_channel(account: bytes) -> bool:
    """True for the account of a channel."""
    return account[0] == _CHANNEL


@dataclass(frozen=True, slots=True)
class Account:
    """A row of the books.

    Args:
        number: Of the row.
        id: Code and owner.
        balance: Base units on the account's normal side.
        locked: Base units in channels that this user opened.
        public_key: Compressed, 33 bytes, once the owner has signed something.
        open_channels: How many channels this user opened that are not closed.
    """

    number: int
    id: bytes
    balance: int
    locked: int = 0
    public_key: bytes | None = None
    open_channels: int = 0

    def moved(self, change: int) -> Account:
        """Returns the account with its balance changed by so many base units."""
        # Every transfer comes by here twice; `replace` takes four times as long.
        return Account(
            self.number, self.id, self.balance + change, self.locked, self.public_key, self.open_channels
        )


@dataclass(frozen=True, slots=True)
class Request:
    """What became of a request id.

    Args:
        account: Id of the account that signed it.
        request_id: 16 bytes.
        digest: Of the body it came with.
        failure: Text of the InsufficientFunds it ended with, or empty for success. Other failures
            do not depend on the state, or leave no row.
        keep_until_ms: The row may go after this.
    """

    account: bytes
    request_id: bytes
    digest: bytes
    failure: str
    keep_until_ms: int


@dataclass(frozen=True, slots=True)
class Terms:
    """What a ledger accepts. Times in milliseconds, money in base units.

    Args:
        min_challenge_ms: Shortest challenge window.
        max_challenge_ms: Longest one.
        min_lifetime_ms: Shortest life of a channel when it opens.
        max_lifetime_ms: Longest one.
        open_fee: What the ledger takes for opening a channel.
        max_locked: Most that one account may have locked in channels.
        max_open_channels: Most channels that one account may have opened and not closed.
        min_update_delta: Smallest raise of a stored update while a channel is open.
    """

    min_challenge_ms: int = HOUR_MS
    max_challenge_ms: int = 7 * 24 * HOUR_MS
    min_lifetime_ms: int = HOUR_MS
    max_lifetime_ms: int = 366 * 24 * HOUR_MS
    open_fee: int = 0
    max_locked: int = SUPPLY
    max_open_channels: int = 10_000
    min_update_delta: int = 1


class View(Protocol):
    """The state that rules may look at."""

    def account(self, account: bytes) -> Account | None:
        """Returns an account by id."""
        ...

    def channel(self, channel_id: bytes) -> Channel | None:
        """Returns a channel."""
        ...

    def request(self, account: bytes, request_id: bytes) -> Request | None:
        """Returns what became of a request id."""
        ...

    def entry(self, request_digest: bytes) -> EntryRef | None:
        """Returns the entry that a request made."""
        ...


@dataclass(frozen=True, slots=True)
class Effect:
    """What an accepted operation does; all of it or nothing.

    Args:
        kind: Of its entry.
        postings: Of its entry.
        channel: The channel as it is afterwards, or None.
        learned: Account id and public key of an owner that signed.
        request: The request id to remember, or None.
    """

    kind: Kind
    postings: tuple[Posting, ...]
    channel: Channel | None = None
    learned: tuple[bytes, bytes] | None = None
    request: Request | None = None


@dataclass(frozen=True, slots=True)
class Repeat:
    """The operation is in the journal already: its receipt is given again."""

    entry: EntryRef


@dataclass(frozen=True, slots=True)
class Refusal:
    """A refusal that is remembered, so that a retry can never turn it into a success.

    Args:
        error: The answer.
        request: What to remember; None when it is remembered already.
    """

    error: BttError
    request: Request | None


Decision = Effect | Repeat | Refusal
