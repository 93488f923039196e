"""The README's story, told by the README itself: its blocks run in order, as a reader would run them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

pytest.importorskip("libtorrent", reason="the node's parts are not installed")

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"(<!-- not run: [a-z ]+ -->\n)?```(\w+)\n(.*?)```\n", re.DOTALL)
SERVERS = ("btt ledger serve", "btt node start")
# What a reader copies from the output into a variable.
PRINTED = {
    "BTT_LEDGER": r"btt-ledger://[^\s\"]+",
    "BTT_NODES": r"btt://[^\s\"]+",
    "INFOHASH": r"Infohash +([0-9a-f]{64})",
}


@dataclass
class Reader:
    """Somebody with a fresh home folder, who types what the README says."""

    home: Path
    seen: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    servers: list[subprocess.Popen[str]] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("BTT_", "XDG_"))}
        tools = f"{self.tools}{os.pathsep}{kept.get('PATH', os.defpath)}"
        # A port of the default may be taken on this machine.
        free = {"BTT_NODE__NODE__LISTEN": "127.0.0.1:0"}
        return {**kept, "HOME": str(self.home), "PATH": tools, **free, **self.variables}

    @property
    def tools(self) -> Path:
        folder = self.home / "bin"
        folder.mkdir(exist_ok=True)
        script = folder / "btt"
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m btt.sdk.cli "$@"\n')
        script.chmod(0o755)
        return folder

    def run(self, *command: str) -> None:
        done = subprocess.run(
            command, cwd=self.home, env=self.environment(), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        self.seen += done.stdout

    def shell(self, line: str) -> None:
        if line.startswith("export ") and line.endswith("=…"):
            name = line.removeprefix("export ").removesuffix("=…")
            found = re.findall(PRINTED[name], self.seen)
            assert found, f"nothing that was printed is a {name}"
            self.variables[name] = found[-1]
        elif line.startswith(SERVERS):
            words = [sys.executable, "-m", "btt.sdk.cli", *shlex.split(line)[1:], "--stdin-lifeline"]
            server = subprocess.Popen(
                words, cwd=self.home, env=self.environment(), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self.servers.append(server)
            assert server.stdout is not None
            ready = server.stdout.readline()
            assert json.loads(ready)["ready"] is True
            self.seen += ready
        else:
            self.run("bash", "-ec", line)

    def stop(self) -> None:
        for server in reversed(self.servers):
            server.terminate()
            server.communicate(timeout=30)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    made = Reader(tmp_path)
    yield made
    made.stop()
    assert [server.returncode for server in made.servers] == [0] * len(made.servers)
    assert not [process for process in psutil.Process().children(recursive=True) if process.is_running()]


def test_the_readme_tells_the_truth(reader: Reader) -> None:
    ran = 0
    for skipped, language, text in BLOCK.findall(README.read_text("utf-8")):
        if skipped:
            continue
        assert language in ("sh", "python")
        if language == "python":
            reader.run(sys.executable, "-c", text)
        else:
            for line in text.splitlines():
                reader.shell(line)
        ran += 1
    assert ran >= 8
    film = (reader.home / "film.mkv").read_bytes()
    for folder in ("downloads", "from-python", "from-devnet"):
        assert (reader.home / folder / "film.mkv").read_bytes() == film


def test_the_readme_begins_with_the_two_commands() -> None:
    _, _, text = BLOCK.findall(README.read_text("utf-8"))[0]
    assert text.splitlines() == [
        "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[node]' && btt demo",
        "pip install -e '.[node,test]' && pytest",
    ]
