"""`btt ledger`: make a ledger, run it, look at it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from btt.sdk.cli.options import ClockFile, parsed

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
    min_challenge: Annotated[str, typer.Option(help="Shortest challenge window.")] = "1h",
    max_challenge: Annotated[str, typer.Option(help="Longest challenge window.")] = "7d",
    min_lifetime: Annotated[str, typer.Option(help="Shortest life of a channel.")] = "1h",
    max_lifetime: Annotated[str, typer.Option(help="Longest life of a channel.")] = "366d",
    max_locked: Annotated[str, typer.Option(help="Most that one account may lock in channels.")] = (
        "990000000000 BTT"
    ),
    max_open_channels: Annotated[
        int, typer.Option(min=1, max=10**9, help="Most open channels of one account.")
    ] = 10_000,
    min_update_delta: Annotated[
        str, typer.Option(help="Smallest raise of an update kept for an open channel.")
    ] = "1 base units",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a ledger with an issue that nothing backs."""
    from btt.sdk.clock import parse_duration
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
        parsed(parse_duration, text, option)
        for text, option in (
            (min_challenge, "--min-challenge"),
            (max_challenge, "--max-challenge"),
            (min_lifetime, "--min-lifetime"),
            (max_lifetime, "--max-lifetime"),
        )
    ]
    if not (0 < windows[0] <= windows[1] < 2**32 and 0 < windows[2] <= windows[3] < 2**53):
        raise typer.BadParameter("challenge and lifetime need 0 < min <= max (challenge: at most 49 days)")
    try:
        most_locked, least_raise = Amount.parse(max_locked), Amount.parse(min_update_delta)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--max-locked, --min-update-delta") from None
    if not (most_locked > 0 and least_raise > 0):
        raise typer.BadParameter("both are above 0", param_hint="--max-locked, --min-update-delta")
    terms = Terms(
        min_challenge_ms=windows[0],
        max_challenge_ms=windows[1],
        min_lifetime_ms=windows[2],
        max_lifetime_ms=windows[3],
        max_locked=int(most_locked),
        max_open_channels=max_open_channels,
        min_update_delta=int(least_raise),
    )
    try:
        receiver = Address.parse(supply_to) if supply_to else None
    except InvalidRequest as error:
        raise typer.BadParameter(error.message, param_hint="--supply-to") from None
    made, identity = init_folder(folder, name=name, supply_to=receiver, amount=amount, terms=terms)
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
    clock: ClockFile = None,
    auditor: Annotated[
        list[str] | None, typer.Option(help="Address that may read the journal; may be repeated.")
    ] = None,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests per second of one key, for ever.")] = 200,
    burst: Annotated[int, typer.Option(min=1, help="Requests of one key at once.")] = 1000,
) -> None:
    """Run a ledger until SIGTERM or SIGINT; prints one JSON line when it is ready."""
    from btt.sdk.errors import InvalidRequest
    from btt.sdk.keys import Address
    from btt.services.ledger.server import LedgerConfig

    try:
        auditors = tuple(Address.parse(text) for text in auditor or ())
    except InvalidRequest as error:
        raise typer.BadParameter(error.message, param_hint="--auditor") from None
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise typer.BadParameter("write it like 127.0.0.1:7400", param_hint="--listen")
    config = LedgerConfig(
        folder=folder,
        host=host.removeprefix("[").removesuffix("]"),
        port=int(port),
        advertise_host=advertise,
        auditors=auditors,
        rate=rate,
        burst=burst,
    )
    run = asyncio.run
    with suppress(ModuleNotFoundError):  # quicker, where the installation for operators is
        from uvloop import run
    run(_serve(config, clock, stdin_lifeline=stdin_lifeline))


async def _serve(config: object, clock: Path | None, *, stdin_lifeline: bool) -> None:
    from btt.sdk.clock import SYSTEM, SharedClock
    from btt.sdk.lifeline import set_at_end_of_stdin
    from btt.services.ledger import server

    assert isinstance(config, server.LedgerConfig)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if stdin_lifeline:
        set_at_end_of_stdin(stop)
    shown = SharedClock(clock) if clock else SYSTEM
    async with server.serve(config, clock=shown) as ledger:
        typer.echo(json.dumps({"ready": True, "address": str(ledger.address)}))
        await stop.wait()


@app.command()
def status(
    address: Annotated[str, typer.Argument(envvar="BTT_LEDGER", help="btt-ledger://… address.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a ledger is, and the sums of its books."""
    from btt.sdk.cli.channel import moment
    from btt.sdk.clock import duration_text
    from btt.sdk.money import Amount

    found = asyncio.run(_status(address))
    if as_json:
        typer.echo(json.dumps(found))
        return
    for key, value in found.items():
        text = str(value)
        if key in ("issued", "accounts", "channels"):
            text = str(Amount(int(text)))
        elif key.endswith("_ms"):
            text = (moment if key == "time_ms" else duration_text)(int(text))
        typer.echo(f"{key.removesuffix('_ms').replace('_', ' '):17} {text}")


async def _status(text: str) -> dict[str, object]:
    from btt.sdk.ledger import LedgerAddress, LedgerClient

    async with LedgerClient.connect(parsed(LedgerAddress.parse, text, "ADDRESS")) as ledger:
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


def _provers() -> int:
    """Returns how many processes shall verify ahead; the audit keeps one core busy, and two of them."""
    return min((os.cpu_count() or 1) - 1, 2)


@app.command()
def audit(
    journal: Annotated[Path, typer.Argument(help="Folder of a ledger, a backup, or an exported journal.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Re-verify a whole journal offline, and name the first entry that is wrong."""
    import time

    from btt.sdk.errors import InvariantBroken
    from btt.sdk.keys import PublicKey
    from btt.sdk.money import Amount
    from btt.services.ledger import audit as auditing
    from btt.services.ledger import export

    began = time.monotonic()
    try:
        with export.journal(journal) as (description, entries, database):
            report, auditor = auditing.audit(description, entries, workers=_provers())
            if database is not None:
                auditing.compare(auditor, database)
    except InvariantBroken as error:
        seq = error.seq if isinstance(error, auditing.AuditFailed) else None
        if as_json:
            typer.echo(json.dumps({"ok": False, "wrong_entry": seq, "why": error.message}))
        else:
            typer.echo(error.message, err=True)
        raise typer.Exit(1) from None
    seconds = time.monotonic() - began
    if as_json:
        found = {
            "ok": True,
            "ledger_id": report.ledger_id.hex(),
            "entries": report.entries,
            "head_hash": report.head.hash.hex(),
            "epoch": report.epoch,
            "operator": str(PublicKey(report.operator_key).address),
            "issued": str(report.issued),
            "accounts": report.accounts,
            "open_channels": report.open_channels,
            "locked": str(report.locked),
            "seconds": round(seconds, 3),
        }
        typer.echo(json.dumps(found))
        return
    rate = report.entries / seconds if seconds else 0
    typer.echo(f"{report.entries} entries hold, from the issue of {Amount(report.issued)} on.")
    typer.echo(f"Head {report.head.hash.hex()}, epoch {report.epoch}")
    typer.echo(
        f"{report.accounts} accounts; {report.open_channels} open channels hold {Amount(report.locked)}"
    )
    typer.echo(f"Verified in {seconds:.1f} s, {rate:,.0f} entries a second.")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of the ledger, or a backup.")],
    target: Annotated[Path, typer.Argument(help="New file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the journal to one file, for auditors."""
    from btt.services.ledger import export as exporting

    count = exporting.export(folder, target)
    typer.echo(json.dumps({"entries": count}) if as_json else f"Wrote {count} entries to {target}.")


@app.command()
def backup(
    folder: Annotated[Path, typer.Argument(help="Folder of the ledger, which may be running.")],
    target: Annotated[Path, typer.Argument(help="New file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Copy the books while the ledger runs, and check the copy."""
    from btt.services.ledger import backup as copying

    head = copying.backup(folder, target)
    if as_json:
        typer.echo(json.dumps({"head_seq": head.seq, "head_hash": head.hash.hex()}))
        return
    typer.echo(f"Copied the books up to entry {head.seq} to {target}.")


@app.command("rotate-key")
def rotate_key(
    folder: Annotated[Path, typer.Argument(help="Folder of a ledger that does not run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Hand the ledger to a fresh operator key; its address stays."""
    from btt.services.ledger.folder import rotate

    operator, entry = rotate(folder)
    if as_json:
        typer.echo(json.dumps({"operator": str(operator), "entry": entry.seq}))
        return
    typer.echo(f"Entry {entry.seq} hands the ledger to {operator}; the address of the ledger stays.")


@app.command()
def recover(
    folder: Annotated[Path, typer.Argument(help="Folder of the ledger, with its keys.")],
    evidence: Annotated[
        list[Path] | None,
        typer.Argument(help="Files from `btt wallet receipts --export` and `btt node receipts --export`."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Newest backup, or an older database; needed at the first call."),
    ] = None,
    finish: Annotated[
        bool, typer.Option("--finish", help="End the recovery: what nobody has shown by now is lost.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Bring a ledger back whose newest books are lost, from a backup and its users' receipts."""
    from btt.sdk.cli.failures import reason
    from btt.services.ledger.recovery import recover as run

    report = run(folder, source=source, evidence=evidence or (), finish=finish)
    if report is None:
        done = {"finished": True}
        typer.echo(json.dumps(done) if as_json else "This recovery had been finished before.")
        return
    assert report.head is not None
    if as_json:
        found = {
            "finished": report.finished,
            "epoch": report.epoch,
            "base_seq": report.base_seq,
            "ended_seq": report.ended_seq,
            "reached_seq": report.reached_seq,
            "restored": report.restored,
            "repeated": report.repeated,
            "updates": report.updates,
            "missing": report.missing,
            "refused": [
                {"operation": what, "reason": reason(error), "why": error.message}
                for what, error in report.refused
            ],
            "undone": report.undone,
            "head_seq": report.head.seq,
            "head_hash": report.head.hash.hex(),
        }
        typer.echo(json.dumps(found))
        return
    typer.echo(
        f"The copy ends with entry {report.base_seq}; the lost books had come to {report.reached_seq}."
    )
    typer.echo(f"Restored as they were: {report.restored} entries. Carried out again: {report.repeated}.")
    if report.updates:
        typer.echo(f"Payments that only their payees had: {report.updates}.")
    if report.undone:
        typer.echo(f"Receipts that an earlier recovery had gone back behind: {report.undone}.")
    for first, last in report.missing:
        typer.echo(f"Nobody showed entry {first}." if first == last else f"Nobody showed {first} to {last}.")
    for what, error in report.refused:
        typer.echo(f"Refused, {what}: {error.message}")
    if report.finished:
        typer.echo(f"Epoch {report.epoch} begins after entry {report.ended_seq}, with a new operator key.")
        typer.echo(f"Run it: btt ledger serve {folder}")
    else:
        typer.echo("Nothing is served yet. Give more files, or end it with --finish.")


@app.command("verify-receipts")
def verify_receipts(
    files: Annotated[list[Path], typer.Argument(help="Files that wallets or nodes exported.")],
    ledger: Annotated[
        str, typer.Option("--ledger", envvar="BTT_LEDGER", help="The ledger they are about: btt-ledger://…")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check exported receipts offline, and say what they prove."""
    from btt.sdk.errors import InvalidRequest
    from btt.sdk.ledger import LedgerAddress
    from btt.sdk.ledger.proving import prove

    try:
        address = LedgerAddress.parse(ledger)
    except InvalidRequest as error:
        raise typer.BadParameter(error.message, param_hint="--ledger") from None
    proof = prove(files, address)
    if as_json:
        found = {
            "acknowledged": [str(one) for one in proof.acknowledged],
            "unacknowledged": [str(one) for one in proof.unacknowledged],
            "undone": [str(one) for one in proof.undone],
            "equivocations": [[str(one), str(other)] for one, other in proof.equivocations],
        }
        typer.echo(json.dumps(found))
        return
    for one in proof.acknowledged:
        typer.echo(f"Acknowledged, {one}")
    for one in proof.unacknowledged:
        typer.echo(f"Signed by {one.signer.address}, {one}")
    for one in proof.undone:
        typer.echo(f"Acknowledged, and gone back behind in a recovery since, {one}")
    for one, other in proof.equivocations:
        typer.echo("THE LEDGER SIGNED TWO HISTORIES:")
        typer.echo(f"  {one}, hash {one.receipt.receipt.entry_hash.hex()}" if one.receipt else "")
        typer.echo(f"  {other}, hash {other.receipt.receipt.entry_hash.hex()}" if other.receipt else "")
    if proof.unacknowledged:
        typer.echo("A payment counts if it is signed by its channel's K1; T1 says which key that is.")
    if not proof.equivocations:
        typer.echo("Every receipt holds, and none contradicts another.")
