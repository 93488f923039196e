"""What every node serves beside its services, and how its connections are kept."""

from __future__ import annotations

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from btt.proto.offer.v1 import offer_pb2
from btt.proto.payment.v1 import payment_pb2


def keepalive(grace_ms: int) -> list[tuple[str, int]]:
    """A payer that vanished does not hold its session, and is not taken for one that does not pay.

    Within the grace time its connection is found to be dead, and the session ends without a
    word against it. Who answers pings all that time, and pays nothing, does so on purpose.
    """
    third = grace_ms // 3
    return [
        ("grpc.keepalive_time_ms", third),
        ("grpc.keepalive_timeout_ms", third),
        ("grpc.http2.ping_timeout_ms", third),  # a minute otherwise, whatever the one before says
    ]


def platform_names() -> tuple[str, ...]:
    """Returns the full names of these services."""
    return (
        payment_pb2.DESCRIPTOR.services_by_name["PaymentService"].full_name,
        offer_pb2.DESCRIPTOR.services_by_name["OfferService"].full_name,
        health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
        reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name,
    )
