"""What each service gets of the node's limiter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from btt.node.limits.gate import Gate


class Limiter:
    """Both directions of a node.

    Args:
        clock: Seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.up = Gate(clock=clock)
        self.down = Gate(clock=clock)

    def limit(self, *, up: int, down: int, services: Mapping[str, tuple[int, int]]) -> None:
        """Sets the limits.

        Args:
            up: Bytes a second that leave, of all services together; 0 for no limit.
            down: The same for what comes.
            services: Both for each service.
        """
        self.up.limit(up, {name: rates[0] for name, rates in services.items()})
        self.down.limit(down, {name: rates[1] for name, rates in services.items()})

    def of(self, service: str) -> ServiceLimiter:
        """Returns what a service is given."""
        return ServiceLimiter(self, service)

    async def close(self) -> None:
        """Lets nothing wait any more."""
        await self.up.close()
        await self.down.close()


@dataclass(frozen=True, slots=True)
class ServiceLimiter:
    """The limiter as one service sees it."""

    _limiter: Limiter
    _service: str

    async def send(self, amount: int, *, flow: str = "") -> None:
        """Returns when bytes may leave."""
        await self._limiter.up.take(self._service, flow, amount)

    async def receive(self, amount: int, *, flow: str = "") -> None:
        """Returns when bytes may be taken."""
        await self._limiter.down.take(self._service, flow, amount)
