"""`btt content`: publish content, ask what it costs, fetch it and pay piece by piece."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
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
    confirmed,
    open_wallet,
    parsed,
    wallet_folder,
)
from btt.sdk.errors import Banned, BttError, NodeBanned, StorageError
from btt.sdk.memory import keep_freed_memory
from btt.sdk.money import Amount

if TYPE_CHECKING:
    from btt.sdk.client import Client
    from btt.sdk.content.client import Quote
    from btt.sdk.content.resuming import ResumeToken
    from btt.sdk.content.torrent import Torrent
    from btt.sdk.content.transfer import Transfer, TransferReceipt

app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Publish content, ask what it costs, fetch it and pay for it."
)

Content = Annotated[str, typer.Argument(metavar="INFOHASH", help="64 hex digits, or a magnet link.")]


def make_client(
    *, nodes: str, ledger: str, wallet: Path | None, budget: Amount, trust_new: bool = False
) -> Client:
    """Makes a client from what the user typed.

    Args:
        nodes: Addresses, separated by commas.
        ledger: Its address.
        wallet: The wallet's folder; the user's own if not given.
        budget: What may be spent.
        trust_new: Accept a bare `host:port` that was never met before.
    """
    from btt.sdk.budget import Budget
    from btt.sdk.client import Client, Wallet
    from btt.sdk.identity import NodeAddress
    from btt.sdk.ledger import LedgerAddress

    parsed(NodeAddress.parse_all, nodes, "--from")
    parsed(LedgerAddress.parse, ledger, "--ledger")
    folder = wallet_folder(wallet)
    return Client.connect(
        nodes,
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
        "nodes": [{"node": str(node.node), "rate": str(node.rate)} for node in quote.nodes],
        "rejections": render.rejections(quote.rejections),
    }


def _show_quote(quote: Quote) -> None:
    count = len(quote.torrent.files)
    typer.echo(f"Name   {render.printable(quote.name)}")
    typer.echo(f"Size   {render.size(quote.total_bytes)} in {count} file{'s' if count != 1 else ''}")
    many = len(quote.nodes) > 1
    typer.echo(f"Price  {'up to ' if many else ''}{quote.rate}")
    typer.echo(f"Cost   {'up to ' if many else ''}{quote.cost}")
    for node in quote.nodes:
        typer.echo(f"Node   {node.node}" + (f", {node.rate}" if many else ""))
    for rejection in quote.rejections:
        typer.echo(f"Not    {rejection.node}, {rejection.cause}: {render.printable(rejection.detail)}")


@app.command()
def quote(
    infohash: Content,
    sellers: NodeOption,
    ledger: LedgerOption,
    wallet: WalletFolder = None,
    trust_new: TrustNew = False,
    as_json: AsJson = False,
) -> None:
    """Show what some content costs; asking is free."""
    content = _check_content(infohash)

    async def ask() -> Quote:
        client = make_client(
            nodes=sellers, ledger=ledger, wallet=wallet, budget=Amount(0), trust_new=trust_new
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
    ctx: typer.Context,
    ledger: LedgerOption,
    budget: Annotated[str, typer.Option(help='The most it may cost, such as "5 BTT".')],
    infohash: Annotated[
        str, typer.Argument(metavar="[INFOHASH]", help="64 hex digits, or a magnet link.", show_default=False)
    ] = "",
    sellers: NodeOption = "",
    resume: Annotated[
        str,
        typer.Option(
            metavar="TOKEN",
            help="Go on with a fetch that broke off, from its nodes and at its price; instead of INFOHASH.",
            show_default=False,
        ),
    ] = "",
    dest: Annotated[Path, typer.Option(help="Folder to put it in.")] = Path(),
    wallet: WalletFolder = None,
    yes: Yes = False,
    trust_new: TrustNew = False,
    as_json: AsJson = False,
) -> None:
    """Fetch content, verify it and pay for it; run it again to resume."""
    from btt.sdk.content.resuming import ResumeToken

    keep_freed_memory()
    if bool(infohash) == bool(resume):
        raise typer.BadParameter("Give one of them: INFOHASH, or --resume TOKEN.")
    token = parsed(ResumeToken.parse, resume, "--resume") if resume else None
    content = token.infohash if token is not None else _check_content(infohash)
    nodes = sellers or ",".join(map(str, token.nodes) if token is not None else ())
    if not nodes:
        raise typer.BadParameter("Name a node, or set BTT_NODES.", param_hint="--from")
    granted = parsed(Amount.parse, budget, "--budget")
    client = make_client(nodes=nodes, ledger=ledger, wallet=wallet, budget=granted, trust_new=trust_new)
    begun: list[Transfer] = []
    work = buy(
        client,
        content,
        dest,
        granted,
        ask=not yes,
        quiet=as_json,
        token=token,
        begun=begun.append,
    )
    again = {
        **_given(ctx, sellers="--from", ledger="--ledger", wallet="--wallet"),
        "--dest": str(dest),
        "--budget": str(granted),
    }
    found = bring(work, begun, again=again if granted else None, as_json=as_json)
    if found is None:
        typer.echo("Nothing was spent.")
        raise typer.Exit(1)
    if as_json:
        typer.echo(json.dumps(found.as_json()))
        return
    found.show()


def _given(ctx: typer.Context, **options: str) -> dict[str, str]:
    """Returns those options that were typed, and did not come from the environment, with their values."""
    typed = {name for name in options if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    return {option: str(ctx.params[name]) for name, option in options.items() if name in typed}


def bring(
    work: Coroutine[Any, Any, Bought | None],
    begun: list[Transfer],
    *,
    again: dict[str, str] | None = None,
    as_json: bool,
) -> Bought | None:
    """Runs what `buy` made; when it breaks off, tells what arrived and was paid.

    Args:
        work: The purchase.
        begun: Holds the transfer once it has begun.
        again: Options of the fetch that goes on; None if none can.
        as_json: Tell a script.
    """
    from btt.sdk.cli.failures import report

    try:
        return asyncio.run(work)
    except (BttError, KeyboardInterrupt) as error:
        if not begun:
            raise
        transfer = begun[0]
        fetched, spent = sum(part.fetched_bytes for part in transfer.parts()), transfer.state().spent
        typer.echo(f"Paid   {spent} for {render.size(fetched)}", err=True)
        if again is not None and _helps(error, fetched):
            words = ("--resume", str(transfer.token), *(word for pair in again.items() for word in pair))
            typer.echo(f"To go on: btt content fetch {shlex.join(words)}", err=True)
        told = {"paid": str(int(spent)), "fetched_bytes": fetched, "resume": str(transfer.token)}
        if isinstance(error, BttError):
            raise typer.Exit(report(error, as_json=as_json, more=told)) from None
        if as_json:
            found = {
                "reason": "INTERRUPTED",
                "message": "It was interrupted.",
                "hint": "Run it again.",
                **told,
            }
            typer.echo(json.dumps({"error": found}))
        raise


def _helps(error: BaseException, fetched: int) -> bool:
    """Tells whether the same words again may bring more than these did."""
    if not isinstance(error, BttError):
        return True
    hopeless = isinstance(error, Banned | NodeBanned) or (isinstance(error, StorageError) and not fetched)
    return not hopeless and (fetched > 0 or error.retryable)


@dataclass(frozen=True, slots=True)
class Bought:
    """What a fetch brought and cost.

    Attributes:
        torrent: What was fetched.
        receipt: Of the transfer.
        channels: Those that were closed, hex.
        unsettled: Nodes that did not answer in the end, and why.
    """

    torrent: Torrent
    receipt: TransferReceipt
    channels: list[str]
    unsettled: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Returns it for machines."""
        return {
            "infohash": self.receipt.infohash.hex(),
            "path": str(self.receipt.path),
            "total_bytes": self.receipt.total_bytes,
            "fetched_bytes": self.receipt.fetched_bytes,
            "paid": str(int(self.receipt.spent)),
            "nodes": [
                {"node": str(part.node), "bytes": part.fetched_bytes, "paid": str(int(part.spent))}
                for part in self.receipt.parts
            ],
            "channels": self.channels,
            "unsettled": self.unsettled,
        }

    def show(self) -> None:
        """Tells a person."""
        receipt = self.receipt
        typer.echo(f"Saved  {render.printable(str(receipt.path))}, verified")
        typer.echo(f"Paid   {receipt.spent} for {render.size(receipt.fetched_bytes)}")
        for part in receipt.parts if len(receipt.parts) > 1 else ():
            typer.echo(f"Node   {part.node}: {render.size(part.fetched_bytes)} for {part.spent}")
        for channel in self.channels:
            typer.echo(f"Closed channel {channel}; the signed receipt is in the wallet")
        for node, why in self.unsettled.items():
            typer.echo(f"Open   {node} did not close its channel: {render.printable(why)}")


async def buy(
    client: Client,
    content: bytes,
    dest: Path,
    granted: Amount,
    *,
    ask: bool,
    quiet: bool,
    token: ResumeToken | None = None,
    begun: Callable[[Transfer], None] = lambda transfer: None,
) -> Bought | None:
    """Fetches content and pays for it, and tells a person about it meanwhile.

    Args:
        client: Not open yet.
        content: Infohash.
        dest: The folder.
        granted: The client's budget.
        ask: Ask before spending.
        quiet: Say nothing.
        token: Of an earlier fetch of this content, to go on with; it begins anew if not given.
        begun: Told the transfer once it has begun.

    Returns:
        None if the person did not want to spend.
    """
    from btt.sdk.selection import DEFAULT_POLICIES

    async with client as btt:
        policies = token.policies if token is not None else DEFAULT_POLICIES
        found = await btt.content.quote(content, policies=policies)
        if not quiet:
            _show_quote(found)
            if found.cost > granted:
                typer.echo(f"The budget of {granted} covers a part of it; what arrives is kept.")
        if ask and not confirmed(f"Spend up to {min(found.cost, granted)}?"):
            return None
        with render.showing(live=not quiet and render.is_terminal()) as show:
            if token is None:
                going = btt.content.fetch(found, dest)
            else:  # it asks again; the price of now is what the person has seen
                going = btt.content.resume(replace(token, rate=found.rate), dest)
            async with going as transfer:
                begun(transfer)
                async for step in transfer.progress():
                    if not quiet:
                        show(step)
    assert transfer.receipt is not None
    return Bought(
        torrent=found.torrent,
        receipt=transfer.receipt,
        channels=[receipt.channel_id.hex() for receipt in client.receipts if receipt.channel_closed],
        unsettled={str(node): error.message for node, error in client.unsettled.items()},
    )
