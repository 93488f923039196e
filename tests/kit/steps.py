"""Acts at one step of a program, such as stopping it dead: before or after a function's nth call."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CRASHED = 9
"""The exit code of a program that was stopped."""


@dataclass(frozen=True)
class Step:
    """Where to stop."""

    owner: Any
    name: str
    nth: int = 4
    after: bool = False


def nothing(*_: object, **__: object) -> None:
    """Does nothing."""


def hook(owner: Any, name: str, before: Callable[..., None], after: Callable[..., None]) -> None:
    """Runs something before and after a function, whichever kind it is."""
    inner = getattr(owner, name)
    if inspect.iscoroutinefunction(inner):

        @functools.wraps(inner)
        async def wrapped(*args, **options):
            before(*args)
            result = await inner(*args, **options)
            after(result, *args)
            return result
    else:

        @functools.wraps(inner)
        def wrapped(*args, **options):
            before(*args)
            result = inner(*args, **options)
            after(result, *args)
            return result

    setattr(owner, name, wrapped)


def act_at(step: Step, act: Callable[[], object]) -> None:
    """Does something at a step."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == step.nth:
            act()

    hook(step.owner, step.name, nothing if step.after else count, count if step.after else nothing)


def stop_at(step: Step) -> None:
    """Makes this process end with CRASHED at a step, without any cleaning up."""
    act_at(step, lambda: os._exit(CRASHED))
