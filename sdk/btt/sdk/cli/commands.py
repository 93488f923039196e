"""The tree of commands, loaded one by one.

A command is a typer app behind a name. The built-in ones stand in a table here; other packages
add theirs as entry points of the group `btt.commands`, where `NAME` is a command or group of
`btt` and `GROUP.NAME` one inside a group. A command's module is imported when the command is
called. A list of commands shows the first line of each module's docstring, which is read without
importing it.
"""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import typer.core
import typer.main

from btt.sdk.errors import ConfigError

GROUP: Final = "btt.commands"

_COMPLETION: Final = ("install_completion", "show_completion")
_BUILT_IN: Final = {
    "channel": "btt.sdk.cli.channel:app",
    "content": "btt.sdk.cli.content:app",
    "demo": "btt.sdk.cli.demo:app",
    "devnet": "btt.sdk.cli.devnet:app",
    "plugin": "btt.sdk.cli.plugin:app",
    "wallet": "btt.sdk.cli.wallet:app",
}


@dataclass(frozen=True, slots=True)
class Plugin:
    """A command that is not loaded yet.

    Attributes:
        name: As it is called; parts of a path are joined by dots.
        target: `module:attribute` of the typer app.
        package: The distribution it comes from.
    """

    name: str
    target: str
    package: str

    def load(self) -> Any:
        """Imports the command.

        Raises:
            ConfigError: Its package is broken, or a part of it is not installed.
        """
        module, _, attribute = self.target.partition(":")
        words = f"btt {self.name.replace('.', ' ')}"
        try:
            app = getattr(importlib.import_module(module), attribute)
            command = typer.main.get_command(app)
        except ModuleNotFoundError as missing:
            raise ConfigError(
                f"`{words}` needs a module that is not installed: {missing.name}.",
                hint=f"If you want it: pip install '{self.package}[node]'",
            ) from missing
        except Exception as broken:  # a plugin may fail in any way; the program says which one did
            raise ConfigError(
                f"`{words}` of the package {self.package} could not be loaded: {broken!r}.",
                hint="Repair that package or remove it.",
            ) from broken
        command.name = self.name.rpartition(".")[2]
        # Each app brings these options; they belong to `btt` alone.
        command.params = [option for option in command.params if option.name not in _COMPLETION]
        return command

    def summary(self) -> str:
        """Returns what the module says it is for, without running any of it."""
        try:
            source = _source(self.target.partition(":")[0])
            text = ast.get_docstring(ast.parse(source.read_bytes())) if source else None
        except (OSError, SyntaxError, ValueError):
            text = None
        if not text:
            return f"From the package {self.package}."
        line = text.splitlines()[0]
        if line.startswith("`btt ") and "`: " in line:
            line = line.partition("`: ")[2]
        return line[:1].upper() + line[1:]


def _source(module: str) -> Path | None:
    places, found = None, None
    # importlib.util.find_spec would import the parents, which is what must not happen here.
    parts = module.split(".")
    for depth in range(len(parts)):
        found = PathFinder.find_spec(".".join(parts[: depth + 1]), places)
        if found is None:
            return None
        places = list(found.submodule_search_locations or ())
    return Path(found.origin) if found is not None and found.origin else None


@cache
def plugins() -> dict[str, Plugin]:
    """Returns all commands that can be loaded, by name; a built-in name cannot be taken over."""
    found = {name: Plugin(name, target, "btt-services") for name, target in _BUILT_IN.items()}
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist is not None else "btt-services"
        found.setdefault(point.name, Plugin(point.name, point.value, package))
    return found


class Commands(typer.core.TyperGroup):
    """A group of commands that also holds plugins, which it loads when they are called."""

    # The types of click differ between the versions of typer, so none is named here.
    _listing = False

    def _below(self, ctx: Any) -> dict[str, Plugin]:
        path = ctx.command_path.split()[1:]
        prefix = "".join(f"{part}." for part in path)
        return {
            name.removeprefix(prefix): plugin
            for name, plugin in plugins().items()
            if name.startswith(prefix) and "." not in name.removeprefix(prefix)
        }

    def list_commands(self, ctx: Any) -> list[str]:
        """Names all commands."""
        return sorted({*self.commands, *self._below(ctx)})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Finds a command; for a list of commands, only its name and summary."""
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        plugin = self._below(ctx).get(cmd_name)
        if plugin is None:
            return None
        if self._listing:
            return typer.core.TyperCommand(cmd_name, help=plugin.summary())
        return plugin.load()

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help without loading what it lists."""
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("btt-services"))
        raise typer.Exit


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _btt(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Buy and sell bandwidth, storage and reachability, paid piece by piece in BTT."""


def run(argv: Sequence[str]) -> int:
    """Runs one command line; usage errors exit with 2.

    Args:
        argv: Arguments without the program's name.
    """
    command = typer.main.get_command(app)
    try:
        command.main(list(argv), prog_name="btt")
    except SystemExit as ended:
        # What typer told a person on its way out, for a script.
        told = getattr(ended.__context__, "format_message", None)
        if told is not None and "--json" in argv:
            found = {"reason": "USAGE", "message": told(), "hint": "Call it with --help."}
            typer.echo(json.dumps({"error": found}))
        raise
    return 0
