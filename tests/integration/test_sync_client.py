"""SyncClient from code without an event loop, against a node in other processes."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

pytest.importorskip("libtorrent", reason="the node's parts are not installed")

from btt.sdk import Budget, SyncClient
from btt.sdk.errors import BudgetExceeded, ConfigError, ContentUnknown
from btt.sdk.money import Unit
from btt.sdk.testing import Devnet
from kit.probe import CALL_PRICES, Calls, pb, rpc


class CallsPlugin:
    name = "calls"

    def __init__(self, context):
        pass

    async def start(self):
        pass

    def register(self, server):
        rpc.add_CallsServiceServicer_to_server(Calls(), server)

    def prices(self):
        return CALL_PRICES

    async def stop(self):
        pass


async def test_a_plain_script_quotes_fetches_calls_and_keeps_receipts(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "film").write_bytes(data)
    async with Devnet(in_process=True, plugins={"calls": CallsPlugin}, services={"calls": {}}) as net:
        infohash = await net.publish(tmp_path / "film")
        wallet = await net.wallet("10 BTT")
        threads = threading.active_count()

        def script() -> None:
            client = SyncClient.connect(
                net.node_address, ledger=net.ledger_address, wallet=wallet, budget=Budget("1 BTT")
            )
            with pytest.raises(ConfigError, match="not open"):
                client.content.quote(infohash)
            with client as btt:
                quote = btt.content.quote(infohash)
                assert quote.total_bytes == len(data)
                with btt.content.fetch(quote, tmp_path / "got") as transfer:
                    steps = list(transfer.progress(0.01))
                assert steps[-1].done_bytes == len(data)
                assert transfer.receipt is not None
                assert transfer.receipt.spent == quote.cost
                assert (tmp_path / "got" / "film").read_bytes() == data
                with btt.content.open_stream(quote, tmp_path / "read") as stream:
                    assert stream.seek(-5, os.SEEK_END) == stream.size - 5
                    assert stream.read() == data[-5:]
                with pytest.raises(ContentUnknown):
                    btt.content.quote("ab" * 32)

                service = btt.service(rpc.CallsServiceStub, budget="0.01 BTT")
                assert service.estimate({Unit.CALL: 3}) == 30
                with service as calls:
                    assert calls.Fee(pb.Ask(size=7)).data == bytes(7)
                    assert [len(m.data) for m in calls.FeeMany(pb.Ask(messages=3, size=5))] == [5, 5, 5]
                    for _ in calls.FeeMany(pb.Ask(messages=3, size=5)):
                        break
                    assert calls.Upload(pb.Up(data=bytes(4)) for _ in range(3)).taken == 12
                    assert len(list(calls.Relay(iter([pb.Up(reply=1), pb.Up(reply=1)])))) == 2
                    with service.verdicts() as verdicts:
                        for message in calls.FeeChecked(pb.Ask(messages=2, size=10)):
                            verdicts.accept(message)
                    with pytest.raises(BudgetExceeded):
                        calls.Upload(pb.Up(data=bytes(1 << 20)) for _ in range(99))
                for mine in (LookupError("mine"), StopIteration("mine")):
                    with pytest.raises(type(mine), match="mine"), service:
                        raise mine
                receipt = btt.close_session()
                assert receipt is not None
                assert receipt.counts_agree
                assert btt.receipts == [receipt]

        await asyncio.to_thread(script)
        assert not [thread for thread in threading.enumerate() if thread.name == "btt-sync"]
        assert threads
        assert (await net.ledger_totals()).open_channels == 0
