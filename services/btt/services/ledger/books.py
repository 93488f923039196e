"""The rules of the ledger, pure: state x verified operation -> postings, or an error.

No clock, no database, no signature is touched here; `overlay` and `store` apply what `decide`
answers, and `verify` is the only maker of operations. Double entry: every entry has at least two
legs and its debits equal its credits. The chart of accounts:

    A genesis        debit normal    issued without backing (a ledger without a chain)
    L user <address> credit normal   what an address can spend; begins with its first credit
    L channel <id>   credit normal   locked by T1
    L fees           credit normal   fees of channel openings, where the ledger takes one

What may happen to a channel is the table in `machine`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from btt.sdk.money import SUPPLY
from btt.services.ledger import machine
from btt.services.ledger.journal import EntryRef, Kind, Posting, Side
from btt.services.ledger.machine import Channel, Move, Phase, Step
from btt.services.ledger.verify import (
    CloseOperation,
    FinalizeOperation,
    OpenOperation,
    Operation,
    RequestCloseOperation,
    TopUpOperation,
    TransferOperation,
    UpdateOperation,
)

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


def _spent_before(view: View, op: Spending, account: bytes, now_ms: int) -> Decision | None:
    """Answers a request with an id that was seen before; refuses one that is too old or too new."""
    if done := view.entry(op.digest):
        return Repeat(done)
    if used := view.request(account, op.request_id):
        if used.digest != op.digest:
            raise RequestConflict("The request id was used for another request.")
        return Refusal(InsufficientFunds(used.failure), None)
    if not now_ms < op.valid_until_ms <= now_ms + LONGEST_VALIDITY_MS:
        raise RequestExpired(f"The request's valid_until is not within 24 hours after {now_ms}.")
    return None


def _request(op: Spending, account: bytes, error: BttError | None = None) -> Request:
    return Request(
        account=account,
        request_id=op.request_id,
        digest=op.digest,
        failure=error.message if error else "",
        keep_until_ms=op.valid_until_ms + REQUEST_MARGIN_MS,
    )


def _transfer(view: View, op: Operation, now_ms: int, seq: int, terms: Terms) -> Decision:
    assert isinstance(op, TransferOperation)
    source = user(op.source)
    if (answer := _spent_before(view, op, source, now_ms)) is not None:
        return answer
    error = _short_of(view.account(source), op.amount)
    if isinstance(error, AccountUnknown):
        # Not remembered: else strangers could fill the disk for nothing.
        raise error
    request = _request(op, source, error)
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
    account = view.account(payer)
    if error := _short_of(account, op.amount + op.fee):
        raise error
    assert account is not None
    if account.open_channels >= terms.max_open_channels:
        raise TermsRefused(
            f"The account has {account.open_channels} channels open; this ledger allows no more.",
            hint="Close channels that are not used.",
        )
    _check_lock(account, op.amount, terms)
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


def _check_lock(account: Account, amount: int, terms: Terms) -> None:
    if account.locked + amount > terms.max_locked:
        raise TermsRefused(
            f"The account would have {account.locked + amount} base units locked in channels; "
            f"this ledger allows {terms.max_locked}."
        )


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


def known(channel: Channel | None) -> Channel:
    """Returns a channel that exists.

    Raises:
        ChannelUnknown: It does not.
    """
    if channel is None:
        raise ChannelUnknown("There is no such channel.")
    return channel


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
    channel = known(channel)
    if signer != channel.k2:
        raise SignerMismatch("A channel is closed by its K2.")
    if capture > max(cumulative, channel.best):
        raise InvalidRequest(f"The capture of {capture} base units is more than the update's {cumulative}.")
    if cumulative > channel.deposit:
        raise UpdateInvalid(f"The update of {cumulative} base units exceeds the deposit.")
    return channel


def _top_up(view: View, op: Operation, now_ms: int, seq: int, terms: Terms) -> Decision:
    assert isinstance(op, TopUpOperation)
    channel = known(view.channel(op.channel_id))
    if op.owner != channel.payer:
        raise SignerMismatch("A channel is topped up with the key of the payer's account.")
    payer = user(op.owner)
    if (answer := _spent_before(view, op, payer, now_ms)) is not None:
        return answer
    after = machine.take(channel, Step(Move.TOP_UP, now_ms, op.amount))
    account = view.account(payer)
    assert account is not None
    _check_lock(account, op.amount, terms)
    error = _short_of(account, op.amount)
    request = _request(op, payer, error)
    if error is not None:
        return Refusal(error, request)
    postings = (_debit(payer, op.amount), _credit(locked_in(channel.id), op.amount))
    return Effect(Kind.TOP_UP, postings, channel=after, request=request)


def check_update(channel: Channel | None, *, cumulative: int) -> Channel:
    """Checks what costs no signature check.

    Args:
        channel: The channel, or None when there is none.
        cumulative: Of the update, base units.

    Raises:
        ChannelUnknown, UpdateInvalid: The update is refused.
    """
    channel = known(channel)
    if not 0 < cumulative <= channel.deposit:
        raise UpdateInvalid(f"The update of {cumulative} base units is not within the deposit.")
    return channel


def _update(view: View, op: Operation, now_ms: int, seq: int, terms: Terms) -> Decision:
    assert isinstance(op, UpdateOperation)
    channel = known(view.channel(op.channel_id))
    if op.signer != channel.k1:
        raise SignatureInvalid("The update is not signed by the channel's K1.")
    if done := view.entry(op.digest):
        return Repeat(done)
    step = Step(Move.UPDATE, now_ms, op.cumulative, op.signature, least_raise=terms.min_update_delta)
    return Effect(Kind.UPDATE, (), channel=machine.take(channel, step))


def _request_close(view: View, op: Operation, now_ms: int, seq: int, terms: Terms) -> Decision:
    assert isinstance(op, RequestCloseOperation)
    channel = known(view.channel(op.channel_id))
    if op.owner != channel.payer:
        raise SignerMismatch("The payer asks to close with the key of the account.")
    payer = user(op.owner)
    if (answer := _spent_before(view, op, payer, now_ms)) is not None:
        return answer
    after = machine.take(channel, Step(Move.REQUEST_CLOSE, now_ms))
    return Effect(Kind.REQUEST_CLOSE, (), channel=after, request=_request(op, payer))


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
    step = Step(Move.CLOSE, now_ms, op.capture, op.update_signature, shown=op.cumulative)
    return _paid_out(Kind.CLOSE_CHANNEL, channel, machine.take(channel, step), seq)


def _finalize(view: View, op: Operation, now_ms: int, seq: int, terms: Terms) -> Decision:
    assert isinstance(op, FinalizeOperation)
    channel = known(view.channel(op.channel_id))
    if done := view.entry(op.digest):
        return Repeat(done)
    after = machine.take(channel, Step(Move.FINALIZE, now_ms))
    return _paid_out(Kind.FINALIZE, channel, after, seq)


def _paid_out(kind: Kind, before: Channel, after: Channel, seq: int) -> Effect:
    capture = after.captured - before.captured
    rest = before.held - capture
    postings = [_debit(locked_in(before.id), before.held)]
    if capture:
        postings.append(_credit(user(before.payee), capture))
    if rest:
        postings.append(_credit(user(before.payer), rest))
    return Effect(kind, tuple(postings), channel=replace(after, closed_seq=seq))


Spending = TransferOperation | TopUpOperation | RequestCloseOperation
_RULES: dict[type[Operation], Callable[[View, Operation, int, int, Terms], Decision]] = {
    TransferOperation: _transfer,
    OpenOperation: _open,
    TopUpOperation: _top_up,
    UpdateOperation: _update,
    CloseOperation: _close,
    RequestCloseOperation: _request_close,
    FinalizeOperation: _finalize,
}
