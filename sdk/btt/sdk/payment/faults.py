"""What a wallet holds against a node, and for how long it leaves it alone (P7's mirror).

Wrong bytes, and counts or bills above what was delivered, end in a ban at once: no honest
node sends them. A node that keeps refusing gets a strike each time we gave up on it. What may
be the network's fault or our own counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from btt.sdk import errors
from btt.sdk.channel import BanPolicy
from btt.sdk.errors import BttError, NodeBanned
from btt.sdk.keys import Address

if TYPE_CHECKING:
    from btt.sdk.payment.store import PayerStore

NODE_BANS: Final = BanPolicy(apart_ms=0)
"""Three times given up on within hours, or one lie: ten minutes at first, up to a day."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that counts against a node.

    Attributes:
        reason: For people.
        weight: Strikes.
    """

    reason: str
    weight: int


_LIES: Final[tuple[tuple[type[BttError], str], ...]] = (
    (errors.ContentMismatch, "it sent what does not verify"),
    (errors.CountsDiffer, "it claims more than it delivered"),
    (errors.CaptureDisputed, "it took more than its due"),
)
_REFUSALS: Final = (
    errors.AppRefused,
    errors.InternalError,
    errors.PaymentRequired,
    errors.RateLimited,
    errors.RemoteError,
    errors.SessionEnded,
    errors.TermsRefused,
    errors.UpdateInvalid,
)


def fault_of(error: BttError, *, at_last: bool) -> Fault | None:
    """Returns what an error says against the node it came from.

    Args:
        error: What ended a session, a call or a transfer.
        at_last: Trying again was no use: a refusal counts then only.
    """
    for kind, reason in _LIES:
        if isinstance(error, kind) and not error.by:  # what we found ourselves, not what somebody says
            return Fault(reason, NODE_BANS.after)
    if at_last and isinstance(error, _REFUSALS) and error.by == "node":
        return Fault("it keeps refusing", 1)
    return None


def check_node(store: PayerStore, node: Address, now_ms: int) -> None:
    """Refuses to have anything to do with a node that the wallet leaves alone.

    Raises:
        NodeBanned: Saying why and until when.
    """
    conduct = store.conduct(node)
    if conduct.is_banned(now_ms):
        until = datetime.fromtimestamp(conduct.until_ms / 1000, UTC)
        raise NodeBanned(
            f"Node {node} is left alone until {until:%Y-%m-%d %H:%M:%S} UTC: {conduct.reason}.",
            until_ms=conduct.until_ms,
        )
