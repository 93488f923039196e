"""Processes that are measured, and how the children among them talk to the harness.

A child follows a small protocol on its standard streams, one JSON object a line: it prints
`{"event": "ready", ...}`, waits for a line (`go`), works, prints `{"event": "done", "seconds": s,
"bytes": n}`, and stays until its standard input ends. So the harness can read the CPU clock of
every process around the work alone, and a child never outlives the harness.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SAMPLE_SECONDS = 0.02
"""How often the anonymous memory of every child is read."""

ROOT = Path(__file__).resolve().parent.parent


class ChildFailed(Exception):
    """A child process died, stayed silent or printed something else than was agreed."""


def cpu_seconds(pid: int) -> float:
    """Returns user and system time that a process used so far, all its threads, ended ones too."""
    # The kernel's clock id of another process's CPU time (clock_getcpuclockid(3)): nanoseconds, where
    # /proc/<pid>/stat has ticks of 10 ms.
    return time.clock_gettime((~pid << 3) | 2)


def anonymous_bytes(pid: int) -> int:
    """Returns RssAnon of a process; mapped and cached file pages are not the process's own."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0


def private_bytes(pid: int) -> int:
    """Returns the anonymous memory of a process, shared pages by its share of them.

    Unlike `anonymous_bytes` it counts once what a process and its fork hold, until that one runs
    another program; the kernel walks the page tables for it.
    """
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                return int(line.split()[1]) << 10
    return 0


class Watched:
    """A process that takes part in a run: its CPU clock, and its peak of anonymous memory while watched.

    Args:
        role: Name in tables, for example `server`.
        pid: Of a process that outlives the watching.
    """

    def __init__(self, role: str, pid: int) -> None:
        self.role = role
        self.pid = pid
        self._peak = 0
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, anonymous_bytes(self.pid))

    def cpu(self) -> float:
        return cpu_seconds(self.pid)

    def peak(self) -> int:
        """Returns the highest RssAnon seen so far, bytes."""
        return max(self._peak, anonymous_bytes(self.pid))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._sampler.join()


class Child(Watched):
    """A child process and its messages.

    Args:
        role: Name in tables, for example `server`.
        module: Module to run with `python -m`.
        arguments: Its command line.
        timeout: Longest silence allowed while a message is awaited, seconds.
    """

    def __init__(self, role: str, module: str, arguments: Sequence[str], *, timeout: float = 300) -> None:
        self._module = module
        self._timeout = timeout
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        super().__init__(role, self.process.pid)

    def tell(self, line: str = "go") -> None:
        """Sends one line to the child."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def expect(self, event: str) -> dict[str, Any]:
        """Waits for one message.

        Raises:
            ChildFailed: The child ended, said something else, or nothing within the time.
        """
        assert self.process.stdout is not None
        watchdog = threading.Timer(self._timeout, self.process.kill)
        watchdog.start()
        try:
            line = self.process.stdout.readline()
        finally:
            watchdog.cancel()
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict) or message.get("event") != event:
            raise ChildFailed(f"{self._module} ({self.role}) was to say {event!r}, it said {line!r}.")
        return message

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        for end in (process.terminate, process.kill):
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                end()
        process.wait()
        process.stdout.close()


def say(event: str, **values: Any) -> None:
    """Prints one message of a child to the harness."""
    print(json.dumps({"event": event, **values}), flush=True)


def heard() -> bool:
    """Waits for the harness's next line; false when the harness is gone or done."""
    return bool(sys.stdin.readline())
