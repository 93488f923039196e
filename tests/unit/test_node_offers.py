"""Offers: serials only grow, nothing is used before it is kept, and the one before stays usable."""

from __future__ import annotations

from dataclasses import replace

import pytest

from btt.node.offers import OfferContent, Offers, OfferServicer
from btt.node.payments.store import PayeeStore
from btt.proto.offer.v1 import offer_pb2
from btt.sdk.channel import Line, Price
from btt.sdk.errors import InvalidRequest, StorageError
from btt.sdk.identity import ChannelTerms, Offer
from btt.sdk.keys import PrivateKey
from btt.sdk.money import SUPPLY, Rate, Unit

HOUR = 3_600_000
LINE = Line("acme.v1.Service", Unit.BYTE)
PAYEE = PrivateKey.generate()
CONTENT = OfferContent(
    ledger_id=bytes(range(32)),
    payee=PAYEE.address,
    payee_key=PAYEE.public,
    certificates=(bytes(32),),
    prices={LINE: Price(Rate.parse("1 BTT / GiB"), 1 << 20)},
    terms=ChannelTerms(1, 1000, 1000, 10_000),
)
DEARER = replace(CONTENT, prices={LINE: Price(Rate.parse("2 BTT / GiB"), 1 << 20)})


class Clock:
    now = 1_800_000_000_000

    def __call__(self):
        return self.now


class Bench:
    """Makes the offers of one node again and again, as restarts do."""

    def __init__(self, folder):
        self.clock = Clock()
        self.key = PrivateKey.generate()
        self.store = PayeeStore(folder / "payments.db")

    async def start(self, content=CONTENT, key=None) -> Offers:
        offers = Offers(key=key or self.key, content=content, store=self.store, clock=self.clock)
        await offers.start()
        return offers


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.store.close()


async def test_the_first_offer_is_what_was_configured(bench):
    offers = await bench.start()
    reply = await OfferServicer(offers).GetOffer(offer_pb2.GetOfferRequest(), None)
    offer = Offer.open(reply.offer, ledger_id=CONTENT.ledger_id, node=bench.key.address, now_ms=bench.clock())
    assert offer.serial == 1
    assert dict(offer.sheet.prices) == CONTENT.prices
    assert (offer.payee, offer.payee_key) == (CONTENT.payee, CONTENT.payee_key)
    assert offer.certificates == CONTENT.certificates
    assert offer.terms == CONTENT.terms
    assert offer.valid_until_ms - offer.issued_at_ms == 24 * HOUR
    assert [o.digest for o in offers.usable()] == [offer.digest]


async def test_it_is_renewed_at_half_of_its_life_and_the_old_one_stays_until_it_ends(bench):
    offers = await bench.start()
    first = await offers.current()
    bench.clock.now += 12 * HOUR
    assert await offers.current() is first
    bench.clock.now += 1
    second = await offers.current()
    assert second.serial == 2
    assert offers.usable() == [second, first]
    bench.clock.now = first.valid_until_ms
    assert first in offers.usable()
    bench.clock.now += 1
    assert offers.usable()[0].serial == 2
    assert first not in offers.usable()


async def test_a_restart_takes_up_the_same_offer(bench):
    first = await (await bench.start()).current()
    bench.clock.now += HOUR
    again = await bench.start()
    assert again.usable() == [first]
    assert await bench.store.last_serial() == 1


@pytest.mark.parametrize(
    "content",
    [
        DEARER,
        replace(CONTENT, certificates=(bytes(31) + b"\1",)),
        replace(CONTENT, terms=ChannelTerms(2, 1000, 1000, 10_000)),
    ],
)
async def test_a_restart_with_other_terms_signs_anew_and_keeps_its_word_on_the_old_offer(bench, content):
    first = await (await bench.start()).current()
    offers = await bench.start(content)
    second = await offers.current()
    assert second.serial == 2
    assert offers.usable() == [second, first]


async def test_serials_never_fall(bench):
    serials = []
    for content in (CONTENT, DEARER, CONTENT, DEARER):
        serials.append((await (await bench.start(content)).current()).serial)
        bench.clock.now += 25 * HOUR
    assert serials == [1, 2, 3, 4]
    bench.clock.now -= 100 * HOUR
    assert (await (await bench.start()).current()).serial == 5, "not even when the clock is put back"


@pytest.mark.parametrize(
    "content",
    [
        replace(CONTENT, payee_key=PrivateKey.generate().public),
        replace(CONTENT, payee=PrivateKey.generate().address),
        replace(CONTENT, ledger_id=bytes(32)),
        replace(CONTENT, prices={**CONTENT.prices, Line("acme.v1.New", Unit.COUNT): CONTENT.prices[LINE]}),
    ],
)
async def test_an_old_offer_that_cannot_be_honoured_is_not_usable(bench, content):
    content = replace(
        content, prices={line: Price(Rate(1, 1, line.unit), 1 << 20) for line in content.prices}
    )
    await bench.start()
    offers = await bench.start(content)
    assert [offer.serial for offer in offers.usable()] == [2]


async def test_an_offer_of_another_identity_is_not_taken_up(bench):
    await bench.start()
    other = PrivateKey.generate()
    offers = await bench.start(key=other)
    assert [(offer.serial, offer.node) for offer in offers.usable()] == [(2, other.address)]


async def test_an_offer_that_cannot_be_kept_is_not_used(bench, monkeypatch):
    offers = await bench.start()
    first = await offers.current()

    async def full(*_):
        raise StorageError("disk full")

    monkeypatch.setattr(bench.store, "add_offer", full)
    bench.clock.now += 13 * HOUR
    with pytest.raises(StorageError):
        await offers.current()
    assert offers.usable() == [first]
    monkeypatch.undo()
    assert (await offers.current()).serial == 2


async def test_an_offer_whose_channels_lock_more_than_there_is_is_malformed(bench):
    async def opened(amount: int) -> Offer:
        terms = replace(CONTENT.terms, min_amount=amount)
        return await (await bench.start(replace(CONTENT, terms=terms))).current()

    assert (await opened(SUPPLY)).terms.min_amount == SUPPLY
    with pytest.raises(InvalidRequest, match="more than there is"):
        await opened(SUPPLY + 1)
