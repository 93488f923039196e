"""Which messages a caller accepts, for methods that are paid on verification."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any

from btt.sdk.channel import Segment

if TYPE_CHECKING:
    from btt.sdk.payment.metered import MeteredCall

Units = list[tuple[Segment, int]]

_VERDICTS: ContextVar[Verdicts | None] = ContextVar("btt_verdicts", default=None)


def current_verdicts() -> Verdicts | None:
    """Returns the block of verdicts that a call is made in."""
    return _VERDICTS.get()


class Verdicts:
    """Says which messages of the calls made inside its `with` block are accepted.

    Methods that are paid on verification must be called inside one. A message that was
    not accepted when the block ends is rejected, and never paid; calls that still run
    are cancelled.

        with session.verdicts() as verdicts:
            async for message in stub.Fetch(request):
                if good(message):
                    verdicts.accept(message)
    """

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[Any, MeteredCall, Units]] = {}
        self._calls: list[MeteredCall] = []
        self._token: Token[Verdicts | None] | None = None

    def __enter__(self) -> Verdicts:
        self._token = _VERDICTS.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _VERDICTS.reset(self._token)
            self._token = None
        self.finish()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Ties calls to this block in this context alone; `finish` then runs where the calls do."""
        token = _VERDICTS.set(self)
        try:
            yield
        finally:
            _VERDICTS.reset(token)

    def finish(self) -> None:
        """Rejects what is not decided, and cancels what still runs; called in the loop of the calls."""
        self._waiting.clear()
        for call in self._calls:
            call.decide()

    def accept(self, message: Any) -> None:
        """Accepts a message: its units become payable.

        Raises:
            ValueError: The message came from no call of this block, or was decided before.
        """
        call, units = self._take(message)
        call.accepted(units)

    def reject(self, message: Any) -> None:
        """Rejects a message: it is not paid.

        Raises:
            ValueError: The message came from no call of this block, or was decided before.
        """
        self._take(message)

    def _take(self, message: Any) -> tuple[MeteredCall, Units]:
        kept = self._waiting.pop(id(message), None)
        if kept is None or kept[0] is not message:
            raise ValueError("this message waits for no verdict here")
        return kept[1], kept[2]

    def expect(self, message: Any, call: MeteredCall, units: Units) -> None:
        """Keeps a message until it is decided; called by the interceptors."""
        self._waiting[id(message)] = (message, call, units)

    def watch(self, call: MeteredCall) -> None:
        """Ties a call to this block; called by the interceptors."""
        self._calls.append(call)
