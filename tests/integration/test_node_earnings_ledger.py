"""What `btt earnings` says is what the ledger's journal says, to the base unit."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import signal
import sys

import pytest
from typer.testing import CliRunner

from btt.node import folder as node_folder
from btt.node.commands.earnings import app
from btt.node.runtime import Node
from btt.sdk.budget import Budget
from btt.sdk.client import Client
from btt.sdk.errors import ContentUnknown
from btt.sdk.money import Rate
from btt.services.content.catalogue import Catalogue
from btt.services.content.publish import publish
from btt.services.ledger.folder import LedgerFolder
from kit.economy import RUN, content


@pytest.fixture
def folder(economy, tmp_path):
    return node_folder.init(
        tmp_path / "node",
        config={
            "node": {"listen": "127.0.0.1:0"},
            "ledger": {"address": str(economy.running.address)},
            "payments": {"min_challenge": "1s", "min_lifetime": "10s", "close_margin": "1s"},
            "services": {"content": {"enabled": True}},
        },
    )


def earnings(folder, *words, code=0):
    done = CliRunner().invoke(app, [*words, "--node", str(folder.path)])
    assert done.exit_code == code, done.output
    return done.output if code else done.stdout


async def paid_by_the_ledger(economy, account) -> int:
    """Adds up all entries of the journal that concern an account."""
    operator = LedgerFolder.open(economy.root / "ledger").operator_key
    total = 0
    async for page in economy.ledger.entries(operator):
        for entry in page.entries:
            for leg in entry.postings:
                if leg.account[1:] == account.data:
                    total += leg.amount if leg.credit else -leg.amount
    return total


async def test_earnings_are_what_the_ledgers_journal_says(economy, folder, tmp_path):
    sizes = (3 * RUN + 17, RUN + 1, 5)
    infohashes = []
    catalogue = Catalogue(folder.path / "content")
    for number, size in enumerate(sizes):
        (tmp_path / f"film{number}").write_bytes(content(size, number))
        infohashes.append(publish(tmp_path / f"film{number}", catalogue).infohash)
    catalogue.close()
    wallets = [await economy.wallet() for _ in range(2)]
    async with Node(folder, clock=economy.clock) as node:
        for wallet, fetched in zip(wallets, (infohashes[:2], infohashes[2:]), strict=True):
            async with Client.connect(
                str(node.address), budget=Budget("5 BTT"), ledger=str(economy.running.address),
                wallet=wallet, clock=economy.clock,
            ) as btt:  # fmt: skip
                with pytest.raises(ContentUnknown):
                    await btt.content.quote(bytes(32))
                for infohash in fetched:
                    async with btt.content.fetch(infohash, tmp_path / "dest"):
                        pass
        running = json.loads(earnings(folder, "--json"))
    rate = Rate.parse("1 BTT / GiB")
    due = rate.owed(sizes[0] + sizes[1]) + rate.owed(sizes[2])
    assert await paid_by_the_ledger(economy, folder.payee) == due
    for by in ("service", "peer", "app", "day"):
        found = json.loads(earnings(folder, "--by", by, "--json", "--since", "2d"))
        assert found["total"]["settled"] == found["settled_with_receipt"] == str(due)
        assert found["total"]["accrued"] == found["total"]["signed"] == str(due)
        assert {found["total"][name] for name in ("unpaid", "arrears", "written_off")} == {"0"}
        rows = list(csv.DictReader(io.StringIO(earnings(folder, "--by", by, "--csv"))))
        assert [row[by] for row in rows] == [row[by] for row in found["rows"]]
        assert sum(int(row["settled"]) for row in rows) == due
    assert len(json.loads(earnings(folder, "--by", "peer", "--json"))["rows"]) == 2
    assert running["total"] == found["total"], "the same while it runs"
    assert "receipts prove" in earnings(folder)

    why = json.loads(earnings(folder, "why-not", "content", "--json"))
    assert why["served"] >= 6
    assert [(row["reason"], row["calls"]) for row in why["refused"]] == [("CONTENT_UNKNOWN", 2)]
    assert "does not have" in earnings(folder, "why-not")


KILLED = """
import asyncio, os, sys
from pathlib import Path
from btt.sdk import Budget, Client, Wallet
from btt.sdk.keys import PrivateKey

async def main():
    node, ledger, folder, secret, infohash, now = sys.argv[1:]
    wallet = Wallet(Path(folder), PrivateKey(bytes.fromhex(secret)))
    async with Client.connect(
        node, ledger=ledger, wallet=wallet, budget=Budget("5 BTT"), clock=lambda: int(now)
    ) as btt:
        async with btt.content.fetch(bytes.fromhex(infohash), "dest") as transfer:
            async for step in transfer.progress(0.001):
                if step.spent:
                    os.kill(os.getpid(), 9)

asyncio.run(main())
"""


async def test_a_client_that_is_killed_is_no_defect_of_the_node(economy, folder, tmp_path):
    (tmp_path / "film").write_bytes(content(64 * RUN, 1))
    catalogue = Catalogue(folder.path / "content")
    infohash = publish(tmp_path / "film", catalogue).infohash
    catalogue.close()
    wallet = await economy.wallet()
    async with Node(folder, clock=economy.clock) as node:
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", KILLED, str(node.address), str(economy.running.address), str(wallet.folder),
            wallet.account.secret.hex(), infohash.hex(), str(economy.clock()), cwd=tmp_path,
        )  # fmt: skip
        assert await client.wait() == -signal.SIGKILL
    why = json.loads(earnings(folder, "why-not", "--json"))
    assert why["served"] > 0
    assert not {"INTERNAL", "CANCELLED"} & {row["reason"] for row in why["refused"]}


def test_a_node_that_never_ran_has_earned_nothing(economy, folder):
    assert json.loads(earnings(folder, "--json"))["rows"] == []
    assert "Nobody called" in earnings(folder, "why-not")
    assert "Nobody called" in earnings(folder, "why-not", "content")
    assert '"content"' in earnings(folder, "why-not", "contnt", code=2)
