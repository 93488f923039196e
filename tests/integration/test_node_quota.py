"""What a service may keep is bounded by its operator, whatever it does, and is remembered."""

from __future__ import annotations

import asyncio

import pytest

from btt.node import folder as node_folder
from btt.node.config import parse
from btt.node.payments.store import PayeeStore
from btt.node.quota import Quotas
from btt.node.runtime import Node
from btt.node.shown import shown
from btt.sdk.errors import ConfigError, InvalidRequest, QuotaFull
from kit.probe import PRICES, Probe, rpc


@pytest.fixture
def books(tmp_path):
    made = PayeeStore(tmp_path / "payments.db")
    yield made
    made.close()


def quota_of(books, limit, service="shop"):
    quotas = Quotas(books.run)
    quotas.limit({service: limit})
    return quotas.of(service)


async def test_what_is_set_aside_stays_within_the_cap(books):
    quota = quota_of(books, 100)
    await quota.reserve("one", 60)
    with pytest.raises(QuotaFull, match="has 40 bytes left of the 100"):
        await quota.reserve("two", 41)
    await quota.reserve("two", 40)
    assert await quota.used() == 100
    assert await quota.release("one")
    assert not await quota.release("one"), "what is not there gives nothing back"
    assert await quota.used() == 40
    assert await quota.reservations() == {"two": 40}


async def test_a_name_is_counted_once_however_often_it_is_reserved(books):
    quota = quota_of(books, 100)
    for amount in (90, 90, 30, 100):
        await quota.reserve("one", amount)
        assert await quota.used() == amount
    with pytest.raises(QuotaFull, match="has 0 bytes left"):
        await quota.reserve("one", 101)
    assert await quota.reservations() == {"one": 100}


async def test_those_who_reserve_at_the_same_time_do_not_get_more_together(books):
    quota = quota_of(books, 100)
    found = await asyncio.gather(*(quota.reserve(f"{n}", 7) for n in range(30)), return_exceptions=True)
    assert sum(result is None for result in found) == 14
    assert {type(result) for result in found if result is not None} == {QuotaFull}
    assert await quota.used() == 98


async def test_below_a_lowered_cap_nothing_is_added_and_less_may_be_kept(books):
    quota = quota_of(books, 100)
    await quota.reserve("one", 50)
    await quota.reserve("two", 50)
    quota.limit = 60
    with pytest.raises(QuotaFull, match="has 0 bytes left of the 60"):
        await quota.reserve("three", 1)
    await quota.reserve("one", 30)
    assert await quota.used() == 80, "it shrank, though it is above the cap still"
    await quota.release("two")
    await quota.reserve("three", 30)


async def test_services_have_a_quota_each_and_nothing_unless_it_is_written(books):
    quotas = Quotas(books.run)
    quotas.limit({"shop": 10, "bank": 10})
    await quotas.of("shop").reserve("same name", 10)
    await quotas.of("bank").reserve("same name", 10)
    assert await quotas.of("shop").reservations() == {"same name": 10}
    with pytest.raises(QuotaFull):
        await quotas.of("third").reserve("one", 1)
    quotas.limit({"bank": 10})
    assert quotas.of("shop").limit == 0, "what is no longer written is no longer allowed"


@pytest.mark.parametrize(("name", "amount"), [("", 1), ("x" * 201, 1), ("x", 0), ("x", -1), ("x", 2**62)])
async def test_what_is_no_reservation_is_refused(books, name, amount):
    with pytest.raises(InvalidRequest):
        await quota_of(books, 2**62).reserve(name, amount)


async def test_reservations_outlive_the_process(tmp_path):
    for limit, expected in ((100, 40), (100, 40)):
        store = PayeeStore(tmp_path / "payments.db")
        quota = quota_of(store, limit)
        await quota.reserve("one", 40)
        assert await quota.used() == expected
        store.close()


def test_sizes_are_written_with_their_unit(economy_config):
    section = parse(economy_config(quota="2 TiB"), source="node.toml").services["shop"]
    assert (section.quota, section.options) == (2 << 40, {}), "the service does not see the node's part"
    assert parse(economy_config(quota=""), source="node.toml").services["shop"].quota == 0
    for wrong in ("2", "2 TB", 5, "-1 MiB"):
        with pytest.raises(ConfigError, match=r'services\.shop\.quota.*"500 MiB"'):
            parse(economy_config(quota=wrong), source="node.toml")


@pytest.fixture
def economy_config(economy):
    def make(**section):
        return {
            "node": {"listen": "127.0.0.1:0"},
            "ledger": {"address": str(economy.running.address)},
            "services": {"shop": {"enabled": True, **section}},
        }

    return make


class Shop:
    """Keeps what it is told to."""

    name = "shop"
    made: Shop

    def __init__(self, context):
        self.quota = context.quota
        type(self).made = self

    async def start(self):
        await self.quota.reserve("at the start", 10)

    def register(self, server):
        rpc.add_ProbeServiceServicer_to_server(Probe(), server)

    def prices(self):
        return PRICES

    async def stop(self):
        pass


async def test_an_operator_changes_the_cap_of_a_service_that_runs(economy, economy_config, tmp_path):
    opened = node_folder.init(tmp_path / "node", config=economy_config(quota="1 KiB"))
    config = opened.path / node_folder.CONFIG
    async with Node(opened, plugins={"shop": lambda: Shop}, clock=economy.clock) as node:
        quota = Shop.made.quota
        assert (quota.limit, await quota.used()) == (1024, 10)
        with pytest.raises(QuotaFull):
            await quota.reserve("large", 2000)
        config.write_text(config.read_text().replace("1 KiB", "2 KiB"))
        assert (await node.reload()).applied == ("services.shop.quota",)
        assert Shop.made.quota is quota, "the service went on"
        await quota.reserve("large", 2000)
        shares = {
            name: value for name, labels, value in await node._samples() if labels == {"service": "shop"}
        }
        assert (shares["btt_quota_limit_bytes"], shares["btt_quota_used_bytes"]) == (2048, 2010)
        config.write_text(config.read_text().replace('quota = "2 KiB"\n', ""))
        assert (await node.reload()).applied == ("services.shop.quota",)
        with pytest.raises(QuotaFull):
            await quota.reserve("larger", 1)
    assert {row.key: row.value for row in shown(opened.path)}["services.shop.quota"] == ""
