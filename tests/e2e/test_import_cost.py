"""What starting up costs, in CPU time: a dApp's import and a person's first command."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

import pytest


def cpu_seconds(*arguments: str) -> float:
    """CPU time of one Python process from start to end, user and system."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, env=environment
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("limit", "arguments"),
    [
        (0.3, ("-c", "import btt.sdk")),
        (0.4, ("-m", "btt.sdk.cli", "--help")),
    ],
    ids=["import", "help"],
)
def test_starting_is_cheap(limit: float, arguments: tuple[str, ...]) -> None:
    cpu_seconds(*arguments)  # the first one writes bytecode
    assert statistics.median(cpu_seconds(*arguments) for _ in range(3)) <= limit


@pytest.mark.parametrize(
    "arguments", ["import btt.sdk", "from btt.sdk.cli import main; main(['--help'])"], ids=["import", "help"]
)
def test_nothing_heavy_is_imported(arguments: str) -> None:
    heavy = (
        "grpc",
        "libtorrent",
        "bip_utils",
        "cryptography",
        "sqlite3",
        "uvloop",
        "btt.services",
        "btt.node",
    )
    code = (
        "import sys\n"
        f"try:\n    {arguments}\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.strip() == "[]"
