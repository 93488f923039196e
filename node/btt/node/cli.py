"""`btt node`: make a node, run it, look at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from btt.node.commands.config import app as config
from btt.node.commands.options import AsJson, Folder
from btt.node.peers import app as peers
from btt.sdk.cli.options import ClockFile, ExportOption, parsed

if TYPE_CHECKING:
    import signal

    from btt.node.folder import NodeFolder

_CUT_S: Final = 15.0

app = typer.Typer(help="Run a node, or look at one.", no_args_is_help=True)
app.add_typer(config, name="config")
app.add_typer(peers, name="peers", hidden=True)  # as `btt peers`


@app.callback()
def _group() -> None:
    """Keeps the commands in a group."""


@app.command()
def init(
    folder: Folder = None,
    ledger: Annotated[
        str, typer.Option(help="Ledger that pays: btt-ledger://…", envvar="BTT_LEDGER", show_default=False)
    ] = "",
    profile: Annotated[
        str, typer.Option(help="home: this machine alone, bounded; server: reachable.", show_default=False)
    ] = "",
    listen: Annotated[
        str,
        typer.Option(
            help="host:port to listen on; port 0 takes a free one.", show_default="as the profile says"
        ),
    ] = "",
    payee: Annotated[
        str | None, typer.Option(help="Account that is paid; one of the node's own by default.")
    ] = None,
    content_price: Annotated[str, typer.Option(help="Price of content.")] = "1 BTT / GiB",
    name: Annotated[str, typer.Option(help="Name of the node, for people.")] = "",
    as_json: AsJson = False,
) -> None:
    """Make a node: keys, certificate and configuration."""
    from btt.node.folder import CONFIG, default_folder
    from btt.node.folder import init as init_folder
    from btt.node.profiles import Profile, tables
    from btt.node.values import is_everywhere
    from btt.sdk.money import Rate, Unit

    if not ledger:
        raise typer.BadParameter("name the ledger that pays the node", param_hint="--ledger")
    if profile and profile not in list(Profile):
        raise typer.BadParameter(f"one of {', '.join(Profile)}", param_hint="--profile")
    if parsed(Rate.parse, content_price, "--content-price").unit is not Unit.BYTE:
        raise typer.BadParameter(
            'content is paid by the byte, such as "1 BTT / GiB"', param_hint="--content-price"
        )
    path = folder or default_folder()
    base = tables(Profile(profile) if profile else None)
    node = {"listen": "127.0.0.1:7800", **base.pop("node", {}), "name": name}
    made = init_folder(
        path,
        config={
            "node": {**node, **({"listen": listen} if listen else {})},
            "ledger": {"address": ledger},
            **({"payments": {"payee": payee}} if payee else {}),
            **base,
            "services": {"content": {"enabled": True, "rate": content_price}},
        },
    )
    if as_json:
        typer.echo(
            json.dumps({"node": str(made.identity.address), "payee": str(made.payee), "folder": str(path)})
        )
        return
    typer.echo(f"Node {made.identity.address}")
    typer.echo(f"Is paid to {made.payee}")
    typer.echo(f"Configured in {path / CONFIG}")
    if is_everywhere(made.config.node.listen) and not made.config.node.advertise:
        at = f" --node {path}" if folder else ""
        typer.echo(f"Say by which host others reach it: btt node config set node.advertise HOST{at}")
    typer.echo(f"Run it: btt node start {path}" if folder else "Run it: btt node start")


@app.command()
def start(
    folder: Folder = None,
    stdin_lifeline: Annotated[bool, typer.Option(help="Stop when standard input ends.")] = False,
    clock: ClockFile = None,
) -> None:
    """Run a node until SIGTERM or SIGINT; prints one JSON line when it is ready."""
    import uvloop

    from btt.node.folder import NodeFolder, default_folder
    from btt.node.logs import configure
    from btt.sdk.memory import keep_freed_memory

    keep_freed_memory()
    opened = NodeFolder.open(folder or default_folder())
    configure(opened.config.log)
    uvloop.run(_start(opened, clock, stdin_lifeline=stdin_lifeline))


async def _start(folder: NodeFolder, clock: Path | None, *, stdin_lifeline: bool) -> None:
    import os
    import sys

    from btt.node.service import serve
    from btt.sdk.clock import SYSTEM, SharedClock

    def ready(address: object) -> None:
        typer.echo(json.dumps({"ready": True, "address": str(address)}))

    shown = SharedClock(clock) if clock else SYSTEM
    if not await serve(folder, ready=ready, clock=shown, stdin_lifeline=stdin_lifeline):
        # Its task would keep the loop, and with it the process, from ending.
        sys.stdout.flush()
        os._exit(0)


@app.command()
def stop(
    folder: Folder = None,
    within: Annotated[str, typer.Option(help="How long it may take.")] = "30s",
    as_json: AsJson = False,
) -> None:
    """Stop a node: running calls get seconds to end; channels stay open for the next start."""
    import signal

    _end(folder, signal.SIGTERM, within, as_json=as_json)


@app.command()
def drain(
    folder: Folder = None,
    within: Annotated[
        str, typer.Option(help="How long paid calls may take; then they are cut.", show_default="for ever")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Take no new work, let paid calls end, close all channels, then stop."""
    import signal

    _end(folder, signal.SIGUSR1, within, as_json=as_json)


def _end(folder: Path | None, number: signal.Signals, within: str, *, as_json: bool) -> None:
    import signal

    from btt.node.commands.options import existing
    from btt.node.editing import signal_node, wait_until_stopped
    from btt.sdk.clock import parse_duration
    from btt.sdk.errors import InternalError

    path = existing(folder)
    try:
        seconds = parse_duration(within) / 1000 if within else None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--within") from None
    was_running = signal_node(path, number)
    ended = wait_until_stopped(path, seconds)
    if not ended and number is signal.SIGUSR1:
        # A second signal cuts what is left.
        signal_node(path, signal.SIGTERM)
        signal_node(path, signal.SIGTERM)
        ended = wait_until_stopped(path, _CUT_S)
    if not ended:
        raise InternalError("The node does not stop.", hint="Look into its log; then kill it.")
    if as_json:
        typer.echo(json.dumps({"was_running": was_running, "running": False}))
        return
    typer.echo("The node has stopped." if was_running else "The node did not run.")


@app.command()
def status(
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Show whether a node runs, what it offers, and what it has served and earned."""
    import asyncio

    from btt.node.folder import default_folder
    from btt.node.status import read_status

    found = asyncio.run(read_status(folder or default_folder()))
    if as_json:
        typer.echo(json.dumps(found.as_json()))
        return
    for key, value in found.lines():
        typer.echo(f"{key:16} {value}")


@app.command()
def receipts(
    folder: Folder = None,
    export: ExportOption = None,
    as_json: AsJson = False,
) -> None:
    """List what the ledger acknowledged and the best payments, from the node's own files."""
    from btt.node.folder import NodeFolder, default_folder
    from btt.node.status import read_updates
    from btt.sdk.cli.receipts import show_receipts

    path = folder or default_folder()
    opened = NodeFolder.open(path)
    show_receipts(
        path,
        opened.config.ledger.address.ledger_id,
        unshown=read_updates(opened.books),
        export=export,
        as_json=as_json,
    )
