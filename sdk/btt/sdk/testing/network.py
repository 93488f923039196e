"""What a test of a dApp needs of a network, whether it was made for the test or stands already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from btt.sdk.budget import Budget

if TYPE_CHECKING:
    from btt.sdk.client import Client


class Network(Protocol):
    """A `Devnet` is one."""

    async def client(self, budget: Budget | str) -> Client:
        """Makes a client of its nodes, with a wallet that can pay; use it with `async with`.

        Args:
            budget: What it may spend.
        """


class Elsewhere:
    """Nodes that run somewhere else; `BTT_LEDGER` and `BTT_WALLET` say where the money is.

    Args:
        nodes: Addresses, separated by commas.
    """

    def __init__(self, nodes: str) -> None:
        self._nodes = nodes

    async def client(self, budget: Budget | str) -> Client:
        """Makes a client that pays with the wallet of whoever runs the test.

        Raises:
            ConfigError: There is no ledger or no wallet.
        """
        from btt.sdk.client import Client

        granted = Budget(budget) if isinstance(budget, str) else budget
        return Client.connect(self._nodes, budget=granted)
