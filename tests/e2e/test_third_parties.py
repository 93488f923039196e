"""Services of third parties: made from the template, installed beside the node, called and paid by dApps."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

pytest.importorskip("libtorrent", reason="the node's parts are not installed")

from btt.sdk.clock import SharedClock
from btt.sdk.testing import Devnet

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
NAMES = ("acme-words", "dataset-query", "message-relay", "note-pocket")


class Place:
    """Where four distributions are installed, apart from the environment of the tests."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.site = root / "site"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("BTT_")}
        self.environment = {**kept, "PYTHONPATH": str(self.site), "HOME": str(root)}

    def python(self, *words: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, cwd=self.root, timeout=170,
            env={**self.environment, **environment}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def btt(self, *words: str, **environment: str) -> str:
        return self.python("-m", "btt.sdk.cli", *words, **environment)

    def dapp(self, name: str, *words: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(EXAMPLES / name / "dapp.py"), *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.root,
            env={**self.environment, **environment},
        )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = Place(tmp_path_factory.mktemp("third"))
    made.btt("plugin", "new", "acme-words")
    folders = [made.root / "acme-words", *(EXAMPLES / name for name in NAMES[1:])]
    made.python(
        "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check",
        "--target", str(made.site), *map(str, folders),
    )  # fmt: skip
    return made


def test_what_is_installed_is_listed_with_its_origin(place: Place) -> None:
    found = json.loads(place.btt("plugin", "list", "--json"))["services"]
    assert {(row["service"], row["distribution"]) for row in found} >= {
        ("content", "btt-services"),
        *((name, name) for name in NAMES),
    }


@pytest.mark.parametrize("name", NAMES)
def test_it_conforms(place: Place, name: str) -> None:
    found = json.loads(place.btt("plugin", "check", name, "--json"))
    assert found["ok"]
    assert len(found["findings"]) == 9


@pytest.mark.parametrize("name", NAMES)
def test_its_own_test_passes(place: Place, name: str) -> None:
    folder = place.root / name if name == "acme-words" else EXAMPLES / name
    place.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder),
                 "-c", str(folder / "pyproject.toml"), str(folder / "tests"))  # fmt: skip


def test_generated_code_is_what_the_proto_makes(place: Place, tmp_path: Path) -> None:
    for name in NAMES[1:]:
        copy = tmp_path / name
        shutil.copytree(EXAMPLES / name, copy)
        place.btt("plugin", "protos", str(copy))
        for made in copy.rglob("*_pb2*.py*"):
            if made.suffix != ".pyc":
                assert made.read_bytes() == (EXAMPLES / name / made.relative_to(copy)).read_bytes(), made


@pytest.mark.parametrize("name", ["acme words", "Acme", "9lives", "json", "class", "../up"])
def test_a_name_that_does_not_do_is_refused(tmp_path: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "btt.sdk.cli", "plugin", "new", name],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_service_without_its_generated_code_is_told_what_to_do(place: Place, tmp_path: Path) -> None:
    copy = tmp_path / "site"
    shutil.copytree(place.site, copy)
    for made in copy.glob("acme_words/v1/*_pb2*"):
        made.unlink()
    done = subprocess.run(
        [sys.executable, "-m", "btt.sdk.cli", "plugin", "check", "acme-words"],
        capture_output=True, text=True, check=False, env={**place.environment, "PYTHONPATH": str(copy)},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "btt plugin protos" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_name_that_nodes_know_already_is_refused(place: Place, tmp_path: Path) -> None:
    for name in ("content", "message-relay"):
        done = subprocess.run(
            [sys.executable, "-m", "btt.sdk.cli", "plugin", "new", name, "--dir", str(tmp_path / "new")],
            capture_output=True, text=True, check=False, env=place.environment,
        )  # fmt: skip
        assert done.returncode == 3, done.stderr
    assert list(tmp_path.iterdir()) == []


async def _wallet(place: Place, net: Devnet, name: str) -> dict[str, str]:
    folder = place.root / name
    made = json.loads(place.btt("wallet", "create", "--wallet", str(folder), "--no-password", "--json"))
    await net.fund(made["address"], "10 BTT")
    assert isinstance(net.clock, SharedClock)
    return {
        "BTT_LEDGER": net.ledger_address,
        "BTT_NODES": net.node_address,
        "BTT_WALLET": str(folder),
        "BTT_CLOCK": str(net.clock.path),
    }


async def test_their_dapps_pay_a_node_in_another_process(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(place.site))
    films = tmp_path / "films.sqlite"
    with sqlite3.connect(films) as database:
        database.execute("CREATE TABLE films (title TEXT, year INTEGER)")
        rows = [(f"film {n}", 1990 + n % 10) for n in range(1000)]
        database.executemany("INSERT INTO films VALUES (?, ?)", rows)
    database.close()
    services = {
        "dataset-query": {"path": str(films), "table": "films", "rate": "0.0001 BTT / row"},
        "message-relay": {"rate": "100 base units / byte"},
        "note-pocket": {"keep_rate": "1 base units / byte", "quota": "1 KiB"},
    }
    async with Devnet(services=services) as net:
        ann, bob = [await _wallet(place, net, name) for name in ("ann", "bob")]
        lines = place.python(str(EXAMPLES / "dataset-query" / "dapp.py"), "year", "1999", **ann).splitlines()
        assert lines[0] == "at most 0.1 BTT"
        assert [json.loads(line) for line in lines[1:-2]] == [list(row) for row in rows if row[1] == 1999]
        assert lines[-2:] == ["spent 0.01 BTT", "receipt: paid 10000 base units, counts agree: True"]

        with place.dapp("message-relay", "lobby", **bob) as listening:
            assert _next(listening.stdout) == "* in lobby"
            with place.dapp("message-relay", "lobby", **ann) as speaking:
                assert _next(speaking.stdout) == "* in lobby"
                said, _ = speaking.communicate("hello\nworld!\n", timeout=60)
            assert said == "spent 0.0011 BTT\n"
            assert [_next(listening.stdout), _next(listening.stdout)] == ["hello", "world!"]
            heard, _ = listening.communicate("", timeout=60)
        assert heard == "spent 0.0011 BTT\n"

        pocket = str(EXAMPLES / "note-pocket" / "dapp.py")
        assert place.python(pocket, "buy", "milk", **ann) == "spent 0.000008 BTT\n"
        assert place.python(pocket, **ann) == "buy milk\nspent 0.001 BTT\n"
        assert int((await net.node_status())["captured"]) == 10_000 + 1_100 + 1_100 + 8 + 1_000
        totals = await net.ledger_totals()
        assert totals.is_conserved
        assert totals.open_channels == 0


def _next(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().rstrip("\n")
