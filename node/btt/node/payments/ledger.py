"""The ledger as a payee needs it, connected on demand: a node starts and serves while it is away.

The ledger's address, and with it its id, is the operator's own configuration, so offers can be
signed without asking it. Credit cannot: every Open asks for the channel's live state.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Protocol

import structlog

from btt.proto.ledger.v1.ledger_pb2 import ChannelState
from btt.sdk.errors import BttError, LedgerUnreachable
from btt.sdk.keys import PrivateKey, PublicKey
from btt.sdk.ledger import LedgerAddress, LedgerClient, SignedReceipt
from btt.sdk.ledger.keeping import EvidenceStore
from btt.sdk.signing import ChannelClose, ChannelUpdate

log = structlog.get_logger(__name__)


class PayeeLedger(Protocol):
    """What a payee asks of its ledger; `LedgerClient` is one."""

    async def channel(self, channel_id: bytes, key: PrivateKey) -> ChannelState:
        """Returns the live state of a channel."""

    async def close_channel(
        self,
        close: ChannelClose,
        k2: PrivateKey,
        update_cumulative: int = 0,
        update_signature: bytes = b"",
    ) -> SignedReceipt:
        """Closes a channel."""

    async def submit_update(
        self, update: ChannelUpdate, update_signature: bytes, *, k1: PublicKey
    ) -> SignedReceipt:
        """Shows the ledger an update, which it keeps for the payee."""

    async def gather(self, key: PrivateKey, *, channel_id: bytes | None = None) -> int:
        """Keeps what the ledger acknowledged about the key's channels, or one of them."""


class LedgerOnDemand:
    """A ledger that is connected when it is first needed, and again after it was away.

    Args:
        address: From the node's own configuration.
        keeper: Keeps what the ledger acknowledges, with its receipts.
        timeout: Seconds for one try of a call.
    """

    def __init__(
        self, address: LedgerAddress, *, keeper: EvidenceStore | None = None, timeout: float = 5.0
    ) -> None:
        self._address = address
        self._keeper = keeper
        self._timeout = timeout
        self._stack = AsyncExitStack()
        self._client: LedgerClient | None = None
        self._connecting: asyncio.Task[LedgerClient] | None = None

    @property
    def is_connected(self) -> bool:
        """Says whether it was reached."""
        return self._client is not None

    async def connect(self) -> LedgerClient:
        """Returns the connection; calls at the same time share one attempt.

        Raises:
            LedgerUnreachable: Nobody answers, or not the configured ledger.
        """
        if self._client is not None:
            return self._client
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(self._connected)
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> LedgerClient:
        try:
            self._client = await self._stack.enter_async_context(
                LedgerClient.connect(self._address, timeout=self._timeout, keeper=self._keeper)
            )
        except LedgerUnreachable:
            raise
        except BttError as error:
            # To whoever opens a session it is the same: this node cannot see its ledger.
            log.warning("ledger.refused", address=str(self._address), error=str(error))
            raise LedgerUnreachable("The node cannot use its ledger.") from error
        log.info("ledger.connected", address=str(self._address))
        return self._client

    def _connected(self, attempt: asyncio.Task[LedgerClient]) -> None:
        self._connecting = None
        if not attempt.cancelled():
            attempt.exception()  # taken note of, even if whoever waited has gone

    async def channel(self, channel_id: bytes, key: PrivateKey) -> ChannelState:
        """Returns the live state of a channel; as `LedgerClient.channel`."""
        return await (await self.connect()).channel(channel_id, key)

    async def close_channel(
        self,
        close: ChannelClose,
        k2: PrivateKey,
        update_cumulative: int = 0,
        update_signature: bytes = b"",
    ) -> SignedReceipt:
        """Closes a channel; as `LedgerClient.close_channel`."""
        return await (await self.connect()).close_channel(close, k2, update_cumulative, update_signature)

    async def submit_update(
        self, update: ChannelUpdate, update_signature: bytes, *, k1: PublicKey
    ) -> SignedReceipt:
        """Shows an update; as `LedgerClient.submit_update`."""
        return await (await self.connect()).submit_update(update, update_signature, k1=k1)

    async def gather(self, key: PrivateKey, *, channel_id: bytes | None = None) -> int:
        """Keeps what others did; as `LedgerClient.gather`."""
        return await (await self.connect()).gather(key, channel_id=channel_id)

    async def close(self) -> None:
        """Ends the connection."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        await self._stack.aclose()
