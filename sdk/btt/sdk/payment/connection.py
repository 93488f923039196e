"""First contact with a node: read its certificate, pin to it, demand an offer that names it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import grpc.aio

from btt.proto.offer.v1 import offer_pb2, offer_pb2_grpc
from btt.sdk.errors import IdentityError
from btt.sdk.identity import NodeAddress, Offer, tls_name
from btt.sdk.payment.history import known_endpoint, met_at, saw_offer, trust_endpoint
from btt.sdk.rpc import to_error
from btt.sdk.tls import certificate_sha256, pinned_channel, read_certificate

if TYPE_CHECKING:
    from btt.sdk.payment.store import PayerStore


@dataclass(frozen=True, slots=True)
class NodeConnection:
    """A node whose identity was proven, and its current offer.

    Attributes:
        address: Where it is; its `node` is never None.
        certificate: The pinned certificate, PEM.
        offer: Its current offer.
    """

    address: NodeAddress
    certificate: bytes
    offer: Offer

    def channel(
        self, *, label: str = "", interceptors: Sequence[grpc.aio.ClientInterceptor] = ()
    ) -> grpc.aio.Channel:
        """Makes a pinned gRPC channel; different labels never share a TCP connection."""
        return pinned_channel(
            self.address.host,
            self.address.port,
            self.certificate,
            tls_name(self.offer.node),
            interceptors=interceptors,
            own_connection=label,
        )


async def connect_node(
    address: NodeAddress,
    *,
    ledger_id: bytes,
    store: PayerStore,
    clock: Callable[[], int],
    trust_new: bool = False,
    timeout: float = 10.0,
) -> NodeConnection:
    """Proves who is at an address.

    Args:
        address: With the node's address, or a bare endpoint.
        ledger_id: The ledger of one's own configuration, 32 bytes.
        store: Remembers the highest offer serial of each node, and bare endpoints.
        clock: Unix milliseconds.
        trust_new: Accept a bare endpoint that was never met before.
        timeout: Seconds for each step.

    Raises:
        ConnectError: Nobody answers.
        IdentityError: Whoever answers is not the node: another key, a certificate that the
            offer does not name, an old offer, or a bare endpoint that is new or changed.
    """
    endpoint = f"{address.host}:{address.port}"
    expected = address.node or known_endpoint(store, endpoint)
    certificate = await read_certificate(address.host, address.port, timeout=timeout)
    # Before the offer proves it, the name to expect is whatever the certificate says; the
    # pin is the certificate itself.
    name = _certificate_name(certificate)
    channel = pinned_channel(address.host, address.port, certificate, name, own_connection="offer")
    try:
        stub = offer_pb2_grpc.OfferServiceStub(channel)
        reply = await stub.GetOffer(offer_pb2.GetOfferRequest(), timeout=timeout)
    except grpc.aio.AioRpcError as failure:
        raise to_error(failure) from failure
    finally:
        await channel.close()
    offer = Offer.open(reply.offer, ledger_id=ledger_id, node=expected, now_ms=clock())
    if certificate_sha256(certificate) not in offer.certificates:
        raise IdentityError(f"{endpoint} shows a certificate that the node's offer does not name.")
    if name != tls_name(offer.node):
        raise IdentityError(f"{endpoint} shows a certificate of another name.")
    if expected is None:
        if not trust_new:
            raise IdentityError(
                f"{endpoint} says it is {offer.node}, which this wallet has not met.",
                hint=f"Use btt://{offer.node}@{endpoint} if that is who you mean, or --trust-new once.",
            )
        trust_endpoint(store, endpoint, offer.node)
    saw_offer(store, offer.node, offer.serial)
    proven = replace(address, node=offer.node)
    met_at(store, proven)
    return NodeConnection(proven, certificate, offer)


def _certificate_name(certificate: bytes) -> str:
    from cryptography import x509

    try:
        parsed = x509.load_pem_x509_certificate(certificate)
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return names.get_values_for_type(x509.DNSName)[0]
    except Exception:  # noqa: BLE001 - a stranger's certificate, and the library's errors for it are many
        raise IdentityError("The certificate there is not a node's.") from None
