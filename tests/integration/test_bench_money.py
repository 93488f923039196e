"""The benchmarks of ledger, channel and audit run to their ends and say what they promise; not how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *words: str) -> Any:
    """Runs a benchmark, which checks every receipt and every book it makes, and returns its report."""
    done = subprocess.run(
        [sys.executable, "-m", *words, "--json"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "BTT_BENCH_DIR": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir()), "it left something behind"
    return json.loads(done.stdout)


def test_the_ledger_beside_raw_storage_and_bare_calls(tmp_path: Path) -> None:
    found = run(tmp_path, "bench.ledger", "--quick", "--rounds", "1", "--seconds", "1")
    claims = {
        "vs_raw_commit",
        "vs_raw_batched",
        "vs_plain_batched",
        "signed_vs_raw_batched",
        "p99_vs_bare_rpc",
    }
    assert found["ratios"].keys() == found["spread"].keys() == claims
    assert {name: runs[0]["operations"] for name, runs in found["runs"].items()} == {
        "ledger, 1 client": 300,
        "raw, 1 a commit": 300,
        "ledger, 256 clients": 256 * 12,
        "books, 256 clients": 256 * 12,
        "raw, 512 a commit": 256 * 12,
        "plain, 512 a commit": 256 * 12,
        "ledger, gRPC": 64 * 15,
        "bare RPC": 64 * 15,
    }
    for name in ("ledger, gRPC", "bare RPC"):
        (called,) = found["runs"][name]
        assert 0 < called["p50"] <= called["p99"]
        assert called["cpu"].keys() == {"server", "clients"}
    assert found["facts"]["paced"].keys() >= {"p50_ms", "p99_ms", "pages_added_by_checkpoints"}
    assert found["facts"]["targets"].keys() == {"vs_raw_commit", "vs_raw_batched", "paced_p99_ms"}


def test_both_sides_of_a_channel_beside_raw_signatures(tmp_path: Path) -> None:
    found = run(tmp_path, "bench.channel", "--rounds", "1", "--each", "2")
    assert found["ratios"].keys() == {"vs_raw_verify", "vs_raw_sign"}
    assert {runs[0]["operations"] for runs in found["runs"].values()} == {512}


def test_the_audit_of_a_journal(tmp_path: Path) -> None:
    found = run(tmp_path, "bench.audit", "--entries", "6000")
    assert found["ratios"].keys() == {"vs_raw_verify", "memory_growth"}
    assert found["facts"]["entries"] == 6000
    assert found["facts"]["peak_anonymous_bytes"] > 0
