"""`btt service`: what a node offers, for how much, and what it does not."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from btt.node.commands.options import AsJson, FolderOption, change, existing

app = typer.Typer(help="Switch the services of a node on and off, and price them.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Of the service, such as content.")]


@app.command("list")
def show(folder: FolderOption = None, as_json: AsJson = False) -> None:
    """List all that are installed: on or off, state, price, and who made them."""
    from btt.node.config import load
    from btt.node.folder import CONFIG
    from btt.node.inventory import inventory

    path = existing(folder)
    rows = inventory(path, load(path / CONFIG))
    if as_json:
        typer.echo(json.dumps({"services": rows}))
        return
    for row in rows:
        words = [row["name"], "on" if row["enabled"] else "off", row["state"], *row["prices"]]
        typer.echo("  ".join([*words, f"({row['package']} {row['version']})", row["reason"]]).rstrip())


@app.command()
def enable(name: Name, folder: FolderOption = None, as_json: AsJson = False) -> None:
    """Switch a service on; a running node starts it at once."""
    _known(name)
    change(folder, {f"services.{name}.enabled": True}, as_json=as_json)


@app.command()
def disable(
    name: Annotated[str, typer.Argument(help="Of the service.", show_default=False)] = "",
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    folder: FolderOption = None,
    as_json: AsJson = False,
) -> None:
    """Switch a service off, or all: calls that run may end, new ones are refused."""
    from btt.node.config import load
    from btt.node.folder import CONFIG

    if bool(name) == everything:
        raise typer.BadParameter("name one service, or --all", param_hint="NAME")
    configured = list(load(existing(folder) / CONFIG).services)
    if name and name not in configured:
        _known(name)
    names = [name] if name else configured
    change(folder, {f"services.{each}.enabled": False for each in names}, as_json=as_json)


@app.command()
def price(
    name: Name,
    rate: Annotated[str, typer.Argument(help='Such as "1 BTT / GiB".')],
    key: Annotated[str, typer.Option(help="Which price, if the service has several.")] = "rate",
    folder: FolderOption = None,
    as_json: AsJson = False,
) -> None:
    """Ask another price: a running node makes a new offer; who has a quote keeps it until it ends."""
    from btt.sdk.money import Rate

    try:
        Rate.parse(rate)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="RATE") from None
    _known(name)
    change(folder, {f"services.{name}.{key}": rate}, as_json=as_json)


def _known(name: str) -> None:
    from btt.node.registry import installed
    from btt.sdk.errors import ConfigError
    from btt.sdk.plugin import did_you_mean

    names = list(installed())
    if name not in names:
        raise ConfigError(f'No service "{name}" is installed.', hint=did_you_mean(name, names))
