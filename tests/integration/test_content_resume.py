"""A transfer that broke off goes on in another client, by its token: the same content, no higher price."""

from __future__ import annotations

import pytest

from btt.sdk.channel import Price
from btt.sdk.cli import content as cli
from btt.sdk.content.feed import LINE
from btt.sdk.content.resuming import ResumeToken
from btt.sdk.errors import BudgetExceeded, InvalidRequest, NoProviders
from btt.sdk.money import Amount, Rate
from btt.sdk.selection import Cause
from kit.economy import CONTENT_PRICE, RUN, content

RATE = CONTENT_PRICE[LINE].rate
DATA = content(8 * RUN)


@pytest.fixture
async def begun(economy, tmp_path):
    """A transfer that brought a part: its node, wallet, infohash, and token."""
    node, infohashes = await economy.content_node({"film": DATA})
    wallet = await economy.wallet()
    with pytest.raises(BudgetExceeded):
        async with (
            economy.client(node, wallet, budget=f"{RATE.owed(3 * RUN)} base units") as btt,
            btt.content.fetch(infohashes["film"], tmp_path / "in", first=["film"]) as transfer,
        ):
            token = str(transfer.token)
    return node, wallet, infohashes["film"], token


async def test_another_client_goes_on_by_the_token_alone(begun, economy, tmp_path):
    node, wallet, infohash, token = begun
    said = ResumeToken.parse(token)
    assert said == ResumeToken(infohash=infohash, first=(0,), rate=RATE, nodes=(node.address,))
    async with economy.client(node, wallet) as btt:
        async with btt.content.resume(token, tmp_path / "in") as transfer:
            assert transfer.token == said, "it may break off again"
        assert 0 < transfer.receipt.fetched_bytes <= 6 * RUN
        async with btt.content.resume(said, tmp_path / "elsewhere") as transfer:
            pass
        assert transfer.receipt.fetched_bytes == 8 * RUN, (
            "what is there counts, not what the token was made for"
        )
    assert (tmp_path / "in" / "film").read_bytes() == DATA


async def test_it_never_costs_more_than_was_agreed(begun, economy, tmp_path):
    node, wallet, _, token = begun
    node.sign({LINE: Price(Rate(RATE.amount + 1, RATE.per, RATE.unit), RUN)})
    async with economy.client(node, wallet) as btt:
        with pytest.raises(NoProviders, match="1 too dear") as refused:
            async with btt.content.resume(token, tmp_path / "in"):
                pass
    assert refused.value.counts == {Cause.DEAR: 1}
    assert btt.receipts == []


async def test_a_person_who_said_yes_to_a_price_pays_no_more_whatever_the_token_allows(
    economy, tmp_path, monkeypatch
):
    node, infohashes = await economy.content_node({"film": DATA})
    dear = Rate.parse("100 BTT / GiB")
    token = ResumeToken(infohash=infohashes["film"], first=(), rate=dear, nodes=(node.address,))

    def say_yes(question):
        assert question == f"Spend up to {Amount(RATE.owed(len(DATA)))}?"
        economy.clock.ahead_ms += 2 * 3600_000  # the offer that was shown ends meanwhile
        node.sign({LINE: Price(dear, RUN)})
        return True

    monkeypatch.setattr(cli, "confirmed", say_yes)
    client = economy.client(node, await economy.wallet())
    with pytest.raises(NoProviders, match="1 too dear"):
        await cli.buy(client, token.infohash, tmp_path, Amount(10**6), ask=True, quiet=True, token=token)
    assert client.receipts == []


async def test_a_token_cannot_name_what_is_not_there(begun, economy, tmp_path):
    node, wallet, infohash, _ = begun
    token = ResumeToken(infohash=infohash, first=(1,), rate=RATE, nodes=(node.address,))
    async with economy.client(node, wallet) as btt:
        with pytest.raises(InvalidRequest, match="files that the content does not have"):
            async with btt.content.resume(str(token), tmp_path / "in"):
                pass
        with pytest.raises(InvalidRequest, match="no token"):
            async with btt.content.resume("ab" * 32, tmp_path / "in"):
                pass
