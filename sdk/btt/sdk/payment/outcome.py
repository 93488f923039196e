"""What became of a channel on the ledger: takes it into the books, and holds it against what was signed.

The ledger decides. But it can pay a node no more than K1 signed, and a node that gave a final
statement no more than that says; if it did, somebody has our key or lies. What proves it is
kept in the wallet's folder before anybody is told.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from btt.proto.common.v1.document_pb2 import SignedDocument
from btt.proto.ledger.v1 import ledger_pb2
from btt.proto.ledger.v1.ledger_pb2 import ChannelState
from btt.proto.payment.v1 import payment_pb2
from btt.sdk.errors import CaptureDisputed, StorageError
from btt.sdk.money import Amount
from btt.sdk.payment.purse import Purse
from btt.sdk.payment.store import CLOSED, CLOSING, StoredChannel
from btt.sdk.signing import ChannelCommit


async def look(purse: Purse, channel_id: bytes) -> ChannelState:
    """Asks the ledger about a channel, and brings the books in step with the answer.

    Args:
        purse: Whose channel.
        channel_id: 32 bytes.

    Raises:
        CaptureDisputed: It was closed with more than was signed or stated; the evidence is kept.
        ChannelUnknown: The ledger has no such channel.
        LedgerUnreachable: The ledger does not answer.
        StorageError: The books or the evidence could not be written; asking again does both.
    """
    document, state = await purse.ledger.channel_document(channel_id, purse.reader)
    store = purse.store
    stored = store.find(channel_id)
    if stored is None:
        return state
    if not purse.holds(ChannelCommit.decode(stored.commit)):
        # Somebody else signs there: what the ledger knows is all that we know of it.
        stored = store.learn_signed(channel_id, max(state.best, state.captured))
    store.learn_deposit(channel_id, state.deposit)
    if state.phase == ledger_pb2.CHANNEL_PHASE_CLOSING:
        store.set_state(channel_id, CLOSING)
    elif state.phase == ledger_pb2.CHANNEL_PHASE_CLOSED:
        statement = store.statement(channel_id)
        most = _most(stored, statement)
        # First the proof: nobody looks at a channel again that is closed in the books.
        where = _keep_evidence(purse, stored, statement, document) if state.captured > most else None
        store.set_state(channel_id, CLOSED)
        if where is not None:
            raise CaptureDisputed(
                f"The node {stored.node} took {Amount(state.captured)} from channel"
                f" {channel_id.hex()[:16]}, where {Amount(most)} were its due; see {where}."
            )
    return state


def _most(stored: StoredChannel, statement: bytes | None) -> int:
    """Returns the most that the node may take from a channel, base units."""
    if statement is None or not stored.kept_ms:
        return stored.signed  # a session after the statement may have used what was prepaid
    said = payment_pb2.SessionStatement.FromString(SignedDocument.FromString(statement).payload)
    return min(stored.signed, said.owed)


def _keep_evidence(
    purse: Purse, stored: StoredChannel, statement: bytes | None, document: SignedDocument
) -> Path:
    folder = purse.store.folder / "evidence"
    path = folder / f"{stored.channel_id.hex()}.json"
    content = {
        "channel": stored.channel_id.hex(),
        "ledger": str(purse.ledger.address),
        "node": str(stored.node),
        "commit": stored.commit.hex(),
        "signed": str(stored.signed),
        "statement": statement.hex() if statement else None,
        "ledger_state": document.SerializeToString().hex(),
        "operator_key": purse.ledger.operator_key.data.hex(),
    }
    fresh = path.with_suffix(".new")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        with fresh.open("w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise StorageError(f"Evidence against a node could not be kept in {folder} ({error}).") from error
    return path
