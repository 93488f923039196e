"""A dApp fetches real files from a node and pays for them, over real sockets."""

from __future__ import annotations

from kit.economy import RUN, content


async def test_a_file_is_fetched_verified_paid_and_the_channel_closed(economy, tmp_path):
    data = content(5 * RUN + 777)
    node, infohash = await economy.content_node({"film.bin": data})
    wallet = await economy.wallet()
    async with economy.client(node, wallet) as btt:
        quote = await btt.content.quote(infohash["film.bin"])
        assert quote.total_bytes == len(data)
        async with btt.content.fetch(quote, tmp_path / "out") as transfer:
            steps = [step async for step in transfer.progress()]
    assert (tmp_path / "out" / "film.bin").read_bytes() == data
    assert steps[-1].done_bytes == len(data)
    assert steps[-1].rate_bytes_s > 0
    assert transfer.receipt.spent == quote.cost
    [receipt] = btt.receipts
    assert receipt.counts_agree
    assert receipt.channel_closed
    assert receipt.paid == receipt.owed == quote.cost == receipt.captured
    state = await economy.ledger.account(node.payee_key)
    assert state.available == quote.cost
    totals = await economy.ledger.totals()
    assert totals.issued == totals.accounts + totals.channels
    assert (totals.open_channels, totals.closed_channels) == (0, 1)
