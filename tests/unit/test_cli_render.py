"""Sizes, times and progress lines."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest

from btt.sdk.cli import render
from btt.sdk.money import Amount


@dataclass
class Step:
    done_bytes: int
    total_bytes: int
    rate_bytes_s: float = 2.5 * 2**20
    spent: Amount = field(default=Amount(12))
    eta_s: float | None = 65.2


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (25_813_480, "24.6 MiB"),
        (3 * 2**40, "3.0 TiB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert render.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "?"),
        (math.inf, "?"),
        (math.nan, "?"),
        (-1, "0 s"),
        (0.2, "1 s"),
        (59.1, "1:00"),
        (3725, "1:02:05"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert render.duration(seconds) == text


def test_a_line_has_bytes_rate_spent_and_eta() -> None:
    line = render.describe(Step(2**20, 2 * 2**20))
    assert line == "1.0 MiB of 2.0 MiB  2.5 MiB/s  spent 0.000012 BTT  ETA 1:06"


def test_nothing_is_left_at_the_end() -> None:
    assert render.describe(Step(5, 5, eta_s=None)).endswith("ETA 0 s")


def test_a_log_gets_few_lines_however_many_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with render.showing(live=False) as show:
        for done in range(1001):
            show(Step(done, 1000))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("  0 %")
    assert lines[-1].startswith("100 %")


def test_empty_content_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with render.showing(live=False) as show:
        show(Step(0, 0))
    assert capsys.readouterr().out.startswith("100 %")


def test_a_live_display_ends_with_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with render.showing(live=True) as show:
        show(Step(0, 2**20))
        show(Step(2**20, 2**20))
    assert "1.0 MiB of 1.0 MiB" in capsys.readouterr().out


def test_names_from_the_other_side_are_harmless() -> None:
    assert render.printable("a\x1b[31mb\nc") == "a?[31mb?c"
