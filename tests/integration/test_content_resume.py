"""A transfer that broke off goes on in another client, by its token: the same content, no higher price."""

from __future__ import annotations

import pytest

from btt.sdk.channel import Price
from btt.sdk.content.feed import LINE
from btt.sdk.content.resuming import ResumeToken
from btt.sdk.errors import BudgetExceeded, InvalidRequest, NoProviders
from btt.sdk.money import Rate
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
