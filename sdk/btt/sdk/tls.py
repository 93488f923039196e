"""Pinned TLS: a peer is known by its certificate, never by a certificate authority.

Python's gRPC cannot skip verification, and with an empty root it silently falls
back to the system's roots. So the certificate is read first with the standard
library, and the gRPC channel is pinned to exactly that certificate; whoever calls
this then demands a signed document that names its hash (`btt.sdk.identity`).
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import ipaddress
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from btt.sdk.errors import ConnectError, IdentityError

if TYPE_CHECKING:
    import grpc.aio

MAX_MESSAGE = 4 << 20
"""Largest message either side takes, bytes."""

TRANSPORT_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    # A fixed window: the self-tuning one lets a fast sender fill 100 MiB and more of a
    # receiver's memory.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", MAX_MESSAGE),
    ("grpc.http2.max_frame_size", 1 << 20),
)
"""Options of both ends of a connection that carries data."""

_OPTIONS: tuple[tuple[str, Any], ...] = (
    *TRANSPORT_OPTIONS,
    # A proxy from the environment would see which nodes are dialled; a service
    # config from DNS could change retries of paid calls.
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.enable_retries", 0),
)


def make_certificate(name: str) -> tuple[bytes, bytes]:
    """Makes a self-signed P-256 certificate (grpcio takes neither Ed25519 nor secp256k1).

    Args:
        name: The only DNS name of the certificate.

    Returns:
        Private key and certificate, both PEM.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    # No expiry of its own: the offer that names the certificate expires within a day.
    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return (
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        certificate.public_bytes(serialization.Encoding.PEM),
    )


def certificate_sha256(certificate: bytes) -> bytes:
    """Returns the SHA-256 of a PEM certificate's DER, 32 bytes."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.decode("ascii"))).digest()


async def read_certificate(host: str, port: int, *, timeout: float = 5.0) -> bytes:
    """Reads the certificate that a server shows, without trusting it yet.

    Args:
        host: Name or address.
        port: TCP port.
        timeout: Seconds for connection and handshake together.

    Returns:
        The certificate, PEM.

    Raises:
        ConnectError: It is no address, or nobody answers there, or not with TLS.
    """
    target(host, port)  # whatever is no host name would fail below in ways of its own
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
            try:
                der: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            finally:
                writer.transport.abort()
    except (OSError, TimeoutError) as error:
        raise ConnectError(f"Nobody answers at {host}:{port} ({str(error) or 'timed out'}).") from error
    if not der:
        raise ConnectError(f"{host}:{port} showed no certificate.")
    return ssl.DER_cert_to_PEM_cert(der).encode("ascii")


def pinned_channel(
    host: str,
    port: int,
    certificate: bytes,
    name: str,
    *,
    interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
    own_connection: str = "",
) -> grpc.aio.Channel:
    """Makes a gRPC channel that talks only to the holder of one certificate.

    Args:
        host: Name or address.
        port: TCP port.
        certificate: The certificate, PEM; never empty.
        name: The DNS name in the certificate.
        interceptors: Client interceptors, outermost first.
        own_connection: Channels with different labels never share a TCP connection.

    Raises:
        IdentityError: The pin is empty or no certificate, which gRPC would take as
            "trust the system's roots".
    """
    import grpc
    import grpc.aio

    if not certificate.startswith(b"-----BEGIN CERTIFICATE-----"):
        raise IdentityError("There is no certificate to pin the connection to.")
    return grpc.aio.secure_channel(
        target(host, port),
        grpc.ssl_channel_credentials(root_certificates=certificate),
        options=[
            *_OPTIONS,
            ("grpc.ssl_target_name_override", name),
            ("grpc.use_local_subchannel_pool", 1),
            ("btt.connection", own_connection),
        ],
        interceptors=list(interceptors),
    )


def target(host: str, port: int) -> str:
    """Builds a gRPC target from parsed parts, so that no text can name another scheme.

    Raises:
        ConnectError: The host is not a DNS name or IP address, or the port is none.
    """
    if not 0 < port < 65536:
        raise ConnectError(f"{port} is not a port.")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        labels = host.removesuffix(".").split(".")
        if len(host) > 253 or not all(
            0 < len(label) <= 63 and label.isascii() and label.replace("-", "a").replace("_", "a").isalnum()
            for label in labels
        ):
            raise ConnectError(f"{host!r} is not a host name.") from None
        return f"dns:///{host}:{port}"
    return f"ipv6:[{address}]:{port}" if address.version == 6 else f"ipv4:{address}:{port}"


def server_credentials(key: bytes, certificate: bytes) -> grpc.ServerCredentials:
    """Returns the credentials a gRPC server listens with; both arguments PEM."""
    import grpc

    return grpc.ssl_server_credentials([(key, certificate)])
