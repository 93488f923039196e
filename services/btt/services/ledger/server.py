"""Runs a ledger: opens its folder, checks its books, listens with its pinned certificate."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc.aio

from btt.proto.ledger.v1.ledger_pb2_grpc import add_LedgerServiceServicer_to_server
from btt.sdk.clock import SYSTEM
from btt.sdk.errors import ConfigError
from btt.sdk.keys import Address, PublicKey
from btt.sdk.ledger.address import LedgerAddress
from btt.sdk.tls import certificate_sha256, server_credentials
from btt.services.ledger import genesis
from btt.services.ledger.folder import LedgerFolder
from btt.services.ledger.genesis import Identity
from btt.services.ledger.hub import Hub
from btt.services.ledger.limits import RateLimiter
from btt.services.ledger.outage import give_back
from btt.services.ledger.reading import Reader
from btt.services.ledger.sequencer import Sequencer
from btt.services.ledger.service import LedgerService
from btt.services.ledger.store import Store
from btt.services.ledger.sweeper import Sweeper
from btt.services.ledger.verify import Verifier

_log = logging.getLogger(__name__)
MAX_MESSAGE: Final = 64 * 1024
"""Largest message, bytes; the largest honest one is about 500."""
MAX_CALLS: Final = 1024
"""Calls that are served at once; more are refused as RESOURCE_EXHAUSTED."""

OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.max_metadata_size", 8 * 1024),
    # Two ledgers on one port would share its connections.
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerConfig:
    """How a ledger runs.

    Args:
        folder: Made by `folder.init`.
        host: Name or IP address to listen on.
        port: TCP port; 0 takes a free one.
        advertise_host: Host in the printed address; the one it listens on by default.
        grace: Seconds that calls may take when the ledger stops.
        rate: Requests per second that one key may make for ever; reads are counted apart.
        burst: Requests that one key may make at once.
        sweep_every: Seconds between rounds that pay out what is due.
        auditors: Addresses that may read the journal, beside the operator.
    """

    folder: Path
    host: str = "127.0.0.1"
    port: int = 0
    advertise_host: str | None = None
    grace: float = 5.0
    rate: float = 200.0
    burst: int = 1000
    sweep_every: float = 5.0
    auditors: tuple[Address, ...] = ()


@dataclass(frozen=True, slots=True)
class RunningLedger:
    """A ledger that listens.

    Args:
        address: Where, and who it is.
        identity: What it is.
        sequencer: Its order of operations.
        sweeper: Pays out what is due.
    """

    address: LedgerAddress
    identity: Identity
    sequencer: Sequencer
    sweeper: Sweeper


@asynccontextmanager
async def serve(config: LedgerConfig, *, clock: Callable[[], int] = SYSTEM) -> AsyncIterator[RunningLedger]:
    """Runs a ledger inside this process until the context ends.

    Args:
        config: How it runs.
        clock: Unix milliseconds.

    Raises:
        ConfigError: There is no ledger in the folder, another process runs it, or the port is taken.
        InvariantBroken: The books do not add up.
        StorageError: The disk failed.
    """
    folder = LedgerFolder.open(config.folder)
    store = Store.open(folder.database)
    async with AsyncExitStack() as stack:
        hub, loop = Hub(), asyncio.get_running_loop()

        def returned(now_ms: int, away_ms: float) -> int:
            batch = give_back(store, folder.operator_key, clock_ms=now_ms, away_ms=away_ms)
            if extended := len(batch.entries):
                _log.warning("%d challenge windows get back the time that the ledger was away.", extended)
                loop.call_soon_threadsafe(hub.publish, batch)
            return extended

        try:
            folder = folder.settled(store.operator_key)
            returned(clock(), math.inf)
        except BaseException:
            store.close()
            raise
        limiter = RateLimiter(rate=config.rate, burst=config.burst)
        sequencer = await stack.enter_async_context(
            Sequencer(store, clock=clock, committed=hub.publish, returned=returned, charge=limiter.charge)
        )
        service = LedgerService(
            sequencer=sequencer,
            reader=Reader(folder.database),
            identity=store.identity,
            operator_key=folder.operator_key,
            certificates=[certificate_sha256(folder.certificate)],
            clock=clock,
            hub=hub,
            limiter=limiter,
            auditors=config.auditors,
        )
        stack.callback(service.close)
        server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
        add_LedgerServiceServicer_to_server(service, server)
        port = _listen(server, config, folder)
        await server.start()
        # Calls end first, then the reader, then the sequencer with what it still holds.
        stack.push_async_callback(server.stop, config.grace)
        stack.callback(hub.close)
        sweeper = Sweeper(due=service.due, sequencer=sequencer, verifier=Verifier(store.identity.ledger_id))
        sweeping = asyncio.create_task(sweeper.run(config.sweep_every, clock), name="ledger-sweeper")
        stack.push_async_callback(_cancel, sweeping)
        address = LedgerAddress(
            # The address names the first operator for ever; clients follow the hand-overs from there.
            PublicKey(genesis.operator_key(store.identity.genesis)).address,
            config.advertise_host or config.host,
            port,
            store.identity.ledger_id,
        )
        yield RunningLedger(address, store.identity, sequencer, sweeper)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def _listen(server: grpc.aio.Server, config: LedgerConfig, folder: LedgerFolder) -> int:
    host = f"[{config.host}]" if ":" in config.host else config.host
    credentials = server_credentials(folder.tls_key, folder.certificate)
    try:
        port = server.add_secure_port(f"{host}:{config.port}", credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigError(
            f"The ledger cannot listen on {host}:{config.port}.", hint="Choose another --listen address."
        )
    return port
