"""The payee's side of one channel: checks updates, meters deliveries, settles calls.

States its rules once, without sockets, clocks or databases:

- An update counts as paid only once it is checked and saved (`Durable[Checked]`).
- What the payer says it accepted settles a call. The shortfall is written off within
  the bounds of `credit`; of what was prepaid, the rest is forfeited.
- Whatever either side can prove is where a session starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from btt.sdk.channel.credit import Standing
from btt.sdk.channel.durable import Durable
from btt.sdk.channel.meter import Meter
from btt.sdk.channel.payer import SignedUpdate
from btt.sdk.channel.prices import PriceSheet, Segment, Tally
from btt.sdk.errors import (
    CallRepeated,
    CountsDiffer,
    InvalidRequest,
    RateLimited,
    SessionEnded,
    UpdateInvalid,
)
from btt.sdk.keys import PublicKey
from btt.sdk.money import MAX_UNITS
from btt.sdk.signing import Updates

REMEMBERED_CALLS = 4096
"""Ended calls whose ids stay refused, and the most that may be open: a call costs its payer nothing yet."""


class Checked(NamedTuple):
    """An update that `Payee.check` has verified, to be saved."""

    channel_id: bytes
    """32 bytes."""
    update: SignedUpdate
    """What K1 signed."""


class Payee:
    """One channel as its payee sees it.

    Args:
        ledger_id: 32 bytes.
        channel_id: 32 bytes.
        key: K1, the payer's channel key.
        deposit: Base units that T1 locks.
        best: The best update so far, from the store.
        tally: What was delivered so far, from the store.
        standing: The payer's standing, shared by all its channels; `standing.paid`
            includes `best` already.
        written_off: Base units written off on this channel; `standing` includes them already.
    """

    def __init__(
        self,
        *,
        ledger_id: bytes,
        channel_id: bytes,
        key: PublicKey,
        deposit: int,
        best: SignedUpdate | None,
        tally: Tally,
        standing: Standing,
        written_off: int = 0,
    ) -> None:
        self.channel_id = channel_id
        self._updates = Updates(ledger_id, channel_id)
        self.key = key
        self.best = best
        self.standing = standing
        self.meter = Meter(
            standing=standing,
            tally=tally,
            paid=best.cumulative if best else 0,
            deposit=deposit,
            written_off=written_off,
        )
        self._open: dict[bytes, dict[Segment, int]] = {}
        self._voided: dict[bytes, dict[Segment, int]] = {}
        self._ended: dict[bytes, None] = {}

    def pin(self, sheet: PriceSheet) -> None:
        """Counts from now on under this offer as well."""
        for segment, rate in sheet.segments():
            self.meter.tally.price(segment, rate)

    # Updates

    def check(self, update: SignedUpdate) -> Checked | None:
        """Checks an update, cheap tests first.

        Returns:
            The update, to be saved; None when it is not higher than the best, which is
            no error: a lost answer makes an honest payer resend.

        Raises:
            UpdateInvalid: It is above the deposit, or not signed by K1.
        """
        if update.cumulative > self.meter.deposit:
            raise UpdateInvalid(f"{update.cumulative} is above the deposit of {self.meter.deposit}.")
        if self.best is not None and update.cumulative <= self.best.cumulative:
            return None
        if update.cumulative == 0:
            return None
        try:
            self._updates.verify(self.key, update.cumulative, update.signature)
        except InvalidRequest as error:
            raise UpdateInvalid("The update is not signed by the channel's key.") from error
        return Checked(self.channel_id, update)

    def accept(self, saved: Durable[Checked]) -> None:
        """Counts a saved update as paid; the books of its channel are saved with it."""
        if not isinstance(saved, Durable) or not isinstance(checked := saved.value, Checked):
            raise TypeError("only an update that was checked and saved counts")
        channel_id, update = checked
        if channel_id != self.channel_id:
            raise TypeError("the update is of another channel")
        self.meter.tally.saved()
        if self.best is None or update.cumulative > self.best.cumulative:
            self.best = update
            self.meter.pay(update.cumulative)

    # Calls

    def begin(self, call_id: bytes) -> None:
        """Opens a metered call.

        Raises:
            CallRepeated: The id is that of an open call, or of one that was reported on.
            RateLimited: The payer does not report on its calls.
        """
        if call_id in self._open or call_id in self._voided or call_id in self._ended:
            raise CallRepeated("This call id was used before.")
        if len(self._open) >= REMEMBERED_CALLS:
            raise RateLimited(f"{REMEMBERED_CALLS} calls of this channel were not reported on yet.")
        self._open[call_id] = {}

    def deliver(self, call_id: bytes, segment: Segment, units: int) -> None:
        """Counts a message that leaves; `meter.fits` said it may.

        Raises:
            SessionEnded: The call has been settled: its caller is gone.
        """
        call = self._open.get(call_id)
        if call is None:
            raise SessionEnded("The call was ended by its caller.")
        call[segment] = call.get(segment, 0) + units
        self.meter.deliver(segment, units)

    def take_back(self, call_id: bytes, segment: Segment, units: int) -> None:
        """Takes back units that were counted beforehand and never reached the payer, or the service."""
        call = self._open.get(call_id)
        if call is None:
            return  # settled already
        if units > call.get(segment, 0):
            raise ValueError("more taken back than was counted")
        call[segment] -= units
        self.meter.deliver(segment, -units)

    def delivered(self, call_id: bytes) -> Mapping[Segment, int]:
        """Returns what stands counted for an open call."""
        return dict(self._open.get(call_id, {}))

    def void(self, call_id: bytes) -> None:
        """Takes a call back whole: it failed by a fault of the payee, who bears it.

        What its payer reports as accepted all the same is counted again: it used that.
        """
        sent = self._open.pop(call_id, {})
        for segment, units in sent.items():
            self.meter.deliver(segment, -units)
        if any(sent.values()):
            self._voided[call_id] = sent
            if len(self._voided) > REMEMBERED_CALLS:
                del self._voided[next(iter(self._voided))]

    def settle(self, call_id: bytes, accepted: Mapping[Segment, int]) -> dict[Segment, int]:
        """Settles an ended call by what its payer says it accepted.

        Returns:
            Units per segment that stay owed: accepted, and forfeited of what was prepaid.

        Raises:
            CountsDiffer: The payer claims to have accepted more than was sent.
        """
        sent = self._open.get(call_id)
        counted = self._voided.get(call_id, {}) if sent is None else sent
        if not all(0 <= units <= counted.get(segment, 0) for segment, units in accepted.items()):
            raise CountsDiffer("The report names more units than were sent.")
        self._open.pop(call_id, None)
        self._voided.pop(call_id, None)
        self._remember(call_id)  # even if unknown: it may still be on its way here
        if sent is None:
            for segment, units in accepted.items():
                if units:
                    self.meter.deliver(segment, units)
            return {segment: units for segment, units in accepted.items() if units}
        settled = {}
        for segment, units in sent.items():
            short = units - accepted.get(segment, 0)
            settled[segment] = units - self.meter.excuse(segment, short)
        return settled

    def _remember(self, call_id: bytes) -> None:
        self._ended[call_id] = None
        if len(self._ended) > REMEMBERED_CALLS:
            del self._ended[next(iter(self._ended))]

    @property
    def open_calls(self) -> int:
        """How many calls are not settled yet."""
        return len(self._open)

    def is_open(self, call_id: bytes) -> bool:
        """Says whether a call is not settled yet."""
        return call_id in self._open

    def reconcile(self, accepted: Mapping[Segment, int]) -> dict[Segment, int]:
        """Settles everything by the payer's cumulative counts when a session opens.

        What it claims beyond our count was forgotten here, and is owed. A claim of units that cost
        nothing is bounded by no deposit: of these our count stands.

        Args:
            accepted: Units per segment since the channel opened; segments of offers that
                this payee does not know are ignored.

        Returns:
            Units per known segment that stay owed.

        Raises:
            CountsDiffer: The payer claims more than its deposit covers.
        """
        tally = self.meter.tally
        if not all(0 <= units <= MAX_UNITS for units in accepted.values()):
            raise CountsDiffer("The payer claims what is no count of units.")
        accepted = {
            s: n if tally.rate(s).amount else min(n, tally.units(s))
            for s, n in accepted.items()
            if tally.knows(s)
        }
        more = sum(tally.cost(s, n - tally.units(s)) for s, n in accepted.items() if n > tally.units(s))
        if tally.owed + more > self.meter.deposit and more:
            raise CountsDiffer("The payer claims more units than its deposit covers.")
        self._open.clear()
        self._voided.clear()
        short = {segment: units - accepted.get(segment, 0) for segment, _, units in tally}
        # What is owed on top comes first: it decides how much of the rest is unpaid.
        for segment, units in short.items():
            if units < 0:
                self.meter.deliver(segment, -units)
        for segment, units in short.items():
            if units > 0:
                self.meter.excuse(segment, units)
        return {segment: units for segment, _, units in tally}
