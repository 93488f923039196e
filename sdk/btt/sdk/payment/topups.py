"""Puts more money into an open channel, as far as the budget reaches.

Reserve and write, ask the ledger, take its answer into the books; only then may more be
signed. A crash anywhere between leaves a row in the books (`pending`), and whoever takes
the channel up next sends the same bytes again: the ledger answers with the receipt of the
first time, or says that they came too late and can never happen.
"""

from __future__ import annotations

import contextlib
from typing import Final

from btt.sdk.errors import (
    BudgetExceeded,
    ChannelClosed,
    ChannelClosing,
    ChannelExpired,
    ChannelUnknown,
    InsufficientFunds,
    InvalidRequest,
    LedgerError,
    RequestExpired,
)
from btt.sdk.keys import PrivateKey
from btt.sdk.money import SUPPLY, Amount
from btt.sdk.payment import pending
from btt.sdk.payment.purse import Purse
from btt.sdk.payment.store import StoredChannel

VALID_MS: Final = 60_000
"""How long the ledger may take a top-up: while that lasts, its outcome may be unknown."""
GRANT_HINT: Final = "Ask the wallet's owner for another grant: `btt wallet grant`. What arrived is kept."
_FINAL: Final = (
    InsufficientFunds,
    InvalidRequest,
    ChannelUnknown,
    ChannelExpired,
    ChannelClosing,
    ChannelClosed,
)
"""Refusals that no later try of the same request can turn into a success."""


async def top_up(purse: Purse, channel_id: bytes, amount: int) -> None:
    """Locks more money in a channel; afterwards the books and the ledger agree.

    Args:
        purse: What pays; without a budget the owner does, and no budget may spend it yet.
        channel_id: 32 bytes.
        amount: Base units, at least 1.

    Raises:
        AccountKeyNeeded: Here is a grant only.
        BudgetExceeded: The budget does not cover it.
        InsufficientFunds: The account does not.
        InvalidRequest: It is nothing, or more than there is.
        ChannelExpired, ChannelClosing, ChannelClosed, TermsRefused: The ledger refuses.
        LedgerUnreachable: No answer; the amount stays reserved until `resume` has heard one.
    """
    try:
        await _ask(purse.account, purse, _begin(purse, channel_id, amount))
    except RequestExpired:  # this machine slept, or a clock was set; the ledger's time is known now
        await _ask(purse.account, purse, _begin(purse, channel_id, amount))


def _begin(purse: Purse, channel_id: bytes, amount: int) -> pending.PendingTopUp:
    return pending.begin(
        purse.store,
        channel_id,
        ledger_id=purse.ledger.ledger_id,
        amount=amount,
        valid_until_ms=purse.ledger.now_ms() + VALID_MS,
        budget=purse.budget,
        granted=purse.granted,
    )


async def _ask(account: PrivateKey, purse: Purse, request: pending.PendingTopUp) -> None:
    try:
        await purse.ledger.top_up(
            request.channel_id,
            account,
            request.amount,
            request.request_id,
            valid_until_ms=request.valid_until_ms,
        )
    except RequestExpired:
        await purse.ledger.info()
        if purse.ledger.now_ms() >= request.valid_until_ms:
            pending.settle(purse.store, request, happened=False)
        raise
    except _FINAL as refusal:
        if refusal.by == "ledger":
            pending.settle(purse.store, request, happened=False)
        raise
    pending.settle(purse.store, request, happened=True)


async def resume(purse: Purse, channel_id: bytes | None = None) -> list[pending.PendingTopUp]:
    """Hears the outcome of top-ups that somebody began and did not finish.

    Args:
        purse: Whose.
        channel_id: Those of this channel; all of this ledger if not given.

    Returns:
        Those that happened.

    Raises:
        LedgerUnreachable: The ledger does not answer.
    """
    happened = []
    for request in pending.pending(purse.store, purse.ledger.ledger_id, channel_id):
        with contextlib.suppress(InvalidRequest, LedgerError):
            await _ask(purse.account, purse, request)
            happened.append(request)
    return happened


async def grow(purse: Purse, channel_id: bytes, *, used: int, need: int, least: int) -> StoredChannel:
    """Makes a channel cover what is being bought: from what it holds, then by a top-up.

    Args:
        purse: What pays.
        channel_id: 32 bytes; the purse's budget pays from it already.
        used: Cumulative base units that are signed, owed or reserved.
        need: Base units that are needed.
        least: With less than this nothing can be bought.

    Returns:
        The channel as it is then: it covers `need`, or as much of it as the budget reaches.

    Raises:
        BudgetExceeded: The budget does not reach for `least`; says what is missing for `need`.
        BttError: As `top_up`.
    """
    need = min(need, SUPPLY - used)  # by a hostile price it may be more than there is
    await resume(purse, channel_id)
    channel = purse.store.adopt(channel_id, purse.budget, purse.granted, used)
    spare = channel.cap - used
    if purse.grant is not None and channel.cap == channel.deposit:  # it binds, and no budget
        if spare < least:
            raise BudgetExceeded(
                f"{Amount(need)} are needed, and the grant of {purse.grant.amount} holds"
                f" {Amount(max(0, spare))} more: {Amount(need - spare)} are missing.",
                hint=GRANT_HINT,
                missing=need - spare,
            )
        return channel
    while spare < need:
        left, which = purse.store.tightest(purse.budget, purse.granted)
        amount = min(need - spare, left)
        missing = need - spare - amount
        if spare + amount < least:
            raise BudgetExceeded(
                f"{Amount(need)} are needed; the channel still holds {Amount(max(0, spare))}, and"
                f" {Amount(left)} of {which} are left:"
                f" {Amount(missing)} are missing.",
                missing=missing,
            )
        if not amount:
            break
        try:
            await top_up(purse, channel_id, amount)
        except BudgetExceeded:
            continue  # another process was quicker
        break
    return purse.store.get(channel_id)
