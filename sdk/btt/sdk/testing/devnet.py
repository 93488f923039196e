"""A whole BTT network on this machine: a ledger, nodes, and money for whoever asks.

Everything is real: what works here works against a node elsewhere. By default each part is a
process of its own; inside one process it starts sooner, and takes a clock and services that a test
made. It lives in a temporary folder, on free loopback ports, and ends with the block that uses it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from btt.sdk.budget import Budget
from btt.sdk.clock import Clock, FakeClock, SharedClock, parse_duration
from btt.sdk.errors import BttError, ConfigError
from btt.sdk.keys import Address, PrivateKey
from btt.sdk.money import Amount, Rate
from btt.sdk.testing import layout, processes
from btt.sdk.testing.processes import Server
from btt.sdk.testing.scratch import make_scratch

if TYPE_CHECKING:
    from btt.sdk.client import Client, Wallet
    from btt.sdk.plugin import ServicePlugin

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
    the processes end; when the block ends the folder is removed, or by the next devnet if this
    process is killed.

    Args:
        nodes: How many.
        content_price: What the nodes ask for content.
        services: Further services that the nodes offer, with their sections of the configuration.
        plugins: Classes of services that are not installed, by name; only in process.
        in_process: Run everything inside this process.
        clock: The time of the network, only in process; by default one that `advance` moves.

    Raises:
        ConfigError: The price does not do, or there is no node.
    """

    def __init__(
        self,
        *,
        nodes: int = 1,
        content_price: str = DEFAULT_PRICE,
        services: Mapping[str, Mapping[str, Any]] | None = None,
        plugins: Mapping[str, type[ServicePlugin]] | None = None,
        in_process: bool = False,
        clock: Clock | None = None,
    ) -> None:
        try:
            self.content_rate = Rate.parse(content_price)
        except ValueError as error:
            raise ConfigError(f"The price does not do: {error}.") from None
        if nodes < 1:
            raise ConfigError("A devnet has at least one node.")
        if not in_process and (plugins or clock is not None):
            raise ConfigError(
                "Processes take no plugin or clock of this one.",
                hint="Install the plugin and name it in `services`, or write in_process=True.",
            )
        self._count = nodes
        self._sections = {
            "content": {"enabled": True, "rate": content_price},
            **{name: {"enabled": True, **section} for name, section in (services or {}).items()},
        }
        self._plugins = dict(plugins or {})
        self._in_process = in_process
        self._clock = clock
        self._faucet = PrivateKey.generate()
        self._stack = AsyncExitStack()
        self._folder: Path | None = None
        self._ledger: Server | None = None
        self._nodes: dict[int, Server] = {}
        self._torrents: dict[str, Path] = {}
        self._wallets = 0
        self.ledger_address = ""
        """`btt-ledger://T...@127.0.0.1:port/...`."""
        self.node_addresses: list[str] = []
        """`btt://T...@127.0.0.1:port` of each node."""

    async def __aenter__(self) -> Devnet:
        async with AsyncExitStack() as stack:
            self._folder = folder = make_scratch(stack)
            if self._clock is None:
                self._clock = SharedClock.create(folder / layout.CLOCK)
            # A node's block ends before the ledger's: it settles while the ledger still answers.
            if self._in_process:
                await self._start_here(stack, self._clock)
            else:
                await self._start_processes(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, BttError):
                for server in self._servers():
                    await server.explain(error)
        finally:
            await self._stack.aclose()

    async def _start_here(self, stack: AsyncExitStack, clock: Clock) -> None:
        ledger, node = layout.hosts()
        serving = ledger.serve(self.folder / layout.LEDGER, supply_to=self._faucet.address, clock=clock)
        self.ledger_address = await stack.enter_async_context(serving)
        for number in range(self._count):
            config = layout.node_config(self.ledger_address, self._sections)
            serving = node.serve(self.node_folders[number], config=config, plugins=self._plugins, clock=clock)
            self.node_addresses.append(await stack.enter_async_context(serving))

    async def _start_processes(self, stack: AsyncExitStack) -> None:
        await self._command(*layout.make_ledger(self.folder, self._faucet.address))
        self._ledger = await self._serve(stack, "ledger", *layout.serve_ledger(self.folder))
        self.ledger_address = self._ledger.address
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self._count):
                    group.create_task(self._make_node(stack, number))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        self.node_addresses = [self._nodes[number].address for number in range(self._count)]

    async def _make_node(self, stack: AsyncExitStack, number: int) -> None:
        folder = self.node_folders[number]
        await self._command(*layout.make_node(folder, self.ledger_address))
        layout.configure(folder, self._sections)
        await self._start_node(stack, number)
        # From now on it comes back where it was.
        config, port = folder / "node.toml", self._nodes[number].address.rpartition(":")[2]
        config.write_text(config.read_text("utf-8").replace("127.0.0.1:0", f"127.0.0.1:{port}"), "utf-8")

    async def _start_node(self, stack: AsyncExitStack, number: int) -> None:
        folder = self.node_folders[number]
        self._nodes[number] = await self._serve(stack, folder.name, *layout.serve_node(self.folder, folder))

    async def _command(self, *arguments: str) -> str:
        clock = self._clock.path if isinstance(self._clock, SharedClock) else None
        return await processes.run(
            *arguments, log=self.folder / f"{'-'.join(arguments[:2])}.log", clock=clock
        )

    async def _serve(self, stack: AsyncExitStack, name: str, *arguments: str) -> Server:
        server = await Server.start(name, *arguments, log=self.folder / f"{name}.log")
        stack.push_async_callback(server.stop)
        return server

    def _servers(self) -> list[Server]:
        nodes = [self._nodes[number] for number in sorted(self._nodes)]
        return [self._ledger, *nodes] if self._ledger is not None else nodes

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
        return layout.node_folders(self.folder, self._count)

    @property
    def node_folder(self) -> Path:
        """The first node's folder."""
        return self.node_folders[0]

    @property
    def node_address(self) -> str:
        """The first node's address."""
        return self.node_addresses[0]

    @property
    def pids(self) -> list[int]:
        """Process ids of the ledger and the nodes; none if they run in this process."""
        return [server.pid for server in self._servers()]

    @property
    def clock(self) -> Clock:
        """The time of the network."""
        assert self._clock is not None, "made when the devnet starts"
        return self._clock

    def advance(self, duration: str) -> None:
        """Moves the time of the whole network ahead, such as "30d".

        Raises:
            ConfigError: That is no duration, or the clock is one that cannot be moved.
        """
        if not isinstance(self._clock, SharedClock | FakeClock):
            raise ConfigError("This clock cannot be moved.", hint="Use a FakeClock, or none.")
        try:
            self._clock.advance(parse_duration(duration))
        except ValueError as error:
            raise ConfigError(f"{duration!r} does not do: {error}.") from None

    async def kill_node(self, node: int) -> None:
        """Kills the process of a node as a power cut would."""
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
        await layout.fund(self.ledger_address, self._faucet, address, amount)

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
        return Client.connect(
            self.node_addresses, ledger=self.ledger_address, wallet=wallet, budget=granted, clock=self.clock
        )

    async def publish(self, path: Path, *, node: int = 0) -> str:
        """Publishes a file or folder at a node and returns its infohash in hex.

        Args:
            path: Of the file or folder.
            node: Which node; the first is 0.

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
                                     "--from", self.node_addresses[source], "--wallet", str(folder),
                                     "--budget", budget, "--stdin-lifeline", "--yes", "--json")  # fmt: skip
        return Amount(int(json.loads(output)["paid"]))

    def torrent(self, infohash: str) -> Path:
        """Returns the torrent file of what was published."""
        return self._torrents[infohash]

    async def node_status(self, node: int = 0) -> dict[str, Any]:
        """Returns what `btt node status --json` says.

        Args:
            node: Which node; the first is 0.
        """
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
