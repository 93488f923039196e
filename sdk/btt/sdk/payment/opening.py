"""Finds or opens the channel that pays a node (paper: channel steps 1 to 6)."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

import grpc.aio

from btt.proto.ledger.v1.ledger_pb2 import LedgerInfo
from btt.proto.payment.v1 import payment_pb2, payment_pb2_grpc
from btt.sdk.errors import BudgetExceeded, ChannelClosed, ChannelClosing, ChannelExpired, LedgerError
from btt.sdk.identity import ChannelTerms, Offer
from btt.sdk.payment.purse import Purse
from btt.sdk.payment.store import CLOSED, CLOSING, OPEN, OPENING, Claim, StoredChannel
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
    """

    stored: StoredChannel
    commit: ChannelCommit
    claim: Claim


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
            if commit.payer == purse.account.public.address and commit.k2 == offer.payee_key:
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
    return await _open_new(purse, offer, stub, need, least)


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
        return None
    except (ChannelClosing, ChannelClosed):
        purse.store.set_state(stored.channel_id, CLOSING)
        return None


async def _open_new(
    purse: Purse, offer: Offer, stub: payment_pb2_grpc.PaymentServiceAsyncStub, need: int, least: int
) -> OpenedChannel:
    terms = offer.terms
    info = await purse.ledger.info()
    left = purse.store.left(purse.budget, purse.granted)
    deposit = max(need, terms.min_amount, 1)
    if left >= least:
        # Less than hoped for may still buy a part of the work, which resumes later.
        deposit = max(min(deposit, left), terms.min_amount, 1)
    purse.store.check(purse.budget, purse.granted, deposit)
    life = _lifetime(terms, info)
    nonce = secrets.token_bytes(16)
    commit = ChannelCommit(
        payer=purse.account.public.address,
        payee=offer.payee,
        k1=derive_channel_key(purse.account, nonce).public,
        k2=offer.payee_key,
        amount=deposit,
        expires_ms=purse.clock() + life,
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
    stored = StoredChannel(
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
    claim = purse.store.claim(channel_id)
    assert claim is not None, "a fresh channel id is claimed by nobody"
    try:
        purse.store.add_channel(stored, purse.granted)
        try:
            await purse.ledger.open_channel(commit, purse.account, reply.signature)
        except LedgerError:
            purse.store.set_state(channel_id, CLOSED)
            raise
        purse.store.set_state(channel_id, OPEN)
    except BaseException:
        claim.release()
        raise
    return OpenedChannel(replace(stored, state=OPEN), commit, claim)


def _lifetime(terms: ChannelTerms, info: LedgerInfo) -> int:
    """Returns milliseconds that suit both, also by their own clocks and when they come to judge."""
    shortest = max(terms.min_lifetime_ms, info.min_lifetime_ms)
    longest = min(terms.max_lifetime_ms, info.max_lifetime_ms)
    tolerance = min(CLOCK_TOLERANCE_MS, max(0, longest - shortest) // 2)
    return min(max(LIFETIME_MS, shortest + tolerance), longest - tolerance)
