"""`python -m btt.services.ledger`: the commands of `btt ledger` without the rest of the CLI."""

from __future__ import annotations

from btt.services.ledger.cli import app

app(prog_name="btt ledger")
