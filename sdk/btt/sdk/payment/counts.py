"""The table of cumulative counts: the same on the payer's disk and on the payee's."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from btt.sdk.channel import Line, Segment, Tally
from btt.sdk.channel.prices import Count
from btt.sdk.money import Rate, Unit

COUNTS_SCHEMA = """
CREATE TABLE counts(
    channel_id BLOB NOT NULL REFERENCES channels(channel_id),
    offer_digest BLOB NOT NULL,
    service TEXT NOT NULL,
    unit INTEGER NOT NULL,
    amount INTEGER NOT NULL,
    per INTEGER NOT NULL,
    units INTEGER NOT NULL CHECK(units >= 0),
    PRIMARY KEY(channel_id, offer_digest, service, unit)
) STRICT, WITHOUT ROWID;
"""


def save_counts(db: sqlite3.Connection, changes: Iterable[tuple[bytes, Iterable[Count]]]) -> None:
    """Writes counts of channels, inside the caller's transaction."""
    db.executemany(
        "INSERT INTO counts(channel_id, offer_digest, service, unit, amount, per, units)"
        " VALUES(?,?,?,?,?,?,?)"
        " ON CONFLICT DO UPDATE SET units = excluded.units WHERE units <> excluded.units",
        [
            (channel_id, offer_digest, service, int(unit), rate.amount, rate.per, units)
            for channel_id, counts in changes
            for (offer_digest, (service, unit)), rate, units in counts
        ],
    )


def load_tally(db: sqlite3.Connection, channel_id: bytes) -> Tally:
    """Reads a channel's tally; the rates of old offers stand with their counts."""
    tally = Tally()
    for digest, service, unit, amount, per, units in db.execute(
        "SELECT offer_digest, service, unit, amount, per, units FROM counts WHERE channel_id = ?",
        (channel_id,),
    ):
        segment = Segment(digest, Line(service, Unit(unit)))
        tally.price(segment, Rate(amount, per, Unit(unit)))
        tally.add(segment, units)
    return tally
