"""`btt demo` as a person runs it: it adds up, and whatever ends it, nothing is left."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from btt.sdk.testing.scratch import make_scratch

pytest.importorskip("libtorrent", reason="the node's parts are not installed")

DEMO = [sys.executable, "-m", "btt.sdk.cli", "demo"]
FIELDS = {
    "bytes", "seconds", "paid", "spent", "earned", "content_sha256_ok", "supply_conserved", "channels_closed",
    "meters_agree", "nodes",
}  # fmt: skip
CHECKS = {"content_sha256_ok", "supply_conserved", "channels_closed", "meters_agree"}
RUN = 1 << 20


class Place:
    """A private temporary folder; every process of a demo is known by it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.home = folder / "home"
        self.home.mkdir()

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("BTT_", "XDG_"))}
        return {**kept, "TMPDIR": str(self.temporary), "HOME": str(self.home), "PYTHONUNBUFFERED": "1"}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*DEMO, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment(),
            cwd=self.folder,
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*DEMO, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**self.environment(), **environment},
            cwd=self.folder,
            timeout=120,
            check=False,
        )

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TMPDIR") == str(self.temporary):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def files(self) -> list[Path]:
        return [*self.temporary.rglob("*"), *self.home.rglob("*")]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    for process in made.processes():
        process.kill()


def test_it_adds_up_and_leaves_nothing(place: Place) -> None:
    done = place.run("--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == FIELDS
    assert found["bytes"] > 2**20
    assert 0 < found["seconds"] < 60
    assert found["earned"] == found["paid"] == -(-found["bytes"] * 10**6 // 2**30)
    assert all(found[name] is True for name in CHECKS)
    [node] = found["nodes"]
    assert (node["served_bytes"], node["earned"]) == (found["bytes"], found["earned"])
    assert node["bought_bytes"] == node["spent"] == found["spent"] == 0
    assert done.stderr == ""
    assert place.processes() == []
    assert place.files() == []


def test_three_nodes_sell_it_and_one_is_killed_midway(place: Place) -> None:
    done = place.run("--nodes", "3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == FIELDS
    assert all(found[name] is True for name in CHECKS)
    assert [node["killed"] for node in found["nodes"]] == [False, False, True]
    first, *others = found["nodes"]
    cost = -(-found["bytes"] * 10**6 // 2**30)
    assert [(node["bought_bytes"], node["spent"]) for node in others] == [(found["bytes"], cost)] * 2
    assert first["bought_bytes"] == first["spent"] == 0
    assert sum(node["spent"] for node in found["nodes"]) == found["spent"]
    assert sum(node["earned"] for node in found["nodes"]) == found["earned"] == found["paid"] + found["spent"]
    assert cost <= found["paid"] <= cost + 10**6 * len(others) // 1024
    to_client = [first["served_bytes"] - 2 * found["bytes"], *(node["served_bytes"] for node in others)]
    assert min(to_client) > RUN, "all of them worked, also the one that was killed"
    assert max(to_client) < found["bytes"] * 3 // 4, "and none did it nearly alone"
    for node, served in zip((first, *others), to_client, strict=True):
        earned = node["earned"] - (2 * cost if node is first else 0)
        assert abs(earned - served * 10**6 // 2**30) <= 10**6 // 1024
    assert done.stderr == ""
    assert place.processes() == []
    assert place.files() == []


def test_it_sends_the_file_of_ones_choice_and_tells_the_story(place: Place) -> None:
    data = random.Random(7).randbytes(3 * 2**20 + 17)
    source = place.folder / "three and a bit.bin"
    source.write_bytes(data)
    done = place.run("--file", source.name)
    assert done.returncode == 0, done.stderr
    assert f"Node served{'':23}{len(data)} bytes" in done.stdout
    assert re.search(r"100 %  3\.0 MiB of 3\.0 MiB  .*/s  spent 0\.00293 BTT  ETA 0 s", done.stdout)
    assert " NO" not in done.stdout
    assert hashlib.sha256(source.read_bytes()).digest() == hashlib.sha256(data).digest()
    assert place.files() == []


def test_a_users_configuration_does_not_reach_it(place: Place) -> None:
    done = place.run(
        "--json", BTT_NODES="btt://nobody@127.0.0.1:1", BTT_LEDGER="nowhere", BTT_NODE__NODE__LISTEN="odd"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["missing", "empty", "folder"])
def test_what_cannot_be_sent_is_refused_at_once(place: Place, name: str) -> None:
    (place.folder / "empty").touch()
    (place.folder / "folder").mkdir()
    done = place.run("--file", name, "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["reason"] == "CONFIG"
    assert place.files() == []


def test_a_failing_child_is_shown_with_its_log_and_nothing_is_left(place: Place) -> None:
    # A link cannot be published; the child that publishes says so.
    (place.folder / "source").write_bytes(b"data")
    (place.folder / "link").symlink_to("source")
    done = place.run("--file", "link", "--json")
    assert done.returncode == 1
    assert "is a link" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["reason"] == "INTERNAL"
    assert place.processes() == []
    assert place.files() == []


@pytest.mark.parametrize(
    ("line", "number"),
    [
        (1, signal.SIGINT),
        (2, signal.SIGINT),
        (4, signal.SIGINT),
        (6, signal.SIGINT),
        (4, signal.SIGTERM),
    ],
)
def test_ctrl_c_leaves_no_process_and_no_file(place: Place, line: int, number: int) -> None:
    with place.start() as demo:
        assert demo.stdout is not None
        for _ in range(line):
            assert demo.stdout.readline()
        demo.send_signal(number)
        rest = demo.stdout.read()
    assert demo.returncode == 130, rest
    assert "Traceback" not in rest
    assert place.processes() == []
    assert place.files() == []


@pytest.mark.parametrize("seed", range(4))
def test_ctrl_c_at_any_moment_leaves_nothing(place: Place, seed: int) -> None:
    with place.start() as demo:
        assert demo.stdout is not None
        try:
            demo.wait(timeout=random.Random(seed).uniform(0.0, 4.0))
        except subprocess.TimeoutExpired:
            # An impatient person presses it twice.
            demo.send_signal(signal.SIGINT)
            demo.send_signal(signal.SIGINT)
        demo.stdout.read()
    assert place.processes() == []
    assert place.files() == []


@pytest.mark.parametrize("line", [1, 3, 4])
def test_kill_9_leaves_no_process(place: Place, line: int) -> None:
    with place.start() as demo:
        assert demo.stdout is not None
        for _ in range(line):
            assert demo.stdout.readline()
        demo.kill()
        demo.wait()
        # Without their parent they start no others, so these are all there will ever be.
        children = place.processes()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


def test_the_next_one_removes_what_a_killed_one_left_and_no_other(place: Place) -> None:
    foreign = place.temporary / "btt-devnet-of-something-else"
    foreign.mkdir()
    with place.start() as first, place.start() as killed:
        for demo in (first, killed):
            assert demo.stdout is not None
            assert demo.stdout.readline()
            assert demo.stdout.readline().startswith("Ledger")
            demo.send_signal(signal.SIGSTOP)  # or it may be done before the other one has begun
        lives = {path.parent for path in place.temporary.glob("*/alive")}
        children = psutil.Process(killed.pid).children(recursive=True)
        killed.kill()
        killed.wait()
        psutil.wait_procs(children, timeout=30)
        with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(place.temporary))
            make_scratch(stack)
        [kept] = {path.parent for path in place.temporary.glob("*/alive")}
        assert kept in lives
        first.send_signal(signal.SIGINT)
        first.send_signal(signal.SIGCONT)
        first.communicate()
    assert place.processes() == []
    assert place.files() == [foreign]


def test_a_terminal_sees_a_live_bar(place: Place) -> None:
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        DEMO, stdin=terminal, stdout=terminal, stderr=terminal,
        env={**place.environment(), "TERM": "xterm-256color", "COLUMNS": "120"},
    ) as demo:  # fmt: skip
        os.close(terminal)
        seen = b""
        while True:
            try:
                part = os.read(controller, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen += part
    os.close(controller)
    assert demo.returncode == 0
    assert "━".encode() in seen
    assert re.search(rb"MiB of .* MiB .*/s  spent .* BTT  ETA", seen)
    assert b"yes" in seen
