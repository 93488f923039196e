"""The rules of the ledger, pure: state x verified operation -> postings, or an error.

No clock, no database, no signature is touched here; `overlay` and `store` apply what `decide`
answers, and `verify` is the only maker of operations. A request that is in the journal gets its
entry again; a refusal for lack of funds is remembered, so that no retry turns it into a success.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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
from btt.sdk.money import SUPPLY, Amount
from btt.services.ledger import books, machine
from btt.services.ledger.books import Account, Decision, Effect, Refusal, Repeat, Request, Terms, View
from btt.services.ledger.journal import Kind, Posting, Side
from btt.services.ledger.machine import Channel, Move, Phase, Step
from btt.services.ledger.verify import (
    CloseOperation,
    ExtendOperation,
    FinalizeOperation,
    OpenOperation,
    Operation,
    RequestCloseOperation,
    TopUpOperation,
    TransferOperation,
    UpdateOperation,
)


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
        # A request may name more than there is.
        asked = Amount(amount) if amount <= SUPPLY else f"{amount} base units"
        return InsufficientFunds(f"The account holds {Amount(account.balance)}, not {asked}.")
    return None


def request_of(operation: Operation) -> tuple[bytes, bytes] | None:
    """Returns the account and the request id that an operation spends, if it has one."""
    if isinstance(operation, TransferOperation):
        return books.user(operation.source), operation.request_id
    if isinstance(operation, TopUpOperation | RequestCloseOperation):
        return books.user(operation.owner), operation.request_id
    return None


def _spent_before(view: View, op: Spending, account: bytes, now_ms: int) -> Decision | None:
    """Answers a request with an id that was seen before; refuses one that is too old or too new."""
    if done := view.entry(op.digest):
        return Repeat(done)
    if used := view.request(account, op.request_id):
        if used.digest != op.digest:
            raise RequestConflict("The request id was used for another request.")
        return Refusal(InsufficientFunds(used.failure), None)
    if not now_ms < op.valid_until_ms <= now_ms + books.LONGEST_VALIDITY_MS:
        raise RequestExpired(f"The request's valid_until is not within 24 hours after {now_ms}.")
    return None


def _request(op: Spending, account: bytes, error: BttError | None = None) -> Request:
    return Request(
        account=account,
        request_id=op.request_id,
        digest=op.digest,
        failure=error.message if error else "",
        keep_until_ms=op.valid_until_ms + books.REQUEST_MARGIN_MS,
    )


def _transfer(view: View, op: Operation, now_ms: int, seq: int, terms: Terms) -> Decision:
    assert isinstance(op, TransferOperation)
    source = books.user(op.source)
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
        (_debit(source, op.amount), _credit(books.user(op.to), op.amount)),
        learned=(source, op.signer),
        request=request,
    )


def _open(view: View, op: Operation, now_ms: int, seq: int, terms: Terms) -> Decision:
    assert isinstance(op, OpenOperation)
    if done := view.entry(op.digest):
        return Repeat(done)
    _check_terms(op, now_ms, terms)
    payer = books.user(op.payer)
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
    postings = [_debit(payer, op.amount + op.fee), _credit(books.locked_in(op.digest), op.amount)]
    if op.fee:
        postings.append(_credit(books.FEES, op.fee))
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
    payer = books.user(op.owner)
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
    postings = (_debit(payer, op.amount), _credit(books.locked_in(channel.id), op.amount))
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
    payer = books.user(op.owner)
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


def _extend(view: View, op: Operation, now_ms: int, seq: int, terms: Terms) -> Decision:
    assert isinstance(op, ExtendOperation)
    channel = known(view.channel(op.channel_id))
    if done := view.entry(op.digest):
        return Repeat(done)
    after = machine.take(channel, Step(Move.EXTEND, now_ms, op.deadline_ms))
    return Effect(Kind.EXTEND, (), channel=after)


def _paid_out(kind: Kind, before: Channel, after: Channel, seq: int) -> Effect:
    capture = after.captured - before.captured
    rest = before.held - capture
    postings = [_debit(books.locked_in(before.id), before.held)]
    if capture:
        postings.append(_credit(books.user(before.payee), capture))
    if rest:
        postings.append(_credit(books.user(before.payer), rest))
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
    ExtendOperation: _extend,
}
