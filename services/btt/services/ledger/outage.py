"""Gives challenge windows back the time in which the ledger was away.

A window is the payee's chance to show its best update, and while nobody takes updates it has none.
So whenever the ledger is back, each window that was running gets back the time since the ledger
was last known to be there. A process that lived through its outage knows that; else it is the last
entry, so no clock has to be kept beside the journal. On a ledger that was quiet this is longer than
it was away, but never more than a whole window from now. `docs/decisions/0016` says why it is done so.
"""

from __future__ import annotations

import math

from btt.sdk.errors import BttError, InternalError
from btt.sdk.keys import PrivateKey
from btt.sdk.signing import ChannelExtension, sign
from btt.services.ledger import machine
from btt.services.ledger.overlay import Batch
from btt.services.ledger.store import Store
from btt.services.ledger.verify import Verifier


def give_back(books: Store, operator_key: PrivateKey, *, clock_ms: int, away_ms: float = math.inf) -> Batch:
    """Extends what ran while the ledger was away; all of it or nothing.

    Args:
        books: Nothing was written to them since the ledger went away.
        operator_key: Signs the entries.
        clock_ms: What the clock says.
        away_ms: How long the ledger was away; since the last entry at most.

    Returns:
        An entry for each window that it extended or began.

    Raises:
        StorageError: The disk failed; nothing happened.
    """
    batch = books.begin(clock_ms)
    since_ms = int(max(books.head.time_ms, batch.now_ms - away_ms))
    verifier = Verifier(books.identity.ledger_id)
    for channel_id in books.running(since_ms, batch.now_ms):
        channel = books.channel(channel_id)
        assert channel is not None
        deadline_ms = machine.after_outage(channel, since_ms=since_ms, now_ms=batch.now_ms)
        if deadline_ms is None:
            continue
        message = ChannelExtension(channel=channel_id, deadline_ms=deadline_ms)
        operation = verifier.extension(
            message.encode(),
            signer=operator_key.public.data,
            signature=sign(operator_key, message, verifier.ledger_id),
        )
        if isinstance(refused := batch.run(operation), BttError):
            raise InternalError(f"A window could not be extended: {refused.message}")
    if not batch.empty:
        books.commit(batch)
    return batch
