from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient
from btt.services.ledger import folder as ledger_folder
from btt.services.ledger.books import Terms
from btt.services.ledger.server import LedgerConfig, serve
from kit.economy import Economy


@pytest.fixture
async def economy(tmp_path: Path) -> AsyncIterator[Economy]:
    faucet = PrivateKey.generate()
    root = tmp_path / "economy"
    root.mkdir()
    ledger_folder.init(
        root / "ledger",
        name="test",
        supply_to=faucet.public.address,
        amount=10**15,
        terms=Terms(min_challenge_ms=1000, min_lifetime_ms=10_000),
    )
    async with (
        serve(LedgerConfig(folder=root / "ledger")) as running,
        LedgerClient.connect(running.address) as client,
    ):
        economy = Economy(root, running, client, faucet)
        async with economy.stack:
            yield economy
