"""Options that the commands for operators share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from btt.node.reload import Reloaded

Folder = Annotated[
    Path | None, typer.Argument(help="Folder of the node.", envvar="BTT_NODE_DIR", show_default=False)
]
FolderOption = Annotated[
    Path | None, typer.Option("--node", help="Folder of the node.", envvar="BTT_NODE_DIR", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def own(folder: Path | None) -> Path:
    """Returns the chosen folder, or this user's."""
    from btt.node.folder import default_folder

    return folder or default_folder()


def existing(folder: Path | None) -> Path:
    """The same, if there is a node in it.

    Raises:
        ConfigError: There is none.
    """
    from btt.node.folder import CONFIG
    from btt.sdk.errors import ConfigError

    path = own(folder)
    if not (path / CONFIG).exists():
        raise ConfigError(f"There is no node in {path}.", hint="Make one with `btt node init`.")
    return path


def change(folder: Path | None, changes: dict[str, Any], *, as_json: bool) -> None:
    """Writes values, tells a running node, and says what came of it.

    Raises:
        ConfigError: They do not do; nothing has changed.
    """
    from btt.node.editing import alone, edit, reload_node, write
    from btt.node.folder import CONFIG
    from btt.sdk.errors import ConfigError

    path = existing(folder)
    with alone(path):
        before = (path / CONFIG).read_bytes()
        edit(path, changes)
        error = _refused(path, changes)
        told = reload_node(path) if not error else None
        error = error or (told.error if told is not None else "")
        if error:
            write(path, before)
            raise ConfigError(f"Nothing has changed. {error}")
        wrote = (path / CONFIG).read_bytes() != before
    if as_json:
        typer.echo(json.dumps({"running": told is not None, **(told.as_json() if told else {})}))
        return
    typer.echo(_says(told, wrote=wrote))


def _refused(path: Path, changes: dict[str, Any]) -> str:
    """What a service says against its own keys, which only it knows; empty if nothing."""
    from btt.node.checking import check_services
    from btt.node.config import load
    from btt.node.folder import CONFIG
    from btt.sdk.errors import ConfigError

    names = {key.split(".")[1] for key in changes if key.startswith("services.")}
    if not names:
        return ""
    try:
        check_services(load(path / CONFIG), only=names)
    except ConfigError as error:
        return str(error)
    return ""


def _says(told: Reloaded | None, *, wrote: bool) -> str:
    if told is None:
        return "Written; the node does not run." if wrote else "Nothing had to change."
    parts = []
    if told.applied:
        parts.append(f"In effect now: {', '.join(told.applied)}.")
    if told.restart:
        parts.append(f"After a restart of the node: {', '.join(told.restart)}.")
    if not parts and wrote:
        return "Written; that is how the node runs already."
    return " ".join(parts) or "Nothing had to change."
