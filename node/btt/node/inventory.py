"""Which services a node has: installed, configured, running."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from btt.node.config import NodeConfig
from btt.node.folder import running_facts
from btt.node.registry import GROUP
from btt.sdk.money import Rate

NOT_RUNNING = "not running"


def inventory(folder: Path, config: NodeConfig) -> list[dict[str, Any]]:
    """Returns one row for each service that is installed or configured, by name.

    Args:
        folder: Of the node.
        config: Of the node.
    """
    facts = running_facts(folder) or {}
    states = facts.get("services", {})
    points = {point.name: point for point in entry_points(group=GROUP)}
    rows = []
    for name in sorted(points.keys() | config.services.keys()):
        section = config.services.get(name)
        point = points.get(name)
        dist = point.dist if point is not None else None
        state = states.get(name, {})
        rows.append(
            {
                "name": name,
                "enabled": bool(section and section.enabled),
                "state": state.get("state", NOT_RUNNING) if point else "not installed",
                "reason": state.get("reason", ""),
                "failures": state.get("failures", 0),
                "prices": _prices(section.options) if section else [],
                "package": dist.name if dist else "",
                "version": dist.version if dist else "",
            }
        )
    return rows


def _prices(options: dict[str, Any]) -> list[str]:
    found = []
    for value in options.values():
        try:
            found.append(str(Rate.parse(value)))
        except (ValueError, TypeError, AttributeError):
            continue
    return found
