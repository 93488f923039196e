"""Content from many nodes at once, over real sockets: slow ones, liars, and nodes that are gone."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import grpc
import pytest

from btt.proto.content.v1 import content_pb2
from btt.sdk.content import client
from btt.sdk.content.client import ContentClient
from btt.sdk.content.feed import LINE
from btt.sdk.content.store import Destination
from btt.sdk.errors import (
    BudgetExceeded,
    ConfigError,
    ContentMismatch,
    InvalidRequest,
    NoProviders,
    StorageError,
)
from btt.sdk.keys import PrivateKey
from btt.sdk.money import SUPPLY, Amount, Rate, Unit
from btt.sdk.selection import Cause, allow, deny, max_price
from btt.services.content.service import ContentServicer
from kit import economy as kit
from kit.economy import CONTENT_PRICE, RUN, content

RUNS = 30
DATA = content(RUNS * RUN + 4321)
OWED = CONTENT_PRICE[LINE].rate.owed
UNIT = OWED(RUN)
DEAR = Rate.parse("5 BTT / GiB")


class Odd(ContentServicer):
    """Serves content as some `way` has it; counts the runs it was made to send."""

    way = None
    mute = False
    stall = None
    sent = 0
    held = 0

    async def Fetch(self, request, context):  # noqa: N802
        async for response in super().Fetch(request, context):
            self.sent += 1
            if self.way is None:
                yield response
            else:
                async for message in self.way(content_pb2.FetchResponse.FromString(response)):
                    yield message.SerializeToString()

    async def GetMetadata(self, request, context):  # noqa: N802
        if self.mute:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not today")
        async for part in super().GetMetadata(request, context):
            yield part
            if self.stall is not None:
                await self.stall.wait()


@pytest.fixture
async def three(economy, monkeypatch):
    """Three nodes with the same film."""
    monkeypatch.setattr(kit, "ContentServicer", Odd)
    nodes = []
    for _ in range(3):
        node, infohash = await economy.content_node({"film.bin": DATA})
        node.infohash = infohash["film.bin"]
        nodes.append(node)
    return nodes


async def fetch(btt, infohash, folder, **options):
    async with btt.content.fetch(infohash, folder, **options) as transfer:
        async for _ in transfer.progress(interval_s=0.02):
            pass
    return transfer.receipt


async def earned(economy, node):
    return (await economy.ledger.account(node.payee_key)).available


def check_paid_once(btt, receipt):
    assert all(closed.counts_agree for closed in btt.receipts)
    assert receipt.fetched_bytes == len(DATA)
    # Each node rounds up what it is owed by itself.
    assert 0 <= receipt.spent - OWED(len(DATA)) < len(receipt.parts)
    assert sum(part.fetched_bytes for part in receipt.parts) == len(DATA)


async def test_all_nodes_share_the_work_and_each_is_paid_for_its_part(economy, three, tmp_path):
    async with economy.client(three, await economy.wallet()) as btt:
        quote = await btt.content.quote(three[0].infohash)
        assert {node.node for node in quote.nodes} == {node.identity.public.address for node in three}
        receipt = await fetch(btt, quote, tmp_path)
    assert (tmp_path / "film.bin").read_bytes() == DATA
    check_paid_once(btt, receipt)
    assert len(receipt.parts) == 3
    assert len(btt.receipts) == 3
    by_node = {part.node: part for part in receipt.parts}
    for node in three:
        part = by_node[node.identity.public.address]
        assert part.fetched_bytes > 0
        assert await earned(economy, node) == part.spent
    assert (await economy.ledger.totals()).open_channels == 0


async def test_a_liar_among_honest_nodes_is_dropped_unpaid_for_its_lie_and_shunned(economy, three, tmp_path):
    liar, *honest = three

    async def lie(response):
        if liar.servicer.sent > 2:
            response.data = bytes(len(response.data))
        yield response

    liar.servicer.way = lie
    async with economy.client(three, await economy.wallet()) as btt:
        receipt = await fetch(btt, liar.infohash, tmp_path)
        assert (tmp_path / "film.bin").read_bytes() == DATA
        [part] = [part for part in receipt.parts if part.error is not None]
        assert part.node == liar.identity.public.address
        assert isinstance(part.error, ContentMismatch)
        assert part.fetched_bytes == 2 * RUN
        quote = await btt.content.quote(liar.infohash)
        assert {node.node for node in quote.nodes} == {node.identity.public.address for node in honest}
        [rejection] = quote.rejections
        assert (rejection.node, rejection.cause) == (str(liar.address), Cause.SHUNNED)
    check_paid_once(btt, receipt)
    assert await earned(economy, liar) == OWED(2 * RUN)


async def test_all_nodes_lie(economy, three, tmp_path):
    async def lie(response):
        response.data = bytes(len(response.data))
        yield response

    for node in three:
        node.servicer.way = lie
    async with economy.client(three, await economy.wallet()) as btt:
        with pytest.raises(ContentMismatch):
            await fetch(btt, three[0].infohash, tmp_path)
        with pytest.raises(NoProviders) as caught:
            await btt.content.quote(three[0].infohash)
        assert caught.value.counts == {Cause.SHUNNED: 3}
    assert [await earned(economy, node) for node in three if node.store] == [0, 0, 0]


async def test_others_take_over_what_a_slow_node_has_before_it(economy, three, tmp_path):
    slow, *_ = three
    let_go = asyncio.Event()

    async def stall(response):
        slow.servicer.held += 1
        if slow.servicer.held > 1:
            await let_go.wait()
        yield response

    slow.servicer.way = stall
    async with economy.client(three, await economy.wallet()) as btt:
        receipt = await fetch(btt, slow.infohash, tmp_path)
        let_go.set()
    assert (tmp_path / "film.bin").read_bytes() == DATA
    check_paid_once(btt, receipt)
    mine = next(part for part in receipt.parts if part.node == slow.identity.public.address)
    assert mine.fetched_bytes == RUN
    assert mine.error is None
    assert await earned(economy, slow) == UNIT


async def test_a_node_that_goes_away_midway_is_replaced_by_the_others(economy, three, tmp_path):
    gone, *rest = three
    reached, stopped = asyncio.Event(), asyncio.Event()

    async def go(response):
        if gone.servicer.sent == 3:
            reached.set()
            await stopped.wait()
        yield response

    gone.servicer.way = go

    async def stop():
        await reached.wait()
        await gone.server.stop(0)

    async with economy.client(three, await economy.wallet()) as btt:
        stopping = asyncio.create_task(stop())
        receipt = await fetch(btt, gone.infohash, tmp_path)
        await stopping
    stopped.set()
    assert (tmp_path / "film.bin").read_bytes() == DATA
    assert receipt.fetched_bytes == len(DATA)
    assert list(btt.unsettled) == [gone.address]
    assert len(btt.receipts) == 2
    for closed in btt.receipts:
        assert closed.counts_agree
    # Each channel is rounded up by itself.
    brought = sum(OWED(part.fetched_bytes) for part in receipt.parts)
    assert sum([await earned(economy, node) for node in rest]) <= brought < OWED(len(DATA)) + 3


async def test_nodes_without_the_content_or_gone_or_dear_are_counted_by_cause(economy, three, tmp_path):
    other, _ = await economy.content_node({"other.bin": content(RUN)})
    gone = await economy.node(lambda registrar: None)
    await gone.server.stop(0)
    dear, _ = await economy.content_node({"film.bin": DATA}, prices={LINE: kit.Price(DEAR, RUN)})
    async with economy.client([*three, other, gone, dear], await economy.wallet(), "50 BTT") as btt:
        quote = await btt.content.quote(three[0].infohash)
        assert len(quote.nodes) == 3
        assert quote.cost == OWED(len(DATA))
        assert {r.node: r.cause for r in quote.rejections} == {
            str(other.address): Cause.UNKNOWN,
            str(gone.address): Cause.UNREACHABLE,
            str(dear.address): Cause.DEAR,
        }
        with pytest.raises(NoProviders, match="4 denied by you, 1 ") as caught:
            nobody = deny([node.identity.public.address for node in [*three, dear]])
            await btt.content.quote(three[0].infohash, policies=[nobody])
        assert caught.value.counts == {Cause.DENIED: 4, Cause.UNKNOWN: 1, Cause.UNREACHABLE: 1}
        only = await btt.content.quote(three[0].infohash, policies=[allow([dear.identity.public.address])])
        assert (only.node, only.cost) == (dear.identity.public.address, DEAR.owed(len(DATA)))
        with pytest.raises(NoProviders) as caught:
            await btt.content.quote(three[0].infohash, policies=[max_price(Rate.parse("0.5 BTT / GiB"))])
        assert caught.value.counts == {Cause.DEAR: 4, Cause.UNKNOWN: 1, Cause.UNREACHABLE: 1}


async def test_a_budget_over_several_nodes_is_never_overspent_and_is_used_to_the_end(
    economy, three, tmp_path
):
    wallet = await economy.wallet()
    before = (await economy.ledger.account(wallet.account)).available
    budget = Amount(OWED(18 * RUN))
    async with economy.client(three, wallet, str(budget)) as btt:
        with pytest.raises(BudgetExceeded):
            await fetch(btt, three[0].infohash, tmp_path)
    for provider in btt.providers:
        assert provider.live is None
    spent = before - (await economy.ledger.account(wallet.account)).available
    assert spent == sum([await earned(economy, node) for node in three])
    assert budget - UNIT <= spent <= budget
    async with economy.client(three, wallet) as btt:
        receipt = await fetch(btt, three[0].infohash, tmp_path)
    assert (tmp_path / "film.bin").read_bytes() == DATA
    assert OWED(len(DATA)) <= spent + receipt.spent <= OWED(len(DATA)) + 6, "nothing was paid twice"


async def test_the_quoted_cost_and_a_unit_suffice_as_a_budget(economy, three, tmp_path):
    async with economy.client(three, await economy.wallet()) as btt:
        cost = (await btt.content.quote(three[0].infohash)).cost
    async with economy.client(three, await economy.wallet(), str(Amount(cost + 3))) as btt:
        receipt = await fetch(btt, three[0].infohash, tmp_path)
    assert (tmp_path / "film.bin").read_bytes() == DATA
    assert receipt.spent <= cost + 3


@pytest.mark.parametrize(
    ("count", "error"), [(1, StorageError("It is full.")), (3, ConfigError("It cannot be written."))]
)
async def test_a_disk_that_takes_no_more_ends_it_at_once_and_nothing_is_paid_in_vain(
    economy, three, tmp_path, monkeypatch, count, error
):
    write, written = Destination.write_run, []

    def until_full(self, file, run, data):
        if len(written) == RUNS // 2:
            raise error
        written.append(run)
        write(self, file, run, data)

    monkeypatch.setattr(Destination, "write_run", until_full)
    async with economy.client(three[:count], await economy.wallet()) as btt:
        with pytest.raises(type(error), match="It "):
            await fetch(btt, three[0].infohash, tmp_path)
    assert sum(closed.owed for closed in btt.receipts) - OWED(RUNS // 2 * RUN) < count


async def test_a_high_limit_locks_no_more_money_than_the_prices_of_the_nodes_take(economy, three, tmp_path):
    high = Rate.parse("1000 BTT / GiB")
    async with economy.client(three, await economy.wallet(), "1 BTT") as btt:
        receipt = await fetch(btt, three[0].infohash, tmp_path, max_rate=high)
        deposits = [provider.live.payer.deposit for provider in btt.providers if provider.live is not None]
        # Each its part, and once more what was missing when its part was done.
        assert sum(deposits) < 5 * OWED(len(DATA)) < 10**6
    check_paid_once(btt, receipt)
    assert len(receipt.parts) > 1


async def test_a_limit_below_the_prices_is_told_before_money_is_locked(economy, three, tmp_path):
    async with economy.client(three, await economy.wallet()) as btt:
        with pytest.raises(NoProviders) as caught:
            await fetch(btt, three[0].infohash, tmp_path, max_rate=Rate.parse("0.5 BTT / GiB"))
    assert caught.value.counts == {Cause.DEAR: 3}
    assert btt.receipts == []


async def test_a_node_that_raises_its_price_is_left_and_the_others_go_on(economy, three, tmp_path):
    async with economy.client(three, await economy.wallet()) as btt:
        quote = await btt.content.quote(three[0].infohash)
        three[0].sign({LINE: kit.Price(DEAR, RUN)})
        btt.providers[0]._node = None  # as if its offer had run out meanwhile
        receipt = await fetch(btt, quote, tmp_path)
    assert (tmp_path / "film.bin").read_bytes() == DATA
    assert three[0].identity.public.address not in {part.node for part in receipt.parts}
    assert OWED(len(DATA)) <= receipt.spent < OWED(len(DATA)) + 3


async def test_what_is_on_disk_is_neither_fetched_nor_paid_again(economy, three, tmp_path):
    async with economy.client(three, await economy.wallet()) as btt:
        quote = await btt.content.quote(three[0].infohash)
        with Destination(tmp_path, quote.torrent) as destination:
            destination.scan()
            for run in range(0, RUNS, 2):
                destination.write_run(0, run, DATA[run * RUN : (run + 1) * RUN])
                destination.keep(0, run)
        receipt = await fetch(btt, quote, tmp_path)
    assert (tmp_path / "film.bin").read_bytes() == DATA
    assert receipt.fetched_bytes == len(DATA) - RUNS // 2 * RUN
    assert receipt.spent < OWED(receipt.fetched_bytes) + 3


# One that spoils it for others


async def test_a_low_bid_that_delivers_nothing_shuts_nobody_out(economy, three):
    cheap, honest, _ = three
    cheap.sign({LINE: kit.Price(Rate.parse("0.000001 BTT / TiB"), RUN)})
    cheap.servicer.mute = True
    async with economy.client([cheap, honest], await economy.wallet()) as btt:
        quote = await btt.content.quote(honest.infohash)
    assert [node.node for node in quote.nodes] == [honest.identity.public.address]
    [rejection] = quote.rejections
    assert rejection.node == str(cheap.address)


async def test_a_low_bid_that_stalls_with_the_metadata_holds_nobody_up_for_long(economy, three, monkeypatch):
    stalling, honest, _ = three
    stalling.sign({LINE: kit.Price(Rate.parse("0.000001 BTT / TiB"), RUN)})
    stalling.servicer.stall = asyncio.Event()
    monkeypatch.setattr(client, "SILENT_S", 1.0)
    async with economy.client([stalling, honest], await economy.wallet()) as btt:
        quote = await btt.content.quote(honest.infohash)
    stalling.servicer.stall.set()
    assert [node.node for node in quote.nodes] == [honest.identity.public.address]
    [rejection] = quote.rejections
    assert (rejection.node, rejection.cause) == (str(stalling.address), Cause.UNREACHABLE)


async def test_an_offer_that_no_book_holds_and_an_address_that_is_none_concern_nobody_else(economy, three):
    odd, honest, _ = three
    with pytest.raises(InvalidRequest, match="serial"):
        odd.sign(serial=2**63)
    lost = SimpleNamespace(address=f"btt://{PrivateKey.generate().address}@exa..mple:7800")
    async with economy.client([odd, honest, lost], await economy.wallet()) as btt:
        quote = await btt.content.quote(honest.infohash)
    assert [node.node for node in quote.nodes] == [honest.identity.public.address]
    causes = {rejection.node: rejection.cause for rejection in quote.rejections}
    assert causes == {str(odd.address): Cause.NOT_OFFERED, lost.address: Cause.UNREACHABLE}


async def test_what_nobody_foresaw_about_one_node_concerns_nobody_else(economy, three, monkeypatch):
    odd, honest, _ = three
    ask = ContentClient._ask

    async def stumble(self, provider, infohash):
        if provider.name == str(odd.address):
            raise ZeroDivisionError
        return await ask(self, provider, infohash)

    monkeypatch.setattr(ContentClient, "_ask", stumble)
    async with economy.client([odd, honest], await economy.wallet()) as btt:
        quote = await btt.content.quote(honest.infohash)
        assert [node.node for node in quote.nodes] == [honest.identity.public.address]
        assert quote.rejections[0].cause is Cause.FAILED
        assert "ZeroDivisionError" in quote.rejections[0].detail


async def test_a_price_beyond_all_there_is(economy):
    node, infohash = await economy.content_node({"film.bin": DATA})
    node.sign({LINE: kit.Price(Rate(SUPPLY, 1, Unit.BYTE), RUN)})
    async with economy.client(node, await economy.wallet()) as btt:
        with pytest.raises(NoProviders) as caught:
            await btt.content.quote(infohash["film.bin"])
    assert caught.value.counts == {Cause.DEAR: 1}
