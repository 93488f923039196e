"""`btt node config`: check, show and change the configuration of a node."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from btt.node.commands.options import AsJson, FolderOption, change, existing

app = typer.Typer(help="Check, show and change the configuration of a node.", no_args_is_help=True)


@app.command()
def check(folder: FolderOption = None, as_json: AsJson = False) -> None:
    """Say whether the configuration does: the file, the environment, and the services' own keys."""
    from btt.node.checking import check_services
    from btt.node.config import load
    from btt.node.folder import CONFIG

    path = existing(folder)
    names = check_services(load(path / CONFIG))
    if as_json:
        typer.echo(json.dumps({"ok": True, "services": names}))
        return
    typer.echo(f"{path / CONFIG} does. Services that are on: {', '.join(names) or 'none'}.")


@app.command()
def show(
    folder: FolderOption = None,
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value comes from.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show every key with its value; a star marks what is read only when the node starts."""
    from btt.node.shown import shown

    found = shown(existing(folder))
    if as_json:
        rows = [
            {"key": one.key, "value": one.value, "origin": one.origin, "needs_restart": one.restart}
            for one in found
        ]
        typer.echo(json.dumps({"config": rows}, default=str))
        return
    for one in found:
        value = json.dumps(one.value, ensure_ascii=False, default=str)
        line = f"{one.key}{'*' if one.restart else ''} = {value}"
        typer.echo(f"{line}  ({one.origin})" if origin else line)


@app.command("set")
def set_(
    key: Annotated[str, typer.Argument(help='Such as "payments.grace".')],
    value: Annotated[str, typer.Argument(help='Such as "30s", 64 or true; "" removes a limit.')],
    folder: FolderOption = None,
    as_json: AsJson = False,
) -> None:
    """Change one key; comments stay, a running node takes it at once if it can."""
    from btt.node.editing import parse_value

    change(folder, {key: parse_value(value)}, as_json=as_json)


@app.command()
def unset(
    key: Annotated[str, typer.Argument(help='Such as "payments.grace".')],
    folder: FolderOption = None,
    as_json: AsJson = False,
) -> None:
    """Remove one key, so that its default holds."""
    from btt.node.shown import check_key

    check_key(existing(folder), key)
    change(folder, {key: None}, as_json=as_json)
