"""How much a payee lets a payer owe.

Credit belongs to the payer, over all its channels, sessions and connections:

- A newcomer may owe one verify unit (paper: the risk of one piece), taken from what
  strangers together may owe in an hour; when that is used up it prepays.
- Later a payer may owe 5 % of what it has paid here, up to the operator's limit, so
  that paying and then defaulting under fresh keys never wins more than 5 %.
- Units that were sent but not accepted are written off against the same bound. Beyond
  one unit or 1 % of what it paid the payer has no credit, and prepays, until it has
  paid more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

EARNED_PERCENT = 5
"""Credit as a share of what the payer has paid here."""
WRITE_OFF_PERCENT = 1
"""Shortfall that costs a payer nothing, as a share of what it has paid here."""


def signing_point(credit: int, unit: int) -> int:
    """Says how much may be outstanding before a payer signs by itself.

    Late enough to sign few updates, early enough that the payee still has something to send
    while an update travels and is saved on both sides. Both sides know it, so that neither
    has to be told what the other will do anyway.

    Args:
        credit: Base units that the payer may owe, as far as it knows.
        unit: Cost of the dearest verify unit, base units.
    """
    return max(0, credit - credit // 8 - unit)


@dataclass(slots=True)
class Standing:
    """One payer's standing with one payee.

    Attributes:
        unit: Cost of the dearest verify unit, base units.
        limit: Most base units that anyone may owe.
        lease: Base units of credit lent from the strangers' budget.
        paid: Base units paid here over all channels.
        written_off: Base units of units that were sent and not accepted.
        unpaid: Base units owed beyond what is paid, over all channels.
    """

    unit: int
    limit: int
    lease: int = 0
    paid: int = 0
    written_off: int = 0
    unpaid: int = 0

    @property
    def earned(self) -> int:
        """Credit earned by paying, base units."""
        return self.paid * EARNED_PERCENT // 100

    @property
    def is_stranger(self) -> bool:
        """True while the payer has not earned a verify unit of credit."""
        return self.earned < self.unit

    @property
    def exposure(self) -> int:
        """Most that this payer may cost: what it owes and what was written off, base units."""
        return max(self.earned, self.lease)

    @property
    def allowance(self) -> int:
        """Shortfall up to which it keeps its credit, base units."""
        floor = self.lease if self.is_stranger else self.unit
        return max(floor, self.paid * WRITE_OFF_PERCENT // 100)

    @property
    def in_default(self) -> bool:
        """True while more was written off than a crash of an honest payer explains."""
        return self.written_off > max(self.unit, self.paid * WRITE_OFF_PERCENT // 100)

    @property
    def credit(self) -> int:
        """Base units that may be owed now."""
        if self.written_off > self.allowance:
            return 0
        return max(0, min(self.limit, self.exposure - self.written_off))

    @property
    def room(self) -> int:
        """Prepaid base units that may still be given back as written off."""
        return max(0, min(self.credit - self.unpaid, self.allowance - self.written_off))


class Strangers:
    """What payers without a history may owe together: token buckets, one of all and one a network.

    Whoever lends keeps `lent` on disk before the credit is given, and begins with `remember`.

    Args:
        total: Base units an hour over all networks.
        per_network: Base units an hour for each /24 or /48.
    """

    MAX_NETWORKS = 65536

    def __init__(self, *, total: int, per_network: int) -> None:
        self._total = _Bucket(total)
        self._per_network = per_network
        self._networks: dict[str, _Bucket] = {}

    def limit(self, *, total: int, per_network: int) -> None:
        """Lends other sums an hour from now on; what is lent stays lent."""
        self._total.resize(total)
        self._per_network = per_network
        for bucket in self._networks.values():
            bucket.resize(per_network)

    def lend(self, network: str, amount: int, now_ms: int) -> bool:
        """Takes `amount` from both buckets, or nothing from either.

        Args:
            network: A /24 or /48 in text form.
            amount: Base units.
            now_ms: Milliseconds of a clock that does not go back.
        """
        bucket = self._networks.get(network)
        if bucket is None:
            if len(self._networks) >= self.MAX_NETWORKS:
                self._networks = {k: b for k, b in self._networks.items() if not b.full(now_ms)}
                if len(self._networks) >= self.MAX_NETWORKS:
                    return False
            bucket = self._networks[network] = _Bucket(self._per_network)
        # Both are asked, so that both have seen this time, should it go back.
        if min(self._total.available(now_ms), bucket.available(now_ms)) < amount:
            return False
        self._total.take(amount)
        bucket.take(amount)
        return True

    def lent(self, network: str, now_ms: int) -> list[tuple[str, int, int]]:
        """Returns what of the budgets is used, to be kept: of all together (named ""), and of a network.

        Args:
            network: A /24 or /48 in text form.
            now_ms: As for `lend`.

        Returns:
            Name, base units lent and neither back nor refilled, and when that was, Unix milliseconds.
        """
        buckets = [("", self._total)]
        if network in self._networks:
            buckets.append((network, self._networks[network]))
        return [(name, bucket.used(now_ms), now_ms) for name, bucket in buckets]

    def remember(self, lent: Iterable[tuple[str, int, int]], now_ms: int) -> None:
        """Goes on from what was kept: a restart lends nobody more.

        Args:
            lent: From `lent`, in another life.
            now_ms: As for `lend`; what was kept at a later time counts as of now.
        """
        for name, used, at_ms in lent:
            bucket = self._networks.setdefault(name, _Bucket(self._per_network)) if name else self._total
            bucket.begin(used, min(at_ms, now_ms))

    def give_back(self, network: str, amount: int) -> None:
        """Returns what was lent and not lost."""
        self._total.put(amount)
        if network in self._networks:
            self._networks[network].put(amount)


class _Bucket:
    """Refills `capacity` an hour, and never holds more."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._level_ms = capacity * 3_600_000  # in base-unit milliseconds: exact at any interval
        self._at_ms: int | None = None

    def available(self, now_ms: int) -> int:
        if self._at_ms is not None and now_ms > self._at_ms:
            self.put_ms((now_ms - self._at_ms) * self._capacity)
        self._at_ms = max(now_ms, self._at_ms or 0)
        return self._level_ms // 3_600_000

    def resize(self, capacity: int) -> None:
        self._level_ms += (capacity - self._capacity) * 3_600_000
        self._capacity = capacity

    def begin(self, used: int, at_ms: int) -> None:
        self._level_ms, self._at_ms = (self._capacity - used) * 3_600_000, at_ms

    def used(self, now_ms: int) -> int:
        return self._capacity - self.available(now_ms)

    def full(self, now_ms: int) -> bool:
        return self.available(now_ms) >= self._capacity

    def take(self, amount: int) -> None:
        self._level_ms -= amount * 3_600_000

    def put(self, amount: int) -> None:
        self.put_ms(amount * 3_600_000)

    def put_ms(self, level_ms: int) -> None:
        self._level_ms = min(self._capacity * 3_600_000, self._level_ms + level_ms)
