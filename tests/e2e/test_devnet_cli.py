"""`btt devnet` as a person runs it: it stays when the command ends, and leaves nothing when it is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("libtorrent", reason="the node's parts are not installed")

DAY = 86_400_000


class Standing:
    """A devnet in a folder of a test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "net"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("BTT_")}
        self.environment = {**kept, "HOME": str(root), "BTT_DEVNET": str(self.folder)}

    def btt(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "btt.sdk.cli", *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, env=self.environment,
            cwd=self.root, timeout=120, check=check,
        )  # fmt: skip

    def json(self, *words: str) -> dict[str, Any]:
        found = json.loads(self.btt(*words, "--json").stdout)
        assert isinstance(found, dict)
        return found

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("HOME") == str(self.root)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Standing]:
    made = Standing(tmp_path)
    yield made
    for process in made.processes():
        process.kill()


def pids(found: dict[str, Any]) -> list[int]:
    return [found["ledger"]["pid"], *(node["pid"] for node in found["nodes"])]


def test_a_dapp_pays_a_devnet_whose_month_passes_in_a_moment(net: Standing) -> None:
    printed = net.btt("devnet", "up", "--nodes", "2").stdout
    variables = dict(line.removeprefix("export ").split("=", 1) for line in printed.splitlines())
    assert set(variables) == {"BTT_LEDGER", "BTT_NODES", "BTT_WALLET", "BTT_CLOCK"}
    assert variables["BTT_NODES"].count("btt://") == 2
    before = net.json("devnet", "status")
    assert before["running"]
    assert len(net.processes()) == 3, "they live on"
    for words in ((), ("--nodes", "2")):
        assert net.json("devnet", "up", *words) | {"time_ms": 0} == before | {"time_ms": 0}

    (net.root / "film").write_bytes(os.urandom(300_000))
    infohash = net.json("content", "publish", "film", "--node", str(net.folder / "node-1"))["infohash"]
    first = variables["BTT_NODES"].split(",")[0]
    net.environment |= {**variables, "BTT_NODES": first}
    net.btt("devnet", "advance", "30d")
    after = net.json("devnet", "status")
    assert after["ahead_ms"] == 30 * DAY
    # The node's offer of a month ago is long over; the client and the node are in the same month.
    net.btt("content", "fetch", infohash, "--budget", "1 BTT", "--dest", "got", "--yes")
    assert (net.root / "got" / "film").read_bytes() == (net.root / "film").read_bytes()
    assert net.json("ledger", "status")["time_ms"] >= after["time_ms"]

    address = net.json("wallet", "balance")["address"]
    balance = int(net.json("wallet", "balance")["balance"])
    net.btt("devnet", "faucet", address, "5 BTT")
    assert int(net.json("wallet", "balance")["balance"]) == balance + 5_000_000

    net.btt("devnet", "down")
    assert net.processes() == []
    assert not net.folder.exists()
    assert sorted(path.name for path in net.root.iterdir()) == ["film", "got"]
    gone = net.btt("devnet", "status", check=False)
    assert gone.returncode == 3
    assert "btt devnet up" in gone.stderr


def test_what_crashed_is_shown_and_comes_back_where_it_was(net: Standing) -> None:
    before = net.json("devnet", "up")
    for pid in pids(before):
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([process for process in net.processes() if process.pid == pid], timeout=30)
    crashed = net.json("devnet", "status")
    assert not crashed["running"]
    assert [part["running"] for part in (crashed["ledger"], *crashed["nodes"])] == [False, False]
    assert net.btt("devnet", "status").stdout.count("CRASHED") == 2
    again = net.json("devnet", "up")
    assert again["running"]
    assert again["environment"] == before["environment"], "the same addresses"
    assert not set(pids(again)) & set(pids(before))
    other = net.btt("devnet", "up", "--nodes", "3", check=False)
    assert other.returncode == 3
    assert "has 1 node, not 3. Say --nodes 1 or nothing" in other.stderr
    node = psutil.Process(again["nodes"][0]["pid"])
    net.btt("node", "stop", str(net.folder / "node-1"))
    node.wait(30)  # its books are closed, and then it ends
    shown = net.btt("devnet", "status").stdout
    assert "node-1   stopped  btt://" in shown
    assert "CRASHED" not in shown
    net.btt("devnet", "down")
    assert net.processes() == []


def test_it_never_takes_a_folder_that_holds_something_else(net: Standing) -> None:
    net.folder.mkdir()
    (net.folder / "thesis").write_text("irreplaceable")
    for words in (("up",), ("down",)):
        assert net.btt("devnet", *words, check=False).returncode == 3
    assert (net.folder / "thesis").read_text() == "irreplaceable"


def test_what_does_not_start_leaves_nothing(net: Standing) -> None:
    failed = net.btt("devnet", "up", "--service", "nonesuch", check=False)
    assert failed.returncode == 1
    assert '"nonesuch" is configured but not installed' in failed.stderr
    assert net.processes() == []
    assert list(net.root.iterdir()) == []
