"""What pays: an account or a grant, its books, its ledger, and the budget that it may use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from btt.proto.common.v1.document_pb2 import SignedDocument
from btt.sdk.errors import AccountKeyNeeded, SignerMismatch
from btt.sdk.keys import Address, PrivateKey, PublicKey
from btt.sdk.ledger import LedgerClient
from btt.sdk.payment.apps import Granter, open_grant
from btt.sdk.payment.grants import Grant
from btt.sdk.payment.store import PayerStore
from btt.sdk.signing import APP_UNKNOWN, ChannelCommit
from btt.sdk.wallet import derive_channel_key


@dataclass(frozen=True, slots=True)
class Purse:
    """What pays.

    Attributes:
        owner: Key of the account, or a grant: one channel and its key.
        store: The books.
        ledger: The ledger of one's own configuration.
        clock: Unix milliseconds.
        budget: Name of the budget; empty where the owner acts and no budget pays.
        granted: Base units of the whole budget.
        app: Gets the grant of the application that sessions are for; None if it is unknown.
    """

    owner: PrivateKey | Grant
    store: PayerStore
    ledger: LedgerClient
    clock: Callable[[], int]
    budget: str = ""
    granted: int = 0
    app: Granter | None = None

    @property
    def account(self) -> PrivateKey:
        """Key of the account.

        Raises:
            AccountKeyNeeded: Here is a grant only.
        """
        if isinstance(self.owner, Grant):
            raise AccountKeyNeeded("That takes the key of the account, and this program has a grant only.")
        return self.owner

    @property
    def grant(self) -> Grant | None:
        """The grant; None where the account pays."""
        return self.owner if isinstance(self.owner, Grant) else None

    @property
    def reader(self) -> PrivateKey:
        """Key that asks the ledger: of the account, or K1 of the grant."""
        return self.owner.key if isinstance(self.owner, Grant) else self.owner

    @property
    def scope(self) -> bytes | None:
        """What the ledger is asked about: the channel of the grant, or None for all of the account."""
        return self.owner.channel_id if isinstance(self.owner, Grant) else None

    def holds(self, commit: ChannelCommit) -> bool:
        """Says whether K1 of a channel is ours; that of a channel which was granted to others is not."""
        return self._key_for(commit).public == commit.k1

    def channel_key(self, commit: ChannelCommit) -> PrivateKey:
        """Returns K1 of a channel.

        Raises:
            SignerMismatch: Whoever the channel was granted to has it, and signs alone.
        """
        key = self._key_for(commit)
        if key.public != commit.k1:
            raise SignerMismatch("This channel was granted, and only who it was granted to signs on it.")
        return key

    def _key_for(self, commit: ChannelCommit) -> PrivateKey:
        if isinstance(self.owner, Grant):
            return self.owner.key
        return derive_channel_key(self.owner, commit.nonce)

    async def granted_app(
        self, channel_key: PublicKey, ledger_id: bytes
    ) -> tuple[Address, SignedDocument | None]:
        """Returns the application that a session is for, and its grant to the session's channel key.

        Raises:
            AppRefused: What came is no grant for this key now.
        """
        if self.app is not None:
            document = await self.app(channel_key, ledger_id)
        elif self.grant is not None and self.grant.app is not None:
            document = self.grant.app
        else:
            return APP_UNKNOWN, None
        grant = open_grant(document, channel_key=channel_key, ledger_id=ledger_id, now_ms=self.clock())
        return grant.app, document
