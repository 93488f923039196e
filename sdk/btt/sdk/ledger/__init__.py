"""The client of the private ledger: accounts, transfers and channels, every answer verified.

`LedgerAddress` says which ledger and where; it comes from one's own configuration, never from a
peer. `LedgerClient` talks to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from btt.sdk.ledger.address import LedgerAddress, tls_name

if TYPE_CHECKING:
    from btt.sdk.ledger.client import LedgerClient
    from btt.sdk.ledger.receipt import SignedReceipt

__all__ = ["LedgerAddress", "LedgerClient", "SignedReceipt", "tls_name"]


def __getattr__(name: str) -> object:
    # The client needs gRPC, which is slow to import; an address alone does not.
    if name == "LedgerClient":
        from btt.sdk.ledger.client import LedgerClient

        return LedgerClient
    if name == "SignedReceipt":
        from btt.sdk.ledger.receipt import SignedReceipt

        return SignedReceipt
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
