"""Payment messages between objects and protobuf; what comes from the network is checked here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Final

from btt.proto.payment.v1 import payment_pb2
from btt.sdk.channel import Line, Segment, SignedUpdate, Tally
from btt.sdk.errors import InvalidRequest
from btt.sdk.keys import PrivateKey
from btt.sdk.money import Unit
from btt.sdk.signing import SessionCall, sign

_UNITS: Final = frozenset(int(unit) for unit in Unit)


def sign_call(key: PrivateKey, token: bytes, call_id: bytes, ledger_id: bytes) -> bytes:
    """Signs one call of a session.

    Args:
        key: K1.
        token: Of the session.
        call_id: 16 bytes, never used before in this session.
        ledger_id: 32 bytes.

    Returns:
        65 bytes.
    """
    return sign(key, SessionCall(session=hashlib.sha256(token).digest(), call_id=call_id), ledger_id)


def update_proto(update: SignedUpdate | None) -> payment_pb2.Update | None:
    """Puts an update on the wire."""
    if update is None:
        return None
    return payment_pb2.Update(cumulative=update.cumulative, signature=update.signature)


def count_protos(tally: Tally) -> list[payment_pb2.Count]:
    """Puts a tally on the wire."""
    return counts_of({segment: units for segment, _, units in tally})


def counts_of(counts: Mapping[Segment, int]) -> list[payment_pb2.Count]:
    """Puts counts on the wire."""
    return [
        payment_pb2.Count(
            offer_digest=s.offer_digest, service=s.line.service, unit=int(s.line.unit), units=units
        )
        for s, units in counts.items()
    ]


def read_counts(protos: Iterable[payment_pb2.Count]) -> dict[Segment, int]:
    """Reads counts from the wire.

    Raises:
        InvalidRequest: One is malformed, or stands twice.
    """
    counts: dict[Segment, int] = {}
    for proto in protos:
        if len(proto.offer_digest) != 32 or proto.unit not in _UNITS or len(counts) > 4096:
            raise InvalidRequest("A count is malformed.")
        segment = Segment(proto.offer_digest, Line(proto.service, Unit(proto.unit)))
        if segment in counts or proto.units >= 2**63:
            raise InvalidRequest("A count stands twice or is out of range.")
        counts[segment] = proto.units
    return counts
