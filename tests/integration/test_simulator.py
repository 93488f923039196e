"""The whole payment system under seeds: loss, duplicates, crashes at every commit, old copies, cheats.

A failing seed prints how to play it again, and the end of its trace.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from sim.world import Outcome, play

SEEDS = range(1, 201)
pytestmark = pytest.mark.timeout(900)  # all seeds are played before the first test
TESTS = Path(__file__).parent.parent


def report(outcome: Outcome) -> str:
    return "\n".join(
        (
            f"{outcome.violation}",
            f"again: PYTHONPATH=tests python -m sim --seed {outcome.seed} --trace",
            *outcome.tail,
        )
    )


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    # Spawned: what this process has started must not be in the copies.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        return list(pool.map(play, [*SEEDS, secrets.randbits(48)], chunksize=5))


def test_nothing_that_must_hold_breaks_under_any_seed(outcomes):
    failed = [outcome for outcome in outcomes if outcome.violation]
    assert not failed, report(failed[0])


def test_the_seeds_crash_everybody_around_everything_that_commits_or_is_sent(outcomes):
    reached: Counter[str] = sum((outcome.coverage for outcome in outcomes), Counter())
    for party in ("ledger", "node", "payer", "tower", "bank"):
        assert any(place.startswith(f"{party}: after") for place in reached), party
    for party in ("ledger", "node", "payer"):
        for moment in ("before commit", "after commit"):
            assert reached[f"{party}: {moment}"], (party, moment)
    for place in (
        "payer: before OpenChannel",
        "payer: after Pay message",
        "node: before answer Pay",
        "node: before answer Open",
        "ledger: after answer Transfer",
        "ledger: rolled back",
        "ledger: recovered",
        "ledger: long",
        "node: away",
        "node: bans",
        "node: long",
        "node: put back",
        "payer: long",
        "payer: put back",
        "payer: topped up",
    ):
        assert reached[place], place


def test_one_seed_is_one_story_in_every_process():
    def told(hash_seed: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "sim", "--seed", "7", "--trace"],
            env=os.environ | {"PYTHONPATH": str(TESTS), "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        return done.stdout.splitlines()[:-1]  # the last line has the time that it took

    first = told("1")
    assert len(first) > 200
    assert first == told("2")


BROKEN = """
import sys
from btt.services.ledger import store
store._check_mark = lambda connection, path: None
from sim.__main__ import main
sys.exit(main())
"""


def test_a_violation_is_reported_with_its_seed():
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, "--seed", "1", "--seeds", str(len(SEEDS))],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    *fine, violation = [line for line in done.stdout.splitlines() if line.startswith("seed ")]
    assert all("all is well" in line for line in fine)
    assert f"seed {len(fine) + 1}: " in violation
    # Where the copy is of before a recovery, its key is another, and that is found first.
    assert "older than its mark" in violation or "current operator key" in violation
    assert "!" in done.stdout.split(violation)[1]  # the trace marks what went wrong
