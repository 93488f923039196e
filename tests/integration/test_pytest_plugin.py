"""The fixtures that the SDK brings to everybody's tests; here they run in a pytest of a stranger."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

pytest.importorskip("libtorrent", reason="the node's parts are not installed")

from btt.sdk.testing import Devnet
from btt.sdk.wallet import Keystore

TESTS = """
import pytest
from btt.sdk.money import Rate

@pytest.fixture
def devnet_options():
    return {"content_price": "3 BTT / GiB"}

async def test_devnet(devnet):
    assert devnet.content_rate == Rate.parse("3 BTT / GiB")
    async with await devnet.client("1 BTT") as btt:
        assert await btt.node()

async def test_network(network):
    async with await network.client("1 BTT") as btt:
        session = await btt.session(1000)
        print("PAID", session.offer.node, "FROM", btt._wallet.account.address)
"""

INI = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
filterwarnings = error
"""


def run(folder, *words, **environment):
    (folder / "test_dapp.py").write_text(TESTS)
    (folder / "pytest.ini").write_text(INI)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *words],
        capture_output=True, text=True, cwd=folder, timeout=120, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


async def test_a_stranger_gets_a_devnet_of_its_making_or_a_network_that_stands(tmp_path):
    code, said = await asyncio.to_thread(run, tmp_path)
    assert code == 0, said
    assert "2 passed" in said
    async with Devnet(in_process=True) as net:
        keystore = Keystore.create(tmp_path / "wallet.json", "")
        await net.fund(keystore.key().public.address, "5 BTT")
        code, said = await asyncio.to_thread(
            run, tmp_path, "--btt", net.node_address, "-k", "network",
            BTT_LEDGER=net.ledger_address, BTT_WALLET=str(tmp_path),
        )  # fmt: skip
        assert code == 0, said
        node = net.node_address.removeprefix("btt://").partition("@")[0]
        assert f"PAID {node} FROM {keystore.key().public.address}" in said
