"""Fetches what the ledger acknowledged to others and concerns us: evidence is for recipients, too."""

from __future__ import annotations

import asyncio

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.errors import IdentityError, InvalidRequest
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger.connection import Connection
from btt.sdk.ledger.evidence import Evidence


class Gathering(Connection):
    """A connection that can complete its keeper's evidence."""

    async def gather(self, key: PrivateKey, *, channel_id: bytes | None = None) -> int:
        """Has the keeper keep all that the ledger acknowledged about an account, or one channel.

        What others did is part of it: the transfer that paid us, the T1 of a channel to us, the
        close that brought the rest back. Without a keeper nothing is asked.

        Args:
            key: Of the account, or one of the channel's keys.
            channel_id: 32 bytes; without it, all that concerns the key, as for `watch`.

        Returns:
            How many operations were told; those of an earlier call are not told again.

        Raises:
            IdentityError: Something of it is not signed as it must be.
            LedgerUnreachable: Nobody answers; the next call goes on where this one ended.
            StorageError: It could not be kept.
        """
        if self._keeper is None:
            return 0
        subject = bytes(12) + key.address.data if channel_id is None else channel_id
        told, recovered, after, more = 0, -1, 0, True
        while more:
            if recovered != self.recovered:
                recovered = self.recovered
                after = await asyncio.to_thread(self._keeper.seen, self.ledger_id, subject, recovered)
            page, operations = await self._page(key, subject, after)
            if recovered == self.recovered:
                after = max(after, page.seen_seq)
                seen = (subject, recovered, after)
                await asyncio.to_thread(self._keeper.keep, self._header, operations, seen=seen)
                told += len(operations)
            more = page.more or recovered != self.recovered
        return told

    async def _page(
        self, key: PrivateKey, subject: bytes, after: int
    ) -> tuple[pb.GetOperationsResponse, list[Evidence]]:
        async def ask(now_ms: int) -> pb.GetOperationsResponse:
            signed, _ = self._query(key, subject, now_ms)
            request = pb.GetOperationsRequest(query=signed, after_seq=after)
            return await self._call(self._stub.GetOperations, request)

        page = await self._timely(ask)
        return page, await self._refreshed(lambda: self._checked(page))

    def _checked(self, page: pb.GetOperationsResponse) -> list[Evidence]:
        try:
            found = [Evidence.read(operation) for operation in page.operations]
            stand = all(one.check(self._keys, self.ledger_id) for one in found)
        except InvalidRequest as error:
            raise IdentityError(f"The ledger tells what it cannot prove: {error.message}") from error
        if not stand:
            raise IdentityError("The ledger tells what it went back behind.")
        return found
