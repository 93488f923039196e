"""The services of a running node: started, watched over, and told about."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from grpc_health.v1 import health_pb2

from btt.node.config import ServiceSection
from btt.node.folder import Running
from btt.node.health import HealthServicer
from btt.node.limits.limiter import Limiter
from btt.node.metrics import NodeMetrics
from btt.node.payments.charged import RunningCall
from btt.node.plugins.host import LEAK_S, START_S, STOP_S, ServiceHost, State, Surroundings
from btt.node.plugins.scope import follow_tasks
from btt.node.plugins.watchdog import LIMIT_S, Blocked, Watchdog
from btt.node.plugins.weakly import weakly
from btt.node.quota import Quotas
from btt.node.registry import Plugins, Registry
from btt.node.supervisor import Supervisor, backoff

_REASON_CHARS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long services may take, seconds.

    Attributes:
        start_s: To start.
        stop_s: To stop.
        leak_s: To end what they left running.
        block_s: To hold up the loop; 0 does not watch over that.
        backoff: Before they are started again, after so many failures.
    """

    start_s: float = START_S
    stop_s: float = STOP_S
    leak_s: float = LEAK_S
    block_s: float = LIMIT_S
    backoff: Callable[[int], float] = backoff


class Services:
    """Of one node.

    Args:
        plugins: What is installed.
        folder: Of the node.
        clock: Unix milliseconds.
        limiter: Of the node.
        metrics: Of the node.
        quotas: Of the node.
        health: Is told how each service is.
        credit_limit: Most that anyone may owe, base units.
        patience: How long services may take.
        restarted: Called when a service came back.
    """

    def __init__(
        self,
        plugins: Plugins,
        *,
        folder: Path,
        clock: Callable[[], int],
        limiter: Limiter,
        metrics: NodeMetrics,
        quotas: Quotas,
        health: HealthServicer,
        credit_limit: int,
        patience: Patience,
        restarted: Callable[[], Awaitable[None]],
    ) -> None:
        around = Surroundings(
            folder=folder,
            clock=clock,
            limiter=limiter.of,
            metrics=metrics.of,
            quota=quotas.of,
            meter=RunningCall(),
            changed=weakly(self._changed),
            start_s=patience.start_s,
            stop_s=patience.stop_s,
            leak_s=patience.leak_s,
        )
        self.registry = Registry(plugins, around=around, limiter=limiter, credit_limit=credit_limit)
        self.supervisor = Supervisor(self.registry, restarted, backoff=patience.backoff)
        self.watchdog = Watchdog(lambda: self.registry.packages, self._blocked, limit_s=patience.block_s)
        self._patience = patience
        self._health = health
        self._running: Running | None = None
        self._telling: set[asyncio.Future[None]] = set()

    async def start(self, stack: AsyncExitStack, sections: Mapping[str, ServiceSection]) -> None:
        """Starts what is enabled; what fails is isolated.

        Args:
            stack: Ends it all.
            sections: Of the configuration.

        Raises:
            ConfigError: A service is not installed, or its configuration does not do.
        """
        stack.callback(follow_tasks(asyncio.get_running_loop()))
        if self._patience.block_s:
            self.watchdog.start()
            stack.push_async_callback(self.watchdog.stop)
        stack.push_async_callback(self.registry.stop)
        self.registry.configure(sections)
        stack.push_async_callback(self.supervisor.stop)
        for host in self.registry.hosts.values():
            await self.registry.begin(host)

    async def serve(self, running: Running) -> None:
        """From now on callers and operators are told how the services are."""
        self._running = running
        for host in self.registry.hosts.values():
            self._changed(host)
            self.supervisor.follow(host)
        await asyncio.gather(*self._telling)

    def _blocked(self, what: Blocked) -> None:
        if what.service in self.registry.hosts:
            self.registry.hosts[what.service].blocked(what)

    def _changed(self, host: ServiceHost) -> None:
        if self._running is None:
            return
        self._running.tell(
            services={
                name: {"state": host.state, "reason": host.reason[:_REASON_CHARS], "failures": host.failures}
                for name, host in self.registry.hosts.items()
            }
        )
        serving = health_pb2.HealthCheckResponse.SERVING
        status = serving if host.state is State.SERVING else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in host.services:
            task = asyncio.ensure_future(self._health.set(service, status))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)
