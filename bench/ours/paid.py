"""The product: a dApp fetches from a node over the SDK, and pays.

Ledger and node are those of a devnet, in processes of their own. The client is a process
too: it takes its wallet, or makes one that nobody has seen before, quotes, and waits. What is timed is
the fetch from its first line, which opens channel and session, to the file under its name
and every base unit paid and settled. CPU time is counted longer, up to the closed channel.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.harness import Run, measure
from bench.processes import Child, Watched, heard, say
from btt.sdk.budget import Budget
from btt.sdk.client import Client, Wallet
from btt.sdk.keys import PrivateKey
from btt.sdk.memory import keep_freed_memory

BUDGET = "50 BTT"


def _wallet(folder: Path) -> Wallet:
    folder.mkdir(exist_ok=True)
    secret = folder / "secret"
    if not secret.exists():
        secret.write_bytes(PrivateKey.generate().secret)
    return Wallet(folder, PrivateKey(secret.read_bytes()))


async def _fetch(nodes: str, ledger: str, infohash: str, folder: Path, wallet: Wallet) -> None:
    say("account", address=str(wallet.account.address))
    await asyncio.to_thread(heard)
    client = Client.connect(nodes, ledger=ledger, wallet=wallet, budget=Budget(BUDGET))
    async with client as btt:
        quote = await btt.content.quote(infohash)
        say("ready")
        await asyncio.to_thread(heard)
        start = time.perf_counter()
        async with btt.content.fetch(quote, folder) as transfer:
            async for _ in transfer.progress():
                pass
        written = time.perf_counter() - start
        await asyncio.gather(*(p.live.settle() for p in btt.providers if p.live is not None))
        seconds = time.perf_counter() - start
    receipt = transfer.receipt
    assert receipt is not None
    captured = sum(closed.captured for closed in client.receipts)
    # What a slow node had on its way when its last runs moved may cost a prepaid one.
    most = (len(client.receipts) - 1) * quote.rate.owed(1 << 20)
    if not (
        all(closed.counts_agree and closed.channel_closed for closed in client.receipts)
        and receipt.spent <= captured <= receipt.spent + most
    ):
        raise RuntimeError("the books of node and client differ")
    say("done", seconds=seconds, bytes=receipt.fetched_bytes, before_settled=written, paid=captured)
    await asyncio.to_thread(heard)


def contestant(
    source: Path,
    folder: Path,
    *,
    nodes: Sequence[str],
    ledger: str,
    infohash: str,
    fund: Callable[[str], None],
    servers: Sequence[tuple[str, int]],
    wallet: Path,
) -> Run:
    """Lets a client fetch the file from nodes.

    Args:
        source: The file that the nodes sell.
        folder: The client's, on the same file system.
        nodes: Addresses of those that sell it.
        ledger: The ledger's address.
        infohash: Of the file, hex.
        fund: Gives an account money.
        servers: Role and process id of each node and the ledger.
        wallet: Folder of its wallet, which is made if it is missing.
    """
    watched = [Watched(role, pid) for role, pid in servers]
    try:
        arguments = [",".join(nodes), ledger, infohash, str(folder), str(wallet)]
        with Child("client", "bench.ours.paid", arguments) as client:
            fund(client.expect("account")["address"])
            client.tell("funded")
            client.expect("ready")
            return measure(client, *watched, source=source, folder=folder)
    finally:
        for process in watched:
            process.__exit__(None, None, None)


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("nodes")
    parser.add_argument("ledger")
    parser.add_argument("infohash")
    parser.add_argument("folder", type=Path)
    parser.add_argument("wallet", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    wallet = _wallet(arguments.wallet)
    asyncio.run(_fetch(arguments.nodes, arguments.ledger, arguments.infohash, arguments.folder, wallet))


if __name__ == "__main__":
    _main()
