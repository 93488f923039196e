"""Runs a node: opens what it needs in order, serves, and stops without losing a payment.

Payment never waits behind data: the gRPC server has no limit of its own on calls, and the
node bounds the paid calls alone (`Admission`), so that Open and Pay are always taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import Final, Self, cast

import grpc.aio
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

from btt.node import registry
from btt.node.admission import Admission, Apps
from btt.node.connections import Connections
from btt.node.folder import NodeFolder, Running
from btt.node.health import HealthServicer
from btt.node.limits.limiter import Limiter
from btt.node.metrics import NodeMetrics, Sample
from btt.node.observe import Observer
from btt.node.offers import OfferContent, Offers, OfferServicer
from btt.node.payments.closing import Closer
from btt.node.payments.interceptor import PaymentInterceptor
from btt.node.payments.ledger import LedgerOnDemand
from btt.node.payments.registrar import Registrar
from btt.node.payments.servicer import PaymentServicer
from btt.node.payments.sessions import Sessions
from btt.node.payments.store import PayeeStore
from btt.node.platform import keepalive, platform_names
from btt.node.plugins.weakly import weakly
from btt.node.quota import Quotas
from btt.node.refusals import Refusals
from btt.node.reload import Reloaded, Reloader, credit_policy
from btt.node.samples import read_samples
from btt.node.services import Patience, Services
from btt.node.values import parse_listen
from btt.proto.offer.v1 import offer_pb2_grpc
from btt.proto.payment.v1 import payment_pb2_grpc
from btt.sdk.clock import SYSTEM
from btt.sdk.errors import BttError, ConfigError, Draining
from btt.sdk.identity import NodeAddress
from btt.sdk.ledger.keeping import RECEIPTS, EvidenceStore
from btt.sdk.tls import TRANSPORT_OPTIONS, certificate_sha256, server_credentials

log = structlog.get_logger(__name__)

GRACE_S: Final = 10.0
"""Seconds that calls may take to end when a node stops."""
_LAST_CALLS_S: Final = 1.0  # for what is left once no paid call runs
_LAST_PAYMENTS_S: Final = 5.0
_LAST_SWEEP_S: Final = 5.0
_SWEEP_EVERY_S: Final = 30.0
_WATCH_EVERY_S: Final = 300.0
_OFFER_EVERY_S: Final = 60.0
DEFAULT_PATIENCE: Final = Patience()
_ANYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what is printed instead

_OPTIONS: Final = (
    *TRANSPORT_OPTIONS,
    ("grpc.max_metadata_size", 16 * 1024),
    # Two nodes on one port would share its connections.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.max_pings_without_data", 0),
)


class Node:
    """One node inside this process.

        async with Node(NodeFolder.open(path)) as node:
            print(node.address)

    Args:
        folder: Its configuration and keys.
        plugins: The services that exist; by default those that are installed.
        clock: Unix milliseconds.
        grace_s: Seconds that calls may take to end when it stops.
        patience: How long services may take.
    """

    def __init__(
        self,
        folder: NodeFolder,
        *,
        plugins: registry.Plugins | None = None,
        clock: Callable[[], int] = SYSTEM,
        grace_s: float = GRACE_S,
        patience: Patience = DEFAULT_PATIENCE,
    ) -> None:
        self.folder = folder
        self._plugins = plugins
        self.clock = clock
        self._grace_s = grace_s
        self._patience = patience
        self._running: Running | None = None
        self._reloads = 0
        self._started = asyncio.Event()
        self._hurry = asyncio.Event()
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: asyncio.Future[BaseException] | None = None

    async def __aenter__(self) -> Self:
        """Starts the node.

        Raises:
            ConfigError: The configuration or a service is wrong, the port is taken, or another
                process runs this node.
            StorageError: The disk failed.
        """
        self._failure = asyncio.get_running_loop().create_future()
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        self._started.set()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stops the node: running calls end first, up to the grace time."""
        await self._stack.aclose()

    def hurry(self) -> None:
        """Cuts the grace time of a stop that is under way, or to come."""
        self._hurry.set()

    async def failed(self) -> BaseException:
        """Returns what makes it impossible to go on, once that happens."""
        assert self._failure is not None, "started before it is watched"
        return await asyncio.shield(self._failure)

    async def _start(self, stack: AsyncExitStack) -> None:
        folder, config = self.folder, self.folder.config
        running = stack.enter_context(folder.lock())
        self.store = PayeeStore(folder.books, clock=self.clock)
        stack.callback(self.store.close)
        keeper = EvidenceStore(folder.path / RECEIPTS)
        stack.callback(keeper.close)
        self.ledger = LedgerOnDemand(config.ledger.address, keeper=keeper)
        stack.push_async_callback(self.ledger.close)
        self.health = HealthServicer()
        self.limiter = Limiter(asyncio.get_running_loop().time)
        stack.push_async_callback(self.limiter.close)
        self.metrics = NodeMetrics(weakly(self._samples))
        self.quotas = Quotas(weakly(self.store.run))
        self.quotas.limit({name: section.quota for name, section in config.services.items()})
        self.services = Services(
            self._plugins if self._plugins is not None else registry.installed(),
            folder=folder.path,
            clock=self.clock,
            limiter=self.limiter,
            metrics=self.metrics,
            quotas=self.quotas,
            health=self.health,
            credit_limit=config.payments.credit_limit,
            patience=self._patience,
            restarted=weakly(self.reprice),
        )
        await self.services.start(stack, config.services)
        services = self.services.registry
        registrar = services.registrar
        self.offers = await self._make_offers(services)
        self.admission = Admission(
            apps=Apps(allow=config.apps.allow, deny=config.apps.deny, clock=self.clock),
            node=config.limits.limits,
            services=services.limits,
            clock=self.clock,
        )
        self._make_payments()
        self._serve_platform(registrar, services)
        paid = PaymentInterceptor(
            sessions=self.sessions,
            charges=registrar.charges,
            admit=self.admission.admit,
            admit_free=self.admission.admit_free,
            clock=self.clock,
        )
        self.refusals = Refusals(store=self.store, clock=self.clock)
        self.connections = Connections(config.limits.connections)
        observer = Observer(
            services.owners,
            lambda service, _, reason: self.refusals.count(service, reason),
            self.metrics.ended,
            connections=self.connections,
        )
        server = grpc.aio.server(
            handlers=[services.router],
            interceptors=[observer, paid],
            options=[*_OPTIONS, *keepalive(config.payments.grace)],
        )
        self.reloader = Reloader(self)
        stack.push_async_callback(self.reloader.close)
        self.reloader.apply_limits(config)
        port = self._listen(server)
        await server.start()
        stack.push_async_callback(self._stop, server)
        # Four questions fit into the shortest window that a payer may close in.
        watch_s = min(_WATCH_EVERY_S, config.payments.terms.min_challenge_ms / 4000)
        self._watch(self.closer.run(_SWEEP_EVERY_S, watch_s))
        self._watch(self.offers.run(_OFFER_EVERY_S, self._lend_units))
        self._watch(self.sessions.bans.run(self.sessions.peers, self.sessions.disconnect))
        self._watch(self.refusals.run())
        self._watch(self._greet_ledger())
        if config.metrics.listen:
            self.metrics_port, stop_metrics = self.metrics.serve(*parse_listen(config.metrics.listen))
            stack.callback(stop_metrics)
        await self._tell(running, port, services)

    async def reprice(self) -> None:
        """Offers what the services ask now.

        Raises:
            StorageError: The offer could not be kept; the old one stays.
        """
        if await self.offers.reprice(self.services.registry.prices, self.reloader.held.payments.terms):
            self._lend_units()

    def _lend_units(self) -> None:
        # A session may still pin the offer before this one.
        self.sessions.reprice(max(offer.sheet.unit_charge for offer in self.offers.usable()))

    async def reload(self) -> Reloaded:
        """Reads the configuration again, and takes what can be taken without a restart, once it serves."""
        await self._started.wait()
        result = await self.reloader.reload()
        if self._running is not None:
            self._reloads += 1
            self._running.tell(reloads=self._reloads, reloaded=result.as_json())
        return result

    async def drain(self) -> None:
        """Takes no new session and no new call, lets paid calls end, and closes all channels.

        `hurry` cuts the waiting.
        """
        log.info("node.draining", calls=self.admission.running)
        await self._refuse_new_work()
        await self._patiently(self.admission.idle(), None)
        # The last payments are on their way; payers who have all they want close their channels.
        await self._patiently(self.sessions.gone(), _LAST_PAYMENTS_S)
        await self._end_sessions()
        for record, _ in await self.store.channels():
            async with self.sessions.lock(record.channel_id):
                try:
                    await self.closer.close(record.channel_id)
                except BttError as error:
                    log.warning("channel.close_failed", channel=record.channel_id.hex(), error=str(error))

    async def _refuse_new_work(self) -> None:
        await self.health.enter_graceful_shutdown()
        self.payments.draining = self.admission.draining = True
        if self._running is not None:
            self._running.tell(draining=True)

    async def _make_offers(self, services: registry.Registry) -> Offers:
        folder, config = self.folder, self.folder.config
        offers = Offers(
            key=folder.identity,
            content=OfferContent(
                ledger_id=config.ledger.address.ledger_id,
                payee=folder.payee,
                payee_key=folder.payee_key.public,
                certificates=(certificate_sha256(folder.certificate),),
                prices=services.prices,
                terms=config.payments.terms,
            ),
            store=self.store,
            clock=self.clock,
        )
        await offers.start()
        return offers

    def _make_payments(self) -> None:
        folder, payments = self.folder, self.folder.config.payments
        ledger_id = folder.config.ledger.address.ledger_id
        self.sessions = Sessions(
            ledger_id=ledger_id,
            store=self.store,
            # A session may still pin the offer before this one.
            policy=credit_policy(
                folder.config, unit=max(offer.sheet.unit_charge for offer in self.offers.usable())
            ),
            clock=self.clock,
        )
        self.closer = Closer(
            store=self.store,
            sessions=self.sessions,
            ledger=self.ledger,
            key=folder.payee_key,
            clock=self.clock,
            margin_ms=payments.close_margin,
        )
        self.payments = PaymentServicer(
            ledger_id=ledger_id,
            ledger=self.ledger,
            identity=folder.identity,
            payee_key=folder.payee_key,
            store=self.store,
            sessions=self.sessions,
            closer=self.closer,
            offers=self.offers.usable,
            serves=self.admission.apps.check,
            clock=self.clock,
        )

    def _serve_platform(self, registrar: Registrar, services: registry.Registry) -> None:
        server = cast("grpc.aio.Server", registrar)
        names = (*platform_names(), *services.services)
        payment_pb2_grpc.add_PaymentServiceServicer_to_server(self.payments, server)
        offer_pb2_grpc.add_OfferServiceServicer_to_server(OfferServicer(self.offers), server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(  # type: ignore[no-untyped-call]
            ReflectionServicer(names), server
        )

    def _listen(self, server: grpc.aio.Server) -> int:
        listen = self.folder.config.node.listen
        credentials = server_credentials(self.folder.tls_key, self.folder.certificate)
        try:
            port = server.add_secure_port(listen, credentials)
        except RuntimeError:
            port = 0
        if port == 0:
            raise ConfigError(
                f"The node cannot listen on {listen}.",
                hint='Choose another address, below [node]: listen = "host:port".',
            )
        return port

    async def _tell(self, running: Running, port: int, services: registry.Registry) -> None:
        node = self.folder.config.node
        host, _ = parse_listen(node.listen)
        local = NodeAddress(self.folder.identity.address, _ANYWHERE.get(host, host), port)
        self.address = replace(local, host=node.advertise or local.host)
        self._running = running
        running.tell(address=str(self.address), local=str(local))
        for service in platform_names():
            await self.health.set(service, health_pb2.HealthCheckResponse.SERVING)
        await self.services.serve(running)
        log.info("node.serving", address=str(self.address), services=list(services.services))

    async def _greet_ledger(self) -> None:
        """Says early in the log whether the ledger is there; the node serves either way."""
        try:
            await self.ledger.connect()
        except BttError as error:
            log.warning("ledger.unreachable", error=str(error))

    def _watch(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]

        def ended(done: asyncio.Task[None]) -> None:
            assert self._failure is not None
            if done.cancelled() or done.exception() is None or self._failure.done():
                return
            self._failure.set_result(done.exception() or RuntimeError())

        task.add_done_callback(ended)
        self._tasks.append(task)

    async def _samples(self) -> list[Sample]:
        return await read_samples(self)

    # Stopping

    async def _stop(self, server: grpc.aio.Server) -> None:
        log.info("node.stopping", calls=self.admission.running)
        await self._refuse_new_work()
        await self.services.supervisor.stop()
        await self._patiently(self.admission.idle(), self._grace_s)
        await self._end_sessions()
        # Payment streams end with their sessions; what is left now is cut.
        await server.stop(None if self._hurry.is_set() else _LAST_CALLS_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._patiently(self._sweep_last(), _LAST_SWEEP_S)
        with suppress(BttError):
            await self.refusals.flush()
        log.info("node.stopped")

    async def _patiently(self, work: object, seconds: float | None) -> None:
        """Waits for some work, for a time, and no longer than until it hurries."""
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({task, hurry}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for waiting in (task, hurry):
            waiting.cancel()
        await asyncio.gather(task, hurry, return_exceptions=True)

    async def _end_sessions(self) -> None:
        for session in self.sessions.all():
            meter = session.payee.meter
            try:
                await self.store.save_books(session.payee.channel_id, meter.tally, meter.written_off)
            except BttError as error:
                log.warning("session.not_saved", error=str(error))
            self.sessions.end(session, Draining("The node is stopping."))

    async def _sweep_last(self) -> None:
        # What was begun is finished if the ledger is there; the rest waits for the next start.
        with suppress(BttError):
            records = [record for record, _ in await self.store.channels()]
            if any(record.state == "closing" for record in records):
                await self.closer.sweep()
            if records:
                await self.closer.watch()
