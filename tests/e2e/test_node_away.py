"""A node's process is away for almost an hour, and its payer asks for everything back meanwhile."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from btt.proto.ledger.v1 import ledger_pb2
from btt.sdk.budget import Budget
from btt.sdk.client import Client
from btt.sdk.ledger import LedgerAddress, LedgerClient
from btt.sdk.testing import Devnet


async def test_a_node_that_was_away_for_an_hour_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "film.bin").write_bytes(os.urandom(3 << 20))
    (tmp_path / "out").mkdir()
    async with Devnet() as net:
        infohash = await net.publish(tmp_path / "film.bin")
        wallet = await net.wallet()
        client = Client.connect(
            net.node_addresses[0],
            ledger=net.ledger_address,
            wallet=wallet,
            budget=Budget("1 BTT"),
            clock=net.clock,
            keep_channels=True,
        )
        async with client as btt, btt.content.fetch(infohash, tmp_path / "out"):
            pass
        [receipt] = client.receipts
        await net.kill_node(0)
        async with LedgerClient.connect(LedgerAddress.parse(net.ledger_address)) as ledger:
            await ledger.request_close(receipt.channel_id, wallet.account)
            net.advance("59m")
            state = await ledger.channel(receipt.channel_id, wallet.account)
            assert (state.phase, state.captured) == (ledger_pb2.CHANNEL_PHASE_CLOSING, 0)
            await net.start_node(0)
            async with asyncio.timeout(60):
                async for _ in ledger.watch(wallet.account, channel_id=receipt.channel_id):
                    state = await ledger.channel(receipt.channel_id, wallet.account)
                    if state.phase == ledger_pb2.CHANNEL_PHASE_CLOSED:
                        break
        assert state.captured == receipt.owed > 0
