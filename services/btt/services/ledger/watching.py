"""What auditors and watchers read: pages of the journal, and events as they happen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.errors import Draining
from btt.sdk.keys import PublicKey
from btt.services.ledger.books import user
from btt.services.ledger.hub import Hub
from btt.services.ledger.journal import Entry, Side

MOST_EVENTS: Final = 256
"""Events in one message; about 40 KiB."""
MOST_ENTRIES: Final = 64
"""Entries in one message; less than 48 KiB."""
MOST_OPERATIONS: Final = 64
"""Operations in one message; less than 48 KiB."""

_Event = tuple[int, int, int, bytes, bytes, bytes]
Read = Callable[[bytes | None, PublicKey, int], Awaitable[tuple[list[_Event], int]]]


def journal_entry(entry: Entry) -> pb.JournalEntry:
    """Returns an entry as it travels."""
    return pb.JournalEntry(
        seq=entry.seq,
        time_ms=entry.time_ms,
        epoch=entry.epoch,
        kind=pb.EntryKind.ValueType(entry.kind),
        request_digest=entry.request_digest,
        body=entry.body,
        signatures=entry.signatures,
        postings=[
            pb.JournalPosting(account=leg.account, credit=leg.side is Side.CREDIT, amount=leg.amount)
            for leg in entry.postings
        ],
        prev_hash=entry.prev_hash,
        hash=entry.hash,
    )


def operation(entry: Entry, receipt: pb.LedgerReceipt) -> pb.AcknowledgedOperation:
    """Returns an entry as its holder keeps it."""
    return pb.AcknowledgedOperation(
        kind=pb.EntryKind.ValueType(entry.kind),
        body=entry.body,
        signatures=entry.signatures,
        receipt=receipt,
    )


async def pages(
    hub: Hub,
    read: Read,
    *,
    channel: bytes | None,
    key: PublicKey,
    known: bool,
    after: int,
    seconds: float,
    heartbeat: float,
) -> AsyncIterator[tuple[list[pb.LedgerEvent], int]]:
    """Tells what concerns a channel or an account, first what was, then what comes.

    Args:
        hub: Wakes us.
        read: Returns events of a channel (or of an account, for None) after an entry, and the entry
            up to which they are complete.
        channel: Id of 32 bytes, or None for the account of `key`.
        key: Who asks.
        known: Whether it has an account or a channel.
        after: Number of the last entry already seen.
        seconds: How long.
        heartbeat: Seconds after which a page without events is sent.

    Yields:
        Events, and the number of the entry up to which all was told.

    Raises:
        Draining: The ledger stops; ask again with the last number.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    subjects = [user(key.address.data), key.data] if channel is None else [channel]
    with hub.watch(key.data, subjects, known=known) as woken:
        quiet_until = 0.0
        while True:
            if hub.closed:
                raise Draining("The ledger is stopping.")
            woken.clear()
            found, after = await read(channel, key, after)
            if found or loop.time() >= quiet_until:
                quiet_until = loop.time() + heartbeat
                yield [_event(row) for row in found], after
            if len(found) == MOST_EVENTS:
                continue
            until = min(end, quiet_until)
            try:
                async with asyncio.timeout_at(until):
                    await woken.wait()
            except TimeoutError:
                if until == end:
                    return


def _event(row: _Event) -> pb.LedgerEvent:
    seq, time_ms, kind, digest, entry_hash, channel_id = row
    return pb.LedgerEvent(
        seq=seq,
        time_ms=time_ms,
        kind=pb.EntryKind.ValueType(kind),
        request_digest=digest,
        entry_hash=entry_hash,
        channel_id=channel_id,
    )
