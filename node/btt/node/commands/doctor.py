"""`btt doctor`: look for what keeps a node from earning, and say what to do."""

from __future__ import annotations

import asyncio
import json

import typer

from btt.node.commands.options import AsJson, FolderOption, existing

app = typer.Typer()


@app.command()
def doctor(folder: FolderOption = None, as_json: AsJson = False) -> None:
    """Check configuration, ledger, clock, port, disk, channels and services; exit with 1 if one fails."""
    from structlog.testing import capture_logs

    from btt.node.doctor import Result, examine
    from btt.sdk.clock import configured

    path = existing(folder)
    with capture_logs():  # what failed is among the findings
        found = asyncio.run(examine(path, clock=configured()))
    failed = any(finding.result is Result.FAILED for finding in found)
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "checks": [finding.as_json() for finding in found]}))
    else:
        for finding in found:
            typer.echo(f"{finding.result:8} {finding.check}: {finding.found}")
            if finding.do:
                typer.echo(f"{'':8} -> {finding.do}")
    if failed:
        raise typer.Exit(1)
