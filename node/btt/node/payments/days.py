"""What the books looked like at the end of each day, so that earnings can be told by day.

Triggers keep it: whatever writes to a channel or its counts also writes the day's row, and nobody
can forget to. The rows are cumulative, so that earnings of a time are differences that add up to
the books exactly. `today()` is a function of the connection that writes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Final

DAY_MS: Final = 86_400_000

_CHANNEL_DAY: Final = """
    INSERT INTO channel_days(channel_id, day, best, captured, arrears, written_off)
    VALUES(new.channel_id, today(), new.best,
           CASE new.state WHEN 'closed' THEN coalesce(new.capture, 0) ELSE 0 END,
           new.arrears, new.written_off)
    ON CONFLICT DO UPDATE SET best = excluded.best, captured = excluded.captured,
                              arrears = excluded.arrears, written_off = excluded.written_off;
"""
_COUNT_DAY: Final = """
    INSERT INTO count_days(channel_id, day, offer_digest, service, unit, units)
    VALUES(new.channel_id, today(), new.offer_digest, new.service, new.unit, new.units)
    ON CONFLICT DO UPDATE SET units = excluded.units;
"""
DAYS_SCHEMA: Final = f"""
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
INSERT INTO channel_days
    SELECT channel_id, CAST(strftime('%s', 'now') AS INTEGER) / 86400, best,
           CASE state WHEN 'closed' THEN coalesce(capture, 0) ELSE 0 END, arrears, written_off
    FROM channels;
INSERT INTO count_days
    SELECT channel_id, CAST(strftime('%s', 'now') AS INTEGER) / 86400, offer_digest, service, unit, units
    FROM counts;
CREATE TRIGGER channel_day_first AFTER INSERT ON channels BEGIN {_CHANNEL_DAY} END;
CREATE TRIGGER channel_day AFTER UPDATE OF best, state, capture, arrears, written_off ON channels
BEGIN {_CHANNEL_DAY} END;
CREATE TRIGGER count_day_first AFTER INSERT ON counts BEGIN {_COUNT_DAY} END;
CREATE TRIGGER count_day AFTER UPDATE OF units ON counts BEGIN {_COUNT_DAY} END;
"""  # noqa: S608
"""Begins with what the books hold on the day of the upgrade."""


def tell_days(db: sqlite3.Connection, clock: Callable[[], int]) -> None:
    """Lets a connection that writes the books know which day it is.

    Args:
        db: Open books.
        clock: Unix milliseconds.
    """
    db.create_function("today", 0, lambda: clock() // DAY_MS)
