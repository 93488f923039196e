"""Signs the node's offer, renews it in time, and keeps the one before it usable until it ends."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import structlog

from btt.node.payments.store import PayeeStore
from btt.proto.common.v1.document_pb2 import SignedDocument
from btt.proto.offer.v1 import offer_pb2, offer_pb2_grpc
from btt.sdk.channel import Line, Price
from btt.sdk.clock import sleep
from btt.sdk.errors import BttError
from btt.sdk.identity import MAX_OFFER_LIFE_MS, ChannelTerms, Offer, sign_offer
from btt.sdk.keys import Address, PrivateKey, PublicKey
from btt.sdk.rpc import abort

if TYPE_CHECKING:
    import grpc.aio

log = structlog.get_logger(__name__)

RENEW_BEFORE_MS: Final = 12 * 3600 * 1000
"""An offer is renewed when it has less than this left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferContent:
    """What the node offers, apart from number and time; as `sign_offer`."""

    ledger_id: bytes
    payee: Address
    payee_key: PublicKey
    certificates: tuple[bytes, ...]
    prices: Mapping[Line, Price]
    terms: ChannelTerms


class Offers:
    """The offers of a node.

    Args:
        key: The identity key.
        content: What is offered.
        store: Keeps every offer before it is used, so that serials only grow.
        clock: Unix milliseconds.
    """

    def __init__(
        self, *, key: PrivateKey, content: OfferContent, store: PayeeStore, clock: Callable[[], int]
    ) -> None:
        self._key = key
        self._content = content
        self._store = store
        self._clock = clock
        self._current: Offer | None = None
        self._previous: Offer | None = None
        self._signing = asyncio.Lock()

    async def start(self) -> None:
        """Takes up the last offer if it still says what is offered, else signs a new one."""
        last = await self._last()
        if last is not None and self._same(last) and not self._is_due(last):
            self._current = last
            return
        self._current = last
        await self._sign()

    async def reprice(self, prices: Mapping[Line, Price], terms: ChannelTerms) -> bool:
        """Offers other prices and terms from now on, and says whether they are others.

        Raises:
            StorageError: The offer could not be kept; the old one stays.
        """
        async with self._signing:
            before = self._content
            if dict(before.prices) == dict(prices) and before.terms == terms:
                return False
            self._content = replace(before, prices=dict(prices), terms=terms)
            try:
                await self._sign()
            except BttError:
                self._content = before
                raise
            return True

    async def _last(self) -> Offer | None:
        row = await self._store.run(_read_last)
        if row is None:
            return None
        document = SignedDocument(payload=row[0], signature=row[1])
        try:
            offer = Offer.open(
                document,
                ledger_id=self._content.ledger_id,
                node=self._key.public.address,
                now_ms=self._clock(),
            )
        except BttError:
            return None  # it has ended, or was for another ledger
        payable = offer.payee == self._content.payee and offer.payee_key == self._content.payee_key
        return offer if payable and offer.sheet.prices.keys() >= self._content.prices.keys() else None

    def _same(self, offer: Offer) -> bool:
        return (
            offer.certificates == self._content.certificates
            and dict(offer.sheet.prices) == dict(self._content.prices)
            and offer.terms == self._content.terms
        )

    def _is_due(self, offer: Offer) -> bool:
        now = self._clock()
        # An offer from the future: this machine's clock was put back.
        return offer.valid_until_ms - now < RENEW_BEFORE_MS or offer.issued_at_ms > now

    async def _sign(self) -> None:
        now = self._clock()
        document = sign_offer(
            self._key,
            ledger_id=self._content.ledger_id,
            payee=self._content.payee,
            payee_key=self._content.payee_key,
            serial=await self._store.last_serial() + 1,
            issued_at_ms=now,
            valid_until_ms=now + MAX_OFFER_LIFE_MS,
            certificates=self._content.certificates,
            prices=dict(self._content.prices),
            terms=self._content.terms,
        )
        offer = Offer.open(
            document, ledger_id=self._content.ledger_id, node=self._key.public.address, now_ms=now
        )
        # Kept first: a serial that was seen outside is never used for another offer.
        await self._store.add_offer(offer.digest, offer.serial, document.payload, document.signature)
        self._previous, self._current = self._current, offer
        log.info("offer.signed", serial=offer.serial, prices=len(offer.sheet.prices))

    async def current(self) -> Offer:
        """Returns the current offer, renewed if it is due."""
        assert self._current is not None, "started before it is used"
        if self._is_due(self._current):
            async with self._signing:
                if self._is_due(self._current):
                    await self._sign()
        return self._current

    def usable(self) -> list[Offer]:
        """Returns what a session may pin: the current offer, then the one before it until it ends."""
        assert self._current is not None, "started before it is used"
        previous = self._previous
        if previous is None or previous.valid_until_ms < self._clock():
            return [self._current]
        return [self._current, previous]

    async def run(self, interval_s: float, looked: Callable[[], None] = lambda: None) -> None:
        """Renews the offer in time, for ever.

        Args:
            interval_s: Seconds between looks.
            looked: Called after each, when another offer may have become current, or have ended.
        """
        while True:
            await sleep(self._clock, interval_s)
            try:
                await self.current()
            except BttError as error:
                log.warning("offer.not_renewed", error=str(error))
            looked()


class OfferServicer(offer_pb2_grpc.OfferServiceServicer):
    """Tells anyone the current offer.

    Args:
        offers: Of the node.
    """

    def __init__(self, offers: Offers) -> None:
        self._offers = offers

    async def GetOffer(  # noqa: N802
        self, request: offer_pb2.GetOfferRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> offer_pb2.GetOfferResponse:
        """Returns the current offer."""
        try:
            return offer_pb2.GetOfferResponse(offer=(await self._offers.current()).document)
        except BttError as error:
            await abort(context, error)


def _read_last(db: sqlite3.Connection) -> tuple[bytes, bytes] | None:
    row: tuple[bytes, bytes] | None = db.execute(
        "SELECT payload, signature FROM offers ORDER BY serial DESC LIMIT 1"
    ).fetchone()
    return row
