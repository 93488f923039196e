"""What a new node is configured with, by where it runs."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final


class Profile(StrEnum):
    """Where a node runs."""

    HOME = "home"
    """On a line that people use for other things: it listens on this machine alone and sends
    2 MiB/s at most until its operator says otherwise."""
    SERVER = "server"
    """On a machine for this: it listens on all addresses, without a limit, and has metrics."""


_TABLES: Final[dict[Profile, dict[str, Any]]] = {
    Profile.HOME: {
        "node": {"listen": "127.0.0.1:7800"},
        "limits": {"up": "2 MiB/s", "down": "8 MiB/s", "connections": 200, "calls": 64},
    },
    Profile.SERVER: {
        "node": {"listen": "0.0.0.0:7800"},
        "limits": {"calls": 4096},
        "metrics": {"listen": "127.0.0.1:7803"},
    },
}


def tables(profile: Profile | None) -> dict[str, Any]:
    """Returns the tables of a profile; those of a node without one are empty."""
    return {name: dict(table) for name, table in _TABLES.get(profile, {}).items()} if profile else {}
