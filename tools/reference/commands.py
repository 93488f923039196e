"""The commands of `btt`, as their own help tells them."""

from __future__ import annotations

import inspect
from typing import Any

import typer.main

from btt.sdk import cli
from btt.sdk.cli.commands import app
from reference.text import Untold, table


def all_commands() -> str:
    """One section for each command, groups loaded."""
    return "\n".join(sections(typer.main.get_command(app), None, "btt"))


def exit_codes() -> str:
    """What `btt` returns to a shell."""
    told = inspect.cleandoc(cli.main.__doc__ or "").partition("Returns:\n")[2]
    if not told:
        raise Untold("btt.sdk.cli.main does not say what it returns")
    return " ".join(told.split())


def sections(command: Any, parent: Any, words: str) -> list[str]:
    """The section of a command, and those below it.

    Raises:
        Untold: A command or an option has no help.
    """
    # The context is where a group finds out which commands of plugins are below it.
    context = type(command).context_class(command, parent=parent, info_name=words.split()[-1])
    text = inspect.cleandoc(command.help or "").strip()
    if not text:
        raise Untold(f"`{words}` has no help")
    if hasattr(command, "list_commands"):
        found = [command.get_command(context, name) for name in command.list_commands(context)]
        below = [sub for sub in found if not sub.hidden]
        parts = [f"## {words}", "", text, ""] if parent is not None else []
        return parts + [part for sub in below for part in sections(sub, context, f"{words} {sub.name}")]
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [f"### {words}", "", text, "", f"`{words} {usage}`", ""]
    rows = [_row(param, words) for param in command.params if not getattr(param, "hidden", False)]
    return [*parts, table(("", "", "default", "variable"), rows), ""] if rows else parts


def _row(param: Any, words: str) -> tuple[str, str, str, str]:
    text = (getattr(param, "help", None) or "").strip()
    name = ", ".join(f"`{known}`" for known in [*param.opts, *param.secondary_opts])
    if param.param_type_name == "argument":
        name = f"`{param.metavar or param.name.upper()}`"
    if not text:
        raise Untold(f"{name} of `{words}` has no help")
    default = param.default
    if param.required:
        shown = "(must be given)"
    elif isinstance(param.show_default, str):
        shown = f"({param.show_default})"
    else:
        shown = "-" if default in (None, "", False, []) or callable(default) else f"`{default}`"
    variable = param.envvar if isinstance(param.envvar, str) else ", ".join(param.envvar or ())
    return name, text, shown, f"`{variable}`" if variable else "-"
