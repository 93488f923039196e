"""What all generated pages share: docstrings, tables, and the error for what says nothing."""

from __future__ import annotations

import inspect
import re


class Untold(Exception):
    """Something that users meet has no text in the code."""


def summary(thing: object, name: str) -> str:
    """The docstring before its first section."""
    # Not inspect.getdoc: what a class inherited tells of another.
    text = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
    text = re.split(r"^(?:Args|Attributes|Returns|Raises|Yields):$", text, flags=re.MULTILINE)[0].strip()
    if not text:
        raise Untold(f"{name} has no docstring")
    return text


def entries(thing: object, section: str) -> dict[str, str]:
    """The entries of a section of a docstring, `name: text` each."""
    doc = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
    found = re.search(rf"^{section}:\n((?:[ ]{{4}}.*\n?|\n)+)", doc + "\n", re.MULTILINE)
    if found is None:
        return {}
    told = re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", found.group(1), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in told}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *(tuple(map(_cell, row)) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
