"""What a devnet is made of: its folders, and the commands and parts that make and serve them.

A devnet of a test and one of `btt devnet` are the same network; they differ in how long it lives.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from btt.sdk.errors import ConfigError
from btt.sdk.keys import Address, PrivateKey
from btt.sdk.money import Amount

if TYPE_CHECKING:
    from btt.sdk.clock import Clock
    from btt.sdk.plugin import ServicePlugin

GROUP: Final = "btt.devnet"
LEDGER: Final = "ledger"
CLOCK: Final = "clock"
_ANY_PORT: Final = "127.0.0.1:0"


class LedgerHost(Protocol):
    """Runs a ledger in this process."""

    def serve(self, folder: Path, *, supply_to: Address, clock: Clock) -> AbstractAsyncContextManager[str]:
        """Makes one and serves it; gives its address."""


class NodeHost(Protocol):
    """Runs a node in this process."""

    def serve(
        self,
        folder: Path,
        *,
        config: dict[str, Any],
        plugins: Mapping[str, type[ServicePlugin]],
        clock: Clock,
    ) -> AbstractAsyncContextManager[str]:
        """Makes one and serves it; gives its address."""


def hosts() -> tuple[LedgerHost, NodeHost]:
    """Returns what runs a ledger and a node in this process.

    Raises:
        ConfigError: The node's parts are not installed.
    """
    found = {point.name: point for point in entry_points(group=GROUP)}
    try:
        ledger, node = (found[name].load() for name in ("ledger", "node"))
    except (KeyError, ImportError) as error:
        raise ConfigError(
            "A devnet runs a node, and the node's parts are not installed.",
            hint="pip install 'btt-services[node]'",
        ) from error
    return cast(LedgerHost, ledger), cast(NodeHost, node)


def node_folders(folder: Path, count: int) -> list[Path]:
    """Returns the folders of the nodes: node-1, node-2 and so on."""
    return [folder / f"node-{number}" for number in range(1, count + 1)]


def node_config(ledger: str, services: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the tables of a node's configuration."""
    return {
        "node": {"listen": _ANY_PORT},
        "ledger": {"address": ledger},
        "services": {name: dict(section) for name, section in services.items()},
    }


def make_ledger(folder: Path, supply_to: Address) -> tuple[str, ...]:
    """Returns the words after `btt` that make the ledger."""
    return ("ledger", "init", str(folder / LEDGER), "--name", "devnet", "--supply-to", str(supply_to))


def serve_ledger(folder: Path, listen: str = _ANY_PORT) -> tuple[str, ...]:
    """Returns the words after `btt` that run the ledger."""
    return ("ledger", "serve", str(folder / LEDGER), "--listen", listen, "--clock", str(folder / CLOCK))


def make_node(node: Path, ledger: str) -> tuple[str, ...]:
    """Returns the words after `btt` that make a node."""
    return ("node", "init", str(node), "--ledger", ledger, "--listen", _ANY_PORT)


def serve_node(folder: Path, node: Path) -> tuple[str, ...]:
    """Returns the words after `btt` that run a node."""
    return ("node", "start", str(node), "--clock", str(folder / CLOCK))


def has_stopped(node: Path) -> bool:
    """Tells whether a node that does not run ended as it was told to: then it leaves an empty lock."""
    lock = node / "node.lock"
    return lock.is_file() and not lock.stat().st_size


def configure(node: Path, services: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes which services a node offers into its configuration."""
    import tomlkit

    path = node / "node.toml"
    document = tomlkit.parse(path.read_text("utf-8"))
    document["services"] = {name: dict(section) for name, section in services.items()}
    path.write_text(tomlkit.dumps(document), "utf-8")


async def fund(ledger: str, faucet: PrivateKey, address: Address | str, amount: Amount | str) -> None:
    """Gives an account money.

    Args:
        ledger: Address of the ledger.
        faucet: Key of the account that holds the issue.
        address: Of the account.
        amount: Such as "5 BTT", or base units.
    """
    from btt.sdk.ledger import LedgerAddress, LedgerClient

    to = Address.parse(address) if isinstance(address, str) else address
    value = Amount.parse(amount) if isinstance(amount, str) else amount
    async with LedgerClient.connect(LedgerAddress.parse(ledger)) as client:
        await client.transfer(faucet, to, value)
