"""Why calls were refused, by day, service and reason: an operator learns what income is missed.

Counting is a dictionary's business; what was counted goes to the books every few seconds in one
commit, and when the node stops. Nothing here grows with what strangers send: reasons come from a
closed list, services from the node, and old days go.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from btt.node.payments.days import DAY_MS
from btt.sdk.errors import BY_REASON, StorageError

if TYPE_CHECKING:
    from btt.node.payments.store import PayeeStore

log = structlog.get_logger(__name__)

SERVED: Final = "SERVED"
"""Stands beside the reasons, for calls that were not refused."""
CANCELLED: Final = "CANCELLED"
"""Stands for calls whose caller went away, or which the node cut when it stopped: nobody was refused."""
KEPT_DAYS: Final = 400
FLUSH_EVERY_S: Final = 5.0
_REASONS: Final = frozenset((*BY_REASON, SERVED))
_OTHER: Final = "INTERNAL"
_MOST_KEYS: Final = 4096

REFUSALS_SCHEMA: Final = """
CREATE TABLE refusals(
    day INTEGER NOT NULL,
    service TEXT NOT NULL,
    reason TEXT NOT NULL,
    calls INTEGER NOT NULL CHECK(calls > 0),
    PRIMARY KEY(day, service, reason)
) STRICT, WITHOUT ROWID;
"""

MEANING: Final = {
    "APP_REFUSED": "the application is not one that you serve; look at [apps]",
    "BANNED": "the payer is banned for failing before; see `btt peers list`",
    "CHANNEL_CLOSED": "the channel was closed already; the client opens a new one",
    "CHANNEL_EXHAUSTED": "the payer's channel held too little; its budget is small for your price",
    "CHANNEL_EXPIRED": "the channel's lock time was too near",
    "CONTENT_UNAVAILABLE": "published files were moved, changed or unreadable; publish them again",
    "CONTENT_UNKNOWN": "somebody asked for content that this node does not have",
    "DRAINING": "the node was stopping",
    "INTERNAL": "a defect or a broken service; look into the log",
    "LEDGER_UNREACHABLE": "the node could not see its ledger; `btt doctor` checks it",
    "OVERBILLED": "the service billed more than callers allow; its log names the method: repair or remove it",
    "PAYMENT_REQUIRED": "payment did not come in time; the client left, or does not pay",
    "PRICE_CHANGED": "the client had an old price; it asks again, unless it finds the new one too high",
    "QUOTA_FULL": "the service keeps as much as you let it; raise services.NAME.quota",
    "RATE_LIMITED": "a limit was reached; look at [limits]",
    "SERVICE_UNAVAILABLE": "the service had failed or was switched off; see `btt service list`",
    "SESSION_ENDED": "the payment session was over, mostly because the client went away",
    "STORAGE": "the disk failed or is full",
    "TERMS_REFUSED": "the channel offered was outside your terms; look at [payments]",
}
"""What a reason means for the operator."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """How often one service refused for one reason on one day.

    Attributes:
        day: Days since 1970, UTC.
        service: Name of the node's service; "payments" for sessions that were not opened.
        reason: On the wire, or SERVED.
        calls: How many.
    """

    day: int
    service: str
    reason: str
    calls: int


class Refusals:
    """Counts for one node.

    Args:
        store: Where the counts go.
        clock: Unix milliseconds.
    """

    def __init__(self, *, store: PayeeStore, clock: Callable[[], int]) -> None:
        self._store = store
        self._clock = clock
        self._counts: dict[tuple[int, str, str], int] = {}

    def count(self, service: str, reason: str) -> None:
        """Counts one call.

        Args:
            service: Name of the node's service.
            reason: On the wire, or SERVED; CANCELLED is not counted, and one that we do not know counts
                as a defect.
        """
        if reason == CANCELLED:
            return
        key = (self._clock() // DAY_MS, service, reason if reason in _REASONS else _OTHER)
        if key in self._counts or len(self._counts) < _MOST_KEYS:
            self._counts[key] = self._counts.get(key, 0) + 1

    async def flush(self) -> None:
        """Writes what was counted; what cannot be written is kept for the next time.

        Raises:
            StorageError: The books could not be written.
        """
        counts, self._counts = self._counts, {}
        if not counts:
            return

        def write(db: sqlite3.Connection) -> None:
            db.executemany(
                "INSERT INTO refusals VALUES(?,?,?,?)"
                " ON CONFLICT DO UPDATE SET calls = calls + excluded.calls",
                [(*key, calls) for key, calls in counts.items()],
            )
            db.execute("DELETE FROM refusals WHERE day < ?", (self._clock() // DAY_MS - KEPT_DAYS,))

        try:
            await self._store.run(write)
        except StorageError:
            for key, calls in counts.items():
                self._counts[key] = self._counts.get(key, 0) + calls
            raise

    async def run(self, interval_s: float = FLUSH_EVERY_S) -> None:
        """Flushes for ever."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self.flush()
            except StorageError as error:
                log.warning("refusals.not_saved", error=str(error))


def read_refusals(db: sqlite3.Connection, *, since_day: int = 0, service: str | None = None) -> list[Refusal]:
    """Reads what was counted, newest day first.

    Args:
        db: The node's books.
        since_day: First day, days since 1970.
        service: Only of this service, and of "payments", which all services need.
    """
    rows = db.execute(
        "SELECT day, service, reason, calls FROM refusals"
        " WHERE day >= ?1 AND (?2 IS NULL OR service IN (?2, 'payments'))"
        " ORDER BY day DESC, calls DESC, service, reason",
        (since_day, service),
    )
    return [Refusal(*row) for row in rows]
