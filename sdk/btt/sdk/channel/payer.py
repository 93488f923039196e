"""The payer's side of one channel: counts what it accepts, and signs no more than that.

States its rules once, without sockets, clocks or databases:

- It pays for units it accepted, by its own count, and never more than the deposit.
- Ahead of delivery it pays at most one verify unit (paper: the risk of one piece).
- It signs only what is already on disk, and signing again gives the same bytes
  (RFC 6979), so that a restart at any moment resends and never contradicts itself.
- What was prepaid and not used up when a call is reported may be forfeited, never more
  (a unit is forfeited whole, even if only its first part was prepaid).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from btt.sdk.channel.credit import signing_point
from btt.sdk.channel.durable import Durable
from btt.sdk.channel.prices import Count, PriceSheet, Segment, Tally
from btt.sdk.errors import BudgetExceeded, CountsDiffer, InvalidRequest, UpdateInvalid
from btt.sdk.keys import PrivateKey
from btt.sdk.money import MAX_UNITS
from btt.sdk.signing import Updates


class Intent(NamedTuple):
    """What a payer is about to sign; saved before it is signed."""

    channel_id: bytes
    """32 bytes."""
    cumulative: int
    """Base units over the life of the channel."""
    counts: tuple[Count, ...]
    """What it accepted and settled so far, of the segments that may not be saved so."""


class SignedUpdate(NamedTuple):
    """A payment (paper: T3)."""

    cumulative: int
    """Base units over the life of the channel."""
    signature: bytes
    """Of K1 over the canonical ChannelUpdate, 65 bytes."""


@dataclass(slots=True)
class PaidCall:
    """What the payer counted in one call.

    Attributes:
        received: Units that arrived, per segment.
        accepted: Units that were accepted, per segment.
        books: What the payer owed for when it reported on the call; None while it runs.
        signed: Base units it had signed then.
    """

    received: dict[Segment, int] = field(default_factory=dict)
    accepted: dict[Segment, int] = field(default_factory=dict)
    books: Tally | None = None
    signed: int = 0


class Payer:
    """One channel as its payer sees it.

    Args:
        ledger_id: 32 bytes.
        channel_id: 32 bytes.
        key: K1.
        deposit: Base units that T1 locks.
        signed: Base units signed so far, from the wallet.
        tally: What was accepted and settled so far, from the wallet.
        limit: Most cumulative base units that the budget allows; the deposit if not given.
    """

    def __init__(
        self,
        *,
        ledger_id: bytes,
        channel_id: bytes,
        key: PrivateKey,
        deposit: int,
        signed: int,
        tally: Tally,
        limit: int | None = None,
    ) -> None:
        self.channel_id = channel_id
        self._updates = Updates(ledger_id, channel_id)
        self._key = key
        self.deposit = deposit
        self.limit = deposit if limit is None else limit
        self.signed = signed
        self.tally = tally
        self._reserved: dict[Segment, int] = {}
        self._undecided: dict[Segment, int] = {}
        self._calls: dict[bytes, PaidCall] = {}
        self._unit = 0

    # Counting

    def pin(self, sheet: PriceSheet) -> None:
        """Counts from now on under this offer; what was counted under others stands still."""
        self._unit = sheet.unit_charge
        for segment, rate in sheet.segments():
            self.tally.price(segment, rate)

    def begin(self, call_id: bytes) -> None:
        """Opens a metered call."""
        self._calls[call_id] = PaidCall()

    def received(self, call_id: bytes, segment: Segment, units: int) -> None:
        """Counts units on arrival, before anyone looks at them."""
        call = self._calls[call_id]
        call.received[segment] = call.received.get(segment, 0) + units
        self._undecided[segment] = self._undecided.get(segment, 0) + units

    def accepted(self, call_id: bytes, segment: Segment, units: int) -> None:
        """Counts received units as payable.

        Raises:
            ValueError: More would be accepted than was received, or the call was reported
                on already: a defect of the caller.
        """
        call = self._calls[call_id]
        if call.books is not None:
            raise ValueError("accepted after the report")
        total = call.accepted.get(segment, 0) + units
        if units < 0 or total > call.received.get(segment, 0):
            raise ValueError("more accepted than received")
        call.accepted[segment] = total
        self._undecided[segment] -= units
        self.tally.add(segment, units)

    def reserve(self, segment: Segment, units: int) -> None:
        """Sets units aside before they are requested: what cannot be paid is not requested.

        Raises:
            BudgetExceeded: The channel does not cover them beside what is owed and reserved.
        """
        if self.tally.owed + self._reserved_cost(segment, units) > self.limit:
            raise BudgetExceeded(f"The channel holds too little for {units} more units.")
        self._reserved[segment] = self._reserved.get(segment, 0) + units

    @property
    def spare(self) -> int:
        """Base units that are neither owed nor reserved."""
        return self.limit - self.tally.owed - sum(self.tally.cost(s, n) for s, n in self._reserved.items())

    @property
    def is_over(self) -> bool:
        """More has arrived than can be paid."""
        return self._outstanding + self.signed > self.limit

    @property
    def is_reserved(self) -> bool:
        """Whoever buys now sets aside what it will cost."""
        return any(self._reserved.values())

    def affordable(self, segment: Segment) -> int:
        """Returns how many more units of a segment can be reserved now."""
        rate, have = self.tally.rate(segment), self.tally.units(segment) + self._reserved.get(segment, 0)
        spare = self.limit - self.tally.owed - self._reserved_cost(segment, 0)
        return max(0, rate.units_for(rate.owed(have) + spare) - have) if spare >= 0 else 0

    def release(self, segment: Segment, units: int) -> None:
        """Gives reserved units back: they were accepted, or will not come."""
        left = self._reserved.get(segment, 0) - units
        if left < 0:
            raise ValueError("more released than reserved")
        self._reserved[segment] = left

    def _reserved_cost(self, segment: Segment, units: int) -> int:
        wanted = dict(self._reserved)
        wanted[segment] = wanted.get(segment, 0) + units
        return sum(self.tally.cost(s, n) for s, n in wanted.items())

    # Paying

    @property
    def ahead(self) -> int:
        """Base units signed beyond what is owed."""
        return max(0, self.signed - self.tally.owed)

    def due(self, *, credit: int, demand: int, flush: bool) -> int | None:
        """Says what cumulative amount to sign now, or None for nothing yet.

        It signs when so much has arrived since the last time that the payee will soon have to wait.

        Args:
            credit: What the payee last said may be owed, base units.
            demand: The cumulative amount its next waiting call needs; 0 when none waits.
            flush: Pay all that is owed, however little.
        """
        owed = self.tally.owed
        if demand > self.signed:
            target = max(owed, min(demand, owed + self._unit))
        elif flush or self._outstanding >= signing_point(credit, self._unit):
            target = owed
        else:
            return None
        target = min(target, self.limit)
        return target if target > self.signed else None

    @property
    def _outstanding(self) -> int:
        """Base units that the payee has sent on credit, as far as it has arrived."""
        tally = self.tally
        undecided = sum([tally.cost(s, n) for s, n in self._undecided.items() if n])
        return tally.owed + undecided - self.signed

    def intend(self, cumulative: int) -> Intent:
        """Makes the intent to sign, to be saved.

        Raises:
            ValueError: The amount breaks a rule of this module: a defect of the caller.
        """
        is_covered = cumulative <= self.tally.owed + self._unit or cumulative == self.signed
        if not (self.signed <= cumulative <= self.limit and is_covered):
            raise ValueError(f"{cumulative} is more than is owed, or less than was signed")
        return Intent(self.channel_id, cumulative, self.tally.changes())

    def sign(self, saved: Durable[Intent]) -> SignedUpdate:
        """Signs what is on disk."""
        if not isinstance(saved, Durable) or (intent := saved.value).channel_id != self.channel_id:
            raise TypeError("only a saved intent of this channel can be signed")
        self.tally.saved()
        cumulative = intent.cumulative
        if cumulative > self.signed:
            self.signed = cumulative
        return SignedUpdate(cumulative, self._updates.sign(self._key, cumulative))

    def last(self) -> SignedUpdate | None:
        """Signs again what was signed last, byte for byte; None before the first."""
        if not self.signed:
            return None
        return SignedUpdate(self.signed, self._updates.sign(self._key, self.signed))

    # Settling

    def end(self, call_id: bytes) -> PaidCall:
        """Closes the count of a call that has ended, and returns it for the report.

        Updates signed before this must reach the payee before the report, and later ones
        after it: what may be forfeited is what is prepaid and not used up now.
        """
        call = self._calls[call_id]
        if call.books is None:
            call.books, call.signed = self.tally.copy(), self.signed
        return call

    def settle(self, call_id: bytes, settled: Mapping[Segment, int]) -> None:
        """Takes the payee's books of an ended call.

        Args:
            call_id: 16 bytes.
            settled: Units per segment: accepted, and forfeited of what was prepaid.

        Raises:
            CountsDiffer: The payee forfeits more than was prepaid, lists other units, or
                settles a call that was not reported on.
        """
        call = self._calls.get(call_id)
        if call is None or call.books is None:
            raise CountsDiffer("The node settled a call that was not reported on.")
        known = self._known(settled)
        lost = {s: known.get(s, 0) - call.accepted.get(s, 0) for s in known.keys() | call.accepted.keys()}
        if any(n < 0 for n in lost.values()):
            raise CountsDiffer("The node settled less than was accepted.")
        if not (_was_prepaid(call.books, lost, call.signed) and self.tally.holds(lost.items())):
            raise CountsDiffer("The node forfeits more than was prepaid.")
        del self._calls[call_id]
        for segment, units in call.received.items():
            self._undecided[segment] -= units - call.accepted.get(segment, 0)
        for segment, units in lost.items():
            self.tally.add(segment, units)
            for other in self._calls.values():
                if other.books is not None:
                    other.books.add(segment, units)

    def reconcile(self, *, best: SignedUpdate | None, settled: Mapping[Segment, int]) -> None:
        """Takes the payee's books when a session opens: no call of an older one is left.

        Of units that cost nothing the payee's count stands, though it may have forgotten some.

        Args:
            best: The highest update the payee can prove; our own signature proves it.
            settled: Units per segment.

        Raises:
            UpdateInvalid: The update is not ours.
            CountsDiffer: The payee claims units that were neither accepted nor prepaid.
        """
        if best is not None and best.cumulative > self.signed:
            if best.cumulative > self.deposit:
                raise UpdateInvalid("The node shows a payment above the deposit.")
            try:
                self._updates.verify(self._key.public, best.cumulative, best.signature)
            except InvalidRequest as error:
                raise UpdateInvalid("The node shows a payment that is not ours.") from error
            self.signed = best.cumulative
        lost = {s: max(0, n - self.tally.units(s)) for s, n in self._known(settled).items()}
        if not _was_prepaid(self.tally, lost, self.signed):
            raise CountsDiffer("The node claims units that were neither accepted nor paid.")
        for segment, units in lost.items():
            self.tally.add(segment, units)
        for segment, rate, units in self.tally:
            if not rate.amount:
                self.tally.add(segment, settled.get(segment, 0) - units)
        self._calls.clear()
        self._reserved.clear()
        self._undecided.clear()

    def _known(self, settled: Mapping[Segment, int]) -> dict[Segment, int]:
        # The payee may list lines of offers that were never used here: at 0 units they say nothing.
        counts = {segment: units for segment, units in settled.items() if units}
        if not all(self.tally.knows(s) and 0 < n <= MAX_UNITS for s, n in counts.items()):
            raise CountsDiffer("The node settled a line that its offer does not have, or no count.")
        return counts


def _was_prepaid(books: Tally, lost: Mapping[Segment, int], signed: int) -> bool:
    """Says whether a payee that writes off all it can may still keep these units.

    It keeps a unit only if without it less would be owed than is paid. Units are whole,
    so what is kept may end above what is paid, by a part of one unit.
    """
    kept = {segment: units for segment, units in lost.items() if units}
    owed = books.owed + sum(books.cost(s, n) for s, n in kept.items())
    last = max((books.cost(s, n) - books.cost(s, n - 1) for s, n in kept.items()), default=0)
    return not kept or owed - last < signed
