"""Shows a service what its call has been charged, and lets it acknowledge; it can change nothing else.

The call is found by the context in which a handler runs, which tasks begun there inherit.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from weakref import ref

from btt.node.payments.context import MeteredContext
from btt.node.payments.metering import Metering
from btt.node.payments.session import Session
from btt.sdk.keys import Address
from btt.sdk.money import Unit
from btt.sdk.payment.charges import MethodCharge
from btt.sdk.signing import APP_UNKNOWN


class Charged:
    """One call as its service sees it (`btt.sdk.plugin.PaidCall`); it does not lead to the node.

    Args:
        session: Who pays.
        call_id: 16 bytes.
        metering: Of the call.
    """

    __slots__ = ("_call_id", "_metering", "_session", "app", "payer")

    def __init__(self, session: Session, call_id: bytes, metering: Metering) -> None:
        self.payer: Address = session.payer
        self.app: Address | None = None if session.app.app == APP_UNKNOWN else session.app.app
        self._call_id = call_id
        self._session = ref(session)
        self._metering = ref(metering)

    @property
    def units(self) -> Mapping[Unit, int]:
        """What stands counted for the call; nothing once it is settled."""
        counted: dict[Unit, int] = {}
        session = self._session()
        for segment, units in session.payee.delivered(self._call_id).items() if session else ():
            counted[segment.line.unit] = counted.get(segment.line.unit, 0) + units
        return counted

    @property
    def paid(self) -> int:
        """What the payer has ever paid here; 0 once its session is gone."""
        session = self._session()
        return session.payee.standing.paid if session else 0

    def acknowledge(self) -> None:
        """Makes the requests that were taken payable."""
        metering = self._metering()
        if metering is not None:
            metering.acknowledge()


_current: ContextVar[Charged | None] = ContextVar("btt_paid_call", default=None)


def begin(session: Session, call_id: bytes, charge: MethodCharge, context: MeteredContext) -> Metering:
    """Begins the count of one call, and shows it to the service that runs from here on.

    Raises:
        CallRepeated, RateLimited, SessionEnded: As `Metering`.
    """
    metering = Metering(session, call_id, charge, context.tell)
    _current.set(Charged(session, call_id, metering))
    return metering


class RunningCall:
    """Finds the call that runs (`btt.sdk.plugin.Meter`)."""

    def call(self) -> Charged | None:
        """Returns the paid call in whose handler this runs."""
        return _current.get()
