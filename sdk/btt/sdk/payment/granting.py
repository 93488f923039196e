"""The wallet's side of grants: makes one, and sees what became of it.

The file is on disk before any money is locked, as T2 is: what is locked has somebody who can spend
it. What a grant has paid only the ledger tells; the node shows it the best update from time to time.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from btt.proto.ledger.v1.ledger_pb2 import ChannelState
from btt.proto.payment.v1 import payment_pb2_grpc
from btt.sdk.errors import InvalidRequest, LedgerError
from btt.sdk.keys import PrivateKey
from btt.sdk.money import SUPPLY
from btt.sdk.payment.connection import NodeConnection
from btt.sdk.payment.grants import Grant, books_beside
from btt.sdk.payment.opening import LIFETIME_MS, agree, confirm_open, lock
from btt.sdk.payment.outcome import look
from btt.sdk.payment.purse import Purse
from btt.sdk.payment.store import OPENING
from btt.sdk.signing import ChannelCommit

LONGEST_NAME: Final = 64
_BUDGET: Final = "granted to "


async def make_grant(
    purse: Purse, node: NodeConnection, path: Path, *, app: str, amount: int, life_ms: int = LIFETIME_MS
) -> Grant:
    """Locks money for one node in a channel whose key is in a new file and nowhere else.

    Args:
        purse: Of the wallet; its `app`, if it has one, grants that the key acts for an application.
        node: The node that can be paid.
        path: Of the file.
        app: What the owner calls who gets it; 1 to 64 printable characters.
        amount: Base units.
        life_ms: How long, within the terms of node and ledger, milliseconds.

    Raises:
        ConfigError: The file exists.
        InvalidRequest: The name is none.
        TermsRefused: The node takes no such channel.
        LedgerError: The ledger refused, so there is no grant.
        LedgerUnreachable: No answer; `granted` asks again.
    """
    if not 0 < len(app) <= LONGEST_NAME or not app.isprintable():
        raise InvalidRequest(f"A grant has a name of 1 to {LONGEST_NAME} printable characters.")
    key = PrivateKey.generate()
    _, document = await purse.granted_app(key.public, purse.ledger.ledger_id)
    # The owner acts, whom no budget binds; its name says in the books whose channel it is.
    purse = replace(purse, budget=_BUDGET + app, granted=SUPPLY)
    control = node.channel(label="payment")
    try:
        stub: payment_pb2_grpc.PaymentServiceAsyncStub = payment_pb2_grpc.PaymentServiceStub(control)
        commit, stored = await agree(
            purse, node.offer, stub, deposit=amount, k1=key.public, nonce=secrets.token_bytes(16),
            life_ms=life_ms,
        )  # fmt: skip
    finally:
        await control.close()
    grant = Grant(books_beside(path), purse.ledger.address, node.address, commit, key, document)
    await asyncio.to_thread(grant.write, path)
    try:
        (await lock(purse, commit, stored)).claim.release()
    except LedgerError:
        await asyncio.to_thread(path.unlink)
        raise
    return grant


@dataclass(frozen=True, slots=True)
class Granted:
    """A grant as its wallet sees it.

    Attributes:
        app: What the owner calls who has it.
        state: Of its channel, by the ledger.
        paid: Base units that the node has shown the ledger, or taken.
    """

    app: str
    state: ChannelState
    paid: int


async def granted(purse: Purse) -> list[Granted]:
    """Asks the ledger about the grants in a wallet's books that were not closed when it asked last.

    Raises:
        LedgerUnreachable: The ledger does not answer.
    """
    found = []
    for stored in purse.store.channels(ledger_id=purse.ledger.ledger_id):
        commit = ChannelCommit.decode(stored.commit)
        if commit.payer != purse.account.address or purse.holds(commit):
            continue
        if stored.state == OPENING:
            # We stopped between asking and hearing the answer.
            claim = purse.store.claim(stored.channel_id)
            if claim is None:
                continue
            try:
                if await confirm_open(purse, stored, commit) is None:
                    continue
            finally:
                claim.release()
        state = await look(purse, stored.channel_id)
        name = stored.budget.removeprefix(_BUDGET)
        found.append(Granted(name, state, max(state.best, state.captured)))
    return found
