"""The books as last committed, for the writer: rows that were read once are kept.

Only the writer changes the database, so what it has read or written stays true. What a batch is
going to ask for is read together when it begins.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

from btt.services.ledger import rows, rules
from btt.services.ledger.books import Account, Request
from btt.services.ledger.journal import EntryRef
from btt.services.ledger.machine import Channel
from btt.services.ledger.overlay import Batch
from btt.services.ledger.reading import storage
from btt.services.ledger.verify import Operation

_MOST: Final = 100_000
"""Accounts and channels that are kept."""


class Committed:
    """Committed rows. Not thread-safe.

    Args:
        connection: To the database.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._accounts: dict[bytes, Account] = {}
        self._channels: dict[bytes, Channel] = {}
        self._entries: dict[bytes, EntryRef] = {}
        self._requests: dict[tuple[bytes, bytes], Request] = {}
        self._looked_up: set[bytes | tuple[bytes, bytes]] = set()

    def account(self, account: bytes) -> Account | None:
        """Returns a committed account."""
        found = self._accounts.get(account)
        if found is None:
            with storage():
                found = rows.read_account(self._connection, account)
            if found is not None:
                self._accounts[account] = found
        return found

    def channel(self, channel_id: bytes) -> Channel | None:
        """Returns a committed channel."""
        found = self._channels.get(channel_id)
        if found is None:
            with storage():
                found = rows.read_channel(self._connection, channel_id)
            if found is not None:
                self._channels[channel_id] = found
        return found

    def request(self, account: bytes, request_id: bytes) -> Request | None:
        """Returns what became of a request id."""
        if (account, request_id) not in self._looked_up:
            owner = self.account(account)
            with storage():
                return rows.read_requests(self._connection, [(owner, request_id)] if owner else []).get(
                    (account, request_id)
                )
        return self._requests.get((account, request_id))

    def entry(self, request_digest: bytes) -> EntryRef | None:
        """Returns the entry that a request made."""
        if request_digest not in self._looked_up:
            with storage():
                return rows.read_entries(self._connection, [request_digest]).get(request_digest)
        return self._entries.get(request_digest)

    def _look_up(self, operations: Sequence[Operation]) -> None:
        """Reads which of these requests were seen before."""
        digests = [operation.digest for operation in operations]
        named = [found for operation in operations if (found := rules.request_of(operation))]
        owners = [(owner, name) for account, name in named if (owner := self.account(account))]
        with storage():
            self._entries = rows.read_entries(self._connection, digests)
            self._requests = rows.read_requests(self._connection, owners)
        self._looked_up = {*digests, *named}

    def _remember(self, batch: Batch) -> None:
        """Takes over what a batch has committed."""
        if len(self._accounts) + len(self._channels) > _MOST:
            self._forget()
        self._looked_up.clear()
        self._accounts.update(batch.accounts)
        self._channels.update(batch.channels)

    def _forget(self) -> None:
        """Forgets everything, because the database may say something else."""
        self._accounts.clear()
        self._channels.clear()
        self._looked_up.clear()
