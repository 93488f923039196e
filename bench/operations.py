"""Runs that are counted in operations: how many a second, how long each took, what each cost."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench.harness import Ratio, Results, report_ratios


@dataclass(frozen=True, slots=True)
class Operations:
    """What one contestant did in one round.

    Args:
        seconds: Wall time of the work.
        operations: How many were done.
        cpu: CPU seconds of each role during the work.
        p50: Median time of one operation, seconds; 0 where they are not told apart.
        p99: 99th percentile of the same.
        extra: Other figures of the contestant's own.
    """

    seconds: float
    operations: int
    cpu: Mapping[str, float]
    p50: float = 0.0
    p99: float = 0.0
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.operations / self.seconds

    @property
    def per_cpu(self) -> float:
        """Operations per CPU second, all roles together: the rate of one core."""
        return self.operations / sum(self.cpu.values())


def percentile(times: Sequence[float], share: float) -> float:
    """Returns the time within which `share` of the operations were done (nearest rank)."""
    return sorted(times)[max(0, math.ceil(share * len(times)) - 1)]


class Clock:
    """Wall and CPU time of this process around some work.

    What was made before the work is put out of the garbage collector's sight: it is the benchmark's.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        gc.collect()
        gc.freeze()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        gc.unfreeze()

    def run(self, operations: int, times: Sequence[float] = (), **extra: float) -> Operations:
        """Returns the run of one process that was timed."""
        return Operations(
            self.seconds,
            operations,
            {"process": self.cpu},
            percentile(times, 0.5) if times else 0.0,
            percentile(times, 0.99) if times else 0.0,
            extra,
        )


def report(
    title: str,
    results: Results[Operations],
    ratios: Mapping[str, Ratio],
    *,
    facts: Mapping[str, object] | None = None,
) -> None:
    """Prints the contestants and their ratios as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=title)
    for column in ("contestant", "operations/s (min-max)", "CPU us/operation", "p50 ms", "p99 ms"):
        table.add_column(column)
    for name, runs in results.runs.items():
        rates = sorted(run.rate for run in runs)
        cpu = {
            role: results.median(name, lambda run, role=role: run.cpu[role] * 1e6 / run.operations)  # type: ignore[misc]
            for role in results.roles(name)
        }
        table.add_row(
            name,
            f"{results.median(name, lambda run: run.rate):,.0f} ({rates[0]:,.0f}-{rates[-1]:,.0f})",
            ", ".join(f"{role} {value:.0f}" for role, value in cpu.items()),
            *(f"{value * 1e3:.2f}" if value else "" for value in _times(results, name)),
        )
    console.print(table)
    report_ratios(console, ratios, facts=facts)


def _times(results: Results[Operations], name: str) -> tuple[float, float]:
    return results.median(name, lambda run: run.p50), results.median(name, lambda run: run.p99)


def missed(
    found: Mapping[str, Ratio], least: Mapping[str, float], most: Mapping[str, float] | None = None
) -> list[str]:
    """Returns the names of the ratios that miss their target."""
    low = [name for name, bound in least.items() if name in found and found[name].median < bound]
    return low + [
        name for name, bound in (most or {}).items() if name in found and found[name].median > bound
    ]
