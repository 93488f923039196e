"""The rules of the ledger, pure: state x verified operation -> postings, or an error.

No clock, no database, no signature is touched here; `overlay` and `store` apply what `decide`
answers, and `verify` is the only maker of operations. Double entry: every entry has at least two
legs and its debits equal its credits. The chart of accounts:

    A genesis        debit normal    issued without backing (a ledger without a chain)
    L user <address> credit normal   what an address can spend; begins with its first credit
    L channel <id>   credit normal   locked by T1
    L fees           credit normal   fees of channel openings, where the ledger takes one

A channel goes (none) -> OPEN -> CLOSED here; the payee's close is final at once, because only the
payee can lose by an old update, and it chose it (white paper, channel steps 7 to 9).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final, Protocol

from btt.sdk.errors import (
    AccountUnknown,
    BttError,
    ChannelClosed,
    ChannelExpired,
    ChannelUnknown,
    InsufficientFunds,
    InvalidRequest,
    RequestConflict,
    RequestExpired,
    SignatureInvalid,
    SignerMismatch,
    TermsRefused,
    UpdateInvalid,
)
from btt.services.ledger.journal import EntryRef, Kind, Posting, Side
from btt.services.ledger.verify import CloseOperation, OpenOperation, Operation, TransferOperation

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


def is_channel(account: bytes) -> bool:
    """True for the account of a channel."""
    return account[0] == _CHANNEL


class Phase(IntEnum):
    """Where a channel stands; numbers of btt.proto.ledger.v1.ChannelPhase."""

    OPEN = 1
    CLOSING = 2
    CLOSED = 3


@dataclass(frozen=True, slots=True)
class Account:
    """A row of the books.

    Args:
        number: Of the row.
        id: Code and owner.
        balance: Base units on the account's normal side.
        locked: Base units in channels that this user opened.
        public_key: Compressed, 33 bytes, once the owner has signed something.
    """

    number: int
    id: bytes
    balance: int
    locked: int = 0
    public_key: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """A channel; the terms are those of T1 (`btt.sdk.signing.ChannelCommit`).

    Args:
        id: Digest of T1, 32 bytes.
        commit: T1 itself.
        payer: Account address, 20 bytes.
        payee: Account address, 20 bytes.
        k1: Key that signs updates, 33 bytes.
        k2: Key that closes, 33 bytes.
        expires_ms: T2 may be used from here on, Unix milliseconds.
        challenge_ms: Length of the challenge window, milliseconds.
        flags: Of T1.
        refund_signature: K2 over T2, 65 bytes.
        deposit: Base units locked by T1 and its top-ups.
        captured: Base units paid to the payee.
        best: Highest cumulative payment the ledger has seen, base units.
        best_signature: K1 over that update, 65 bytes; empty when best is 0.
        phase: Where it stands.
        deadline_ms: End of the challenge window; 0 unless CLOSING.
        opened_seq: Entry that opened it.
        closed_seq: Entry that closed it, or None.
    """

    id: bytes
    commit: bytes
    payer: bytes
    payee: bytes
    k1: bytes
    k2: bytes
    expires_ms: int
    challenge_ms: int
    flags: int
    refund_signature: bytes
    deposit: int
    captured: int = 0
    best: int = 0
    best_signature: bytes = b""
    phase: Phase = Phase.OPEN
    deadline_ms: int = 0
    opened_seq: int
    closed_seq: int | None = None

    @property
    def held(self) -> int:
        """Base units that must be in the channel's account."""
        return 0 if self.phase is Phase.CLOSED else self.deposit - self.captured


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
    """What a ledger accepts in a T1. Times in milliseconds, fee in base units."""

    min_challenge_ms: int = HOUR_MS
    max_challenge_ms: int = 7 * 24 * HOUR_MS
    min_lifetime_ms: int = HOUR_MS
    max_lifetime_ms: int = 366 * 24 * HOUR_MS
    open_fee: int = 0


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


def decide(view: View, operation: Operation, *, now_ms: int, seq: int, terms: Terms) -> Decision:
    """Applies the rules to one operation.

    Args:
        view: The state before it.
        operation: Its signatures are verified already.
        now_ms: Ledger time.
        seq: Number that its entry would get.
        terms: What this ledger accepts.

    Raises:
        BttError: The operation is refused and leaves no trace.
    """
    return _RULES[type(operation)](view, operation, now_ms, seq, terms)


def _debit(account: bytes, amount: int) -> Posting:
    return Posting(account, Side.DEBIT, amount)


def _credit(account: bytes, amount: int) -> Posting:
    return Posting(account, Side.CREDIT, amount)


def _short_of(account: Account | None, amount: int) -> BttError | None:
    if account is None:
        return AccountUnknown("The account has never received anything.")
    if account.balance < amount:
        return InsufficientFunds(f"The account holds {account.balance} base units, not {amount}.")
    return None


def _transfer(view: View, op: Operation, now_ms: int, seq: int, terms: Terms) -> Decision:
    assert isinstance(op, TransferOperation)
    source = user(op.source)
    if done := view.entry(op.digest):
        return Repeat(done)
    if known := view.request(source, op.request_id):
        if known.digest != op.digest:
            raise RequestConflict("The request id was used for another transfer.")
        return Refusal(InsufficientFunds(known.failure), None)
    if not now_ms < op.valid_until_ms <= now_ms + LONGEST_VALIDITY_MS:
        raise RequestExpired(f"The transfer's valid_until is not within 24 hours after {now_ms}.")
    error = _short_of(view.account(source), op.amount)
    if isinstance(error, AccountUnknown):
        # Not remembered: else strangers could fill the disk for nothing.
        raise error
    request = Request(
        account=source,
        request_id=op.request_id,
        digest=op.digest,
        failure=error.message if error else "",
        keep_until_ms=op.valid_until_ms + REQUEST_MARGIN_MS,
    )
    if error is not None:
        return Refusal(error, request)
    return Effect(
        Kind.TRANSFER,
        (_debit(source, op.amount), _credit(user(op.to), op.amount)),
        learned=(source, op.signer),
        request=request,
    )


def _open(view: View, op: Operation, now_ms: int, seq: int, terms: Terms) -> Decision:
    assert isinstance(op, OpenOperation)
    if done := view.entry(op.digest):
        return Repeat(done)
    _check_terms(op, now_ms, terms)
    payer = user(op.payer)
    if error := _short_of(view.account(payer), op.amount + op.fee):
        raise error
    postings = [_debit(payer, op.amount + op.fee), _credit(locked_in(op.digest), op.amount)]
    if op.fee:
        postings.append(_credit(FEES, op.fee))
    channel = Channel(
        id=op.digest,
        commit=op.body,
        payer=op.payer,
        payee=op.payee,
        k1=op.k1,
        k2=op.k2,
        expires_ms=op.expires_ms,
        challenge_ms=op.challenge_ms,
        flags=op.flags,
        refund_signature=op.refund_signature,
        deposit=op.amount,
        opened_seq=seq,
    )
    return Effect(Kind.OPEN_CHANNEL, tuple(postings), channel=channel, learned=(payer, op.signer))


def _check_terms(op: OpenOperation, now_ms: int, terms: Terms) -> None:
    lifetime = op.expires_ms - now_ms
    if lifetime <= 0:
        raise ChannelExpired("The channel's lock time has passed.")
    if not terms.min_lifetime_ms <= lifetime <= terms.max_lifetime_ms:
        raise TermsRefused(
            f"The channel would live {lifetime} ms; this ledger takes "
            f"{terms.min_lifetime_ms} to {terms.max_lifetime_ms} ms."
        )
    if not terms.min_challenge_ms <= op.challenge_ms <= terms.max_challenge_ms:
        raise TermsRefused(
            f"The challenge window is {op.challenge_ms} ms; this ledger takes "
            f"{terms.min_challenge_ms} to {terms.max_challenge_ms} ms."
        )
    if op.fee != terms.open_fee:
        raise TermsRefused(f"The fee is {op.fee} base units; this ledger takes {terms.open_fee}.")


def check_close(channel: Channel | None, *, signer: bytes, capture: int, cumulative: int) -> Channel:
    """Checks what costs no signature check; also used before one is spent.

    Args:
        channel: The channel, or None when there is none.
        signer: Key that signed the close, 33 bytes.
        capture: What the payee takes, base units.
        cumulative: Of the update that is shown, base units; 0 without one.

    Raises:
        ChannelUnknown, SignerMismatch, InvalidRequest, UpdateInvalid: The close is refused.
    """
    if channel is None:
        raise ChannelUnknown("There is no such channel.")
    if signer != channel.k2:
        raise SignerMismatch("A channel is closed by its K2.")
    if capture > cumulative:
        raise InvalidRequest(f"The capture of {capture} base units is more than the update's {cumulative}.")
    if cumulative > channel.deposit:
        raise UpdateInvalid(f"The update of {cumulative} base units exceeds the deposit.")
    return channel


def _close(view: View, op: Operation, now_ms: int, seq: int, terms: Terms) -> Decision:
    assert isinstance(op, CloseOperation)
    channel = check_close(
        view.channel(op.channel_id), signer=op.signer, capture=op.capture, cumulative=op.cumulative
    )
    if op.cumulative and op.k1 != channel.k1:
        raise SignatureInvalid("The update is not signed by the channel's K1.")
    if done := view.entry(op.digest):
        return Repeat(done)
    if channel.phase is Phase.CLOSED:
        raise ChannelClosed("The channel was closed with another capture.")
    rest = channel.deposit - op.capture
    postings = [_debit(locked_in(channel.id), channel.deposit)]
    if op.capture:
        postings.append(_credit(user(channel.payee), op.capture))
    if rest:
        postings.append(_credit(user(channel.payer), rest))
    raised = op.cumulative > channel.best
    closed = replace(
        channel,
        phase=Phase.CLOSED,
        captured=op.capture,
        best=op.cumulative if raised else channel.best,
        best_signature=op.update_signature if raised else channel.best_signature,
        deadline_ms=0,
        closed_seq=seq,
    )
    return Effect(Kind.CLOSE_CHANNEL, tuple(postings), channel=closed)


_RULES: dict[type[Operation], Callable[[View, Operation, int, int, Terms], Decision]] = {
    TransferOperation: _transfer,
    OpenOperation: _open,
    CloseOperation: _close,
}
