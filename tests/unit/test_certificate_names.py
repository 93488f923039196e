"""Certificates of strangers: whatever stands in them, the answer is one typed error."""

from __future__ import annotations

import datetime
import socket

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from btt.sdk.errors import ConnectError, IdentityError
from btt.sdk.payment.connection import _certificate_name
from btt.sdk.tls import make_certificate, read_certificate

X400_NAME = b"\x30\x04\xa3\x02\x30\x00"  # a kind of name that the library does not read


def certificate(*extensions: x509.ExtensionType) -> bytes:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_the_name_is_that_of_the_node():
    assert _certificate_name(make_certificate("node.btt")[1]) == "node.btt"


@pytest.mark.parametrize(
    "pem",
    [
        b"none",
        certificate(),
        certificate(x509.SubjectAlternativeName([x509.RFC822Name("a@b")])),
        certificate(x509.UnrecognizedExtension(x509.ExtensionOID.SUBJECT_ALTERNATIVE_NAME, X400_NAME)),
        certificate(x509.UnrecognizedExtension(x509.ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"junk")),
    ],
    ids=["no certificate", "no names", "no DNS name", "a name of another kind", "junk"],
)
def test_a_certificate_that_names_no_node_is_refused(pem):
    with pytest.raises(IdentityError):
        _certificate_name(pem)


@pytest.mark.parametrize("host", ["exa..mple", "a" * 64 + ".example", "ex ample", ""])
async def test_what_is_no_host_name_is_not_dialled(host):
    with pytest.raises(ConnectError, match="host name"):
        await read_certificate(host, 7800)


async def test_silence_is_said():
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ConnectError, match=r"\(timed out\)"),
    ):
        await read_certificate("127.0.0.1", silent.getsockname()[1], timeout=0.01)
