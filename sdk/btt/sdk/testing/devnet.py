"""A whole BTT network on this machine: a ledger, nodes, and money for whoever asks.

Everything is real and in separate processes: what works here works against a node elsewhere. It
lives in a temporary folder, on free loopback ports, and ends with the block that uses it.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from btt.sdk.budget import Budget
from btt.sdk.errors import BttError, ConfigError
from btt.sdk.keys import Address, PrivateKey
from btt.sdk.money import Amount, Rate
from btt.sdk.testing import processes
from btt.sdk.testing.processes import Server

if TYPE_CHECKING:
    from btt.sdk.client import Client, Wallet

DEFAULT_PRICE: Final = "1 BTT / GiB"
_PURSE: Final = Amount.parse("1000 BTT")


@dataclass(frozen=True, slots=True)
class Totals:
    """The sums of a ledger's books.

    Attributes:
        issued: All that was ever issued.
        accounts: All that accounts can spend.
        channels: All that is locked in channels.
        open_channels: How many channels are not closed.
        closed_channels: How many are.
    """

    issued: Amount
    accounts: Amount
    channels: Amount
    open_channels: int
    closed_channels: int

    @property
    def is_conserved(self) -> bool:
        """Nothing was made or lost: accounts and channels hold exactly what was issued."""
        return self.issued == self.accounts + self.channels


class Devnet:
    """A ledger and nodes for tests and trials; nodes are named by their number, from 0.

        async with Devnet() as net:
            infohash = await net.publish(path)
            async with await net.client("5 BTT") as btt:
                async with btt.content.fetch(infohash, folder) as transfer: ...

    Needs the installation for operators (`[node]`). When the block ends, or this process does,
    the processes end; when the block ends the folder is removed.

    Args:
        content_price: What each node asks for content.
        nodes: How many.

    Raises:
        ConfigError: The price does not do, or there is no node.
    """

    def __init__(self, *, content_price: str = DEFAULT_PRICE, nodes: int = 1) -> None:
        if nodes < 1:
            raise ConfigError("A devnet has at least one node.")
        try:
            self.content_rate = Rate.parse(content_price)
        except ValueError as error:
            raise ConfigError(f"The price does not do: {error}.") from None
        self._price = content_price
        self._faucet = PrivateKey.generate()
        self._stack = AsyncExitStack()
        self._folder: Path | None = None
        self._count = nodes
        self._ledger: Server | None = None
        self._nodes: dict[int, Server] = {}
        self._torrents: dict[str, Path] = {}
        self._wallets = 0

    async def __aenter__(self) -> Devnet:
        async with AsyncExitStack() as stack:
            # No await between these two: a cancelled task cannot leave the folder behind.
            self._folder = folder = Path(tempfile.mkdtemp(prefix="btt-devnet-"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            await self._command("ledger", "init", str(folder / "ledger"), "--name", "devnet",
                                "--supply-to", str(self._faucet.address))  # fmt: skip
            self._ledger = await self._serve(stack, "ledger", "ledger", "serve", str(folder / "ledger"))
            try:
                async with asyncio.TaskGroup() as group:
                    for number in range(self._count):
                        group.create_task(self._make_node(stack, number))
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None
            self._stack = stack.pop_all()
        return self

    async def _make_node(self, stack: AsyncExitStack, number: int) -> None:
        folder = self.node_folders[number]
        await self._command("node", "init", str(folder), "--ledger", self.ledger_address,
                            "--listen", "127.0.0.1:0", "--content-price", self._price)  # fmt: skip
        await self._start_node(stack, number)
        # From now on it comes back where it was.
        config, port = folder / "node.toml", self._nodes[number].address.rpartition(":")[2]
        config.write_text(config.read_text("utf-8").replace("127.0.0.1:0", f"127.0.0.1:{port}"), "utf-8")

    async def _start_node(self, stack: AsyncExitStack, number: int) -> None:
        folder = self.node_folders[number]
        self._nodes[number] = await self._serve(stack, folder.name, "node", "start", str(folder))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, BttError):
                for server in [self._ledger, *self._nodes.values()]:
                    if server is not None:
                        await server.explain(error)
        finally:
            await self._stack.aclose()

    async def _command(self, *arguments: str) -> str:
        return await processes.run(*arguments, log=self.folder / f"{'-'.join(arguments[:2])}.log")

    async def _serve(self, stack: AsyncExitStack, name: str, *arguments: str) -> Server:
        server = await Server.start(name, *arguments, log=self.folder / f"{name}.log")
        # Stopped in reverse order: the node settles while the ledger still answers.
        stack.push_async_callback(server.stop)
        return server

    @property
    def folder(self) -> Path:
        """The temporary folder; yours to use while the devnet runs.

        Raises:
            ConfigError: The devnet does not run.
        """
        if self._folder is None:
            raise ConfigError("The devnet does not run.", hint="Use it inside `async with`.")
        return self._folder

    @property
    def node_folders(self) -> list[Path]:
        """The nodes' folders, as for `btt node`."""
        return [self.folder / f"node-{number + 1}" for number in range(self._count)]

    @property
    def node_folder(self) -> Path:
        """The first node's folder."""
        return self.node_folders[0]

    @property
    def ledger_address(self) -> str:
        """`btt-ledger://T...@127.0.0.1:port/...`."""
        assert self._ledger is not None
        return self._ledger.address

    @property
    def node_addresses(self) -> list[str]:
        """`btt://T...@127.0.0.1:port` of each node."""
        return [self._nodes[number].address for number in sorted(self._nodes)]

    @property
    def node_address(self) -> str:
        """Address of the first node."""
        return self.node_addresses[0]

    @property
    def pids(self) -> list[int]:
        """Process ids of the ledger and the nodes."""
        assert self._ledger is not None
        return [self._ledger.pid, *(self._nodes[number].pid for number in sorted(self._nodes))]

    async def kill_node(self, node: int) -> None:
        """Kills a node as a power cut would."""
        await self._nodes[node].kill()

    async def start_node(self, node: int) -> None:
        """Starts a node that was killed, at the address it had."""
        await self._start_node(self._stack, node)

    async def fund(self, address: Address | str, amount: Amount | str) -> None:
        """Gives an account money.

        Args:
            address: Of the account.
            amount: Such as "5 BTT", or base units.
        """
        from btt.sdk.ledger import LedgerAddress, LedgerClient

        to = Address.parse(address) if isinstance(address, str) else address
        value = Amount.parse(amount) if isinstance(amount, str) else amount
        async with LedgerClient.connect(LedgerAddress.parse(self.ledger_address)) as ledger:
            await ledger.transfer(self._faucet, to, value)

    async def wallet(self, funds: Amount | str = _PURSE) -> Wallet:
        """Makes a wallet that holds some money.

        Args:
            funds: What it holds.
        """
        from btt.sdk.client import Wallet

        self._wallets += 1
        made = Wallet(self.folder / f"wallet-{self._wallets}", PrivateKey.generate())
        made.folder.mkdir(mode=0o700)
        await self.fund(made.account.address, funds)
        return made

    async def client(self, budget: Budget | str, *, wallet: Wallet | None = None) -> Client:
        """Makes a client of all nodes, with a funded wallet of its own; use it with `async with`.

        Args:
            budget: What it may spend.
            wallet: Pays instead of a new one.
        """
        from btt.sdk.client import Client

        granted = Budget(budget) if isinstance(budget, str) else budget
        if wallet is None:
            wallet = await self.wallet(Amount(max(_PURSE, granted.amount)))
        return Client.connect(self.node_addresses, ledger=self.ledger_address, wallet=wallet, budget=granted)

    async def publish(self, path: Path, *, node: int = 0) -> str:
        """Publishes a file or folder at a node and returns its infohash in hex.

        Raises:
            InternalError: It cannot be published; the text says why.
        """
        output = await self._command("content", "publish", str(path), "--node", str(self.node_folders[node]),
                                     "--stdin-lifeline", "--json")  # fmt: skip
        found = json.loads(output)
        self._torrents[found["infohash"]] = Path(found["torrent"])
        return str(found["infohash"])

    async def add(self, infohash: str, *, node: int, source: int = 0, budget: str = "100 BTT") -> Amount:
        """Lets a node buy content from another one, with money of its own, and sell it.

        Args:
            infohash: Hex.
            node: Who buys.
            source: Who sells.
            budget: The most it may cost.

        Returns:
            What it paid.

        Raises:
            InternalError: It cannot be bought; the text says why.
        """
        from btt.sdk.wallet import Keystore

        folder = self.node_folders[node] / "wallet"
        if not folder.exists():
            folder.mkdir(mode=0o700)
            keystore = await asyncio.to_thread(Keystore.create, folder / "wallet.json", "")
            await self.fund(keystore.key().public.address, _PURSE)
        output = await self._command("content", "add", infohash, "--node", str(self.node_folders[node]),
                                     "--from", self.node_addresses[source], "--ledger", self.ledger_address,
                                     "--wallet", str(folder), "--budget", budget, "--stdin-lifeline",
                                     "--json")  # fmt: skip
        return Amount(int(json.loads(output)["paid"]))

    def torrent(self, infohash: str) -> Path:
        """Returns the torrent file of what was published."""
        return self._torrents[infohash]

    async def node_status(self, node: int = 0) -> dict[str, Any]:
        """Returns what `btt node status --json` says."""
        found = json.loads(await self._command("node", "status", str(self.node_folders[node]), "--json"))
        assert isinstance(found, dict)
        return found

    async def ledger_totals(self) -> Totals:
        """Returns the sums of the ledger's books."""
        from btt.sdk.ledger import LedgerAddress, LedgerClient

        async with LedgerClient.connect(LedgerAddress.parse(self.ledger_address)) as ledger:
            sums = await ledger.totals()
        return Totals(
            issued=Amount(sums.issued),
            accounts=Amount(sums.accounts),
            channels=Amount(sums.channels),
            open_channels=sums.open_channels,
            closed_channels=sums.closed_channels,
        )
