"""`btt ledger`: make a ledger, run it, look at it."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Run a private ledger, or look at one.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps the commands in a group."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="New folder for keys and books.")],
    name: Annotated[str, typer.Option(help="Name of the ledger, for people.")],
    supply_to: Annotated[
        str | None, typer.Option(help="Address that gets the issue; the operator's by default.")
    ] = None,
    supply: Annotated[str, typer.Option(help="Size of the (unbacked) issue.")] = "990000000000 BTT",
    min_challenge: Annotated[float, typer.Option(help="Shortest challenge window, seconds.")] = 3600,
    max_challenge: Annotated[float, typer.Option(help="Longest challenge window, seconds.")] = 7 * 86400,
    min_lifetime: Annotated[float, typer.Option(help="Shortest life of a channel, seconds.")] = 3600,
    max_lifetime: Annotated[float, typer.Option(help="Longest life of a channel, seconds.")] = 366 * 86400,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a ledger with an issue that nothing backs."""
    from btt.sdk.errors import InvalidRequest
    from btt.sdk.keys import Address
    from btt.sdk.money import Amount
    from btt.services.ledger.books import Terms
    from btt.services.ledger.folder import init as init_folder

    try:
        amount = Amount.parse(supply)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--supply") from None
    windows = [
        round(seconds * 1000) for seconds in (min_challenge, max_challenge, min_lifetime, max_lifetime)
    ]
    if not (0 < windows[0] <= windows[1] < 2**32 and 0 < windows[2] <= windows[3] < 2**53):
        raise typer.BadParameter("challenge and lifetime need 0 < min <= max (challenge: at most 49 days)")
    try:
        receiver = Address.parse(supply_to) if supply_to else None
    except InvalidRequest as error:
        raise typer.BadParameter(error.message, param_hint="--supply-to") from None
    made, identity = init_folder(folder, name=name, supply_to=receiver, amount=amount, terms=Terms(*windows))
    operator = str(made.operator_key.address)
    if as_json:
        found = {"operator": operator, "ledger_id": identity.ledger_id.hex(), "folder": str(folder)}
        typer.echo(json.dumps(found))
        return
    typer.echo(f"Ledger {name} ({identity.ledger_id.hex()})")
    typer.echo(f"Operator {operator}")
    typer.echo(f"Issued {amount} to {receiver or operator}; nothing backs it.")
    typer.echo(f"Run it: btt ledger serve {folder}")


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="Folder of the ledger.")],
    listen: Annotated[str, typer.Option(help="host:port; port 0 takes a free one.")] = "127.0.0.1:0",
    advertise: Annotated[str | None, typer.Option(help="Host in the printed address.")] = None,
    stdin_lifeline: Annotated[bool, typer.Option(help="Stop when standard input ends.")] = False,
) -> None:
    """Run a ledger until SIGTERM or SIGINT; prints one JSON line when it is ready."""
    from btt.services.ledger.server import LedgerConfig

    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise typer.BadParameter("write it like 127.0.0.1:7400", param_hint="--listen")
    config = LedgerConfig(
        folder=folder,
        host=host.removeprefix("[").removesuffix("]"),
        port=int(port),
        advertise_host=advertise,
    )
    asyncio.run(_serve(config, stdin_lifeline=stdin_lifeline))


async def _serve(config: object, *, stdin_lifeline: bool) -> None:
    from btt.sdk.lifeline import set_at_end_of_stdin
    from btt.services.ledger import server

    assert isinstance(config, server.LedgerConfig)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if stdin_lifeline:
        set_at_end_of_stdin(stop)
    async with server.serve(config) as ledger:
        typer.echo(json.dumps({"ready": True, "address": str(ledger.address)}))
        await stop.wait()


@app.command()
def status(
    address: Annotated[str, typer.Argument(help="btt-ledger://… address.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a ledger is, and the sums of its books."""
    from btt.sdk.money import Amount

    found = asyncio.run(_status(address))
    if as_json:
        typer.echo(json.dumps(found))
        return
    for key, value in found.items():
        money = key in ("issued", "accounts", "channels")
        typer.echo(f"{key.replace('_', ' '):17} {Amount(int(str(value))) if money else value}")


async def _status(text: str) -> dict[str, object]:
    from btt.sdk.ledger import LedgerAddress, LedgerClient

    async with LedgerClient.connect(LedgerAddress.parse(text)) as ledger:
        info, totals = await ledger.info(), await ledger.totals()
    return {
        "name": _printable(info.name),
        "ledger_id": info.ledger_id.hex(),
        "operator": str(ledger.address.operator),
        "unbacked": info.unbacked,
        "epoch": info.epoch,
        "time_ms": info.time_ms,
        "head_seq": totals.head_seq,
        "head_hash": info.head_hash.hex(),
        "issued": str(totals.issued),
        "accounts": str(totals.accounts),
        "channels": str(totals.channels),
        "open_channels": totals.open_channels,
        "closed_channels": totals.closed_channels,
        "min_challenge_ms": info.min_challenge_ms,
        "max_challenge_ms": info.max_challenge_ms,
        "min_lifetime_ms": info.min_lifetime_ms,
        "max_lifetime_ms": info.max_lifetime_ms,
    }


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
