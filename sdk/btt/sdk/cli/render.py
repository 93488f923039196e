"""How the commands show sizes, times and progress: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

from btt.sdk.money import Amount

if TYPE_CHECKING:
    from btt.sdk.selection import Rejection

_SIZES: Final = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_LINES: Final = 10
"""How many lines of progress a log gets."""


class Step(Protocol):
    """What a transfer says about itself now and then."""

    @property
    def done_bytes(self) -> int:
        """Bytes that are verified and on disk."""

    @property
    def total_bytes(self) -> int:
        """Bytes in all."""

    @property
    def rate_bytes_s(self) -> float:
        """Bytes a second."""

    @property
    def spent(self) -> Amount:
        """Paid so far."""

    @property
    def eta_s(self) -> float | None:
        """Seconds left; None while unknown."""


def size(count: float) -> str:
    """Writes a number of bytes: "24.6 MiB"."""
    for unit, name in _SIZES:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} bytes"


def duration(seconds: float | None) -> str:
    """Writes a time: "8 s", "2:05", "1:02:05"; "?" while it is unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    whole = math.ceil(max(0.0, seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def printable(text: str) -> str:
    """Makes text from the other side harmless: a terminal obeys control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def rejections(found: Iterable[Rejection]) -> list[dict[str, str]]:
    """Writes for machines why nodes are not used."""
    return [{"node": each.node, "cause": str(each.cause), "detail": each.detail} for each in found]


def describe(step: Step) -> str:
    """Writes one line about a transfer: bytes, rate, spent, ETA."""
    left = 0.0 if step.done_bytes == step.total_bytes else step.eta_s
    return (
        f"{size(step.done_bytes)} of {size(step.total_bytes)}  {size(step.rate_bytes_s)}/s"
        f"  spent {step.spent}  ETA {duration(left)}"
    )


def is_terminal() -> bool:
    """Tells whether a person watches standard output."""
    return sys.stdout.isatty()


@contextmanager
def showing(*, live: bool) -> Iterator[Callable[[Step], None]]:
    """Shows progress; call what it gives with every step.

    Args:
        live: Draw a bar that moves; otherwise write about ten lines.
    """
    if live:
        with _bar() as show:
            yield show
        return
    shown = -1

    def line(step: Step) -> None:
        nonlocal shown
        tenth = step.done_bytes * _LINES // step.total_bytes if step.total_bytes else _LINES
        if tenth > shown:
            shown = tenth
            share = step.done_bytes * 100 // step.total_bytes if step.total_bytes else 100
            sys.stdout.write(f"{share:3d} %  {describe(step)}\n")
            sys.stdout.flush()

    yield line


@contextmanager
def _bar() -> Iterator[Callable[[Step], None]]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (BarColumn(bar_width=30), TaskProgressColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as progress:
        task = progress.add_task("", total=None)

        def draw(step: Step) -> None:
            progress.update(
                task, completed=step.done_bytes, total=step.total_bytes, description=describe(step)
            )

        yield draw
