"""A devnet inside the process of a test: with the test's clock, and several nodes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("libtorrent", reason="the node's parts are not installed")

from btt.sdk import Budget, Client
from btt.sdk.clock import Clock
from btt.sdk.errors import ConfigError
from btt.sdk.testing import Devnet, FakeClock

HOUR = 3_600_000


async def until_closed(net: Devnet, channels: int) -> None:
    while (await net.ledger_totals()).closed_channels < channels:
        net.advance("30s")  # whoever was busy when time moved sleeps until it moves again


async def test_a_channel_that_is_left_alone_ends_with_its_lock_time(tmp_path: Path) -> None:
    clock = FakeClock()
    (tmp_path / "film").write_bytes(os.urandom(200_000))
    async with Devnet(in_process=True, clock=clock, nodes=2) as net:
        assert net.pids == []
        assert len(set(net.node_addresses)) == 2
        infohash = await net.publish(tmp_path / "film", node=1)
        wallet = await net.wallet("10 BTT")
        async with Client.connect(
            net.node_addresses[1], ledger=net.ledger_address, wallet=wallet, budget=Budget("1 BTT"),
            keep_channels=True, clock=clock,
        ) as btt, btt.content.fetch(infohash, tmp_path / "got") as transfer:  # fmt: skip
            pass
        assert transfer.receipt is not None
        assert (await net.ledger_totals()).open_channels == 1
        net.advance("23h")
        assert (await net.ledger_totals()).open_channels == 1
        net.advance("50m")
        await until_closed(net, 1)
        totals = await net.ledger_totals()
        assert totals.open_channels == 0
        assert totals.is_conserved
        assert int((await net.node_status(1))["captured"]) == transfer.receipt.spent


async def test_processes_and_one_process_are_the_same_network(tmp_path: Path) -> None:
    async with Devnet() as net, await net.client("1 BTT") as btt:
        before = net.clock()
        net.advance("2d")
        ledger = await btt.ledger()
        info = await ledger.info()
        assert info.time_ms >= before + 48 * HOUR, "another process moved with us"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"nodes": 0}, "at least one"),
        ({"clock": FakeClock()}, "in_process"),
        ({"content_price": "x"}, "price"),
    ],
)
def test_what_does_not_do_is_said_at_once(options: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Devnet(**options)  # type: ignore[arg-type]


async def test_a_clock_that_is_not_ours_is_not_moved() -> None:
    async with Devnet(in_process=True, clock=Clock()) as net:
        with pytest.raises(ConfigError, match="cannot be moved"):
            net.advance("1d")
