"""`btt content`: publish content, ask what it costs, fetch it and pay piece by piece."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btt.sdk.cli import render
from btt.sdk.cli.commands import Commands
from btt.sdk.cli.options import (
    AsJson,
    LedgerOption,
    NodeOption,
    TrustNew,
    WalletFolder,
    Yes,
    open_wallet,
    parsed,
    wallet_folder,
)
from btt.sdk.errors import ConfigError
from btt.sdk.memory import keep_freed_memory
from btt.sdk.money import Amount

if TYPE_CHECKING:
    from btt.sdk.client import Client
    from btt.sdk.content.client import Quote
    from btt.sdk.content.transfer import TransferReceipt

app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Publish content, ask what it costs, fetch it and pay for it."
)

Content = Annotated[str, typer.Argument(metavar="INFOHASH", help="64 hex digits, or a magnet link.")]


def _client(*, node: str, ledger: str, wallet: Path | None, budget: Amount, trust_new: bool) -> Client:
    from btt.sdk.budget import Budget
    from btt.sdk.client import Client, Wallet
    from btt.sdk.identity import NodeAddress
    from btt.sdk.ledger import LedgerAddress

    # BTT_NODES may name several; until there is discovery, the first one serves.
    node = node.split(",")[0].strip()
    parsed(NodeAddress.parse, node, "--node-address")
    parsed(LedgerAddress.parse, ledger, "--ledger")
    folder = wallet_folder(wallet)
    return Client.connect(
        node,
        ledger=ledger,
        wallet=Wallet(folder, open_wallet(folder).key()),
        budget=Budget(budget),
        trust_new=trust_new,
    )


def _check_content(text: str) -> bytes:
    from btt.sdk.content.magnet import parse_infohash

    return parsed(parse_infohash, text, "INFOHASH")


def _quote_json(quote: Quote) -> dict[str, Any]:
    return {
        "infohash": quote.torrent.infohash.hex(),
        "name": quote.name,
        "files": len(quote.torrent.files),
        "total_bytes": quote.total_bytes,
        "rate": str(quote.rate),
        "cost": str(int(quote.cost)),
        "node": str(quote.node),
    }


def _show_quote(quote: Quote) -> None:
    count = len(quote.torrent.files)
    typer.echo(f"Name   {render.printable(quote.name)}")
    typer.echo(f"Size   {render.size(quote.total_bytes)} in {count} file{'s' if count != 1 else ''}")
    typer.echo(f"Price  {quote.rate}")
    typer.echo(f"Cost   {quote.cost}")
    typer.echo(f"Node   {quote.node}")


@app.command()
def quote(
    infohash: Content,
    node_address: NodeOption,
    ledger: LedgerOption,
    wallet: WalletFolder = None,
    trust_new: TrustNew = False,
    as_json: AsJson = False,
) -> None:
    """Show what some content costs; asking is free."""
    content = _check_content(infohash)

    async def ask() -> Quote:
        client = _client(
            node=node_address, ledger=ledger, wallet=wallet, budget=Amount(0), trust_new=trust_new
        )
        async with client as btt:
            return await btt.content.quote(content)

    found = asyncio.run(ask())
    if as_json:
        typer.echo(json.dumps(_quote_json(found)))
        return
    _show_quote(found)


@app.command()
def fetch(
    infohash: Content,
    node_address: NodeOption,
    ledger: LedgerOption,
    budget: Annotated[str, typer.Option(help='The most it may cost, such as "5 BTT".')],
    dest: Annotated[Path, typer.Option(help="Folder to put it in.")] = Path(),
    wallet: WalletFolder = None,
    yes: Yes = False,
    trust_new: TrustNew = False,
    as_json: AsJson = False,
) -> None:
    """Fetch content, verify it and pay for it; run it again to resume."""
    keep_freed_memory()
    content = _check_content(infohash)
    granted = parsed(Amount.parse, budget, "--budget")
    client = _client(node=node_address, ledger=ledger, wallet=wallet, budget=granted, trust_new=trust_new)
    found = asyncio.run(_fetch(client, content, dest, granted, ask=not (yes or as_json), quiet=as_json))
    if found is None:
        typer.echo("Nothing was spent.")
        raise typer.Exit(1)
    receipt, paid, channels = found
    if as_json:
        result = {
            "infohash": receipt.infohash.hex(),
            "path": str(receipt.path),
            "total_bytes": receipt.total_bytes,
            "fetched_bytes": receipt.fetched_bytes,
            "paid": str(int(paid)),
            "node": str(receipt.node),
            "channels": channels,
        }
        typer.echo(json.dumps(result))
        return
    typer.echo(f"Saved  {render.printable(str(receipt.path))}, verified")
    typer.echo(f"Paid   {paid} for {render.size(receipt.fetched_bytes)}")
    for channel in channels:
        typer.echo(f"Closed channel {channel}; the signed receipt is in the wallet")


async def _fetch(
    client: Client, content: bytes, dest: Path, granted: Amount, *, ask: bool, quiet: bool
) -> tuple[TransferReceipt, Amount, list[str]] | None:
    async with client as btt:
        found = await btt.content.quote(content)
        if not quiet:
            _show_quote(found)
            if found.cost > granted:
                typer.echo(f"The budget of {granted} covers a part of it; what arrives is kept.")
        if ask and not _agreed(min(found.cost, granted)):
            return None
        with render.showing(live=not quiet and render.is_terminal()) as show:
            async with btt.content.fetch(found, dest) as transfer:
                async for step in transfer.progress():
                    if not quiet:
                        show(step)
    assert transfer.receipt is not None
    closed = [receipt.channel_id.hex() for receipt in btt.receipts if receipt.channel_closed]
    return transfer.receipt, transfer.receipt.spent, closed


def _agreed(cost: Amount) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("There is no terminal to ask on whether to spend.", hint="Say --yes.")
    return bool(typer.confirm(f"Spend up to {cost}?"))
