"""Which money is whose: what a budget has left, by itself and within others, over all processes of a wallet.

A budget within another one uses that, too: an application's is shared by all clients that name it,
however many run at once. All of it is read and reserved inside the transaction of whoever uses it.
"""

from __future__ import annotations

import sqlite3

from btt.sdk.budget import Budget
from btt.sdk.errors import InvalidRequest
from btt.sdk.money import Amount

BUDGETS_SCHEMA = """
CREATE TABLE budgets(
    name TEXT PRIMARY KEY,
    granted INTEGER NOT NULL CHECK(granted >= 0),
    spent INTEGER NOT NULL DEFAULT 0,
    within TEXT
) STRICT, WITHOUT ROWID;
"""
_RESERVED = """
WITH RECURSIVE used(name) AS
  (SELECT ?1 UNION SELECT budgets.name FROM budgets JOIN used ON budgets.within = used.name)
SELECT (SELECT coalesce(sum(CASE state WHEN 'closed' THEN max(signed - base, 0) ELSE cap - base END), 0)
          FROM channels WHERE budget IN used)
     + (SELECT coalesce(sum(reserved), 0) FROM top_ups WHERE budget IN used)
     + (SELECT coalesce(sum(spent), 0) FROM budgets WHERE name IN used)
"""
_ABOVE = """
SELECT above.name, above.granted FROM budgets JOIN budgets above ON budgets.within = above.name
 WHERE budgets.name = ?
"""


def grant(db: sqlite3.Connection, name: str, granted: int) -> None:
    """Writes the total of a budget, which is that of whoever said it last."""
    db.execute(
        "INSERT INTO budgets(name, granted) VALUES(?, ?)"
        " ON CONFLICT DO UPDATE SET granted = excluded.granted",
        (name, granted),
    )


def declare(db: sqlite3.Connection, budget: Budget) -> None:
    """Writes what a budget is within, with the totals.

    Raises:
        InvalidRequest: It is within another one, or was used before without.
    """
    within = budget.within
    if within is None:
        return
    declare(db, within)
    grant(db, within.name, within.amount)
    db.execute(
        "INSERT INTO budgets(name, granted, within) VALUES(?, ?, ?) ON CONFLICT DO NOTHING",
        (budget.name, budget.amount, within.name),
    )
    query = "SELECT within FROM budgets WHERE name = ?"
    if db.execute(query, (budget.name,)).fetchone()[0] != within.name:
        raise InvalidRequest(
            f"The budget {budget.name} was used before, and not within {within.name}: give it another name."
        )


def reserved(db: sqlite3.Connection, name: str) -> int:
    """Returns the base units that are spent, locked, or about to be locked, also by budgets within it."""
    return int(db.execute(_RESERVED, (name,)).fetchone()[0])


def tightest(db: sqlite3.Connection, name: str, granted: int) -> tuple[int, str]:
    """Returns how many base units are free of a budget and of all that it is within.

    Args:
        db: The wallet's books.
        name: Of the budget.
        granted: Its total, base units.

    Returns:
        They, less than 0 in a budget that was lowered below what it has reserved; and which budget
        has no more, for people.
    """
    found = granted - reserved(db, name), f"the budget of {Amount(granted)}"
    while (row := db.execute(_ABOVE, (name,)).fetchone()) is not None:
        name, granted = row
        left = granted - reserved(db, name)
        if left < found[0]:
            found = left, f"the budget {name} of {Amount(granted)}"
    return found
