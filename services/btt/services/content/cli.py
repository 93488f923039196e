"""`btt content publish`: publish a file or folder at a node, also while the node runs."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from btt.sdk.cli.options import AsJson

if TYPE_CHECKING:
    from btt.services.content.catalogue import Catalogue
    from btt.services.content.publish import Published

NodeFolder = Annotated[
    Path | None, typer.Option(envvar="BTT_NODE_DIR", help="Folder of the node.", show_default="your own")
]

CONFIG: Final = "node.toml"
LEDGER_VARIABLE: Final = "BTT_NODE__LEDGER__ADDRESS"
"""Overrides the file, as every key of it can be."""

app = typer.Typer()


@app.command()
def publish(
    path: Annotated[Path, typer.Argument(help="File or folder; it stays where it is.")],
    node: NodeFolder = None,
    as_json: AsJson = False,
    stdin_lifeline: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Publish a file or folder at a node; prints the infohash that fetches it."""
    from btt.sdk.cli import render
    from btt.sdk.content.magnet import magnet_link
    from btt.services.content.publish import publish as enter

    if stdin_lifeline:
        from btt.sdk.lifeline import follow_stdin

        follow_stdin()
    with open_catalogue(node) as catalogue:
        watched = not as_json and render.is_terminal()
        made = _with_bar(path, catalogue) if watched else enter(path, catalogue)
    magnet = magnet_link(made.infohash, infohash_v1=made.infohash_v1, name=made.name)
    if as_json:
        found = {
            "infohash": made.infohash.hex(),
            "infohash_v1": made.infohash_v1.hex(),
            "name": made.name,
            "total_bytes": made.total_bytes,
            "torrent": str(made.torrent_path),
            "magnet": magnet,
        }
        typer.echo(json.dumps(found))
        return
    typer.echo(f"Published {render.printable(made.name)}, {render.size(made.total_bytes)}")
    typer.echo(f"Infohash  {made.infohash.hex()}")
    typer.echo(f"Magnet    {magnet}")


@contextmanager
def open_catalogue(node: Path | None) -> Iterator[Catalogue]:
    """Opens the catalogue of a node, also while the node runs.

    Args:
        node: The node's folder; this user's own if not given.

    Raises:
        ConfigError: There is no node.
    """
    from btt.services.content.catalogue import Catalogue

    catalogue = Catalogue(folder_of(node) / "content")
    try:
        yield catalogue
    finally:
        catalogue.close()


def folder_of(node: Path | None) -> Path:
    """Returns the folder of a node; this user's own if not given.

    Raises:
        ConfigError: There is no node.
    """
    from platformdirs import user_data_path

    from btt.sdk.errors import ConfigError

    folder = user_data_path("btt") / "node" if node is None else node
    if not (folder / CONFIG).exists():
        raise ConfigError(f"There is no node in {folder}.", hint="Make one with `btt node init`.")
    return folder


def ledger_of(node: Path | None) -> str:
    """Returns the address of the ledger on which a node is paid, as its configuration has it.

    Raises:
        ConfigError: There is no node, or its configuration does not say.
    """
    from btt.sdk.errors import ConfigError

    path = folder_of(node) / CONFIG
    if address := os.environ.get(LEDGER_VARIABLE):
        return address
    try:
        return str(tomllib.loads(path.read_text("utf-8"))["ledger"]["address"])
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(
            f"{path} does not say on which ledger the node is paid.",
            hint="Check it with `btt node config check`, or give --ledger.",
        ) from None


def _with_bar(path: Path, catalogue: Catalogue) -> Published:
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from btt.services.content.publish import publish as enter

    with Progress(BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=None)

        def hashed(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return enter(path, catalogue, progress=hashed)
