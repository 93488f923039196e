"""How much each service may keep on this machine: the operator's cap, and what is set aside of it.

A service reserves before it keeps anything and releases what it no longer keeps; the node adds up.
Reservations are in the node's books, so they survive a crash and no service can forget its own.
Each is named by the service, which makes repeating one harmless: after a crash the service
compares the names with what it finds in its folder, and knows what to finish or to release.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from btt.sdk.errors import InvalidRequest, QuotaFull
from btt.sdk.group_commit import Job

_LONGEST_NAME: Final = 200

QUOTA_SCHEMA: Final = """
CREATE TABLE reservations(
    service TEXT NOT NULL,
    name TEXT NOT NULL,
    bytes INTEGER NOT NULL CHECK(bytes > 0),
    PRIMARY KEY(service, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE reserved(
    service TEXT PRIMARY KEY,
    bytes INTEGER NOT NULL CHECK(bytes >= 0)
) STRICT, WITHOUT ROWID;
"""


class Quota:
    """What one service may keep.

    Args:
        service: Its name.
        run: Runs a job on the node's books; its result is there once it is committed.
    """

    def __init__(self, service: str, run: Callable[[Job], Awaitable[Any]]) -> None:
        self._service = service
        self._run = run
        self.limit = 0

    async def reserve(self, name: str, amount: int) -> None:
        """Sets bytes aside under a name; what the name had before is replaced.

        Raises:
            QuotaFull: That is more than is left; nothing has changed.
            InvalidRequest: The name or the amount does not do.
            StorageError: The disk failed; nothing has changed.
        """
        if not 0 < len(name) <= _LONGEST_NAME or not 0 < amount < 2**62:
            raise InvalidRequest(f"A reservation has a name of 1 to {_LONGEST_NAME} characters, and bytes.")
        limit = self.limit

        def write(db: sqlite3.Connection) -> int | None:
            before = self._reserved(db, name)
            used = self._total(db) - before
            # Giving some back is allowed also above a cap that the operator has lowered since.
            if used + amount > limit and amount > before:
                return max(0, limit - used - before)
            self._put(db, name, amount, used + amount)
            return None

        left = await self._run(write)
        if left is not None:
            raise QuotaFull(
                f"The service {self._service} of this node has {left} bytes left of the {limit} it may keep."
            )

    async def release(self, name: str) -> bool:
        """Gives back what a name has, and says whether it had anything.

        Raises:
            StorageError: The disk failed; nothing has changed.
        """

        def write(db: sqlite3.Connection) -> bool:
            before = self._reserved(db, name)
            if before:
                db.execute("DELETE FROM reservations WHERE service = ? AND name = ?", (self._service, name))
                self._set_total(db, self._total(db) - before)
            return bool(before)

        return bool(await self._run(write))

    async def used(self) -> int:
        """Returns the bytes that are set aside."""
        return int(await self._run(self._total))

    async def reservations(self) -> Mapping[str, int]:
        """Returns the bytes of each name."""

        def read(db: sqlite3.Connection) -> dict[str, int]:
            return dict(
                db.execute("SELECT name, bytes FROM reservations WHERE service = ?", (self._service,))
            )

        return await self._run(read)  # type: ignore[no-any-return]

    def _reserved(self, db: sqlite3.Connection, name: str) -> int:
        row = db.execute(
            "SELECT bytes FROM reservations WHERE service = ? AND name = ?", (self._service, name)
        ).fetchone()
        return int(row[0]) if row else 0

    def _total(self, db: sqlite3.Connection) -> int:
        row = db.execute("SELECT bytes FROM reserved WHERE service = ?", (self._service,)).fetchone()
        return int(row[0]) if row else 0

    def _put(self, db: sqlite3.Connection, name: str, amount: int, total: int) -> None:
        db.execute("INSERT OR REPLACE INTO reservations VALUES(?,?,?)", (self._service, name, amount))
        self._set_total(db, total)

    def _set_total(self, db: sqlite3.Connection, total: int) -> None:
        db.execute("INSERT OR REPLACE INTO reserved VALUES(?,?)", (self._service, total))


class Quotas:
    """Those of all services of a node.

    Args:
        run: As for `Quota`.
    """

    def __init__(self, run: Callable[[Job], Awaitable[Any]]) -> None:
        self._run = run
        self._quotas: dict[str, Quota] = {}

    def of(self, service: str) -> Quota:
        """Returns what a service is given."""
        if service not in self._quotas:
            self._quotas[service] = Quota(service, self._run)
        return self._quotas[service]

    def limit(self, limits: Mapping[str, int]) -> None:
        """Makes caps hold; a service without one may keep nothing more.

        Args:
            limits: Bytes by service. What is reserved above them stays, and must shrink before
                anything is added.
        """
        for service in self._quotas.keys() | limits.keys():
            self.of(service).limit = limits.get(service, 0)
