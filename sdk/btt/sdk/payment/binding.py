"""Binds a channel to an offer and an app: what a payment session begins with.

The channel's key signs the node, the channel, the offer, the app and what either side made up
for this session; both then start from the highest update and the counts that either can prove.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple

import grpc.aio

from btt.proto.payment.v1 import payment_pb2, payment_pb2_grpc
from btt.sdk.channel import Payer, SignedUpdate
from btt.sdk.errors import InvalidRequest
from btt.sdk.identity import Offer
from btt.sdk.keys import PrivateKey
from btt.sdk.payment.purse import Purse
from btt.sdk.payment.wire import count_protos, read_counts, update_proto
from btt.sdk.rpc import to_error
from btt.sdk.signing import SessionOpen, sign

OPEN_VALID_MS = 60_000
"""How long what is signed may be on its way to the node."""


class Bound(NamedTuple):
    """What the node answers."""

    token: bytes
    """32 random bytes that name the session in each of its calls."""
    credit: int
    """Base units that may be owed now."""


async def bind(
    purse: Purse,
    stub: payment_pb2_grpc.PaymentServiceAsyncStub,
    key: PrivateKey,
    offer: Offer,
    payer: Payer,
) -> Bound:
    """Opens a session with a node; the payer's books are reconciled with the node's, and saved.

    Args:
        purse: What pays.
        stub: Of the node.
        key: K1 of the channel.
        offer: Of the node.
        payer: Of the channel.

    Raises:
        InvalidRequest: The node's answer is malformed.
        CountsDiffer: The node claims what was neither accepted nor paid.
        BttError: The node refused, or did not answer.
    """
    try:
        app, grant = await purse.granted_app(key.public, offer.ledger_id)
        begin = await stub.Begin(payment_pb2.BeginRequest(), timeout=20)
        body = SessionOpen(
            node=offer.node,
            channel=payer.channel_id,
            offer_digest=offer.digest,
            app=app,
            client_nonce=secrets.token_bytes(16),
            server_nonce=begin.server_nonce,
            valid_until_ms=purse.clock() + OPEN_VALID_MS,
        )
        reply = await stub.Open(
            payment_pb2.OpenRequest(
                open=body.encode(),
                signature=sign(key, body, offer.ledger_id),
                best=update_proto(payer.last()),
                accepted=count_protos(payer.tally),
                app_grant=grant,
            ),
            timeout=30,
        )
    except grpc.aio.AioRpcError as failure:
        raise to_error(failure) from failure
    if len(reply.token) != 32:
        raise InvalidRequest("The node's session token is malformed.")
    best = SignedUpdate(reply.best.cumulative, reply.best.signature) if reply.HasField("best") else None
    payer.reconcile(best=best, settled=read_counts(reply.settled))
    purse.store.save_books(payer.channel_id, payer.signed, payer.tally)
    return Bound(reply.token, reply.credit)
