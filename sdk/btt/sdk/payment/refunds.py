"""Gets money out of channels that are used no more.

A channel is left to whoever uses it (its claim), and for some hours to whoever left it open on
purpose. Otherwise: a node that answers closes it, which gives the rest back at once; else its
payer asks the ledger, from the lock time on, or before it where T1 allows; once the challenge
window is over, anybody's word pays it out. Asking twice does no harm, so a crash needs no memory.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from btt.proto.ledger.v1 import ledger_pb2
from btt.proto.ledger.v1.ledger_pb2 import ChannelState
from btt.sdk.errors import BttError, CaptureDisputed, LedgerError
from btt.sdk.identity import NodeAddress
from btt.sdk.keys import Address
from btt.sdk.payment.connection import NodeConnection, connect_node
from btt.sdk.payment.history import place_of
from btt.sdk.payment.opening import confirm_open
from btt.sdk.payment.outcome import look
from btt.sdk.payment.purse import Purse
from btt.sdk.payment.session import PaymentSession
from btt.sdk.payment.store import CLOSING, OPENING, StoredChannel
from btt.sdk.payment.topups import resume
from btt.sdk.signing import EARLY_CLOSE, ChannelCommit

KEEP_MS = 6 * 3600 * 1000
"""How long a channel that was left open on purpose waits for the next client."""
CONNECT_S = 5.0
"""Seconds for each step of reaching a node that shall close a channel."""
CLOSE_S = 30.0
"""Seconds that such a node may take in all."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which channels to ask back, beside those that time has made due.

    Attributes:
        idle: Those that nobody uses, before their lock time.
        keep_ms: Of the idle ones leave those that were left open on purpose less than so long ago.
        spare: Leave the idle ones of these nodes: sessions with them are about to use them.
    """

    idle: bool
    keep_ms: int = 0
    spare: frozenset[Address] = frozenset()


async def ask_back(purse: Purse, wanted: Wanted) -> tuple[list[ChannelState], list[CaptureDisputed]]:
    """Asks back what lies in channels of the wallet's books that are used no more.

    Args:
        purse: Whose.
        wanted: Which channels.

    Returns:
        The channels about which something happened, as they are now, and the disputes found.

    Raises:
        LedgerUnreachable: The ledger does not answer; what was done stays done.
    """
    if purse.grant is not None:
        return [], []  # that is for the account to do
    await resume(purse)
    touched, disputes = [], []
    for stored in purse.store.channels(ledger_id=purse.ledger.ledger_id):
        try:
            state = await _ask_back(purse, stored, wanted)
        except CaptureDisputed as dispute:
            disputes.append(dispute)
        except LedgerError:
            continue  # somebody else was quicker; the next look says what became of it
        else:
            if state is not None:
                touched.append(state)
    return touched, disputes


async def _ask_back(purse: Purse, stored: StoredChannel, wanted: Wanted) -> ChannelState | None:
    commit = ChannelCommit.decode(stored.commit)
    if commit.payer != purse.account.address or not _is_wanted(purse, stored, commit, wanted):
        return None
    claim = purse.store.claim(stored.channel_id)
    if claim is None:
        return None  # in use
    try:
        stored = purse.store.get(stored.channel_id)
        if stored.state == OPENING and await confirm_open(purse, stored, commit) is None:
            return None
        state = await look(purse, stored.channel_id)
        if state.phase == ledger_pb2.CHANNEL_PHASE_CLOSED:
            return state
        due = await collect(purse, state)
        if due is not None or state.phase != ledger_pb2.CHANNEL_PHASE_OPEN or not wanted.idle:
            return due
    finally:
        claim.release()
    # The session that closes it has to claim it itself.
    closed = await _close_with_node(purse, stored)
    if closed is not None:
        return closed
    claim = purse.store.claim(stored.channel_id)
    if claim is None:
        return None
    try:
        return await request_close(purse, stored.channel_id)
    finally:
        claim.release()


def _is_wanted(purse: Purse, stored: StoredChannel, commit: ChannelCommit, wanted: Wanted) -> bool:
    """Says whether the ledger has to be asked about a channel at all."""
    if stored.state == CLOSING or purse.ledger.now_ms() >= stored.expires_ms:
        return True
    if not wanted.idle or stored.node in wanted.spare or not purse.holds(commit):
        return False
    return not stored.kept_ms or stored.kept_ms + wanted.keep_ms <= purse.clock()


async def collect(purse: Purse, state: ChannelState) -> ChannelState | None:
    """Takes what time alone has made due of a channel: pays it out, or asks for it.

    Args:
        purse: Whose.
        state: The channel's, of just now.

    Returns:
        The channel's new state; None if nothing is due.

    Raises:
        BttError: As `look`, and as the ledger refuses.
    """
    commit = ChannelCommit.decode(state.commit)
    is_closing = state.phase == ledger_pb2.CHANNEL_PHASE_CLOSING
    due_ms = state.deadline_ms if is_closing else commit.expires_ms + 2 * commit.challenge_ms
    if state.phase == ledger_pb2.CHANNEL_PHASE_CLOSED or (
        state.time_ms < due_ms and (is_closing or state.time_ms < commit.expires_ms)
    ):
        return None
    if state.time_ms < due_ms:
        return await request_close(purse, state.channel_id)
    with contextlib.suppress(LedgerError):  # the ledger may have done it by itself just now
        await purse.ledger.finalize_channel(state.channel_id)
    return await look(purse, state.channel_id)


async def request_close(purse: Purse, channel_id: bytes) -> ChannelState | None:
    """Asks the ledger for the rest of a channel, if T1 allows that now.

    Raises:
        LedgerUnreachable: The ledger does not answer; asking again is harmless.
    """
    state = await look(purse, channel_id)
    commit = ChannelCommit.decode(state.commit)
    if state.phase == ledger_pb2.CHANNEL_PHASE_OPEN:
        if not commit.flags & EARLY_CLOSE and state.time_ms < commit.expires_ms:
            return None
        with contextlib.suppress(LedgerError):  # the node may have closed it just now
            await purse.ledger.request_close(channel_id, purse.account)
        state = await look(purse, channel_id)
    return state


async def _close_with_node(purse: Purse, stored: StoredChannel) -> ChannelState | None:
    """Has the node close a channel, if it can be reached; None if it does not."""
    place = place_of(purse.store, stored.node)
    if place is None:
        return None
    try:
        async with asyncio.timeout(CLOSE_S):
            node = await _reach(purse, place)
            session = await PaymentSession.open(purse, node, need=0, only=stored.channel_id)
            await session.close(close_channel=True)
    except CaptureDisputed:
        raise
    except (BttError, TimeoutError):
        return None
    return await look(purse, stored.channel_id)


async def _reach(purse: Purse, place: NodeAddress) -> NodeConnection:
    return await connect_node(
        place,
        ledger_id=purse.ledger.ledger_id,
        store=purse.store,
        clock=purse.clock,
        timeout=CONNECT_S,
    )
