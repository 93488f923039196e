"""What dApps and service authors import; the names below load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from btt.sdk.budget import Budget
from btt.sdk.errors import BttError
from btt.sdk.money import Amount, Rate

if TYPE_CHECKING:
    from btt.sdk.client import Client, Wallet
    from btt.sdk.payment.grants import Grant
    from btt.sdk.sync import SyncClient

__all__ = ["Amount", "BttError", "Budget", "Client", "Grant", "Rate", "SyncClient", "Wallet"]


def __getattr__(name: str) -> object:
    if name in ("Client", "Wallet"):
        from btt.sdk import client

        return getattr(client, name)
    if name == "Grant":
        from btt.sdk.payment.grants import Grant

        return Grant
    if name == "SyncClient":
        from btt.sdk.sync import SyncClient

        return SyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
