"""What an operator may watch with Prometheus: names carry their unit, and no label names a peer.

Numbers about money and services are read when somebody asks, in the node's own loop; only calls
are counted as they end.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from btt.sdk.errors import ConfigError

_MOST_NAMES: Final = 64
_ANSWER_S: Final = 5.0
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")

Sample = tuple[str, Mapping[str, str], float]
"""Name, labels and value of a gauge."""

HELP: Final = {
    "btt_revenue_base_units": "Earned so far, by state: accrued, signed, settled, unpaid, written_off.",
    "btt_unpaid_base_units": "What live sessions owe now.",
    "btt_channels": "Channels, by state.",
    "btt_channel_capacity_base_units": "What open channels lock.",
    "btt_channel_expiry_seconds": "Time to the nearest lock time of an open channel.",
    "btt_sessions": "Payment sessions that are open.",
    "btt_calls_running": "Paid calls that run.",
    "btt_plugin_state": "1 for the state that a service is in.",
    "btt_plugin_failures": "How often a service has failed since the start.",
    "btt_quota_limit_bytes": "What a service may keep.",
    "btt_quota_used_bytes": "What a service has set aside of that.",
    "btt_loop_lag_seconds": "How late the event loop answered last.",
    "btt_ledger_connected": "1 while the ledger is connected.",
    "btt_offer_serial": "Number of the current offer.",
}


class NodeMetrics:
    """The metrics of one node.

    Args:
        read: Returns what is read when somebody asks; runs in the loop in which `serve` is called.
    """

    def __init__(self, read: Callable[[], Coroutine[Any, Any, list[Sample]]]) -> None:
        self.registry = CollectorRegistry()
        self._read = read
        self._services: dict[str, ServiceMetrics] = {}
        self._calls = Counter(
            "btt_service_requests_total",
            "Calls that ended, by how: SERVED, CANCELLED or the reason of a refusal.",
            ("service", "method", "code"),
            registry=self.registry,
        )

    def ended(self, service: str, method: str, reason: str) -> None:
        """Counts a call."""
        self._calls.labels(service, method, reason).inc()

    def of(self, service: str) -> ServiceMetrics:
        """Returns what a service is given."""
        if service not in self._services:
            self._services[service] = ServiceMetrics(self.registry, service, {})
        return self._services[service]

    def serve(self, host: str, port: int) -> tuple[int, Callable[[], None]]:
        """Answers scrapes in a thread of its own.

        Args:
            host: To listen on; not for strangers.
            port: 0 takes a free one.

        Returns:
            The port, and what ends it.

        Raises:
            ConfigError: The address is taken.
        """
        self.registry.register(_Asked(self._read, asyncio.get_running_loop()))
        try:
            server, thread = start_http_server(port, host, registry=self.registry)
        except OSError as error:
            raise ConfigError(
                f"Metrics cannot be served on {host}:{port} ({error.strerror}).",
                hint='Choose another address, below [metrics]: listen = "127.0.0.1:7803".',
            ) from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return server.server_port, stop


class _Asked(Collector):
    def __init__(
        self, read: Callable[[], Coroutine[Any, Any, list[Sample]]], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._read = read
        self._loop = loop

    def describe(self) -> Iterator[Metric]:
        yield from ()

    def collect(self) -> Iterator[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        # A node that is too busy to answer, or stops, is told by what is missing.
        with suppress(TimeoutError, RuntimeError):
            asked = asyncio.run_coroutine_threadsafe(self._read(), self._loop)
            for name, labels, value in asked.result(_ANSWER_S):
                if name not in families:
                    families[name] = GaugeMetricFamily(name, HELP[name], labels=tuple(labels))
                families[name].add_metric(tuple(labels.values()), value)
        yield from families.values()


@dataclass(frozen=True, slots=True)
class ServiceMetrics:
    """The metrics of one service; each name gets the service's before it."""

    _registry: CollectorRegistry
    _service: str
    _known: dict[str, Counter | Gauge]

    def count(self, name: str, amount: float = 1) -> None:
        """Adds to a counter."""
        metric = self._metric(name, Counter)
        if isinstance(metric, Counter):
            metric.inc(amount)

    def gauge(self, name: str, value: float) -> None:
        """Sets a gauge."""
        metric = self._metric(name, Gauge)
        if isinstance(metric, Gauge):
            metric.set(value)

    def _metric(self, name: str, kind: type[Counter] | type[Gauge]) -> Counter | Gauge | None:
        metric = self._known.get(name)
        if metric is None:
            # A service that makes names up as it goes does not fill the memory.
            if not _NAME.fullmatch(name) or len(self._known) >= _MOST_NAMES:
                return None
            full = f"btt_{re.sub('[^a-z0-9]', '_', self._service.lower())}_{name}"
            metric = kind(full, f"Of the service {self._service}.", registry=self._registry)
            self._known[name] = metric
        return metric
