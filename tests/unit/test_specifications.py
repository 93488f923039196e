"""Service specifications have the form of their template, and name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPECS = ROOT / "docs" / "specs"
STATUS = re.compile(r"draft|accepted|withdrawn|replaced by \d{4}")


def _form(text: str) -> list[str]:
    return re.findall(r"^## (.+)$|^\| (\w+) \| .*$", text, re.MULTILINE)


@pytest.mark.parametrize("path", sorted(SPECS.glob("0*.md")), ids=lambda path: path.stem)
def test_a_specification_has_every_part(path: Path) -> None:
    text = path.read_text("utf-8")
    template = _form((SPECS / "template.md").read_text("utf-8"))
    assert [part for part in _form(text) if part in template] == template
    head = dict(re.findall(r"^\| (\w+) \| (.+) \|$", text, re.MULTILINE))
    number = path.name[:4]
    assert head["Number"] == number
    assert STATUS.fullmatch(head["Status"])
    for proto in head["Proto"].split(","):
        assert (ROOT / "proto" / proto.strip(" `")).is_file()
    row = rf"^\| \[{number}\]\({path.name}\) \| .+ \| {head['Status']} \|$"
    assert re.search(row, (SPECS / "index.md").read_text("utf-8"), re.MULTILINE)
