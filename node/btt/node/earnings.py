"""What a node has earned, told so that it adds up: every number is a difference of two states of the books.

Accrued is what was delivered and settled with the payer, at its price. Signed is what the payer's
updates cover of it; settled is what the ledger paid out, with the ledger's receipt for it. What is
accrued and not signed is unpaid; once its channel is closed it is arrears. Written off is what was
delivered, not accepted, and never accrued.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import groupby
from operator import itemgetter
from typing import Final

from btt.sdk.errors import BttError
from btt.sdk.keys import Address
from btt.sdk.money import Rate, Unit
from btt.sdk.signing import ChannelClose, Receipt

UNKNOWN_APP: Final = "unknown"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Sums:
    """Base units.

    Attributes:
        accrued: Delivered, settled with the payer, and priced.
        signed: Of that, covered by the payer's updates.
        settled: Of that, paid out by the ledger.
        unpaid: Accrued beyond what is signed.
        arrears: Of that, on channels that are closed.
        written_off: Delivered, not accepted, and not accrued.
    """

    accrued: int = 0
    signed: int = 0
    settled: int = 0
    unpaid: int = 0
    arrears: int = 0
    written_off: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


COLUMNS: Final = tuple(f.name for f in fields(Sums))


class By(StrEnum):
    """What earnings can be told by."""

    SERVICE = "service"
    PEER = "peer"
    APP = "app"
    DAY = "day"


@dataclass(frozen=True, slots=True)
class Entry:
    """What changed on one day, on one channel, for one service.

    Attributes:
        day: Days since 1970, UTC.
        channel: 32 bytes.
        peer: Who pays.
        app: For which application, as an address; UNKNOWN_APP without one.
        service: Full name of the proto service; empty for money without a delivery.
        sums: By how much.
    """

    day: int
    channel: bytes
    peer: str
    app: str
    service: str
    sums: Sums

    def key(self, by: By) -> str:
        """Returns what the entry is told under."""
        return date_of(self.day) if by is By.DAY else str(getattr(self, by.value))


def date_of(day: int) -> str:
    """Writes a day, counted since 1970, as "2030-01-31"."""
    return f"{_EPOCH + timedelta(days=day):%Y-%m-%d}"


def split(amount: int, weights: Mapping[str, int]) -> dict[str, int]:
    """Splits an amount in proportion to weights; the parts add up to it exactly.

    Args:
        amount: Base units.
        weights: Not negative; if all are 0 everything goes to "".
    """
    total = sum(weights.values())
    if not total:
        return {"": amount} if amount else {}
    parts = {key: amount * weight // total for key, weight in weights.items()}
    rest = amount - sum(parts.values())
    by_remainder = sorted(weights, key=lambda key: (-(amount * weights[key] % total), key))
    for key in by_remainder[:rest]:
        parts[key] += 1
    return parts


def read_entries(db: sqlite3.Connection) -> Iterator[Entry]:
    """Reads all that was ever earned, channel by channel and in the order of days.

    Args:
        db: The node's books.
    """
    rates = {
        tuple(key): Rate(amount, per, Unit(key[3]))
        for *key, amount, per in db.execute(
            "SELECT channel_id, offer_digest, service, unit, amount, per FROM counts"
        )
    }
    counts: dict[tuple[bytes, int], list[tuple[bytes, str, int, int]]] = defaultdict(list)
    for channel, day, *count in db.execute(
        "SELECT channel_id, day, offer_digest, service, unit, units FROM counts_by_day"
    ):
        counts[channel, day].append((*count,))
    states: dict[tuple[bytes, int], tuple[int, int, int, int]] = {
        (channel, day): (*state,)
        for channel, day, *state in db.execute(
            "SELECT channel_id, day, best, captured, arrears, written_off FROM channels_by_day"
        )
    }
    parties = {
        channel: (str(Address(payer)), str(Address(app)) if app else UNKNOWN_APP)
        for channel, payer, app in db.execute("SELECT channel_id, payer, app FROM channels")
    }
    for channel, days in groupby(sorted(counts.keys() | states.keys()), key=itemgetter(0)):
        peer, app = parties[channel]
        owed: dict[tuple[bytes, str, int], int] = {}
        money = (0, 0, 0, 0)
        before: dict[str, Sums] = {}
        for _, day in days:
            for digest, service, unit, units in counts.get((channel, day), ()):
                owed[digest, service, unit] = rates[channel, digest, service, unit].owed(units)
            money = states.get((channel, day), money)
            now = _state(owed, *money)
            for service in now.keys() | before.keys():
                change = now.get(service, Sums()) - before.get(service, Sums())
                if change != Sums():
                    yield Entry(day=day, channel=channel, peer=peer, app=app, service=service, sums=change)
            before = now


def _state(
    owed: Mapping[tuple[bytes, str, int], int], best: int, captured: int, arrears: int, written_off: int
) -> dict[str, Sums]:
    accrued: dict[str, int] = defaultdict(int)
    for (_, service, _), amount in owed.items():
        accrued[service] += amount
    total = sum(accrued.values())
    # A payer that left takes back what it prepaid, unless the ledger closed without us.
    signed = split(max(min(best, total), captured), accrued)
    parts = (
        accrued,
        signed,
        split(captured, accrued),
        split(max(0, total - best), accrued),
        split(arrears, accrued),
        split(written_off, accrued),
    )
    services = {service for part in parts for service in part}
    return {service: Sums(*(part.get(service, 0) for part in parts)) for service in services}


def told_by(entries: Iterable[Entry], by: By, *, since_day: int = 0) -> dict[str, Sums]:
    """Adds entries up, in the order of their keys.

    Args:
        entries: As read.
        by: What they are told by.
        since_day: First day, days since 1970.
    """
    found: dict[str, Sums] = {}
    for entry in entries:
        if entry.day >= since_day:
            key = entry.key(by)
            found[key] = found.get(key, Sums()) + entry.sums
    return dict(sorted(found.items()))


def total_of(told: Mapping[str, Sums]) -> Sums:
    """Adds up what was told."""
    return sum(told.values(), Sums())


def read_receipts(db: sqlite3.Connection, ledger_id: bytes) -> dict[bytes, int]:
    """Returns what the ledger's receipts prove: base units by channel.

    A receipt counts if it is for the close of that channel with that amount; its signature was
    checked when it came.

    Args:
        db: The node's books.
        ledger_id: 32 bytes.
    """
    proved = {}
    for channel, capture, receipt in db.execute(
        "SELECT channel_id, capture, receipt FROM channels WHERE state = 'closed' AND receipt IS NOT NULL"
    ):
        try:
            digest = Receipt.decode(receipt).request_digest
        except BttError:
            continue
        if digest == ChannelClose(channel=channel, capture=capture).digest(ledger_id):
            proved[channel] = capture
    return proved
