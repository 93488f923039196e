"""`btt content add|ls|rm`: what a node sells; buy content from other nodes to sell it on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from btt.sdk.cli import render
from btt.sdk.cli.content import Content, bring, buy, make_client
from btt.sdk.cli.options import AsJson, NodeOption, WalletFolder, Yes, parsed
from btt.sdk.content.magnet import parse_infohash
from btt.sdk.errors import ContentUnknown
from btt.sdk.lifeline import follow_stdin
from btt.sdk.memory import keep_freed_memory
from btt.sdk.money import Amount
from btt.services.content.cli import NodeFolder, ledger_of, open_catalogue

if TYPE_CHECKING:
    from btt.sdk.content.transfer import Transfer

add_app = typer.Typer()
ls_app = typer.Typer()
rm_app = typer.Typer()


@add_app.command()
def add(
    infohash: Content,
    sellers: NodeOption,
    budget: Annotated[str, typer.Option(help='The most it may cost, such as "5 BTT".')],
    node: NodeFolder = None,
    ledger: Annotated[
        str | None,
        typer.Option(
            envvar="BTT_LEDGER", help="The ledger: btt-ledger://T…@host:port/…", show_default="the node's"
        ),
    ] = None,
    wallet: WalletFolder = None,
    yes: Yes = False,
    as_json: AsJson = False,
    stdin_lifeline: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Buy content from other nodes, and sell it at this one; run it again to resume."""
    from btt.services.content.stock import enter_bought, place_of

    if stdin_lifeline:
        follow_stdin()
    keep_freed_memory()
    content = parsed(parse_infohash, infohash, "INFOHASH")
    granted = parsed(Amount.parse, budget, "--budget")
    with open_catalogue(node) as catalogue:
        client = make_client(nodes=sellers, ledger=ledger or ledger_of(node), wallet=wallet, budget=granted)
        place = place_of(catalogue, content)
        begun: list[Transfer] = []
        work = buy(client, content, place, granted, ask=not yes, quiet=as_json, begun=begun.append)
        found = bring(work, begun, as_json=as_json)
        if found is None:
            typer.echo("Nothing was spent.")
            raise typer.Exit(1)
        enter_bought(found.torrent, catalogue)
    if as_json:
        typer.echo(json.dumps(found.as_json()))
        return
    found.show()
    typer.echo("On sale at this node from now on")


@ls_app.command()
def ls(node: NodeFolder = None, as_json: AsJson = False) -> None:
    """List what a node sells."""
    with open_catalogue(node) as catalogue:
        entries = catalogue.list()
    if as_json:
        found = [
            {
                "infohash": entry.infohash.hex(),
                "infohash_v1": entry.infohash_v1.hex(),
                "name": entry.name,
                "files": entry.files,
                "total_bytes": entry.total_bytes,
                "source": str(entry.source),
            }
            for entry in entries
        ]
        typer.echo(json.dumps(found))
        return
    for entry in entries:
        name = render.printable(entry.name)
        typer.echo(f"{entry.infohash.hex()}  {render.size(entry.total_bytes):>10}  {name}")


@rm_app.command()
def rm(infohash: Content, node: NodeFolder = None, as_json: AsJson = False) -> None:
    """Sell some content no more; files that were published stay, bought ones are deleted."""
    from btt.services.content.stock import remove

    content = parsed(parse_infohash, infohash, "INFOHASH")
    with open_catalogue(node) as catalogue:
        if not remove(content, catalogue):
            raise ContentUnknown("The node sells no such content.", hint="List it with `btt content ls`.")
    typer.echo(json.dumps({"infohash": content.hex()}) if as_json else "It is on sale no more")
