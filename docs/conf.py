"""How the documentation site is built: `python -m sphinx -W --keep-going -b html docs build/docs`.

Sphinx reads Markdown through MyST. What the code knows better than a page is put in while the page
is read (tools/reference).
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from reference import GENERATED

project = "BTT services"
copyright = "the authors of BTT services"
version = release = version_of("btt-services")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
nitpicky = False
html_theme = "furo"
html_title = f"BTT services {version}"
html_show_sphinx = False
html_copy_source = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_use_ivar = True

_PLACE = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)


def _generate(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = _PLACE.sub(lambda place: GENERATED[place[1]](), source[0])


def _to_rst(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Our docstrings mark code as Markdown does: with single backticks, and by indenting a paragraph."""
    lines[:] = [re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line) for line in lines]
    for at in range(len(lines) - 1, 1, -1):
        before, blank, line = lines[at - 2 : at + 1]
        if line.startswith(" ") and not blank and before and not before.startswith(" "):
            lines[at - 1 : at] = ["", "::", ""]


def setup(app: Sphinx) -> None:
    """Fills in what the code knows."""
    app.connect("source-read", _generate)
    app.connect("autodoc-process-docstring", _to_rst, priority=400)  # before napoleon's 500
