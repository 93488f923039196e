"""`btt devnet`: a ledger, nodes and a funded wallet on this machine, for trials."""

from __future__ import annotations

import asyncio
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from btt.sdk.cli.options import AsJson, parsed

if TYPE_CHECKING:
    from btt.sdk.testing.standing import StandingDevnet

app = typer.Typer(help="Run a whole network on this machine, for trials.", no_args_is_help=True)

Folder = Annotated[
    Path | None,
    typer.Option("--dir", envvar="BTT_DEVNET", help="Folder of the devnet.", show_default="your own"),
]


@app.callback()
def _group() -> None:
    """Keeps the commands in a group."""


@app.command()
def up(
    nodes: Annotated[
        int | None,
        typer.Option(min=1, max=20, help="How many nodes.", show_default="those that there are, or one"),
    ] = None,
    service: Annotated[
        list[str] | None,
        typer.Option(help="Installed service that the nodes offer too; may be repeated."),
    ] = None,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Start a devnet that lives until `btt devnet down`; what crashed is started again."""
    devnet = _devnet(folder)
    asyncio.run(devnet.up(nodes=nodes, services=service or []))
    if as_json:
        _print_json(devnet)
        return
    for name, value in devnet.environment().items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@app.command()
def status(folder: Folder = None, as_json: AsJson = False) -> None:
    """Show what runs, what has crashed, the time of the devnet, and how dApps find it."""
    from btt.sdk.cli.render import duration

    devnet = _devnet(folder)
    if as_json:
        _print_json(devnet)
        return
    for part in devnet.parts():
        state = "running" if part.running else "stopped" if part.stopped else "CRASHED"
        typer.echo(f"{part.name:8} {state}  {part.address}")
        if state == "CRASHED":
            typer.echo(f"{'':8} {part.last_words}")
    typer.echo(f"{'clock':8} {duration(devnet.clock.offset_ms / 1000)} ahead of this machine")
    for name, value in devnet.environment().items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@app.command()
def advance(
    by: Annotated[str, typer.Argument(help='How far, such as "90s", "12h" or "30d".')],
    folder: Folder = None,
) -> None:
    """Move the time of the whole devnet ahead."""
    from btt.sdk.clock import parse_duration

    clock = _devnet(folder).clock
    parsed(lambda text: clock.advance(parse_duration(text)), by, "BY")


@app.command()
def faucet(
    address: Annotated[str, typer.Argument(help="Account that gets money: T…")],
    amount: Annotated[str, typer.Argument(help='How much, such as "5 BTT".')],
    folder: Folder = None,
) -> None:
    """Give an account money of the devnet."""
    from btt.sdk.keys import Address
    from btt.sdk.money import Amount

    to, value = parsed(Address.parse, address, "ADDRESS"), parsed(Amount.parse, amount, "AMOUNT")
    asyncio.run(_devnet(folder).fund(to, value))
    typer.echo(f"{to} got {value}.")


@app.command()
def down(folder: Folder = None) -> None:
    """End all processes of a devnet and remove its folder."""
    _devnet(folder).down()


def _devnet(folder: Path | None) -> StandingDevnet:
    from platformdirs import user_data_path

    from btt.sdk.testing.standing import StandingDevnet

    return StandingDevnet((folder or user_data_path("btt") / "devnet").absolute())


def _print_json(devnet: StandingDevnet) -> None:
    from btt.sdk.testing.standing import as_json

    typer.echo(json.dumps(as_json(devnet)))
