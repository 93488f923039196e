"""Where the bytes of all services wait for their turn, when the operator set a limit.

Whoever has had least of late goes first (start-time fair queueing): a caller with large messages
gets no more than one with small ones, and ten calls of one peer no more than one call of another.
A service that waits for its own limit holds up no other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextvars import Context
from dataclasses import dataclass, field
from typing import Final

from btt.node.limits.bucket import Bucket

_LONGEST_SLEEP_S: Final = 0.05  # then those who came meanwhile, and changed limits, are looked at


@dataclass(slots=True)
class _Flow:
    service: str
    start: int
    waiting: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)


class Gate:
    """One direction of a node's traffic.

    Args:
        clock: Seconds, never going back.
        sleep: Waits for seconds.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._node: Bucket | None = None
        self._services: dict[str, Bucket] = {}
        self._flows: dict[tuple[str, str], _Flow] = {}
        self._turn = 0
        self._pump: asyncio.Task[None] | None = None

    def limit(self, node: int, services: Mapping[str, int]) -> None:
        """Sets the limits, also while bytes wait.

        Args:
            node: Bytes a second of all services together; 0 for no limit.
            services: The same for each service.
        """
        now = self._clock()
        self._node = _bucket(self._node, node, now)
        self._services = {
            name: bucket
            for name, rate in services.items()
            if (bucket := _bucket(self._services.get(name), rate, now)) is not None
        }

    def limits(self, service: str) -> bool:
        """Says whether there is a limit for a service; without one there is nothing to ask."""
        return self._node is not None or service in self._services

    async def take(self, service: str, flow: str, amount: int) -> None:
        """Returns when bytes may pass.

        Args:
            service: Whose they are.
            flow: For whom, such as the address of a peer; flows share fairly.
            amount: Bytes.
        """
        if not self.limits(service):
            return
        if not self._flows and not self._wait(service):
            self._pass(service, amount)
            return
        key = (service, flow)
        queue = self._flows.get(key)
        if queue is None:
            queue = self._flows[key] = _Flow(service, self._turn)
        passed = asyncio.get_running_loop().create_future()
        queue.waiting.append((amount, passed))
        if self._pump is None:
            # Of no service: it must not end with the one whose call happens to begin it.
            self._pump = asyncio.create_task(self._run(), context=Context())
        await passed

    def _wait(self, service: str) -> float:
        now = self._clock()
        buckets = (self._node, self._services.get(service))
        return max((bucket.wait(now) for bucket in buckets if bucket is not None), default=0.0)

    def _pass(self, service: str, amount: int) -> None:
        for bucket in (self._node, self._services.get(service)):
            if bucket is not None:
                bucket.take(amount)

    async def _run(self) -> None:
        try:
            while True:
                self._drop_those_who_left()
                if not self._flows:
                    return
                flows = [flow for flow in self._flows.values() if flow.waiting]
                waits = {service: self._wait(service) for service in {flow.service for flow in flows}}
                ready = [flow for flow in flows if not waits[flow.service]]
                if not ready:
                    await self._sleep(min(_LONGEST_SLEEP_S, *waits.values()))
                    continue
                flow = min(ready, key=lambda flow: flow.start)
                amount, passed = flow.waiting.popleft()
                self._pass(flow.service, amount)
                self._turn = flow.start
                flow.start += amount
                passed.set_result(None)
                if not flow.waiting:
                    # It comes back at once or not at all; let it, before it is forgotten.
                    await asyncio.sleep(0)
        finally:
            self._pump = None

    def _drop_those_who_left(self) -> None:
        for key, flow in list(self._flows.items()):
            while flow.waiting and flow.waiting[0][1].done():
                flow.waiting.popleft()
            if not flow.waiting and flow.start <= self._turn:
                del self._flows[key]
        if not any(flow.waiting for flow in self._flows.values()):
            self._flows.clear()

    async def close(self) -> None:
        """Lets nothing wait any more."""
        self.limit(0, {})
        if self._pump is not None:
            await self._pump


def _bucket(before: Bucket | None, rate: int, now: float) -> Bucket | None:
    if not rate:
        return None
    return before if before is not None and before.rate == rate else Bucket(rate, now)
