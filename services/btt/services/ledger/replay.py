"""From stored bytes back to a verified operation: what the audit and a recovery run again."""

from __future__ import annotations

from collections.abc import Callable

from btt.sdk.errors import InvalidRequest
from btt.services.ledger.journal import Kind
from btt.services.ledger.machine import Channel
from btt.services.ledger.rules import known
from btt.services.ledger.verify import Operation, Verifier


def operation_of(
    verifier: Verifier,
    kind: Kind,
    body: bytes,
    proof: bytes,
    *,
    channel: Callable[[bytes], Channel | None],
) -> Operation:
    """Verifies an operation again, from what the journal or its holder keeps of it.

    Args:
        verifier: Of the ledger.
        kind: Of its entry.
        body: Canonical body of the request.
        proof: Keys and signatures, in the layout of `verify`.
        channel: Finds a channel by its id: K1 of a close stands only there.

    Raises:
        InvalidRequest: It is malformed, or not signed as it must be.
        ChannelUnknown: It closes a channel that does not exist.
    """
    signer, signature = proof[:33], proof[33:98]
    if kind is Kind.TRANSFER:
        return verifier.transfer(body, signer=signer, signature=signature)
    if kind is Kind.OPEN_CHANNEL:
        return verifier.open_channel(body, signer=signer, signature=signature, refund_signature=proof[98:])
    if kind is Kind.TOP_UP:
        return verifier.top_up(body, signer=signer, signature=signature)
    if kind is Kind.UPDATE:
        return verifier.update(body, k1=signer, signature=signature)
    if kind is Kind.REQUEST_CLOSE:
        return verifier.request_close(body, signer=signer, signature=signature)
    if kind is Kind.EXTEND:
        return verifier.extension(body, signer=signer, signature=signature)
    if kind is Kind.FINALIZE:
        return verifier.finalize(body)
    if kind is Kind.CLOSE_CHANNEL:
        return verifier.close_channel(
            body,
            signer=signer,
            signature=signature,
            cumulative=int.from_bytes(proof[98:106], "big"),
            update_signature=proof[106:],
            k1=known(channel(body[:32])).k1,
        )
    raise InvalidRequest(f"An entry of kind {kind} is no operation.")
