"""Decides whether one more message may leave, and keeps the queue of those that wait.

A message leaves while `owed + its charge <= paid + credit`. The one at the head of
the queue names what is needed (`demand`); behind it nobody overtakes, so a large
message is never starved by small ones, and one that is larger than the credit is
prepaid instead of waiting for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from btt.sdk.channel.credit import Standing
from btt.sdk.channel.prices import Segment, Tally

Units = Sequence[tuple[Segment, int]]
"""What one message is charged; no segment stands twice."""


class Meter:
    """Delivered units of one channel against what it paid.

    Args:
        standing: The payer's standing, shared by all its channels.
        tally: Units delivered and settled so far.
        paid: Base units of the best saved update.
        deposit: Base units that T1 locks.
        written_off: Base units written off on this channel; `standing` includes them already.
    """

    def __init__(
        self, *, standing: Standing, tally: Tally, paid: int, deposit: int, written_off: int = 0
    ) -> None:
        self._standing = standing
        self.tally = tally
        self.paid = paid
        self.deposit = deposit
        self.written_off = written_off
        self._counted = 0
        self._recount()

    @property
    def owed(self) -> int:
        """Base units owed over the life of the channel."""
        return self.tally.owed

    @property
    def excess(self) -> int:
        """Base units owed beyond what is paid; negative when prepaid."""
        return self.tally.owed - self.paid

    def affordable(self, units: Units) -> bool:
        """Says whether the whole deposit would cover these units, and the tally hold them."""
        return self.tally.owed + self._cost(units) <= self.deposit and self.tally.holds(units)

    def fits(self, units: Units) -> bool:
        """Says whether a message of these units may leave now."""
        return self.demand(units) <= self.paid

    def demand(self, units: Units) -> int:
        """Returns the cumulative payment at which a message of these units may leave."""
        elsewhere = self._standing.unpaid - self._counted
        spare = max(0, self._standing.credit - elsewhere)
        return self.tally.owed + self._cost(units) - spare

    def _cost(self, units: Units) -> int:
        return sum([self.tally.cost(segment, count) for segment, count in units])

    def deliver(self, segment: Segment, units: int) -> None:
        """Counts what leaves; takes it back when negative."""
        self.tally.add(segment, units)
        self._recount()

    def pay(self, cumulative: int) -> None:
        """Counts a saved update."""
        if cumulative > self.paid:
            self._standing.paid += cumulative - self.paid
            self.paid = cumulative
            self._recount()

    def excuse(self, segment: Segment, units: int) -> int:
        """Writes off units that were sent and not accepted, as far as the rules allow.

        What is unpaid can always be written off: it stays within the payer's exposure.
        What was prepaid is given back only from the allowance; the rest is forfeited.

        Returns:
            Units written off; the others stay owed.
        """
        budget = max(0, self.excess) + self._standing.room
        excused = self.tally.refundable(segment, units, budget)
        before = self.tally.owed
        self.tally.add(segment, -excused)
        self.written_off += before - self.tally.owed
        self._standing.written_off += before - self.tally.owed
        self._recount()
        return excused

    def leave(self) -> None:
        """Takes this channel out of the payer's unpaid sum: it is closed.

        What it leaves unpaid is written off: arrears follow the payer, or every new
        channel would bring new credit.
        """
        self._standing.unpaid -= self._counted
        self._standing.written_off += self._counted
        self._counted = 0
        # What its last calls still count or take back is in that already.
        self._standing = replace(self._standing)

    def _recount(self) -> None:
        counted = self.tally.owed - self.paid
        if counted < 0:
            counted = 0
        self._standing.unpaid += counted - self._counted
        self._counted = counted
