"""Tables of the ledger. A version's tables are final; a change is a new version with a migration.

A new database is made as version 1 and migrated like an old one, so that one path leads to every
database there is.

Money is int64 base units and every constraint that SQL can state is stated here, so that a defect
above cannot store broken books. Journal rows can be neither changed nor removed.
"""

from __future__ import annotations

from typing import Final

from btt.sdk.money import SUPPLY

VERSION: Final = 4
"""Stored as SQLite's user_version."""

CONCERNS: Final = (
    "WITH told (id, seq) AS (SELECT id, opened_seq FROM channels UNION ALL "
    "SELECT substr(body, 1, 32), seq FROM entries WHERE kind IN (4, 5, 6, 7, 8, 11)) "
    "SELECT payer AS party, seq FROM told JOIN channels USING (id) UNION ALL "
    "SELECT payee, seq FROM told JOIN channels USING (id) UNION ALL "
    "SELECT k2, seq FROM told JOIN channels USING (id)"
)
"""What the table `concerns` holds: each entry of a channel with its payer, its payee and its K2."""

_MONEY: Final = f"BETWEEN 0 AND {SUPPLY}"

TABLES: Final = f"""
CREATE TABLE ledger (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    ledger_id BLOB NOT NULL CHECK (length(ledger_id) = 32),
    genesis BLOB NOT NULL,
    name TEXT NOT NULL,
    unbacked INTEGER NOT NULL CHECK (unbacked IN (0, 1)),
    min_challenge_ms INTEGER NOT NULL CHECK (min_challenge_ms > 0),
    max_challenge_ms INTEGER NOT NULL CHECK (max_challenge_ms BETWEEN min_challenge_ms AND 4294967295),
    min_lifetime_ms INTEGER NOT NULL CHECK (min_lifetime_ms > 0),
    max_lifetime_ms INTEGER NOT NULL CHECK (max_lifetime_ms >= min_lifetime_ms),
    open_fee INTEGER NOT NULL CHECK (open_fee {_MONEY})
) STRICT;

CREATE TABLE epochs (
    epoch INTEGER PRIMARY KEY,
    operator_key BLOB NOT NULL CHECK (length(operator_key) = 33),
    first_seq INTEGER NOT NULL CHECK (first_seq > 0)
) STRICT;

CREATE TABLE head (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    epoch INTEGER NOT NULL REFERENCES epochs,
    writer BLOB NOT NULL,
    seq INTEGER NOT NULL CHECK (seq >= 0),
    hash BLOB NOT NULL CHECK (length(hash) = 32),
    time_ms INTEGER NOT NULL CHECK (time_ms >= 0),
    issued INTEGER NOT NULL CHECK (issued {_MONEY}),
    accounts INTEGER NOT NULL CHECK (accounts {_MONEY}),
    channels INTEGER NOT NULL CHECK (channels {_MONEY}),
    open_channels INTEGER NOT NULL CHECK (open_channels >= 0),
    closed_channels INTEGER NOT NULL CHECK (closed_channels >= 0),
    CHECK (issued = accounts + channels)
) STRICT;

CREATE TABLE accounts (
    acct INTEGER PRIMARY KEY,
    id BLOB NOT NULL UNIQUE CHECK (length(id) BETWEEN 1 AND 255),
    balance INTEGER NOT NULL CHECK (balance {_MONEY}),
    locked INTEGER NOT NULL CHECK (locked {_MONEY}),
    public_key BLOB CHECK (public_key IS NULL OR length(public_key) = 33),
    flags INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE entries (
    seq INTEGER PRIMARY KEY CHECK (seq > 0),
    time_ms INTEGER NOT NULL,
    epoch INTEGER NOT NULL REFERENCES epochs,
    kind INTEGER NOT NULL,
    request_digest BLOB NOT NULL UNIQUE CHECK (length(request_digest) = 32),
    body BLOB NOT NULL,
    signatures BLOB NOT NULL,
    prev_hash BLOB NOT NULL CHECK (length(prev_hash) = 32),
    hash BLOB NOT NULL CHECK (length(hash) = 32)
) STRICT;

CREATE TABLE postings (
    seq INTEGER NOT NULL REFERENCES entries,
    leg INTEGER NOT NULL CHECK (leg >= 0),
    acct INTEGER NOT NULL REFERENCES accounts,
    side INTEGER NOT NULL CHECK (side IN (0, 1)),
    amount INTEGER NOT NULL CHECK (amount BETWEEN 1 AND {SUPPLY}),
    PRIMARY KEY (seq, leg)
) STRICT, WITHOUT ROWID;

CREATE TABLE channels (
    id BLOB NOT NULL UNIQUE CHECK (length(id) = 32),
    acct INTEGER NOT NULL UNIQUE REFERENCES accounts,
    commitment BLOB NOT NULL,
    payer BLOB NOT NULL CHECK (length(payer) = 20),
    payee BLOB NOT NULL CHECK (length(payee) = 20),
    k1 BLOB NOT NULL CHECK (length(k1) = 33),
    k2 BLOB NOT NULL CHECK (length(k2) = 33),
    expires_ms INTEGER NOT NULL,
    challenge_ms INTEGER NOT NULL,
    flags INTEGER NOT NULL,
    refund_signature BLOB NOT NULL CHECK (length(refund_signature) = 65),
    deposit INTEGER NOT NULL CHECK (deposit {_MONEY}),
    captured INTEGER NOT NULL CHECK (captured >= 0),
    best INTEGER NOT NULL,
    best_signature BLOB NOT NULL,
    phase INTEGER NOT NULL CHECK (phase IN (1, 2, 3)),
    deadline_ms INTEGER NOT NULL CHECK ((deadline_ms > 0) = (phase = 2)),
    opened_seq INTEGER NOT NULL REFERENCES entries,
    closed_seq INTEGER REFERENCES entries CHECK ((closed_seq IS NOT NULL) = (phase = 3)),
    CHECK (captured <= best AND best <= deposit),
    CHECK (length(best_signature) = CASE WHEN best > 0 THEN 65 ELSE 0 END)
) STRICT;
CREATE INDEX channels_by_payer ON channels (payer, phase);
CREATE INDEX channels_by_payee ON channels (payee, phase);
CREATE INDEX channels_by_deadline ON channels (deadline_ms) WHERE phase = 2;

CREATE TABLE requests (
    acct INTEGER NOT NULL REFERENCES accounts,
    request_id BLOB NOT NULL CHECK (length(request_id) = 16),
    digest BLOB NOT NULL CHECK (length(digest) = 32),
    failure TEXT NOT NULL,
    keep_until_ms INTEGER NOT NULL,
    PRIMARY KEY (acct, request_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX requests_by_age ON requests (keep_until_ms);

CREATE TRIGGER entries_stay BEFORE UPDATE ON entries
BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
CREATE TRIGGER entries_remain BEFORE DELETE ON entries
BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
CREATE TRIGGER postings_stay BEFORE UPDATE ON postings
BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
CREATE TRIGGER postings_remain BEFORE DELETE ON postings
BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;

PRAGMA user_version = 1;
"""

MIGRATIONS: Final[dict[int, tuple[str, ...]]] = {
    # 2: limits per account, look-up of what concerns an account or a channel, rotation of keys.
    1: (
        f"ALTER TABLE ledger ADD COLUMN max_locked INTEGER NOT NULL DEFAULT {SUPPLY} CHECK (max_locked > 0)",
        (
            "ALTER TABLE ledger ADD COLUMN max_open_channels INTEGER NOT NULL DEFAULT 10000 "
            "CHECK (max_open_channels > 0)"
        ),
        (
            "ALTER TABLE ledger ADD COLUMN min_update_delta INTEGER NOT NULL DEFAULT 1 "
            "CHECK (min_update_delta > 0)"
        ),
        "ALTER TABLE accounts ADD COLUMN open_channels INTEGER NOT NULL DEFAULT 0 CHECK (open_channels >= 0)",
        (
            "UPDATE accounts SET open_channels = (SELECT count(*) FROM channels c "
            "WHERE c.phase <> 3 AND c.payer = substr(accounts.id, 2)) WHERE substr(id, 1, 1) = x'01'"
        ),
        "CREATE INDEX postings_by_account ON postings (acct, seq)",
        "CREATE INDEX entries_by_channel ON entries (substr(body, 1, 32), seq) WHERE kind BETWEEN 4 AND 8",
        "CREATE INDEX channels_by_k2 ON channels (k2)",
        "CREATE INDEX channels_by_abandonment ON channels (expires_ms + 2 * challenge_ms) WHERE phase = 1",
    ),
    # 3: extensions concern a channel, too.
    2: (
        "DROP INDEX entries_by_channel",
        (
            "CREATE INDEX entries_by_channel ON entries (substr(body, 1, 32), seq) "
            "WHERE kind IN (4, 5, 6, 7, 8, 11)"
        ),
    ),
    # 4: what concerns somebody is found in its order, however many channels there are.
    3: (
        (
            "CREATE TABLE concerns (party BLOB NOT NULL, seq INTEGER NOT NULL REFERENCES entries, "
            "PRIMARY KEY (party, seq)) STRICT, WITHOUT ROWID"
        ),
        f"INSERT INTO concerns {CONCERNS}",
        "DROP INDEX channels_by_payer",
        "DROP INDEX channels_by_payee",
        "DROP INDEX channels_by_k2",
    ),
}
"""Statements that lead from a version to the next one; they run in one transaction."""
