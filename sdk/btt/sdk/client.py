"""The dApp's way in: one client, one budget, a payment session with each node it uses.

async with Client.connect(["btt://T...@host:port", ...], budget=Budget("5 BTT")) as btt:
quote = await btt.content.quote(infohash)
async with btt.content.fetch(quote, "downloads") as transfer:
async for step in transfer.progress():
print(step.done_bytes, step.spent)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import grpc.aio

from btt.sdk.budget import Budget
from btt.sdk.clock import configured
from btt.sdk.content.client import ContentClient
from btt.sdk.errors import BttError, ConfigError
from btt.sdk.identity import NodeAddress
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerAddress, LedgerClient
from btt.sdk.ledger.keeping import RECEIPTS, EvidenceStore
from btt.sdk.money import SUPPLY, Amount
from btt.sdk.payment.apps import Granter
from btt.sdk.payment.connection import NodeConnection
from btt.sdk.payment.grants import Grant
from btt.sdk.payment.keeper import Keeper
from btt.sdk.payment.purse import Purse
from btt.sdk.payment.receipt import SessionReceipt
from btt.sdk.payment.refunds import KEEP_MS, Wanted
from btt.sdk.payment.session import PaymentSession
from btt.sdk.payment.store import PayerStore
from btt.sdk.provider import Provider
from btt.sdk.service import Service, StubT
from btt.sdk.wallet import Keystore

HURRY_S = 10.0
"""Seconds that closing may take when an error is on its way out."""
GONE_PAUSES_S = (0.2, 1.0)
"""Pauses between the tries to close a session with one node of several, seconds."""


def default_wallet() -> Path:
    """Returns the wallet folder of this user: BTT_WALLET, or the platform's place for data."""
    import platformdirs

    return Path(os.environ.get("BTT_WALLET") or platformdirs.user_data_path("btt") / "wallet")


@dataclass(frozen=True, slots=True)
class Wallet:
    """An account and its books.

    Attributes:
        folder: Holds wallet.json and the books.
        account: Key of the account.
    """

    folder: Path
    account: PrivateKey

    @classmethod
    def open(cls, folder: Path | None = None, password: str | None = None) -> Wallet:
        """Opens a wallet folder.

        Args:
            folder: The default one if not given.
            password: BTT_WALLET_PASSWORD, or none, if not given.

        Raises:
            ConfigError: There is no wallet, or the password is wrong.
        """
        folder = folder or default_wallet()
        secret = os.environ.get("BTT_WALLET_PASSWORD", "") if password is None else password
        return cls(folder, Keystore.open(folder / "wallet.json", secret).key())


class Client:
    """A dApp's connection to nodes; made by `connect`, used with `async with`.

    Leaving the block pays what is due and closes the channels; `receipts` then holds the
    signed statements, and `unsettled` what kept a node of several from giving one: what it is owed is
    signed, and the books keep the channel. While it lives it watches its account on the ledger: a
    channel that is closed under it is left, and a node that took more than its due ends the block with
    `CaptureDisputed`.
    """

    def __init__(
        self,
        *,
        nodes: Sequence[NodeAddress],
        ledger: LedgerAddress,
        wallet: Wallet | Grant,
        budget: Budget,
        trust_new: bool,
        keep_channels: bool,
        clock: Callable[[], int],
        app: Granter | None,
    ) -> None:
        self._ledger_address = ledger
        self._wallet = wallet
        self._budget = budget
        self._app = app
        self._stack = AsyncExitStack()
        self._store: PayerStore | None = None
        self._ledger: LedgerClient | None = None
        self._dialling = asyncio.Lock()
        self._keep_channels = keep_channels
        self._keeper: Keeper | None = None
        self._keeping: asyncio.Task[None] | None = None
        self.clock = clock
        self.receipts: list[SessionReceipt] = []
        self.unsettled: dict[NodeAddress, BttError] = {}
        self.providers = tuple(
            Provider(self, address, trust_new=trust_new, close_channels=not keep_channels)
            for address in nodes
        )
        self.content = ContentClient(self)

    @classmethod
    def connect(
        cls,
        nodes: str | Sequence[str] | None = None,
        *,
        budget: Budget | None = None,
        ledger: str | None = None,
        wallet: Wallet | Path | None = None,
        grant: Grant | Path | str | None = None,
        trust_new: bool = False,
        keep_channels: bool | None = None,
        clock: Callable[[], int] | None = None,
        app: Granter | None = None,
    ) -> Client:
        """Makes a client; nothing is dialled before it is needed.

        Args:
            nodes: `btt://<node address>@host:port`, one or several; BTT_NODES, separated by commas,
                if not given.
            budget: What may be spent, by all nodes together; with a grant all of it, if not given.
            ledger: `btt-ledger://...`; BTT_LEDGER if not given.
            wallet: A wallet, or its folder; the user's default if not given.
            grant: Or a grant, or its file: it names node and ledger, and no wallet is opened. BTT_GRANT
                if neither is given.
            trust_new: Accept a bare `host:port` that was never met before.
            keep_channels: Leave channels open at the end, for the next client; as is done with a grant
                if not given.
            clock: Unix milliseconds; the devnet's if BTT_CLOCK names one, or this machine's.
            app: Gets the grant of the application that this client is; see `btt.sdk.payment.apps`.

        Raises:
            ConfigError: No node, ledger, wallet or budget is configured, or a grant beside them.
            InvalidRequest: An address is malformed.
        """
        if grant is None and wallet is None:
            grant = os.environ.get("BTT_GRANT") or None
        if grant is not None:
            if not (nodes is None and ledger is None and wallet is None):
                raise ConfigError("A grant names its node and ledger, and stands for a wallet.")
            grant = grant if isinstance(grant, Grant) else Grant.open(grant)
            return cls(
                nodes=[grant.node],
                ledger=grant.ledger,
                wallet=grant,
                budget=budget or Budget(Amount(SUPPLY), name="grant"),
                trust_new=False,
                keep_channels=keep_channels is not False,
                clock=clock or configured(),
                app=app,
            )
        if budget is None:
            raise ConfigError("No budget is given.", hint='Say what may be spent: Budget("1 BTT").')
        if nodes is None:
            nodes = os.environ.get("BTT_NODES", "")
        found = NodeAddress.parse_all(nodes)
        if not found:
            raise ConfigError("No node is configured.", hint="Name one, or set BTT_NODES.")
        ledger = ledger or os.environ.get("BTT_LEDGER", "")
        if not ledger:
            raise ConfigError("No ledger is configured.", hint="Name one, or set BTT_LEDGER.")
        return cls(
            nodes=found,
            ledger=LedgerAddress.parse(ledger),
            wallet=wallet if isinstance(wallet, Wallet) else Wallet.open(wallet),
            budget=budget,
            trust_new=trust_new,
            keep_channels=bool(keep_channels),
            clock=clock or configured(),
            app=app,
        )

    async def __aenter__(self) -> Client:
        store = PayerStore(self._wallet.folder)
        try:
            store.declare(self._budget)
            if isinstance(self._wallet, Grant):
                self._wallet.begin_books(store)
        except BaseException:
            store.close()
            raise
        self._store = store
        self._stack.callback(store.close)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self._close_sessions()
            elif any(provider.live for provider in self.providers):
                # The error on its way out matters more than a receipt; the books keep the channel.
                with contextlib.suppress(BttError, TimeoutError):
                    async with asyncio.timeout(HURRY_S):
                        await asyncio.gather(*(provider.close_session(()) for provider in self.providers))
        finally:
            for provider in self.providers:
                await provider.abandon()
            await self._stop_keeping(tidy=kind is None)
            await self._stack.aclose()
            keeper, self._keeper = self._keeper, None
            self._store = self._ledger = self._keeping = None
        if kind is None and keeper is not None and keeper.disputes:
            raise keeper.disputes[0]

    async def _close_sessions(self) -> None:
        if len(self.providers) == 1:
            await self.close_session()
            return
        closing = [provider.close_session(GONE_PAUSES_S) for provider in self.providers]
        for provider, outcome in zip(
            self.providers, await asyncio.gather(*closing, return_exceptions=True), strict=True
        ):
            if isinstance(outcome, BttError):
                self.unsettled[provider.address] = outcome
            elif isinstance(outcome, BaseException):
                raise outcome

    async def _stop_keeping(self, *, tidy: bool) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        if self._keeper is not None and tidy:
            # What a node did not close with us is asked back from the ledger.
            with contextlib.suppress(BttError, TimeoutError):
                async with asyncio.timeout(HURRY_S):
                    await self._keeper.tidy(Wanted(idle=not self._keep_channels, keep_ms=KEEP_MS))

    async def node(self) -> NodeConnection:
        """Returns the first node, proven and with its current offer."""
        return await self.providers[0].node()

    async def ledger(self) -> LedgerClient:
        """Returns the ledger, proven."""
        async with self._dialling:
            if self._ledger is None:
                async with AsyncExitStack() as opening:
                    receipts = EvidenceStore(self.books.folder / RECEIPTS)  # of an open client
                    opening.callback(receipts.close)
                    connecting = LedgerClient.connect(self._ledger_address, keeper=receipts)
                    ledger = await opening.enter_async_context(connecting)
                    self._stack.push_async_exit(opening.pop_all())
                self._ledger = ledger
                self._keeper = Keeper(self._purse(ledger), self._live)
                nodes = frozenset(p.address.node for p in self.providers if p.address.node is not None)
                # Idle channels of our own nodes are for the sessions that are about to open.
                wanted = Wanted(idle=len(nodes) == len(self.providers), keep_ms=KEEP_MS, spare=nodes)
                self._keeping = asyncio.create_task(self._keeper.run(wanted), name="channel-keeper")
            return self._ledger

    def _live(self) -> list[PaymentSession]:
        return [provider.live for provider in self.providers if provider.live is not None]

    async def session(self, need: int) -> PaymentSession:
        """Returns the live payment session with the first node, topped up as far as needed, or opens one.

        Args:
            need: Base units the coming work is expected to cost.

        Raises:
            BudgetExceeded: The budget does not reach for one verify unit; says what is missing.
            BttError: The node or the ledger refused, or did not answer.
        """
        return await self.providers[0].session(need)

    def service(
        self,
        stub: Callable[[grpc.aio.Channel], StubT],
        *,
        budget: Amount | str,
        per_call: Amount | str | None = None,
    ) -> Service[StubT]:
        """Returns any service of the node, paid from this client's budget; use it with `async with`.

        Args:
            stub: The generated stub class of the service.
            budget: What the calls of the block may cost together; such as "0.5 BTT".
            per_call: What one of them may; the whole of it if not given.

        Raises:
            InvalidRequest: That is no stub, or no amount.
        """
        return Service(self, stub, budget=budget, per_call=per_call)

    async def close_session(self) -> SessionReceipt | None:
        """Pays what is due to the first node, ends the session, and keeps its receipt.

        A node or ledger that is away for a moment is waited for.

        Returns:
            The receipt; None without a session, or when the node closed the channel and its answer
            was lost.

        Raises:
            BttError: The node or the ledger did not answer; the books keep the channel.
        """
        return await self.providers[0].close_session()

    async def purse(self) -> Purse:
        """Returns what pays the nodes."""
        return self._purse(await self.ledger())

    def _purse(self, ledger: LedgerClient) -> Purse:
        return Purse(
            owner=self._wallet if isinstance(self._wallet, Grant) else self._wallet.account,
            store=self.books,
            ledger=ledger,
            clock=self.clock,
            budget=self._budget.name,
            granted=self._budget.amount,
            app=self._app,
        )

    @property
    def ledger_id(self) -> bytes:
        """Of the configured ledger, 32 bytes."""
        return self._ledger_address.ledger_id

    @property
    def books(self) -> PayerStore:
        """The wallet's books.

        Raises:
            ConfigError: The client is not open.
        """
        if self._store is None:
            raise ConfigError("The client is not open.", hint="Use it inside `async with`.")
        return self._store
