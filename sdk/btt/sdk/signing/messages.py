"""The signed messages of the ledger and of payment sessions, one declaration each.

The white paper's T1, T2 and T3 are ChannelCommit, ChannelRefund and ChannelUpdate. Order, widths
and tags are final: `tests/vectors/signing.json` pins them. All amounts are base units of 10^-6 BTT,
all times Unix milliseconds.
"""

from __future__ import annotations

from typing import ClassVar, Final

from btt.sdk.keys import Address, PublicKey
from btt.sdk.signing.layout import (
    U16,
    U32,
    U64,
    Bytes16,
    Bytes32,
    ChannelFlags,
    Message,
    Money,
    TimeMs,
    message,
    tag,
)

EARLY_CLOSE: Final = 1
"""Flag of ChannelCommit: the payer may ask to close before `expires_ms`; the challenge window follows."""
APP_UNKNOWN: Final = Address(bytes(20))
"""SessionOpen.app of an application without a grant."""


def service_reference(node: Address) -> bytes:
    """Returns the ChannelCommit.service_ref of a channel for one node.

    Args:
        node: Address of the node's identity key.

    Returns:
        32 bytes: twelve zeros, then the address.
    """
    return bytes(12) + node.data


@message
class ChannelCommit(Message):
    """T1: locks `amount` of the payer for one payee. Signed by the payer's account key.

    The channel id is the digest of this message, known before it is signed (white paper, channel
    step 2).
    """

    TAG: ClassVar[bytes] = tag("ChannelCommit")

    payer: Address
    payee: Address
    k1: PublicKey
    k2: PublicKey
    amount: Money
    expires_ms: TimeMs
    challenge_ms: U32
    flags: ChannelFlags
    fee: Money
    nonce: Bytes16
    service_ref: Bytes32

    def channel_id(self, ledger_id: bytes) -> bytes:
        """Returns the id of the channel that this message opens on a ledger, 32 bytes.

        Args:
            ledger_id: 32 bytes.

        Raises:
            InvalidRequest: The ledger id is not 32 bytes.
        """
        return self.digest(ledger_id)


@message
class ChannelRefund(Message):
    """T2: gives all that is not captured back to the payer from `not_before_ms` on.

    K2 signs it first, having seen the unsigned T1; `not_before_ms` equals T1's `expires_ms`.
    """

    TAG: ClassVar[bytes] = tag("ChannelRefund")

    channel: Bytes32
    not_before_ms: TimeMs


@message
class ChannelUpdate(Message):
    """T3: the payee may have `cumulative` of the channel. Signed by K1; a higher one replaces it."""

    TAG: ClassVar[bytes] = tag("ChannelUpdate")

    channel: Bytes32
    cumulative: Money


@message
class ChannelClose(Message):
    """Ends a channel: the payee takes `capture`, the rest returns. Signed by K2."""

    TAG: ClassVar[bytes] = tag("ChannelClose")

    channel: Bytes32
    capture: Money


@message
class Transfer(Message):
    """Moves money between accounts. Signed by the sender's account key."""

    TAG: ClassVar[bytes] = tag("Transfer")

    sender: Address
    recipient: Address
    amount: Money
    request_id: Bytes16
    valid_until_ms: TimeMs
    memo: Bytes32


@message
class Query(Message):
    """Asks for private state. `subject` is a channel id, or an account as twelve zeros and its address."""

    TAG: ClassVar[bytes] = tag("Query")

    subject: Bytes32
    nonce: Bytes16
    valid_until_ms: TimeMs


@message
class SessionOpen(Message):
    """Binds a payment session to a node, a channel, an offer and an application. Signed by K1."""

    TAG: ClassVar[bytes] = tag("SessionOpen")

    node: Address
    channel: Bytes32
    offer_digest: Bytes32
    app: Address
    client_nonce: Bytes16
    server_nonce: Bytes16
    valid_until_ms: TimeMs


@message
class SessionCall(Message):
    """Lets one call use a session: a token alone, if it is stolen, is worth nothing. Signed by K1.

    `session` is the SHA-256 of the session's token.
    """

    TAG: ClassVar[bytes] = tag("SessionCall")

    session: Bytes32
    call_id: Bytes16


@message
class Receipt(Message):
    """What the ledger did with a request. Signed by the ledger's operator key."""

    TAG: ClassVar[bytes] = tag("Receipt")

    request_digest: Bytes32
    seq: U64
    entry_hash: Bytes32
    time_ms: TimeMs
    code: U16
    epoch: U32
    operator_key_id: Address


@message
class TopUp(Message):
    """Locks `amount` more in an open channel. Signed by the payer's account key."""

    TAG: ClassVar[bytes] = tag("TopUp")

    channel: Bytes32
    amount: Money
    request_id: Bytes16
    valid_until_ms: TimeMs


@message
class CloseRequest(Message):
    """The payer asks to close; the challenge window begins. Signed by the payer's account key.

    From `expires_ms` on it is the refund T2, which K2 signed when the channel opened; before that it
    needs EARLY_CLOSE.
    """

    TAG: ClassVar[bytes] = tag("CloseRequest")

    channel: Bytes32
    request_id: Bytes16
    valid_until_ms: TimeMs


@message
class ChannelFinalize(Message):
    """Pays out a channel whose window has ended. Nobody signs it: only the ledger's clock decides."""

    TAG: ClassVar[bytes] = tag("ChannelFinalize")

    channel: Bytes32


@message
class ChannelExtension(Message):
    """Ends a challenge window later, or begins one, because the ledger was away. Signed by its operator."""

    TAG: ClassVar[bytes] = tag("ChannelExtension")

    channel: Bytes32
    deadline_ms: TimeMs


@message
class KeyRotation(Message):
    """Hands the ledger to a new operator key, which begins `epoch`. Signed by the old and the new key."""

    TAG: ClassVar[bytes] = tag("KeyRotation")

    epoch: U32
    next_key: PublicKey


@message
class LedgerRecovery(Message):
    """Begins `epoch` on an older copy of the books. Signed by the copy's operator key and a new one.

    The epochs before end with entry `ended_seq`, though they had come to `reached_seq` at least: what
    they acknowledged in between stands only where entries of the new epoch repeat it.
    """

    TAG: ClassVar[bytes] = tag("LedgerRecovery")

    epoch: U32
    next_key: PublicKey
    ended_seq: U64
    ended_hash: Bytes32
    reached_seq: U64


MESSAGES: Final[tuple[type[Message], ...]] = (
    ChannelCommit,
    ChannelRefund,
    ChannelUpdate,
    ChannelClose,
    Transfer,
    Query,
    SessionOpen,
    SessionCall,
    Receipt,
    TopUp,
    CloseRequest,
    ChannelFinalize,
    ChannelExtension,
    KeyRotation,
    LedgerRecovery,
)
"""Every message type."""
