"""The benchmark of content runs to its end and says what it promises; not how fast it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """One run with a small file; every contestant's output is compared with the source."""
    folder = tmp_path_factory.mktemp("bench")
    done = subprocess.run(
        [sys.executable, "-m", "bench.content", "--quick", "--size", "8MiB", "--json"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "BTT_BENCH_DIR": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir()), "it left something behind"
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_it_reports_every_claim_with_its_spread(report: dict[str, dict[str, object]]) -> None:
    claims = {
        *("vs_bare_grpc", "vs_libtorrent", "payment_cpu_overhead"),
        *("known_payer_vs_libtorrent", "known_payer_cpu_overhead"),
        *("least_vs_unpaid", "least_cpu_overhead"),
    }
    assert report["ratios"].keys() == report["spread"].keys() == claims
    assert all(isinstance(ratio, float) for ratio in report["ratios"].values())


def test_every_contestant_delivered_the_whole_file_in_every_round(
    report: dict[str, dict[str, list[dict[str, object]]]],
) -> None:
    assert report["runs"].keys() == {"btt", "btt, known", "unpaid", "least", "bare gRPC", "libtorrent"}
    for runs in report["runs"].values():
        assert [run["bytes"] for run in runs] == [8 << 20] * 2


def test_the_product_was_paid_in_full_and_every_process_was_counted(
    report: dict[str, dict[str, list[dict[str, dict[str, float]]]]],
) -> None:
    for run in report["runs"]["btt"] + report["runs"]["btt, known"]:
        assert run["extra"]["paid"] == -(-(8 << 20) * 10**6 // 2**30)
        for counted in (run["cpu"], run["anonymous"]):
            assert counted.keys() == {"client", "node", "ledger"}
            assert all(value > 0 for value in counted.values())


def test_the_least_payment_keeps_the_rules_of_credit(
    report: dict[str, dict[str, list[dict[str, dict[str, float]]]]],
) -> None:
    for run in report["runs"]["least"]:
        assert run["extra"] == {"paid": 8, "updates": 8}, "a newcomer pays each piece before the next one"


def test_the_benchmark_of_the_platform_reports_what_a_call_and_a_stream_cost(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.platform", "--quick", "--rounds", "1", "--streams", "50", "--json"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "BTT_BENCH_DIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir()), "it left something behind"
    found = json.loads(done.stdout)
    assert found["unary_overhead_us"] == found["unary"]["overhead_us"]
    assert found["streams"]["streams"] == 50
    assert 0 < found["streams"]["fairness"] <= 1
    assert found["streams"]["updates"] > 0, "it was paid under way"


def test_the_kinds_of_calls_are_compared_paid_and_bare(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.content", "--kinds", "--size", "1MiB", "--rounds", "1", "--json"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "BTT_BENCH_DIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir()), "it left something behind"
    kinds = [f"{asked}_{answered}" for asked in ("unary", "stream") for answered in ("unary", "stream")]
    found = json.loads(done.stdout)
    assert found["ratios"].keys() == {f"{k}_{what}" for k in kinds for what in ("vs_bare", "cpu_vs_bare")}
    assert all(ratio > 0 for ratio in found["ratios"].values())
