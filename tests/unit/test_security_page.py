"""The page on attacks names tests; each of them exists, and each row has some."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = [*range(1, 14), *range(17, 21)]


def _defined_in(path: Path) -> set[str]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, functions)}


def test_every_row_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    rows = dict(re.findall(r"^\| A(\d+) \|(.*)$", page, re.MULTILINE))
    assert list(map(int, rows)) == ROWS
    files = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    for number, row in rows.items():
        named = re.findall(r"`(test_\w+)::(test_\w+)`", row)
        assert named, f"A{number} names no test"
        for file, test in named:
            assert test in _defined_in(files[file]), f"A{number} names {file}::{test}"
