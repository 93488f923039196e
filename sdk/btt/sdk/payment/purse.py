"""What pays: an account, its books, its ledger, and the budget that it may use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient
from btt.sdk.payment.store import PayerStore
from btt.sdk.signing import ChannelCommit
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
    """

    account: PrivateKey
    store: PayerStore
    ledger: LedgerClient
    clock: Callable[[], int]
    budget: str = ""
    granted: int = 0

    def channel_key(self, commit: ChannelCommit) -> PrivateKey:
        """Returns K1 of a channel of this account."""
        return derive_channel_key(self.account, commit.nonce)
