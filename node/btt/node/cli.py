"""`btt node`: make a node, run it, look at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from btt.node.peers import app as peers
from btt.sdk.cli.options import AsJson, ClockFile, ExportOption

if TYPE_CHECKING:
    from btt.node.folder import NodeFolder

app = typer.Typer(help="Run a node, or look at one.", no_args_is_help=True)
app.add_typer(peers, name="peers")

Folder = Annotated[
    Path | None, typer.Argument(help="Folder of the node.", envvar="BTT_NODE_DIR", show_default=False)
]


@app.callback()
def _group() -> None:
    """Keeps the commands in a group."""


@app.command()
def init(
    folder: Folder = None,
    ledger: Annotated[
        str, typer.Option(help="Ledger that pays: btt-ledger://…", envvar="BTT_LEDGER", show_default=False)
    ] = "",
    listen: Annotated[
        str, typer.Option(help="host:port to listen on; port 0 takes a free one.")
    ] = "127.0.0.1:7800",
    payee: Annotated[
        str | None, typer.Option(help="Account that is paid; one of the node's own by default.")
    ] = None,
    content_price: Annotated[str, typer.Option(help="Price of content.")] = "1 BTT / GiB",
    name: Annotated[str, typer.Option(help="Name of the node, for people.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a node: keys, certificate and configuration."""
    from btt.node.folder import CONFIG, default_folder
    from btt.node.folder import init as init_folder

    if not ledger:
        raise typer.BadParameter("name the ledger that pays the node", param_hint="--ledger")
    path = folder or default_folder()
    made = init_folder(
        path,
        config={
            "node": {"listen": listen, "name": name},
            "ledger": {"address": ledger},
            **({"payments": {"payee": payee}} if payee else {}),
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
    from btt.sdk.memory import keep_freed_memory

    keep_freed_memory()
    opened = NodeFolder.open(folder or default_folder())
    _log_to_stderr()
    uvloop.run(_start(opened, clock, stdin_lifeline=stdin_lifeline))


async def _start(folder: NodeFolder, clock: Path | None, *, stdin_lifeline: bool) -> None:
    from btt.node.service import serve
    from btt.sdk.clock import SYSTEM, SharedClock

    def ready(address: object) -> None:
        typer.echo(json.dumps({"ready": True, "address": str(address)}))

    shown = SharedClock(clock) if clock else SYSTEM
    await serve(folder, ready=ready, clock=shown, stdin_lifeline=stdin_lifeline)


def _log_to_stderr() -> None:
    import sys

    import structlog

    # Standard output carries the ready line alone.
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


@app.command()
def status(
    folder: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
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
