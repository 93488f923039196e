"""Runs contestants against each other so that only their ratio counts.

A shared machine drifts by a factor of two within minutes, so a number from one run
says little. Here all contestants run in alternating rounds (the order is reversed in
every second round), each run is paired with the peer's run of the same round, and
the result is the median of the paired ratios with its spread.

A contestant is one or more child processes (`bench.processes`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from bench.processes import Child, Watched

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Run:
    """What one contestant did in one round.

    Args:
        seconds: Wall time of the work.
        bytes: Bytes of payload delivered.
        cpu: CPU seconds of each role during the work.
        anonymous: Peak RssAnon of each role over its life, bytes.
        extra: Other figures of the contestant's own.
    """

    seconds: float
    bytes: int
    cpu: Mapping[str, float]
    anonymous: Mapping[str, int]
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds

    @property
    def cpu_per_gib(self) -> float:
        """CPU seconds of all roles together per GiB."""
        return sum(self.cpu.values()) * GIB / self.bytes


class Warmth:
    """Keeps memory in the same state for every run: the source cached, enough free pages backed.

    A virtual machine hands free pages back to its host after two seconds, and drops cold cache; whoever
    touches them next pays up to ten times the price of a write, so that whoever is a little slower
    would be slower by half. So a scratch file holds pages, and gives them back bit by bit while the
    contestant runs. Where nothing is handed back this changes nothing.

    Args:
        source: The file that will be read.
        folder: Where the scratch file is made.
    """

    STEP = 64 * MIB
    EVERY_SECONDS = 0.08
    AHEAD = 512 * MIB
    MOST = 2 * GIB

    def __init__(self, source: Path, folder: Path) -> None:
        self._scratch = folder / "warm"
        self._file = self._scratch.open("wb", buffering=0)
        self._left = 0
        with source.open("rb", buffering=0) as reader:
            while block := reader.read(MIB):
                # More would go to the disk, and hold up what is measured.
                for _ in range(2 if self._left < self.MOST else 0):
                    self._left += self._file.write(block)
        for _ in range(self.AHEAD // MIB):
            self._left += self._file.write(bytes(MIB))
        self._stop = threading.Event()
        self._release(self.AHEAD)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _release(self, size: int) -> None:
        self._left = max(0, self._left - size)
        self._file.truncate(self._left)

    def _run(self) -> None:
        while self._left and not self._stop.wait(self.EVERY_SECONDS):
            self._release(self.STEP)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._file.close()
        self._scratch.unlink()


def measure(worker: Child, *others: Watched, source: Path, folder: Path) -> Run:
    """Lets a worker that is ready do its work, and measures it and the processes it works with.

    Args:
        worker: The child that is told to go and says when it is done.
        others: The processes that serve it.
        source: The file that is delivered.
        folder: Where the worker writes it.
    """
    children: tuple[Watched, ...] = (worker, *others)
    with Warmth(source, folder):
        before = [child.cpu() for child in children]
        worker.tell()
        done = worker.expect("done")
        cpu = {child.role: child.cpu() - start for child, start in zip(children, before, strict=True)}
    own = {"event", "seconds", "bytes"}
    return Run(
        seconds=done["seconds"],
        bytes=done["bytes"],
        cpu=cpu,
        anonymous={child.role: child.peak() for child in children},
        extra={name: value for name, value in done.items() if name not in own},
    )


class Measured(Protocol):
    """A run of any contestant: how fast it was, and what it took."""

    @property
    def rate(self) -> float: ...

    @property
    def cpu(self) -> Mapping[str, float]: ...


R = TypeVar("R", bound=Measured)
Contestant = Callable[[Path], R]
"""Does one run; its argument is an empty folder that is removed afterwards."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A median of paired ratios with its spread."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        return cls(statistics.median(values), min(values), max(values))


class Results(Generic[R]):
    """The runs of all contestants, round by round."""

    def __init__(self, runs: Mapping[str, Sequence[R]]) -> None:
        self.runs = runs

    def paired(self, name: str, other: str, value: Callable[[R], float] = lambda run: run.rate) -> Ratio:
        """Compares two contestants round by round.

        Args:
            name: Contestant above the line.
            other: Contestant below the line.
            value: What is compared; the rate unless told otherwise.
        """
        pairs = zip(self.runs[name], self.runs[other], strict=True)
        return Ratio.of([value(mine) / value(theirs) for mine, theirs in pairs])

    def median(self, name: str, value: Callable[[R], float]) -> float:
        return statistics.median(value(run) for run in self.runs[name])

    def roles(self, name: str) -> list[str]:
        return list(self.runs[name][0].cpu)


def alternate(
    contestants: Mapping[str, Contestant[R]],
    *,
    rounds: int,
    parent: Path,
    progress: Callable[[int, str, R], None] | None = None,
) -> Results[R]:
    """Runs all contestants in every round, in reversed order in every second one.

    Args:
        contestants: Name and how to run it.
        rounds: How many runs each contestant gets.
        parent: Folder under which each run gets an empty one of its own.
        progress: Called after each run with round (from 0), name and run.
    """
    runs: dict[str, list[R]] = {name: [] for name in contestants}
    for number in range(rounds):
        order = list(contestants)
        if number % 2:
            order.reverse()
        for name in order:
            folder = Path(tempfile.mkdtemp(prefix="run-", dir=parent))
            try:
                run = contestants[name](folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            runs[name].append(run)
            if progress is not None:
                progress(number, name, run)
    return Results(runs)


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """Gives a temporary folder on a real disk and removes it; `BTT_BENCH_DIR` names its parent."""
    # A tmpfs would make fsync free, which is not what users have.
    folder = Path(tempfile.mkdtemp(prefix="btt-bench-", dir=os.environ.get("BTT_BENCH_DIR", "/var/tmp")))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def random_file(path: Path, size: int) -> Path:
    """Writes a file of random bytes, which is in the page cache afterwards.

    Args:
        path: Where; an existing file is replaced.
        size: Bytes.
    """
    with path.open("wb") as file:
        left = size
        while left:
            left -= file.write(os.urandom(min(left, MIB)))
        file.flush()
        # Else its write-back falls into the first contestant's time.
        os.fsync(file.fileno())
    return path


def report_ratios(
    console: Any, ratios: Mapping[str, Ratio], *, facts: Mapping[str, Any] | None = None
) -> None:
    """Prints ratios as a table, and facts line by line, on a rich console."""
    from rich.table import Table

    if ratios:
        table = Table(title="paired ratios")
        for column in ("ratio", "median", "min", "max"):
            table.add_column(column)
        for name, ratio in ratios.items():
            table.add_row(name, f"{ratio.median:.3f}", f"{ratio.low:.3f}", f"{ratio.high:.3f}")
        console.print(table)
    for name, value in (facts or {}).items():
        console.print(f"{name}: {value}")


def as_json(
    results: Results[Any], ratios: Mapping[str, Ratio], *, facts: Mapping[str, Any] | None = None
) -> str:
    """Returns one JSON object: `ratios` (medians), `spread`, `runs`, `facts`."""
    return json.dumps(
        {
            "ratios": {name: round(ratio.median, 4) for name, ratio in ratios.items()},
            "spread": {name: [round(ratio.low, 4), round(ratio.high, 4)] for name, ratio in ratios.items()},
            "runs": {name: [asdict(run) for run in runs] for name, runs in results.runs.items()},
            "facts": dict(facts or {}),
        }
    )
