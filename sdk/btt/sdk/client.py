"""The dApp's way in: one client, one budget, one channel for each node it pays.

async with Client.connect("btt://T...@host:port", budget=Budget("5 BTT")) as btt:
quote = await btt.content.quote(infohash)
async with btt.content.fetch(quote, "downloads") as transfer:
async for step in transfer.progress():
print(step.done_bytes, step.spent)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from btt.sdk.budget import Budget
from btt.sdk.content.client import ContentClient
from btt.sdk.errors import (
    BttError,
    ChannelClosed,
    ChannelClosing,
    ChannelExpired,
    ConfigError,
    CountsDiffer,
)
from btt.sdk.identity import NodeAddress
from btt.sdk.keys import Address, PrivateKey
from btt.sdk.ledger import LedgerAddress, LedgerClient
from btt.sdk.ledger.keeping import RECEIPTS, EvidenceStore
from btt.sdk.payment.backoff import retry_after
from btt.sdk.payment.connection import NodeConnection, connect_node
from btt.sdk.payment.faults import NODE_BANS, check_node, fault_of
from btt.sdk.payment.history import known_endpoint
from btt.sdk.payment.keeper import Keeper
from btt.sdk.payment.purse import Purse
from btt.sdk.payment.receipt import SessionReceipt
from btt.sdk.payment.refunds import KEEP_MS, Wanted
from btt.sdk.payment.session import PaymentSession
from btt.sdk.payment.store import PayerStore
from btt.sdk.wallet import Keystore

CLOSE_PAUSES_S = (0.2, 1.0, 2.0, 4.0, 8.0)
"""Pauses between the tries to close a session, seconds."""
HURRY_S = 10.0
"""Seconds that closing may take when an error is on its way out."""


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


def system_ms() -> int:
    """Returns this machine's time, Unix milliseconds."""
    return time.time_ns() // 1_000_000


class Client:
    """A dApp's connection to a node; made by `connect`, used with `async with`.

    Leaving the block pays what is due and closes the channels; `receipts` then holds the
    signed statements. While it lives it watches its account on the ledger: a channel that is closed under
    it is left, and a node that took more than its due ends the block with `CaptureDisputed`.
    """

    def __init__(
        self,
        *,
        node: NodeAddress,
        ledger: LedgerAddress,
        wallet: Wallet,
        budget: Budget,
        trust_new: bool,
        keep_channels: bool,
        clock: Callable[[], int],
    ) -> None:
        self._address = node
        self._ledger_address = ledger
        self._wallet = wallet
        self._budget = budget
        self._trust_new = trust_new
        self._keep_channels = keep_channels
        self._clock = clock
        self._stack = AsyncExitStack()
        self._store: PayerStore | None = None
        self._ledger: LedgerClient | None = None
        self._node: NodeConnection | None = None
        self._met: Address | None = None
        self._session: PaymentSession | None = None
        self._opening = asyncio.Lock()
        self._keeper: Keeper | None = None
        self._keeping: asyncio.Task[None] | None = None
        self.receipts: list[SessionReceipt] = []
        self.content = ContentClient(self)

    @classmethod
    def connect(
        cls,
        node: str | None = None,
        *,
        budget: Budget,
        ledger: str | None = None,
        wallet: Wallet | Path | None = None,
        trust_new: bool = False,
        keep_channels: bool = False,
        clock: Callable[[], int] = system_ms,
    ) -> Client:
        """Makes a client; nothing is dialled before it is needed.

        Args:
            node: `btt://<node address>@host:port`; the first of BTT_NODES if not given.
            budget: What may be spent.
            ledger: `btt-ledger://...`; BTT_LEDGER if not given.
            wallet: A wallet, or its folder; the user's default if not given.
            trust_new: Accept a bare `host:port` that was never met before.
            keep_channels: Leave channels open at the end, for the next client.
            clock: Unix milliseconds.

        Raises:
            ConfigError: No node, ledger or wallet is configured.
            InvalidRequest: An address is malformed.
        """
        node = node or os.environ.get("BTT_NODES", "").split(",")[0].strip()
        if not node:
            raise ConfigError("No node is configured.", hint="Name one, or set BTT_NODES.")
        ledger = ledger or os.environ.get("BTT_LEDGER", "")
        if not ledger:
            raise ConfigError("No ledger is configured.", hint="Name one, or set BTT_LEDGER.")
        return cls(
            node=NodeAddress.parse(node),
            ledger=LedgerAddress.parse(ledger),
            wallet=wallet if isinstance(wallet, Wallet) else Wallet.open(wallet),
            budget=budget,
            trust_new=trust_new,
            keep_channels=keep_channels,
            clock=clock,
        )

    async def __aenter__(self) -> Client:
        self._store = PayerStore(self._wallet.folder)
        self._stack.callback(self._store.close)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self.close_session()
            elif self._session is not None:
                # The error on its way out matters more than a receipt; the books keep the channel.
                with contextlib.suppress(BttError, TimeoutError):
                    async with asyncio.timeout(HURRY_S):
                        await self._close_session(())
        finally:
            if self._session is not None:
                await self._session.abandon()
            await self._stop_keeping(tidy=kind is None)
            await self._stack.aclose()
        if kind is None and self._keeper is not None and self._keeper.disputes:
            raise self._keeper.disputes[0]

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
        """Returns the node, proven and with its current offer.

        Raises:
            NodeBanned: The wallet leaves it alone for a while; it was not dialled.
            BttError: It could not be reached or trusted.
        """
        named = self._address.node or known_endpoint(
            self._books, f"{self._address.host}:{self._address.port}"
        )
        if named is not None:
            check_node(self._books, named, self._clock())
        return await self._connected()

    async def _connected(self) -> NodeConnection:
        if self._node is None or self._node.offer.valid_until_ms < self._clock():
            self._node = await connect_node(
                self._address,
                ledger_id=self._ledger_address.ledger_id,
                store=self._books,
                clock=self._clock,
                trust_new=self._trust_new,
            )
            self._met = self._node.offer.node
        return self._node

    async def ledger(self) -> LedgerClient:
        """Returns the ledger, proven."""
        if self._ledger is None:
            receipts = EvidenceStore(self._wallet.folder / RECEIPTS)
            self._stack.callback(receipts.close)
            self._ledger = await self._stack.enter_async_context(
                LedgerClient.connect(self._ledger_address, keeper=receipts)
            )
            self._keeper = Keeper(self._purse(self._ledger), lambda: self._session)
            node = self._address.node
            # Idle channels of our own node are for the session that is about to open.
            wanted = Wanted(idle=node is not None, keep_ms=KEEP_MS, spare=node)
            self._keeping = asyncio.create_task(self._keeper.run(wanted), name="channel-keeper")
        return self._ledger

    def _purse(self, ledger: LedgerClient) -> Purse:
        return Purse(
            account=self._wallet.account,
            store=self._books,
            ledger=ledger,
            clock=self._clock,
            budget=self._budget.name,
            granted=self._budget.amount,
        )

    async def session(self, need: int) -> PaymentSession:
        """Returns the live payment session, topped up as far as needed, or opens one.

        Args:
            need: Base units the coming work is expected to cost.

        Raises:
            BudgetExceeded: The budget does not reach for one verify unit; says what is missing.
            BttError: The node or the ledger refused, or did not answer.
        """
        async with self._opening:
            if self._session is not None and self._session.error is not None:
                self.blame(self._session.error)
                await self._session.abandon()
                self._session = None
                self._node = None  # it may have restarted with a new offer
            if self._session is not None:
                check_node(self._books, self._session.offer.node, self._clock())
                try:
                    await self._session.provide(need)
                except ChannelExpired:
                    await self.close_session()
            if self._session is None:
                await self.node()  # dials no banned one
                self._session = await self._open_session(need)
            return self._session

    async def _open_session(self, need: int, only: bytes | None = None) -> PaymentSession:
        # Whatever a node did, what is due to it is paid, and a channel to it closed.
        node = await self._connected()
        purse = self._purse(await self.ledger())
        try:
            return await PaymentSession.open(purse, node, need=need, only=only)
        except BttError as error:
            self.blame(error)
            raise

    def blame(self, error: BttError, *, at_last: bool = False) -> None:
        """Remembers a failure of the node, if it is one; for some it is left alone for a while.

        Args:
            error: What happened.
            at_last: Trying again was no use.
        """
        fault = fault_of(error, at_last=at_last)
        if fault is not None and self._met is not None:
            self._books.strike(
                self._met, fault.reason, now_ms=self._clock(), policy=NODE_BANS, weight=fault.weight
            )

    async def close_session(self) -> SessionReceipt | None:
        """Pays what is due, ends the session, and keeps its receipt.

        A node or ledger that is away for a moment is waited for.

        Returns:
            The receipt; None without a session, or when the node closed the channel and its answer
            was lost.

        Raises:
            BttError: The node or the ledger did not answer; the books keep the channel.
        """
        return await self._close_session(CLOSE_PAUSES_S)

    async def _close_session(self, pauses: tuple[float, ...]) -> SessionReceipt | None:
        session, self._session = self._session, None
        if session is None:
            return None
        if session.error is not None:
            self.blame(session.error)
        channel_id = session.payer.channel_id
        for pause in (*pauses, None):
            try:
                if session is None:
                    session = await self._open_session(0, channel_id)
                receipt = await session.close(close_channel=not self._keep_channels)
            except (ChannelClosed, ChannelClosing):
                return None
            except BttError as error:
                self.blame(error)
                session, self._node = None, None
                if pause is None or not error.retryable:
                    raise
                await asyncio.sleep(max(pause, retry_after(error)))
            else:
                if receipt.paid > session.payer.signed or receipt.owed > session.payer.tally.owed:
                    self.blame(CountsDiffer("The node closed with more than was accepted."))
                self.receipts.append(receipt)
                with contextlib.suppress(BttError):  # the next time brings it, too
                    await (await self.ledger()).gather(self._wallet.account)
                return receipt
        raise AssertionError("the last try returns or raises")

    @property
    def _books(self) -> PayerStore:
        if self._store is None:
            raise ConfigError("The client is not open.", hint="Use it inside `async with`.")
        return self._store
