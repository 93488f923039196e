"""Finds or opens the channel that pays a node (paper: channel steps 1 to 6)."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

import grpc.aio

from btt.proto.ledger.v1.ledger_pb2 import LedgerInfo
from btt.proto.payment.v1 import payment_pb2, payment_pb2_grpc
from btt.sdk.errors import (
    AccountKeyNeeded,
    BudgetExceeded,
    ChannelClosed,
    ChannelClosing,
    ChannelExpired,
    LedgerError,
)
from btt.sdk.identity import ChannelTerms, Offer
from btt.sdk.keys import PublicKey
from btt.sdk.payment.claims import Claim
from btt.sdk.payment.grants import Grant
from btt.sdk.payment.purse import Purse
from btt.sdk.payment.store import CLOSED, CLOSING, OPEN, OPENING, StoredChannel
from btt.sdk.payment.topups import grow, resume
from btt.sdk.rpc import to_error
from btt.sdk.signing import EARLY_CLOSE, ChannelCommit, ChannelRefund, service_reference, verify
from btt.sdk.wallet import derive_channel_key

LIFETIME_MS = 24 * 3600 * 1000
"""Life of a new channel, within the node's terms (paper: several times the download plus hours)."""
CLOCK_TOLERANCE_MS = 60_000
"""How far the payee's clock may be from ours, with the way there: a life is that far within its terms."""
EXPIRY_MARGIN_MS = 10 * 60 * 1000
"""A channel this near its lock time is left to its payee to close."""


@dataclass(frozen=True, slots=True)
class OpenedChannel:
    """A channel that this process may use.

    Attributes:
        stored: As it is in the books.
        commit: T1.
        claim: Released when the session ends.
        is_new: It was opened just now.
    """

    stored: StoredChannel
    commit: ChannelCommit
    claim: Claim
    is_new: bool = False


async def obtain_channel(
    purse: Purse,
    offer: Offer,
    stub: payment_pb2_grpc.PaymentServiceAsyncStub,
    need: int,
    only: bytes | None = None,
) -> OpenedChannel:
    """Takes a channel to the node that is open already, or opens one.

    Args:
        purse: What pays.
        offer: The node's offer.
        stub: The node's PaymentService.
        need: Base units the coming work is expected to cost.
        only: Take up this channel, and open no other.

    Raises:
        AccountKeyNeeded: The purse is a grant, and its channel does not do; says why.
        BudgetExceeded: The budget does not cover a channel.
        ChannelClosed: `only` cannot be taken up any more.
        LedgerError: The ledger or the node refused the channel.
        LedgerUnreachable: The ledger does not answer.
    """
    least = min(need, offer.sheet.unit_charge)
    for stored in purse.store.channels(node=offer.node, ledger_id=offer.ledger_id):
        claim = purse.store.claim(stored.channel_id) if only in (None, stored.channel_id) else None
        if claim is None:
            continue
        try:
            commit = ChannelCommit.decode(stored.commit)
            # Another may have used it before we had it.
            stored = purse.store.get(stored.channel_id)
            if purse.holds(commit) and commit.k2 == offer.payee_key:
                usable = await confirm_open(purse, stored, commit)
                if usable is not None and only is None:
                    usable = await _take_up(purse, usable, offer, need, least)
                if usable is not None:
                    return OpenedChannel(usable, commit, claim)
        except BaseException:
            claim.release()
            raise
        claim.release()
    if only is not None:
        raise ChannelClosed("The channel cannot be taken up again.")
    if purse.grant is not None:
        raise AccountKeyNeeded(_why_not(purse, purse.grant, offer))
    return await _open_new(purse, offer, stub, need, least)


def _why_not(purse: Purse, grant: Grant, offer: Offer) -> str:
    stored = purse.store.get(grant.channel_id)
    if stored.node != offer.node:
        return f"The grant pays {stored.node}, not {offer.node}."
    if stored.state != OPEN or is_ending(stored, offer, purse.clock()):
        return "The grant has ended: its channel is closed, or its lock time is near."
    return "Another program uses the grant's channel at this moment."


async def confirm_open(purse: Purse, stored: StoredChannel, commit: ChannelCommit) -> StoredChannel | None:
    """Finishes what was begun with a channel that this process has claimed: its opening, its top-ups.

    Returns:
        The channel; None when it takes no payments any more.
    """
    if stored.state == OPENING:
        # We stopped between asking and hearing the answer; asking again is harmless.
        try:
            await purse.ledger.open_channel(commit, purse.account, stored.refund_signature)
        except LedgerError:
            purse.store.set_state(stored.channel_id, CLOSED)
            return None
        purse.store.set_state(stored.channel_id, OPEN)
    await resume(purse, stored.channel_id)
    stored = purse.store.get(stored.channel_id)
    return stored if stored.state == OPEN else None


def is_ending(channel: StoredChannel, offer: Offer, now_ms: int) -> bool:
    """Says whether a channel is too near its lock time for more business with a node."""
    # The node takes no session on a channel with less than half of its least lifetime.
    return channel.expires_ms - max(EXPIRY_MARGIN_MS, offer.terms.min_lifetime_ms // 2) < now_ms


async def _take_up(
    purse: Purse, stored: StoredChannel, offer: Offer, need: int, least: int
) -> StoredChannel | None:
    """Lets our budget pay from an open channel, and tops it up; None when another one has to do it."""
    if is_ending(stored, offer, purse.clock()):
        return None
    used = max(stored.signed, purse.store.tally(stored.channel_id).owed)
    try:
        return await grow(purse, stored.channel_id, used=used, need=need, least=least)
    except (BudgetExceeded, ChannelExpired):
        if purse.grant is not None:
            raise  # no other channel can do it
        return None
    except (ChannelClosing, ChannelClosed):
        purse.store.set_state(stored.channel_id, CLOSING)
        return None


async def _open_new(
    purse: Purse, offer: Offer, stub: payment_pb2_grpc.PaymentServiceAsyncStub, need: int, least: int
) -> OpenedChannel:
    terms = offer.terms
    left = purse.store.left(purse.budget, purse.granted)
    deposit = max(need, terms.min_amount, 1)
    if left >= least:
        # Less than hoped for may still buy a part of the work, which resumes later.
        deposit = max(min(deposit, left), terms.min_amount, 1)
    purse.store.check(purse.budget, purse.granted, deposit)
    nonce = secrets.token_bytes(16)
    k1 = derive_channel_key(purse.account, nonce).public
    commit, stored = await agree(purse, offer, stub, deposit=deposit, k1=k1, nonce=nonce)
    return await lock(purse, commit, stored)


async def agree(
    purse: Purse,
    offer: Offer,
    stub: payment_pb2_grpc.PaymentServiceAsyncStub,
    *,
    deposit: int,
    k1: PublicKey,
    nonce: bytes,
    life_ms: int = LIFETIME_MS,
) -> tuple[ChannelCommit, StoredChannel]:
    """Writes T1 and gets the node's consent to it; nothing is locked yet.

    Args:
        purse: What will pay.
        offer: The node's offer.
        stub: The node's PaymentService.
        deposit: Base units.
        k1: Who will sign the updates.
        nonce: 16 bytes, of this channel alone.
        life_ms: How long it shall live; the terms of node and ledger bound it, milliseconds.

    Raises:
        TermsRefused: The node takes no such channel.
        BttError: The node or the ledger refused, or did not answer.
    """
    terms, info = offer.terms, await purse.ledger.info()
    commit = ChannelCommit(
        payer=purse.account.address,
        payee=offer.payee,
        k1=k1,
        k2=offer.payee_key,
        amount=deposit,
        expires_ms=purse.clock() + _lifetime(terms, info, life_ms),
        challenge_ms=max(terms.min_challenge_ms, info.min_challenge_ms),
        flags=EARLY_CLOSE,
        fee=0,
        nonce=nonce,
        service_ref=service_reference(offer.node),
    )
    channel_id = commit.channel_id(offer.ledger_id)
    try:
        reply = await stub.AgreeRefund(payment_pb2.AgreeRefundRequest(commit=commit.encode()), timeout=20)
    except grpc.aio.AioRpcError as failure:
        raise to_error(failure) from failure
    # The refund is in our hands before any money is locked (paper: step 5).
    refund = ChannelRefund(channel=channel_id, not_before_ms=commit.expires_ms)
    verify(offer.payee_key, refund, offer.ledger_id, reply.signature)
    return commit, StoredChannel(
        channel_id=channel_id,
        ledger_id=offer.ledger_id,
        node=offer.node,
        commit=commit.encode(),
        refund_signature=reply.signature,
        deposit=deposit,
        expires_ms=commit.expires_ms,
        signed=0,
        budget=purse.budget,
        base=0,
        cap=deposit,
        state=OPENING,
    )


async def lock(purse: Purse, commit: ChannelCommit, stored: StoredChannel) -> OpenedChannel:
    """Opens a channel that was agreed on: in the books first, then on the ledger.

    Raises:
        BudgetExceeded: The budget does not cover it.
        LedgerError: The ledger refused.
        LedgerUnreachable: No answer; whoever takes the channel up next asks again.
    """
    claim = purse.store.claim(stored.channel_id)
    assert claim is not None, "a fresh channel id is claimed by nobody"
    try:
        purse.store.add_channel(stored, purse.granted)
        try:
            await purse.ledger.open_channel(commit, purse.account, stored.refund_signature)
        except LedgerError:
            purse.store.set_state(stored.channel_id, CLOSED)
            raise
        purse.store.set_state(stored.channel_id, OPEN)
    except BaseException:
        claim.release()
        raise
    return OpenedChannel(replace(stored, state=OPEN), commit, claim, is_new=True)


def _lifetime(terms: ChannelTerms, info: LedgerInfo, wanted: int = LIFETIME_MS) -> int:
    """Returns milliseconds that suit both, also by their own clocks and when they come to judge."""
    shortest = max(terms.min_lifetime_ms, info.min_lifetime_ms)
    longest = min(terms.max_lifetime_ms, info.max_lifetime_ms)
    tolerance = min(CLOCK_TOLERANCE_MS, max(0, longest - shortest) // 2)
    return min(max(wanted, shortest + tolerance), longest - tolerance)
