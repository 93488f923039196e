"""The reader of pages: a page that says what is not so fails, and no block is passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from btt.sdk.errors import ConfigError
from kit.reader import Reader, read_page


def block(language: str, text: str, how: str = "") -> str:
    return f"{how}```{language}\n{text}\n```\n"


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (block("sh", "false"), "exited with 1"),
        (block("sh", "true # exits 1"), "exited with 0"),
        (block("python", "raise SystemExit(3)"), "exited with 3"),
        (block("sh", "echo 12 pieces") + block("text", "13 pieces"), "what was printed"),
        (block("sh", "echo 12 pieces") + block("text", "12 …s\nand more"), "what was printed"),
        (block("sh", "export BTT_LEDGER=…"), "nothing that was printed"),
        (block("toml", "[limits]\ncalled = 3"), 'no key "limits.called"'),
        (block("rust", "fn main() {}"), "does not say why it is not run"),
        (block("", "anything"), "does not say why it is not run"),
        (block("proto", 'syntax = "proto3"; message A { Unknown b = 1; }'), "exited with 1"),
    ],
)
def test_a_page_that_says_what_is_not_so_fails(page: str, said: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, ConfigError), match=said):
        Reader(tmp_path).read(read_page("page.md", page))


def test_a_page_that_says_what_is_so_is_read_whole(tmp_path: Path) -> None:
    text = (
        block("sh", "printf 'one\\ntwo\\nand a half\\nthree 3\\n'")
        + block("text", "one\n…\nthree …")
        + block("sh", "exit 5 # exits 5")
        + block("cobol", "?", "<!-- not run: nobody has it -->\n")
        + block("toml", "[limits]\ncalls = 3")
        + block("sh", "test -f pyproject.toml", "<!-- in the clone -->\n")
        + block("proto", 'syntax = "proto3"; package acme.v1; message A {}')
    )
    assert Reader(tmp_path).read(read_page("page.md", text)) == 6


@pytest.mark.parametrize(
    "page",
    [
        "  ```sh\n  true\n  ```\n",
        "~~~sh\ntrue\n~~~\n",
        "```sh\ntrue\n",
        "<!-- later -->\n```sh\ntrue\n```\n",
        "<!-- not run: -->\n```sh\ntrue\n```\n",
    ],
)
def test_no_block_is_passed_over(page: str) -> None:
    with pytest.raises(ValueError, match=r"page\.md"):
        read_page("page.md", page)


def test_two_nodes_that_a_page_sends_to_one_port_fail_it(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "node.toml").write_text('[node]\nlisten = "127.0.0.1:7800"\n')
    with pytest.raises(AssertionError, match="two nodes are to listen at one place"):
        Reader(tmp_path).read(read_page("page.md", block("sh", "btt node start two")))
