"""Who a node is: its address, its signed offer, and the first contact that checks both.

An address is `btt://<node address>@host:port`. The certificate shown at that endpoint
is worth nothing by itself: the endpoint must return an offer that is signed by the
identity key of the address, names that very certificate, and is current. The identity
key is neither the TLS key nor K2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from btt.proto.common.v1.document_pb2 import Price as PriceProto
from btt.proto.common.v1.document_pb2 import SignedDocument
from btt.proto.offer.v1 import offer_pb2
from btt.sdk.channel.prices import Line, Price, PriceSheet
from btt.sdk.errors import IdentityError, InvalidRequest, SignatureInvalid
from btt.sdk.keys import Address, PrivateKey, PublicKey
from btt.sdk.money import SUPPLY, Rate, Unit
from btt.sdk.signing import document_digest, sign_document

CLOCK_TOLERANCE_MS: Final = 5 * 60 * 1000
"""Difference of clocks that an offer tolerates."""
MAX_OFFER_LIFE_MS: Final = 24 * 3600 * 1000
"""Longest life of an offer."""
_MAX_OFFER_BYTES: Final = 65536
_MAX_PRICES: Final = 256
_MAX_SERIAL: Final = 2**63 - 1


def tls_name(node: Address) -> str:
    """Returns the DNS name in a node's certificate."""
    return f"{node}.btt"


@dataclass(frozen=True, slots=True)
class NodeAddress:
    """Where a node is, and who it must be.

    Attributes:
        node: Address of its identity key; None for a bare `host:port`, which is trust on
            first use.
        host: Name or IP address.
        port: TCP port.
    """

    node: Address | None
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> NodeAddress:
        """Reads `btt://T...@host:port`, or a bare `host:port`.

        Raises:
            InvalidRequest: It is neither.
        """
        node: Address | None = None
        rest = text
        if text.startswith("btt://"):
            name, at, rest = text.removeprefix("btt://").partition("@")
            if not at:
                raise InvalidRequest(f'"{text[:200]}" names no node: write btt://<node address>@host:port.')
            node = Address.parse(name)
        host, colon, port = rest.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not host or not (port.isascii() and port.isdigit()) or not 0 < int(port[:6]) < 65536:
            raise InvalidRequest(f'"{text[:200]}" is no address: write btt://<node address>@host:port.')
        return cls(node, host, int(port))

    @classmethod
    def parse_all(cls, texts: str | Sequence[str]) -> list[NodeAddress]:
        """Reads several addresses, each once: a list, or a text that separates them by commas.

        Raises:
            InvalidRequest: One of them is no address.
        """
        parts = texts.split(",") if isinstance(texts, str) else texts
        return list(dict.fromkeys(cls.parse(part.strip()) for part in parts if part.strip()))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"btt://{self.node}@{host}:{self.port}" if self.node else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ChannelTerms:
    """The channel terms a node accepts; amounts in base units, times in milliseconds."""

    min_amount: int
    min_challenge_ms: int
    min_lifetime_ms: int
    max_lifetime_ms: int


_UNITS: Final = frozenset(int(unit) for unit in Unit)


@dataclass(frozen=True, slots=True)
class Offer:
    """A verified price sheet.

    Attributes:
        document: As it was signed.
        digest: SHA-256 of its payload, 32 bytes; what a session pins.
        ledger_id: 32 bytes.
        node: Address of the identity key.
        node_key: The identity key.
        payee: Account that is paid.
        payee_key: K2.
        serial: Grows with every offer of the node.
        issued_at_ms: Unix milliseconds.
        valid_until_ms: Unix milliseconds.
        certificates: SHA-256 of the DER certificates: current, then next.
        sheet: The prices.
        terms: Of its channels.
    """

    document: SignedDocument
    digest: bytes
    ledger_id: bytes
    node: Address
    node_key: PublicKey
    payee: Address
    payee_key: PublicKey
    serial: int
    issued_at_ms: int
    valid_until_ms: int
    certificates: tuple[bytes, ...]
    sheet: PriceSheet
    terms: ChannelTerms

    @classmethod
    def open(cls, document: SignedDocument, *, ledger_id: bytes, node: Address | None, now_ms: int) -> Offer:
        """Verifies an offer.

        Args:
            document: As received.
            ledger_id: The ledger of one's own configuration, 32 bytes.
            node: Who must have signed it; None takes whoever did.
            now_ms: Unix milliseconds.

        Raises:
            IdentityError: Somebody else signed it, it is for another ledger, or not current.
            InvalidRequest: It is malformed.
        """
        if len(document.payload) > _MAX_OFFER_BYTES:
            raise InvalidRequest("The offer is too large.")
        proto = offer_pb2.Offer()
        try:
            proto.ParseFromString(document.payload)
        except DecodeError:
            raise InvalidRequest("The offer is malformed.") from None
        key = PublicKey(proto.node_key)
        if node is not None and key.address != node:
            raise IdentityError(f"The offer there is of {key.address}, not of {node}.")
        if proto.ledger_id != ledger_id:
            raise IdentityError("The node is paid on another ledger.", hint="Use a node of your ledger.")
        if not key.verify(document_digest("Offer", ledger_id, document.payload), document.signature):
            raise IdentityError("The offer is not signed by the node's key.") from SignatureInvalid("offer")
        if proto.serial > _MAX_SERIAL:
            raise InvalidRequest("The offer's serial is out of range.")
        if proto.terms.min_amount > SUPPLY:
            raise InvalidRequest("The offer asks for channels that lock more than there is.")
        if not proto.issued_at_ms <= proto.valid_until_ms <= proto.issued_at_ms + MAX_OFFER_LIFE_MS:
            raise InvalidRequest("The offer is valid for longer than a day, or never.")
        if not proto.issued_at_ms - CLOCK_TOLERANCE_MS <= now_ms <= proto.valid_until_ms + CLOCK_TOLERANCE_MS:
            raise IdentityError("The offer is not current.", hint="Check this machine's clock.")
        digest = hashlib.sha256(document.payload).digest()
        return cls(
            document=document,
            digest=digest,
            ledger_id=ledger_id,
            node=key.address,
            node_key=key,
            payee=Address(proto.payee),
            payee_key=PublicKey(proto.payee_key),
            serial=proto.serial,
            issued_at_ms=proto.issued_at_ms,
            valid_until_ms=proto.valid_until_ms,
            certificates=tuple(proto.certificate_sha256[:2]),
            sheet=PriceSheet(digest, _prices(proto.prices)),
            terms=ChannelTerms(
                min_amount=proto.terms.min_amount,
                min_challenge_ms=proto.terms.min_challenge_ms,
                min_lifetime_ms=proto.terms.min_lifetime_ms,
                max_lifetime_ms=proto.terms.max_lifetime_ms,
            ),
        )


def _prices(protos: Sequence[PriceProto]) -> dict[Line, Price]:
    if len(protos) > _MAX_PRICES:
        raise InvalidRequest("The offer lists too many prices.")
    prices: dict[Line, Price] = {}
    for proto in protos:
        if (
            proto.unit not in _UNITS
            or not 0 < proto.per < 2**63
            or not 0 < proto.verify_units < 2**63
            or proto.amount > SUPPLY
            or not 0 < len(proto.service) <= 200
        ):
            raise InvalidRequest("A price of the offer is out of range.")
        line = Line(proto.service, Unit(proto.unit))
        if line in prices:
            raise InvalidRequest("The offer prices one line twice.")
        prices[line] = Price(Rate(proto.amount, proto.per, line.unit), proto.verify_units)
    return prices


def sign_offer(
    key: PrivateKey,
    *,
    ledger_id: bytes,
    payee: Address,
    payee_key: PublicKey,
    serial: int,
    issued_at_ms: int,
    valid_until_ms: int,
    certificates: Sequence[bytes],
    prices: dict[Line, Price],
    terms: ChannelTerms,
) -> SignedDocument:
    """Makes an offer; the arguments are those of `Offer`, `key` is the identity key."""
    proto = offer_pb2.Offer(
        ledger_id=ledger_id,
        node_key=key.public.data,
        payee=payee.data,
        payee_key=payee_key.data,
        serial=serial,
        issued_at_ms=issued_at_ms,
        valid_until_ms=valid_until_ms,
        certificate_sha256=certificates,
        prices=[
            PriceProto(
                service=line.service,
                unit=int(line.unit),
                amount=price.rate.amount,
                per=price.rate.per,
                verify_units=price.verify_units,
            )
            for line, price in sorted(prices.items())
        ],
        terms=offer_pb2.ChannelTerms(
            min_amount=terms.min_amount,
            min_challenge_ms=terms.min_challenge_ms,
            min_lifetime_ms=terms.min_lifetime_ms,
            max_lifetime_ms=terms.max_lifetime_ms,
        ),
    )
    return sign_document(key, "Offer", ledger_id, proto.SerializeToString())
