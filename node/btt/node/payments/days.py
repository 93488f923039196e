"""What the books looked like at the end of each day, so that earnings can be told by day.

A row of the books says on which day it was written last. The first write of a later day puts what
the row held until then among the days that are over; every other write costs nothing more. Triggers
see to it, so that nobody can forget to. The rows are cumulative, so that earnings of a time are
differences that add up to the books exactly. `today()` is a function of the connection that writes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Final

DAY_MS: Final = 86_400_000

DAYS_SCHEMA: Final = """
ALTER TABLE channels ADD COLUMN app BLOB CHECK(app IS NULL OR length(app) = 20);
CREATE TABLE channel_days(
    channel_id BLOB NOT NULL,
    day INTEGER NOT NULL,
    best INTEGER NOT NULL,
    captured INTEGER NOT NULL,
    arrears INTEGER NOT NULL,
    written_off INTEGER NOT NULL,
    PRIMARY KEY(channel_id, day)
) STRICT, WITHOUT ROWID;
CREATE TABLE count_days(
    channel_id BLOB NOT NULL,
    day INTEGER NOT NULL,
    offer_digest BLOB NOT NULL,
    service TEXT NOT NULL,
    unit INTEGER NOT NULL,
    units INTEGER NOT NULL,
    PRIMARY KEY(channel_id, day, offer_digest, service, unit)
) STRICT, WITHOUT ROWID;
"""
"""Version 3 also kept the day that was not over yet in these tables, by triggers of its own."""

_CAPTURED: Final = "CASE {0}state WHEN 'closed' THEN coalesce({0}capture, 0) ELSE 0 END"
_TODAY: Final = "CAST(strftime('%s', 'now') AS INTEGER) / 86400"
TODAY_SCHEMA: Final = f"""
DROP TRIGGER IF EXISTS channel_day_first;
DROP TRIGGER IF EXISTS channel_day;
DROP TRIGGER IF EXISTS count_day_first;
DROP TRIGGER IF EXISTS count_day;
ALTER TABLE channels ADD COLUMN day INTEGER NOT NULL DEFAULT 0;
ALTER TABLE counts ADD COLUMN day INTEGER NOT NULL DEFAULT 0;
UPDATE channels SET day = coalesce(
    (SELECT max(d.day) FROM channel_days AS d WHERE d.channel_id = channels.channel_id), {_TODAY});
UPDATE counts SET day = coalesce(
    (SELECT max(d.day) FROM count_days AS d WHERE d.channel_id = counts.channel_id
        AND d.offer_digest = counts.offer_digest AND d.service = counts.service AND d.unit = counts.unit),
    {_TODAY});
DELETE FROM channel_days WHERE (channel_id, day) IN (SELECT channel_id, day FROM channels);
DELETE FROM count_days WHERE (channel_id, day, offer_digest, service, unit) IN
    (SELECT channel_id, day, offer_digest, service, unit FROM counts);
CREATE TRIGGER channel_first_day AFTER INSERT ON channels
BEGIN UPDATE channels SET day = today() WHERE channel_id = new.channel_id; END;
CREATE TRIGGER channel_next_day AFTER UPDATE OF best, state, capture, arrears, written_off ON channels
WHEN old.day < today()
BEGIN
    INSERT INTO channel_days
        VALUES(old.channel_id, old.day, old.best, {_CAPTURED.format("old.")}, old.arrears, old.written_off);
    UPDATE channels SET day = today() WHERE channel_id = new.channel_id;
END;
CREATE TRIGGER count_first_day AFTER INSERT ON counts
BEGIN
    UPDATE counts SET day = today() WHERE channel_id = new.channel_id
        AND offer_digest = new.offer_digest AND service = new.service AND unit = new.unit;
END;
CREATE TRIGGER count_next_day AFTER UPDATE OF units ON counts WHEN old.day < today()
BEGIN
    INSERT INTO count_days
        VALUES(old.channel_id, old.day, old.offer_digest, old.service, old.unit, old.units);
    UPDATE counts SET day = today() WHERE channel_id = new.channel_id
        AND offer_digest = new.offer_digest AND service = new.service AND unit = new.unit;
END;
CREATE VIEW channels_by_day AS
    SELECT channel_id, day, best, captured, arrears, written_off FROM channel_days
    UNION ALL
    SELECT channel_id, day, best, {_CAPTURED.format("")}, arrears, written_off FROM channels;
CREATE VIEW counts_by_day AS
    SELECT channel_id, day, offer_digest, service, unit, units FROM count_days
    UNION ALL
    SELECT channel_id, day, offer_digest, service, unit, units FROM counts;
"""  # noqa: S608
"""Books of before begin with what they hold on the day of the upgrade, if no day is known."""


def tell_days(db: sqlite3.Connection, clock: Callable[[], int]) -> None:
    """Lets a connection that writes the books know which day it is.

    Args:
        db: Open books.
        clock: Unix milliseconds.
    """
    db.create_function("today", 0, lambda: clock() // DAY_MS)
