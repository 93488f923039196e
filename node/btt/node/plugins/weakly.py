"""Keeps what is given to a service from leading to the node, and with it to its keys.

A service runs in this process and can find anything if it searches; but nothing that it holds
has an attribute by which it comes to a key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakMethod

_Result = TypeVar("_Result")


def weakly(method: Callable[..., _Result]) -> Callable[..., _Result]:
    """Returns a function that calls a bound method without holding its object.

    Args:
        method: Of an object that outlives the function.
    """
    held = WeakMethod(method)

    def call(*arguments: Any) -> _Result:
        found = held()
        assert found is not None, "the node outlives its services"
        return found(*arguments)

    return call
