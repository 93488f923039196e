"""`btt plugin`: write a service of your own, and check that it behaves."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import redirect_stdout
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from pathlib import Path
from typing import Annotated, Final

import typer

from btt.sdk.cli.failures import FAILED
from btt.sdk.cli.options import AsJson
from btt.sdk.errors import ConfigError

app = typer.Typer(help="Write a service of your own, and check it.", no_args_is_help=True)

SERVICES: Final = "btt.services"
CASES: Final = "btt.conformance"


@app.callback()
def _group() -> None:
    """Keeps the commands in a group."""


@app.command()
def new(
    name: Annotated[str, typer.Argument(help='Of the distribution and the service, such as "acme-words".')],
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Where to write it.", show_default="its name")
    ] = None,
) -> None:
    """Make the distribution of a new service: proto, service, test, and what a node needs to find it."""
    from btt.sdk import scaffold

    path = folder or Path(name)
    scaffold.new(name, path)
    typer.echo(f"Wrote {path}.")
    steps = [f"pip install -e '{path}[test]'", f"btt plugin protos {path}", f"btt plugin check {name}"]
    if scaffold.can_generate():
        del steps[1]  # it is done
    typer.echo(f"Install and try it: {' && '.join(steps)}")


@app.command()
def protos(
    folder: Annotated[Path, typer.Argument(help="Of the distribution.")] = Path(),
) -> None:
    """Generate the code of a service from its proto."""
    from btt.sdk import scaffold

    for proto in scaffold.generate(folder):
        typer.echo(f"Generated the code of {proto}.")


@app.command("list")
def show(as_json: AsJson = False) -> None:
    """List the services that are installed, and from where; operators enable them in node.toml."""
    rows = [
        {
            "service": point.name,
            "distribution": point.dist.name if point.dist else "",
            "version": point.dist.version if point.dist else "",
        }
        for point in sorted(entry_points(group=SERVICES), key=lambda point: point.name)
    ]
    if as_json:
        typer.echo(json.dumps({"services": rows}))
        return
    for row in rows:
        typer.echo(f"{row['service']:24} {row['distribution']} {row['version']}")


@app.command()
def check(
    name: Annotated[str, typer.Argument(metavar="DIST", help="Name of the installed distribution.")],
    as_json: AsJson = False,
) -> None:
    """Run the services of a distribution on a node of a devnet, pay them, and say what is wrong."""
    import structlog

    from btt.sdk.testing import conformance

    results = {}
    for service, case in _cases(name).items():
        try:
            loaded = case.load()
        except Exception as broken:  # a third party's code may fail in any way
            raise ConfigError(
                f"{name} cannot be imported: {broken}.",
                hint="Repair it; if code of its proto is missing: btt plugin protos FOLDER.",
            ) from broken
        if not isinstance(loaded, conformance.Case):
            raise ConfigError(f"{case.value} is no Case of btt.sdk.testing.conformance.")
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("warning"))
        with redirect_stdout(sys.stderr):  # what the node logs is not what was asked for
            results[service] = asyncio.run(conformance.run(loaded))
    ok = all(finding.ok for findings in results.values() for finding in findings)
    if as_json:
        rows = [
            {"service": service, "check": finding.check, "ok": finding.ok, "text": finding.text}
            for service, findings in results.items()
            for finding in findings
        ]
        typer.echo(json.dumps({"ok": ok, "findings": rows}))
    else:
        for service, findings in results.items():
            for finding in findings:
                typer.echo(f"{service}: {'ok  ' if finding.ok else 'FAIL'} {finding.check}")
                if finding.text:
                    typer.echo(f"    {finding.text}")
    if not ok:
        raise typer.Exit(FAILED)


def _cases(name: str) -> dict[str, EntryPoint]:
    try:
        points = distribution(name).entry_points
    except PackageNotFoundError:
        raise ConfigError(f"{name} is not installed.", hint=f"pip install {name}") from None
    services = [point.name for point in points if point.group == SERVICES]
    if not services:
        raise ConfigError(f"{name} registers no service (entry points of the group {SERVICES}).")
    cases = {point.name: point for point in points if point.group == CASES}
    for service in services:
        if service not in cases:
            raise ConfigError(
                f"{name} does not say what to try with {service}.",
                hint=f"Name a Case as the entry point {service} of the group {CASES}.",
            )
    return {service: cases[service] for service in services}
