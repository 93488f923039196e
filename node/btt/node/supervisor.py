"""Brings services that have failed back, waiting longer each time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from btt.node.plugins.host import ServiceHost, State
from btt.node.registry import Registry
from btt.sdk.errors import BttError

log = structlog.get_logger(__name__)

_FIRST_S: Final = 1.0
_LONGEST_S: Final = 300.0
_CALLS_S: Final = 10.0  # for calls that still run when their service is made anew


def backoff(failures: int) -> float:
    """Returns seconds to wait after so many failures: 1, 2, 4 … up to five minutes."""
    return min(_LONGEST_S, _FIRST_S * 2.0 ** min(failures - 1, 16))


class Supervisor:
    """Watches over the services of a node.

    Args:
        registry: The services.
        restarted: Called after a service came back, or its prices changed.
        backoff: Seconds to wait after so many failures.
    """

    def __init__(
        self,
        registry: Registry,
        restarted: Callable[[], Awaitable[None]],
        *,
        backoff: Callable[[int], float] = backoff,
    ) -> None:
        self._registry = registry
        self._restarted = restarted
        self._backoff = backoff
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def follow(self, host: ServiceHost) -> None:
        """Watches over one service from now on."""
        self.leave(host)
        self._tasks[host.name] = asyncio.create_task(self._follow(host), name=f"supervise {host.name}")

    def leave(self, host: ServiceHost) -> None:
        """Watches over it no more."""
        task = self._tasks.pop(host.name, None)
        if task is not None:
            task.cancel()

    async def stop(self) -> None:
        """Watches over nothing any more."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, host: ServiceHost) -> None:
        while True:
            await host.failed.wait()
            delay = self._backoff(host.failures)
            log.info("service.restart_later", service=host.name, seconds=delay)
            await asyncio.sleep(delay)
            await host.drain(_CALLS_S)
            await host.stop()
            try:
                host.configure()
                await self._registry.begin(host)
                await self._restarted()
            except BttError as error:
                log.warning("service.not_restarted", service=host.name, error=str(error))
            if host.state is State.SERVING:
                log.info("service.restarted", service=host.name, failures=host.failures)
