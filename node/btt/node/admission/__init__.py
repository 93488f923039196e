"""Decides which paid calls run: one condition a file, in the order in which a call meets them.

gRPC's own limits count every call. With all slots taken by calls that wait for payment, the
payment could then not come in; so the server has no such limit, and only paid calls, whose
payer is known already, come by here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from btt.node.admission.apps import Apps
from btt.node.admission.concurrency import Concurrency
from btt.node.admission.deadlines import deadline
from btt.node.admission.limits import Limits
from btt.node.admission.rates import Rates
from btt.node.payments.session import Session
from btt.sdk.errors import Draining
from btt.sdk.payment.charges import MethodCharge

__all__ = ["Admission", "Apps", "Limits"]


class Admission:
    """The conditions of one node: application, rate, concurrency, time.

    Args:
        apps: Which applications are served.
        node: What holds over all services together, and where a service says nothing.
        services: Limits of each proto service by its full name; one who shares them with another
            service of its plugin names the same object.
        clock: Unix milliseconds.
    """

    def __init__(
        self,
        *,
        apps: Apps,
        node: Limits,
        services: Mapping[str, Limits],
        clock: Callable[[], int],
    ) -> None:
        self.apps = apps
        self._node = node
        self._services = services
        self._rates = Rates(clock)
        self._concurrency = Concurrency()
        self.draining = False

    def limit(self, node: Limits) -> None:
        """Takes other limits for all services together from now on."""
        self._node = node

    @property
    def running(self) -> int:
        """Paid calls that run now."""
        return self._concurrency.running

    async def idle(self) -> None:
        """Returns when no paid call runs."""
        await self._concurrency.idle()

    @contextmanager
    def admit(self, charge: MethodCharge, session: Session, context: Any) -> Iterator[None]:
        """Admits one paid call for the time of the block.

        Raises:
            AppRefused: Its application's grant has expired.
            DeadlineExceeded: It took longer than it may.
            Draining: The node is stopping.
            RateLimited: There are too many, now or this minute.
        """
        if self.draining:
            raise Draining("The node is stopping.")
        self.apps.check_current(session.app)
        service = self._services.get(charge.service, self._node)
        self._rates.take("", session.payer, self._node)
        if service is not self._node:
            self._rates.take(service.name, session.payer, service)
        with (
            self._concurrency.enter(session.payer, self._node, service),
            deadline(service.deadline_s or self._node.deadline_s, context),
        ):
            yield

    def admit_free(self, service: str, context: Any) -> AbstractContextManager[None]:
        """Gives a free call the time that its service has; those of the node itself have all they want.

        Args:
            service: Full name of the proto service.
            context: Of the call.

        Raises:
            DeadlineExceeded: When the time is up.
        """
        limits = self._services.get(service)
        if limits is None:
            return nullcontext()
        return deadline(limits.deadline_s or self._node.deadline_s, context)
