"""The receipt of a session: what the node signed at its end, checked against our own books."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from btt.proto.payment.v1 import payment_pb2
from btt.sdk.channel import Payer
from btt.sdk.errors import CountsDiffer, InvalidRequest
from btt.sdk.identity import Offer
from btt.sdk.ledger import LedgerClient
from btt.sdk.payment.wire import read_counts
from btt.sdk.signing import ChannelClose, open_document


@dataclass(frozen=True, slots=True)
class SessionReceipt:
    """How a session ended, signed by the node.

    Attributes:
        channel_id: 32 bytes.
        paid: Base units paid over the life of the channel.
        owed: Base units owed over the life of the channel, by the node's books.
        written_off: Base units the node wrote off.
        counts_agree: The node's settled units are exactly those of our own books.
        channel_closed: The ledger has closed the channel; its receipt was verified.
        captured: Base units that the payee took on the ledger, once closed.
        statement: The signed SessionStatement, serialised, to keep.
    """

    channel_id: bytes
    paid: int
    owed: int
    written_off: int
    counts_agree: bool
    channel_closed: bool
    captured: int
    statement: bytes


def read_receipt(
    reply: payment_pb2.CloseResponse, payer: Payer, offer: Offer, ledger: LedgerClient | None
) -> SessionReceipt:
    """Checks the node's answer to Close.

    Args:
        reply: The answer.
        payer: Our books of the channel.
        offer: Of the node, which names its identity key.
        ledger: Verifies the receipt of the channel's close; None when the channel stays open.

    Raises:
        CountsDiffer: The statement is about another channel.
        BttError: It is malformed, or not signed by whom it should be.
    """
    payload = open_document(reply.statement, "SessionStatement", offer.ledger_id, offer.node_key)
    statement = payment_pb2.SessionStatement()
    try:
        statement.ParseFromString(payload)
    except DecodeError:
        raise InvalidRequest("The node's statement is malformed.") from None
    if statement.channel_id != payer.channel_id:
        raise CountsDiffer("The node's statement is about another channel.")
    mine = {s: units for s, _, units in payer.tally if units}
    theirs = {s: units for s, units in read_counts(statement.settled).items() if units}
    captured = 0
    if ledger is not None:
        captured = min(statement.paid, statement.owed)
        close = ChannelClose(channel=payer.channel_id, capture=captured)
        ledger.check_receipt(reply.ledger_receipt, reply.ledger_signature, close.digest(offer.ledger_id))
    return SessionReceipt(
        channel_id=payer.channel_id,
        paid=statement.paid,
        owed=statement.owed,
        written_off=statement.written_off,
        counts_agree=mine == theirs and statement.paid == payer.signed,
        channel_closed=ledger is not None,
        captured=captured,
        statement=reply.statement.SerializeToString(),
    )
