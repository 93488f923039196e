"""The tree of commands: plugins are listed without being imported, and loaded when called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from btt.sdk.cli import commands, main

Install = Callable[..., None]

GOOD = '''"""`btt {name}`: greet somebody."""
import typer
app = typer.Typer()

@app.command()
def greet() -> None:
    typer.echo("hello from a plugin")
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    points: list[EntryPoint] = []
    modules: list[str] = []

    def add(name: str, source: str) -> None:
        module = f"btt_test_plugin_{len(points)}"
        (tmp_path / f"{module}.py").write_text(source)
        points.append(EntryPoint(name, f"{module}:app", commands.GROUP))
        modules.append(module)

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(commands, "entry_points", lambda **_: points)
    commands.plugins.cache_clear()
    yield add
    commands.plugins.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


def test_a_plugin_runs_under_its_name(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("hello", GOOD)
    assert run("hello") == 0
    assert capsys.readouterr().out == "hello from a plugin\n"


def test_a_dotted_name_adds_to_a_group(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("wallet.hello", GOOD)
    assert run("wallet", "hello") == 0
    assert capsys.readouterr().out == "hello from a plugin\n"
    assert run("wallet", "--help") == 0
    listed = capsys.readouterr().out
    assert "hello" in listed
    assert "create" in listed
    assert run("hello") == 2


def test_help_lists_plugins_without_importing_them(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("hello", GOOD.format(name="hello") + "\nraise RuntimeError('imported')")
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert "hello" in out
    assert "Greet somebody." in out
    assert "btt_test_plugin_0" not in sys.modules


@pytest.mark.parametrize("source", ["def broken(:", "", "app = 5"])
def test_help_survives_a_plugin_that_cannot_be_read(
    install: Install, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    install("odd", source)
    assert run("--help") == 0
    assert "odd" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["def broken(:", "", "app = 5", "raise RuntimeError('no')"])
def test_a_broken_plugin_is_an_error_that_names_it(
    install: Install, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    install("odd", source)
    assert main(["odd"]) == 3
    err = capsys.readouterr().err
    assert "`btt odd`" in err
    assert "Traceback" not in err


def test_a_missing_part_says_how_to_get_it(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("parted", "import not_installed_anywhere")
    assert main(["parted"]) == 3
    err = capsys.readouterr().err
    assert "not_installed_anywhere" in err
    assert "pip install" in err


def test_a_plugin_cannot_take_over_a_command(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("wallet", GOOD)
    assert run("wallet", "--help") == 0
    assert "balance" in capsys.readouterr().out


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("walet") == 2
    assert "walet" in capsys.readouterr().err


def test_the_installed_tree_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    commands.plugins.cache_clear()
    for words in (
        "demo", "wallet create", "wallet address", "wallet balance", "content publish", "content quote",
        "content fetch", "ledger init", "ledger serve", "node init", "node start", "node status",
    ):  # fmt: skip
        assert run(*words.split(), "--help") == 0
        assert words in capsys.readouterr().out
