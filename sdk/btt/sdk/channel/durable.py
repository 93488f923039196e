"""Proof that something is on disk, which can only be had by putting it there.

A payer signs only a `Durable[Intent]`, and a payee counts as paid only a
`Durable[Checked]`. The one way to make a `Durable` is to run the write, so signing
before saving, or giving credit before saving, cannot be written down.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")
_SEAL = object()


class Durable(Generic[T]):
    """A value that has been written to stable storage."""

    __slots__ = ("_value",)

    def __init__(self, value: T, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("a Durable is made only by Durable.write or Durable.awrite")
        self._value = value

    @property
    def value(self) -> T:
        """The value that was written."""
        return self._value

    @classmethod
    def write(cls, value: T, write: Callable[[T], object]) -> Durable[T]:
        """Runs `write(value)`, which returns only once the value is safe, and vouches for it."""
        write(value)
        return cls(value, _SEAL)

    @classmethod
    async def awrite(cls, value: T, write: Awaitable[object]) -> Durable[T]:
        """Does the same with a write of the value that is under way."""
        await write
        return cls(value, _SEAL)
