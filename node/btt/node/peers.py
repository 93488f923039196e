"""`btt peers`: who paid, who failed, who is banned; works while the node runs or not."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btt.sdk.clock import configured

if TYPE_CHECKING:
    from btt.node.payments.bans import Bans
    from btt.node.payments.store import PayeeStore

app = typer.Typer(help="Show the payers of a node; ban and unban them.", no_args_is_help=True)

Folder = Annotated[
    Path | None, typer.Option("--node", help="Folder of the node.", envvar="BTT_NODE_DIR", show_default=False)
]
Peer = Annotated[str, typer.Argument(help="Address of a payer, T…, or an IP address or network.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list")
def show(folder: Folder = None, as_json: AsJson = False) -> None:
    """List those who paid or failed: the banned ones first, then by what they paid."""
    from btt.node.payments.bans import until_text
    from btt.sdk.money import Amount

    async def ask(store: PayeeStore, bans: Bans) -> list[dict[str, Any]]:
        return _rows(await store.payers(), await bans.all(), configured()())

    rows = _with_books(folder, ask)
    if as_json:
        typer.echo(json.dumps({"peers": rows}))
        return
    for row in rows:
        state = f"banned {until_text(row['banned_until_ms'])}" if row["banned"] else "-"
        notes = [f"{row['strikes']} failures"] if row["strikes"] else []
        notes += [row["reason"]] if row["reason"] else []
        typer.echo(f"{row['peer']:34}  paid {Amount(int(row['paid']))}  {state}  {', '.join(notes)}".rstrip())
    if not rows:
        typer.echo("Nobody has paid or failed yet.")


@app.command()
def ban(
    peer: Peer,
    folder: Folder = None,
    duration: Annotated[
        str, typer.Option("--for", help='How long, such as "1d"; for good if not given.', show_default=False)
    ] = "",
    reason: Annotated[str, typer.Option(help="Told to the one that is banned.")] = "by the operator",
    as_json: AsJson = False,
) -> None:
    """Ban a payer, or everybody from a network; a running node disconnects it within seconds."""
    from btt.node.payments.bans import until_text
    from btt.sdk.clock import parse_duration

    subject = _subject(peer)
    try:
        length = parse_duration(duration) if duration else None
        if length == 0:
            raise ValueError("a ban lasts longer than nothing")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--for") from None
    if not reason.isprintable() or not 0 < len(reason) <= 200:
        raise typer.BadParameter("at most 200 printable characters", param_hint="--reason")

    async def change(_: PayeeStore, bans: Bans) -> int:
        return (await bans.ban(subject, for_ms=length, reason=reason)).until_ms

    until = _with_books(folder, change)
    if as_json:
        typer.echo(json.dumps({"peer": subject, "banned_until_ms": until}))
        return
    typer.echo(f"{subject} is banned {until_text(until)}.")


@app.command()
def unban(peer: Peer, folder: Folder = None, as_json: AsJson = False) -> None:
    """End a ban, and forget the failures before it."""
    subject = _subject(peer)

    async def change(_: PayeeStore, bans: Bans) -> bool:
        return await bans.unban(subject)

    found = _with_books(folder, change)
    if as_json:
        typer.echo(json.dumps({"peer": subject, "forgotten": found}))
        return
    typer.echo(f"{subject} may come back." if found else f"There was nothing against {subject}.")


def _subject(text: str) -> str:
    from btt.node.payments.network import network_of
    from btt.sdk.errors import InvalidRequest
    from btt.sdk.keys import Address

    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        try:
            return str(Address.parse(text))
        except InvalidRequest as error:
            raise typer.BadParameter(str(error), param_hint="PEER") from None
    host = network.network_address
    found = network_of(f"ipv4:{host}:0" if network.version == 4 else f"ipv6:[{host}]:0")
    if network.num_addresses > ipaddress.ip_network(found).num_addresses:
        raise typer.BadParameter(f"networks are kept as {found}; ban them one by one", param_hint="PEER")
    return found


def _rows(payers: dict[str, tuple[int, int, int]], conduct: dict[str, Any], now: int) -> list[dict[str, Any]]:
    from btt.sdk.channel import Conduct

    rows = []
    for peer in payers.keys() | conduct.keys():
        paid, unpaid, channels = payers.get(peer, (0, 0, 0))
        kept = conduct.get(peer, Conduct())
        rows.append(
            {
                "peer": peer,
                "paid": str(paid),
                "written_off": str(unpaid),
                "open_channels": channels,
                "strikes": kept.strikes,
                "bans": kept.bans,
                "banned": kept.is_banned(now),
                "banned_until_ms": kept.until_ms,
                "by_operator": kept.by_operator,
                "reason": kept.reason,
            }
        )
    return sorted(rows, key=lambda row: (not row["banned"], -int(row["paid"]), row["peer"]))


def _with_books(folder: Path | None, work: Any) -> Any:
    from btt.node.config import load
    from btt.node.folder import BOOKS, CONFIG, default_folder
    from btt.node.payments.bans import Bans
    from btt.node.payments.store import PayeeStore

    path = folder or default_folder()
    policy = load(path / CONFIG).bans_policy

    async def run() -> Any:
        store = PayeeStore(path / BOOKS)
        try:
            return await work(store, Bans(store=store, policy=policy, clock=configured()))
        finally:
            store.close()

    return asyncio.run(run())
