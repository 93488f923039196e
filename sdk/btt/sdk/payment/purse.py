"""What pays: an account, its books, its ledger, and the budget that it may use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from btt.proto.common.v1.document_pb2 import SignedDocument
from btt.sdk.keys import Address, PrivateKey, PublicKey
from btt.sdk.ledger import LedgerClient
from btt.sdk.payment.apps import Granter, open_grant
from btt.sdk.payment.store import PayerStore
from btt.sdk.signing import APP_UNKNOWN, ChannelCommit
from btt.sdk.wallet import derive_channel_key


@dataclass(frozen=True, slots=True)
class Purse:
    """What pays.

    Attributes:
        account: Key of the account.
        store: The wallet's books.
        ledger: The ledger of one's own configuration.
        clock: Unix milliseconds.
        budget: Name of the budget; empty where the owner acts and no budget pays.
        granted: Base units of the whole budget.
        app: Gets the grant of the application that sessions are for; None if it is unknown.
    """

    account: PrivateKey
    store: PayerStore
    ledger: LedgerClient
    clock: Callable[[], int]
    budget: str = ""
    granted: int = 0
    app: Granter | None = None

    def channel_key(self, commit: ChannelCommit) -> PrivateKey:
        """Returns K1 of a channel of this account."""
        return derive_channel_key(self.account, commit.nonce)

    async def granted_app(
        self, channel_key: PublicKey, ledger_id: bytes
    ) -> tuple[Address, SignedDocument | None]:
        """Returns the application that a session is for, and its grant to the session's channel key.

        Raises:
            AppRefused: What came is no grant for this key now.
        """
        if self.app is None:
            return APP_UNKNOWN, None
        document = await self.app(channel_key, ledger_id)
        grant = open_grant(document, channel_key=channel_key, ledger_id=ledger_id, now_ms=self.clock())
        return grant.app, document
