"""The pages tell the truth: what they say to type is typed, in order, as a reader would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kit.reader import Page, Reader, pages, reading, stories

pytest.importorskip("libtorrent", reason="the node's parts are not installed")

PAGES = pages()


def children() -> set[psutil.Process]:
    return {process for process in psutil.Process().children(recursive=True) if process.is_running()}


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    before = children()  # such as multiprocessing's, which stay as long as this process
    yield from reading(tmp_path)
    assert not children() - before


@pytest.mark.parametrize("story", stories(PAGES), ids=lambda story: " ".join(page.name for page in story))
def test_what_pages_say_is_what_happens(reader: Reader, story: tuple[Page, ...]) -> None:
    assert all(reader.read(page) for page in story)
    # Whatever was fetched is what was published.
    films = {path.read_bytes() for path in reader.home.rglob("film.mkv")}
    assert len(films) <= 1
    if story[0].name == "README.md":
        assert len(list(reader.home.rglob("film.mkv"))) == 5


def test_the_readme_begins_with_the_two_commands() -> None:
    assert PAGES["README.md"].blocks[0].text.splitlines() == [
        "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[node]' && btt demo",
        "pip install -e '.[node,test]' && pytest",
    ]
