"""The channel machine as a table: what may happen to a channel in which phase, and when.

    phase    move           when                                leads to
    -------  -------------  ----------------------------------  ---------------------------------
    (none)   open           `books` checks the terms            OPEN
    OPEN     top up         before `expires_ms`                 OPEN, deposit grows
    OPEN     update         raises best by the least raise      OPEN, best grows (watchtower)
    OPEN     close          always                              CLOSED, capture <= best
    OPEN     request close  from `expires_ms` on (T2), before   CLOSING, deadline = now + window,
                            only with EARLY_CLOSE               at most `abandoned_ms`
    OPEN     finalize       from `abandoned_ms` on              CLOSED, best to the payee
    OPEN     extend         from `expires_ms` on                CLOSING, at most a window from now
    CLOSING  update         before the deadline                 CLOSING, best grows (challenge)
    CLOSING  close          before the deadline                 CLOSED, capture <= best
    CLOSING  finalize       from the deadline on                CLOSED, best to the payee
    CLOSING  extend         always                              CLOSING, at most a window from now
    CLOSED   nothing

Everything else is refused. At the very deadline a challenge is late and a finalize is due. Only
the payee's close is final at once: only the payee can lose by an old update, and it chose it
(white paper, channel steps 7 to 9). Whoever vanishes, the money is out by
`abandoned_ms` = expiry + window + grace, where the grace is one more window: both are in T1, so
the journal alone tells whether a close was right. Only the ledger extends, and only after it was
away (`after_outage`): then it is out by a window after its return, if that is later.

Pure: no clock, no signature, no database. `books` adds the postings; the audit and the exhaustive
model check (`tests/unit/test_channel_machine_model.py`) run this very code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import Final

from btt.sdk.errors import (
    BttError,
    ChannelClosed,
    ChannelClosing,
    ChannelExpired,
    ChannelLocked,
    InvalidRequest,
    UpdateInvalid,
)
from btt.sdk.money import SUPPLY
from btt.sdk.signing import EARLY_CLOSE


class Phase(IntEnum):
    """Where a channel stands; numbers of btt.proto.ledger.v1.ChannelPhase."""

    OPEN = 1
    CLOSING = 2
    CLOSED = 3


class Move(Enum):
    """What can be done to a channel; the value is for people."""

    TOP_UP = "top up"
    UPDATE = "update"
    CLOSE = "close"
    REQUEST_CLOSE = "request to close"
    FINALIZE = "finalize"
    EXTEND = "extension"


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

    @property
    def abandoned_ms(self) -> int:
        """Ledger time from which anybody may pay it out, Unix milliseconds."""
        return self.expires_ms + 2 * self.challenge_ms


@dataclass(frozen=True, slots=True)
class Step:
    """One move.

    Args:
        move: What.
        now_ms: Ledger time.
        amount: TOP_UP: base units added; UPDATE: cumulative; CLOSE: capture; EXTEND: the new deadline,
            Unix milliseconds; else 0.
        signature: UPDATE: K1 over it, 65 bytes.
        shown: CLOSE: cumulative of the update that came with it, base units.
        least_raise: UPDATE while OPEN: raises smaller than this are refused, base units.
    """

    move: Move
    now_ms: int
    amount: int = 0
    signature: bytes = b""
    shown: int = 0
    least_raise: int = 1


def take(channel: Channel, step: Step) -> Channel:
    """Makes a move, or refuses it.

    Args:
        channel: As it is.
        step: The move; its signatures are verified already.

    Returns:
        The channel afterwards. What left it is `channel.held` before less `held` after, of which
        the growth of `captured` is the payee's.

    Raises:
        ChannelClosed, ChannelClosing: The phase does not allow it, or the window has ended.
        ChannelLocked: It is not due yet.
        ChannelExpired, UpdateInvalid, InvalidRequest: The move itself does not do.
    """
    rule = TABLE.get((channel.phase, step.move))
    if rule is None:
        raise _refused(channel, step.move)
    return rule(channel, step)


def _refused(channel: Channel, move: Move) -> BttError:
    if channel.phase is Phase.CLOSED:
        return ChannelClosed(f"The channel is closed; it takes no {move.value}.")
    return ChannelClosing(f"The channel is closing; it takes no {move.value}.")


def _top_up(channel: Channel, step: Step) -> Channel:
    if step.now_ms >= channel.expires_ms:
        raise ChannelExpired("The channel's lock time has passed; it takes no top up.")
    if step.amount < 1 or channel.deposit + step.amount > SUPPLY:
        raise InvalidRequest("A top up adds at least one base unit, and no more than there is.")
    return replace(channel, deposit=channel.deposit + step.amount)


def _raise(channel: Channel, step: Step) -> Channel:
    if step.amount > channel.deposit:
        raise UpdateInvalid(f"The update of {step.amount} base units exceeds the deposit.")
    if step.amount <= channel.best:
        raise UpdateInvalid(f"The ledger holds an update of {channel.best} base units already.")
    return replace(channel, best=step.amount, best_signature=step.signature)


def _store(channel: Channel, step: Step) -> Channel:
    raised = _raise(channel, step)
    # The last unit of the deposit has no higher update to wait for.
    if step.amount - channel.best < step.least_raise and step.amount < channel.deposit:
        raise UpdateInvalid(
            f"While a channel is open its update is raised by {step.least_raise} base units at least."
        )
    return raised


def _in_window(channel: Channel, step: Step) -> None:
    if step.now_ms >= channel.deadline_ms:
        raise ChannelClosing(
            f"The challenge window ended at {channel.deadline_ms}.", hint="Finalize the channel."
        )


def _challenge(channel: Channel, step: Step) -> Channel:
    _in_window(channel, step)
    return _raise(channel, step)


def _close(channel: Channel, step: Step) -> Channel:
    if step.amount > max(step.shown, channel.best):
        raise InvalidRequest(f"The capture of {step.amount} base units is more than the update's.")
    if step.shown > channel.best:
        channel = _raise(channel, replace(step, amount=step.shown))
    return _paid_out(channel, step.amount)


def _close_in_window(channel: Channel, step: Step) -> Channel:
    _in_window(channel, step)
    return _close(channel, step)


def _request_close(channel: Channel, step: Step) -> Channel:
    if step.now_ms < channel.expires_ms and not channel.flags & EARLY_CLOSE:
        raise ChannelLocked(f"The refund is due at {channel.expires_ms}; T1 allows no early close.")
    window = min(step.now_ms + channel.challenge_ms, channel.abandoned_ms)
    return replace(channel, phase=Phase.CLOSING, deadline_ms=max(step.now_ms, window))


def _finalize_abandoned(channel: Channel, step: Step) -> Channel:
    if step.now_ms < channel.abandoned_ms:
        raise ChannelLocked(f"Nobody asked to close the channel; it is paid out at {channel.abandoned_ms}.")
    return _paid_out(channel, channel.best)


def _finalize(channel: Channel, step: Step) -> Channel:
    if step.now_ms < channel.deadline_ms:
        raise ChannelLocked(f"The challenge window ends at {channel.deadline_ms}.")
    return _paid_out(channel, channel.best)


def _begin_window(channel: Channel, step: Step) -> Channel:
    if step.now_ms < channel.expires_ms:
        raise ChannelLocked(f"Before {channel.expires_ms} no outage takes a payee's time.")
    return _extend(channel, step)


def _extend(channel: Channel, step: Step) -> Channel:
    if not max(channel.deadline_ms, step.now_ms) < step.amount <= step.now_ms + channel.challenge_ms:
        raise InvalidRequest("An extension ends later than before, and within a window from now.")
    return replace(channel, phase=Phase.CLOSING, deadline_ms=step.amount)


def after_outage(channel: Channel, *, since_ms: int, now_ms: int) -> int | None:
    """Says when a channel's window must end, now that the ledger is back.

    What the payee had left when the ledger went away it has again: of the window, or of the time in
    which nobody had asked to close an expired channel.

    Args:
        channel: As it was then.
        since_ms: Ledger time of the last entry before.
        now_ms: Ledger time.

    Returns:
        The new deadline, Unix milliseconds; None if the outage took the payee nothing.
    """
    if channel.phase is Phase.CLOSED or now_ms <= since_ms:
        return None
    if channel.phase is Phase.CLOSING:
        left = channel.deadline_ms - since_ms
    elif now_ms > channel.expires_ms:
        left = channel.abandoned_ms - max(since_ms, channel.expires_ms)
    else:
        return None
    return now_ms + min(left, channel.challenge_ms) if left > 0 else None


def _paid_out(channel: Channel, capture: int) -> Channel:
    return replace(channel, phase=Phase.CLOSED, captured=capture, deadline_ms=0)


TABLE: Final[dict[tuple[Phase, Move], Callable[[Channel, Step], Channel]]] = {
    (Phase.OPEN, Move.TOP_UP): _top_up,
    (Phase.OPEN, Move.UPDATE): _store,
    (Phase.OPEN, Move.CLOSE): _close,
    (Phase.OPEN, Move.REQUEST_CLOSE): _request_close,
    (Phase.OPEN, Move.FINALIZE): _finalize_abandoned,
    (Phase.OPEN, Move.EXTEND): _begin_window,
    (Phase.CLOSING, Move.UPDATE): _challenge,
    (Phase.CLOSING, Move.CLOSE): _close_in_window,
    (Phase.CLOSING, Move.FINALIZE): _finalize,
    (Phase.CLOSING, Move.EXTEND): _extend,
}
"""Every move that exists; any other is refused."""
