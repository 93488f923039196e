"""`btt wallet grant` and `grants`: let a program spend some of the wallet's money without the wallet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btt.sdk.cli.channel import channel_fields, moment, with_purse
from btt.sdk.cli.options import (
    AsJson,
    LedgerOption,
    TrustNew,
    WalletFolder,
    Yes,
    confirmed,
    parsed,
)
from btt.sdk.cli.render import printable

if TYPE_CHECKING:
    from btt.sdk.keys import PrivateKey
    from btt.sdk.ledger import LedgerClient
    from btt.sdk.payment.grants import Grant
    from btt.sdk.payment.purse import Purse


def grant(
    app: Annotated[str, typer.Argument(help="What you call the program that gets it.")],
    amount: Annotated[str, typer.Argument(help='The most it may spend, such as "2 BTT".')],
    node: Annotated[
        str, typer.Option("--node", envvar="BTT_NODES", help="Whom it may pay: btt://T…@host:port.")
    ],
    ledger: LedgerOption,
    life: Annotated[str, typer.Option("--for", help="How long, as far as the node agrees.")] = "24h",
    out: Annotated[
        Path | None, typer.Option(help="The file for the program.", show_default="APP.grant")
    ] = None,
    wallet: WalletFolder = None,
    trust_new: TrustNew = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Let a program pay one node up to an amount, and nothing else; it gets a file instead of the wallet."""
    from btt.sdk.clock import parse_duration
    from btt.sdk.identity import NodeAddress
    from btt.sdk.money import Amount
    from btt.sdk.payment.connection import connect_node
    from btt.sdk.payment.granting import make_grant

    nodes = parsed(NodeAddress.parse_all, node, "--node")
    value, life_ms = parsed(Amount.parse, amount, "AMOUNT"), parsed(parse_duration, life, "--for")
    if len(nodes) != 1:
        raise typer.BadParameter("a grant is for one node", param_hint="--node")
    if out is None and "/" in app:
        raise typer.BadParameter("say --out, or choose a name without /", param_hint="APP")
    path = out or Path(f"{app}.grant")
    if not yes and not confirmed(f"Lock {value} for {app}?"):
        raise typer.Exit(1)

    async def make(_: LedgerClient, __: PrivateKey, purse: Purse) -> Grant:
        node = await connect_node(
            nodes[0],
            ledger_id=purse.ledger.ledger_id,
            store=purse.store,
            clock=purse.clock,
            trust_new=trust_new,
        )
        return await make_grant(purse, node, path, app=app, amount=int(value), life_ms=life_ms)

    made = with_purse(ledger, wallet, make)
    if as_json:
        found = {
            "grant": str(path),
            "channel": made.channel_id.hex(),
            "amount": str(int(value)),
            "expires_ms": made.expires_ms,
        }
        typer.echo(json.dumps(found))
        return
    typer.echo(f"Grant   {path}")
    typer.echo(f"Channel {made.channel_id.hex()}, until {moment(made.expires_ms)}")
    typer.echo("Whoever has the file can pay this one node what the channel holds, and do nothing else.")


def grants(ledger: LedgerOption, wallet: WalletFolder = None, as_json: AsJson = False) -> None:
    """List the grants of this wallet and what was paid from them; `btt channel close` takes one back."""
    from btt.sdk.money import Amount
    from btt.sdk.payment.granting import granted

    async def ask(_: LedgerClient, __: PrivateKey, purse: Purse) -> list[dict[str, Any]]:
        return [
            {**channel_fields(one.state), "app": one.app, "paid": str(one.paid)}
            for one in await granted(purse)
        ]

    found = with_purse(ledger, wallet, ask)
    if as_json:
        typer.echo(json.dumps(found))
        return
    if not found:
        typer.echo("No grants.")
    for one in found:
        paid, deposit = Amount(int(one["paid"])), Amount(int(one["deposit"]))
        typer.echo(
            f"{one['channel'][:16]}  {one['phase']:7}  {printable(one['app'])}: {paid} of {deposit} paid to"
            f" {one['payee']}, until {moment(one['expires_ms'])}"
        )
