"""`btt earnings`: what a node earned, by service, payer, application or day, and why not more."""

from __future__ import annotations

import csv
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btt.node.commands.options import AsJson, FolderOption, existing

if TYPE_CHECKING:
    from btt.node.refusals import Refusal

app = typer.Typer(help="Show what a node earned, and why not more.", invoke_without_command=True)

Since = Annotated[
    str, typer.Option(help='Only this long, such as "30d"; whole days, UTC.', show_default="all of it")
]


@app.callback()
def earnings(
    ctx: typer.Context,
    folder: FolderOption = None,
    since: Since = "",
    by: Annotated[str, typer.Option(help="service, peer, app or day.")] = "service",
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values, base units.")] = False,
) -> None:
    """Show what was accrued, signed by payers, settled by the ledger, unpaid and written off."""
    if ctx.invoked_subcommand is not None:
        return
    from btt.node import config
    from btt.node.books import reading
    from btt.node.earnings import COLUMNS, By, read_entries, read_receipts, told_by, total_of
    from btt.node.folder import CONFIG
    from btt.sdk.money import Amount

    if as_json and as_csv:
        raise typer.BadParameter("one of --json and --csv", param_hint="--csv")
    if by not in list(By):
        raise typer.BadParameter(f"one of {', '.join(By)}", param_hint="--by")
    path = existing(folder)
    day = _since_day(since)
    with reading(path) as db:
        proved = read_receipts(db, config.load(path / CONFIG).ledger.address.ledger_id)
        entries = list(read_entries(db))
    told = told_by(entries, By(by), since_day=day)
    total = total_of(told)
    by_receipt = sum(e.sums.settled for e in entries if e.day >= day and e.channel in proved)
    if as_json:
        rows = [{by: key, **_numbers(sums)} for key, sums in told.items()]
        found = {"by": by, "rows": rows, "total": _numbers(total), "settled_with_receipt": str(by_receipt)}
        typer.echo(json.dumps(found))
        return
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow((by, *COLUMNS))
        writer.writerows((key, *(getattr(sums, name) for name in COLUMNS)) for key, sums in told.items())
        return
    if not told:
        typer.echo("Nothing was earned. `btt earnings why-not` may say why.")
        return
    for key, sums in (*told.items(), ("total", total)):
        typer.echo(key or "(no delivery)")
        for name in COLUMNS:
            amount = getattr(sums, name)
            if amount or name in ("accrued", "signed", "settled"):
                typer.echo(f"  {name.replace('_', ' '):12} {_money(amount)}")
    if total.settled:
        typer.echo(f"The ledger's receipts prove {Amount(max(0, by_receipt))} of what is settled.")


@app.command("why-not")
def why_not(
    service: Annotated[
        str,
        typer.Argument(
            help="Name of a service, such as content; payments, which it needs, are told with it.",
            show_default="all",
        ),
    ] = "",
    folder: FolderOption = None,
    since: Since = "30d",
    as_json: AsJson = False,
) -> None:
    """Say which calls were refused, how often and why, and what to do about it."""
    from btt.node.books import reading
    from btt.node.config import load
    from btt.node.folder import CONFIG
    from btt.node.refusals import read_refusals
    from btt.sdk.plugin import did_you_mean

    path = existing(folder)
    with reading(path) as db:
        known = {*load(path / CONFIG).services, *(one.service for one in read_refusals(db))}
        if service and service not in known:
            raise typer.BadParameter(
                f"there is no service {service} here. {did_you_mean(service, known)}", param_hint="SERVICE"
            )
        found = read_refusals(db, since_day=_since_day(since), service=service or None)
    rows, served = _summed(found)
    if as_json:
        typer.echo(json.dumps({"served": served, "refused": rows}))
        return
    typer.echo(f"{served} calls were served, {sum(row['calls'] for row in rows)} refused.")
    for row in rows:
        typer.echo(f"{row['calls']:8}  {row['service']}  {row['reason']}: {row['meaning']}")
    if not rows and not served:
        typer.echo("Nobody called. Is the node's address known, and its port reachable? See `btt doctor`.")


def _summed(found: list[Refusal]) -> tuple[list[dict[str, Any]], int]:
    from btt.node.refusals import MEANING, SERVED

    sums: dict[tuple[str, str], list[Refusal]] = {}
    served = 0
    for refusal in found:
        if refusal.reason == SERVED:
            served += refusal.calls if refusal.service not in ("payments", "offers") else 0
        else:
            sums.setdefault((refusal.service, refusal.reason), []).append(refusal)
    rows = [
        {
            "service": service,
            "reason": reason,
            "calls": sum(one.calls for one in each),
            "days": len({one.day for one in each}),
            "meaning": MEANING.get(reason, "the request itself was wrong or came too late"),
        }
        for (service, reason), each in sums.items()
    ]
    return sorted(rows, key=lambda row: (-int(str(row["calls"])), row["service"], row["reason"])), served


def _since_day(text: str) -> int:
    from btt.node.payments.days import DAY_MS
    from btt.sdk.clock import configured, parse_duration

    if not text:
        return 0
    try:
        return (configured()() - parse_duration(text)) // DAY_MS + 1
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--since") from None


def _numbers(sums: Any) -> dict[str, str]:
    from btt.node.earnings import COLUMNS

    return {name: str(getattr(sums, name)) for name in COLUMNS}


def _money(amount: int) -> str:
    from btt.sdk.money import Amount

    # A sum of differences: what was unpaid on one day falls when it is paid on another.
    return str(Amount(amount)) if amount >= 0 else f"-{Amount(-amount)}"
