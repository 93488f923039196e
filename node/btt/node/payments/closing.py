"""Guards a node's channels on the ledger: closes them in time, and keeps the ledger informed.

A channel is closed when asked, before its lock time, and as soon as its payer asks the ledger to
close it. The best update is shown to the ledger every few minutes and when the node stops, so
that it is paid even if the node never comes back (paper: the seeder publishes the last T3).

What will be captured is fixed on disk before the ledger is asked, so that asking again
after a lost answer or a crash is the same request.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable

import structlog

from btt.node.payments.ledger import PayeeLedger
from btt.node.payments.sessions import Sessions
from btt.node.payments.store import CLOSED, OPEN, ChannelRecord, PayeeStore
from btt.proto.ledger.v1 import ledger_pb2
from btt.sdk.clock import sleep
from btt.sdk.errors import BttError, ChannelClosed, ChannelUnknown, SessionEnded, UpdateInvalid
from btt.sdk.keys import PrivateKey
from btt.sdk.signing import ChannelClose, ChannelCommit, ChannelUpdate

log = structlog.get_logger(__name__)


class Closer:
    """Closes a node's channels.

    Args:
        store: The payee's books.
        sessions: Ended before their channel closes.
        ledger: Where to close.
        key: K2.
        clock: Unix milliseconds.
        margin_ms: How long before its lock time a channel is closed.
    """

    def __init__(
        self,
        *,
        store: PayeeStore,
        sessions: Sessions,
        ledger: PayeeLedger,
        key: PrivateKey,
        clock: Callable[[], int],
        margin_ms: int,
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._ledger = ledger
        self._key = key
        self._clock = clock
        self.margin_ms = margin_ms
        self._closing: set[asyncio.Future[tuple[bytes, bytes]]] = set()

    async def close(self, channel_id: bytes) -> tuple[bytes, bytes]:
        """Closes a channel; call it under the channel's lock.

        Once begun it is finished, though whoever asked has gone.

        Returns:
            The ledger's canonical receipt and the operator's signature.

        Raises:
            ChannelUnknown: The node has no such channel.
            LedgerUnreachable: The ledger does not answer; `sweep` tries again.
            LedgerError: The ledger refused.
        """
        closing = asyncio.ensure_future(self._close(channel_id))
        self._closing.add(closing)
        closing.add_done_callback(self._closed)
        return await asyncio.shield(closing)

    def _closed(self, closing: asyncio.Future[tuple[bytes, bytes]]) -> None:
        self._closing.discard(closing)
        if not closing.cancelled():
            closing.exception()  # taken note of, even if whoever asked has gone

    async def _close(self, channel_id: bytes) -> tuple[bytes, bytes]:
        found = await self._last(channel_id, "The channel is being closed.")
        if found is None:
            raise ChannelUnknown("This node has no such channel.")
        record, owed = found
        best = record.best.cumulative if record.best else 0
        # What was prepaid and not used goes back to the payer with the rest.
        arrears = max(0, owed - best) if record.state == OPEN else 0
        capture = await self._store.begin_close(channel_id, min(best, owed), arrears)
        await self._sessions.forget(record.payer, channel_id, arrears)
        receipt = await self._ledger.close_channel(
            ChannelClose(channel=channel_id, capture=capture),
            self._key,
            best if capture else 0,
            record.best.signature if record.best and capture else b"",
        )
        body = receipt.encode()
        await self._store.end_close(channel_id, body, receipt.signature)
        log.info("channel.closed", channel=channel_id.hex(), captured=capture)
        return body, receipt.signature

    async def _last(self, channel_id: bytes, why: str) -> tuple[ChannelRecord, int] | None:
        """Ends a channel's session, and returns how its books end: no later update counts.

        They are read behind whatever the session was saving, or its payer would owe what it has paid.
        """
        session = self._sessions.live(channel_id)
        if session is not None:
            self._sessions.end(session, SessionEnded(why))
        found = await self._store.channel(channel_id)
        if found is None:
            return None
        record, tally = found
        return record, (tally if session is None else session.payee.meter).owed

    async def sweep(self) -> int:
        """Closes what must be closed now: begun closes, and channels near their lock time.

        Returns:
            How many were closed.
        """
        closed = 0
        for record, _ in await self._store.channels():
            if record.state == CLOSED or (record.state == OPEN and not self._is_due(record)):
                continue
            async with self._sessions.lock(record.channel_id):
                try:
                    await self.close(record.channel_id)
                    closed += 1
                except ChannelClosed:
                    await self._closed_elsewhere(record)
                except BttError as error:
                    log.warning("channel.close_failed", channel=record.channel_id.hex(), error=str(error))
        return closed

    def _is_due(self, record: ChannelRecord) -> bool:
        return record.expires_ms - self.margin_ms <= self._clock()

    async def watch(self) -> int:
        """Asks the ledger about every open channel: closes those that are closing, shows the rest.

        Returns:
            How many are being closed by their payer, and were closed here first.
        """
        closed = 0
        for record, _ in await self._store.channels():
            if record.state != OPEN:
                continue
            try:
                closed += await self._look_after(record)
            except BttError as error:
                log.warning("channel.watch_failed", channel=record.channel_id.hex(), error=str(error))
        await self._ledger.gather(self._key)
        return closed

    async def _look_after(self, record: ChannelRecord) -> bool:
        state = await self._ledger.channel(record.channel_id, self._key)
        if state.phase == ledger_pb2.CHANNEL_PHASE_CLOSING:
            log.info("channel.payer_closes", channel=record.channel_id.hex(), deadline_ms=state.deadline_ms)
            async with self._sessions.lock(record.channel_id):
                await self.close(record.channel_id)
            return True
        if state.phase == ledger_pb2.CHANNEL_PHASE_CLOSED:
            async with self._sessions.lock(record.channel_id):
                await self._closed_elsewhere(record)
            return False
        best = record.best
        if state.phase == ledger_pb2.CHANNEL_PHASE_OPEN and best is not None and best.cumulative > state.best:
            update = ChannelUpdate(channel=record.channel_id, cumulative=best.cumulative)
            with contextlib.suppress(UpdateInvalid):  # a raise below the ledger's minimum waits
                k1 = ChannelCommit.decode(record.commit).k1
                await self._ledger.submit_update(update, best.signature, k1=k1)
        return False

    async def _closed_elsewhere(self, record: ChannelRecord) -> None:
        """The ledger closed a channel while this node was away: its books say what was paid."""
        state = await self._ledger.channel(record.channel_id, self._key)
        found = await self._last(record.channel_id, "The channel was closed on the ledger.")
        if found is None or found[0].state == CLOSED:
            return
        record, owed = found
        best = record.best.cumulative if record.best else 0
        arrears = max(0, owed - best) if record.state == OPEN else 0
        await self._store.closed_elsewhere(record.channel_id, state.captured, arrears)
        await self._sessions.forget(record.payer, record.channel_id, arrears)
        log.warning("channel.closed_elsewhere", channel=record.channel_id.hex(), captured=state.captured)

    async def run(self, interval_s: float, watch_s: float) -> None:
        """Sweeps and watches for ever.

        Args:
            interval_s: Seconds between sweeps.
            watch_s: Seconds between questions to the ledger; several fit into a challenge window.
        """
        watched = -math.inf
        while True:
            try:
                await self.sweep()
                now = self._clock() / 1000
                if not 0 <= now - watched < watch_s:
                    watched = now
                    await self.watch()
            except BttError as error:
                log.warning("channel.sweep_failed", error=str(error))
            await sleep(self._clock, min(interval_s, watch_s))
