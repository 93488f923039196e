"""A disk that fails when a test says so, under real processes; see `faults.c` for how.

A full disk is a real small file system where this machine lets us mount one, and everywhere a quota.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import select
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_FIELDS = ("syncs", "fail_syncs", "error", "hold", "room")
_PLENTY = 1 << 40


def _library(made: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the disk is made to fail by a preloaded library: that takes Linux and a C compiler (cc)")
    source = Path(__file__).with_name("faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", made, source, "-ldl"], check=True)
    return made


class Switch:
    """Says what goes wrong, in every process that shares the control file."""

    def __init__(self, control: Path) -> None:
        self._control = control
        with control.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 4096)

    def close(self) -> None:
        self._page.close()

    def _set(self, field: str, value: int) -> None:
        struct.pack_into("@q", self._page, 8 * _FIELDS.index(field), value)

    def fail_syncs(self, times: int = 1) -> None:
        """Lets the next syncs fail; those after them work again, as they do on a real disk."""
        self._set("error", errno.EIO)
        self._set("fail_syncs", times)

    def fill(self) -> None:
        """Leaves no room: no file can grow."""
        self._set("room", 0)

    def fill_up(self) -> None:
        """Leaves no room even to write over what is there, as where a file system copies on write."""
        self._set("room", -1)

    def free(self) -> None:
        """Makes room again."""
        self._set("room", _PLENTY)

    def hold(self) -> None:
        """Lets the next sync wait; `held` returns when it does, `go` ends it."""
        self._set("hold", 1)

    def held(self) -> None:
        reached = os.open(f"{self._control}.reached", os.O_RDONLY | os.O_NONBLOCK)
        try:
            assert select.select([reached], [], [], 60)[0], "nothing was synced"
        finally:
            os.close(reached)

    def go(self) -> None:
        os.close(os.open(f"{self._control}.go", os.O_WRONLY))


class Disk(Switch):
    """What goes wrong with the files whose path begins with `path`, in processes that get `env`.

    Use it as a context manager.
    """

    def __init__(self, path: Path, control: Path) -> None:
        control.write_bytes(bytes(4096))
        for end in (".reached", ".go"):
            os.mkfifo(f"{control}{end}")
        super().__init__(control)
        self.free()
        self.env = {
            "LD_PRELOAD": str(_library(control.with_suffix(".so"))),
            "FAULTS_PATH": str(path.absolute()),
            "FAULTS_CONTROL": str(control),
        }

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SmallDisk:
    """A real file system of a few MiB on a folder."""

    def __init__(self, folder: Path) -> None:
        self._ballast = folder / "ballast"
        self.env: dict[str, str] = {}

    def fill(self) -> None:
        with suppress(OSError), self._ballast.open("ab", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                with suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass

    def free(self) -> None:
        self._ballast.unlink()


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[SmallDisk]:
    """Mounts a file system on a folder that exists; only root can."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", folder], check=True)
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", folder], check=True)


@functools.cache
def can_mount() -> bool:
    """True where this user may mount a file system."""
    if os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder), 1):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


FULL_DISKS = ["quota", "tmpfs"] if can_mount() else ["quota"]
"""Kinds of full disk that this machine can have."""
