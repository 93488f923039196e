"""Checks the keys that only services understand, by making each service and throwing it away."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path

from structlog.testing import capture_logs

from btt.node import registry
from btt.node.config import NodeConfig
from btt.node.limits.limiter import Limiter
from btt.node.metrics import NodeMetrics, Sample
from btt.node.payments.charged import RunningCall
from btt.node.plugins.host import State, Surroundings
from btt.node.quota import Quotas
from btt.sdk.clock import SYSTEM
from btt.sdk.errors import ConfigError
from btt.sdk.group_commit import Job


def check_services(config: NodeConfig, *, only: Collection[str] | None = None) -> list[str]:
    """Returns the services that are on.

    Args:
        config: Of the node.
        only: Names of those that are looked at; all by default.

    Raises:
        ConfigError: One of them is not installed, cannot be made, or refuses its keys.
    """

    async def nothing() -> list[Sample]:
        return []

    sections = {name: each for name, each in config.services.items() if only is None or name in only}
    limiter = Limiter(lambda: 0.0)
    # What fails is told by what this raises; standard output belongs to the command.
    with capture_logs(), tempfile.TemporaryDirectory() as folder:
        made = registry.Registry(
            registry.installed(),
            around=Surroundings(
                folder=Path(folder),
                clock=SYSTEM,
                limiter=limiter.of,
                metrics=NodeMetrics(nothing).of,
                quota=Quotas(_no_books).of,
                meter=RunningCall(),
            ),
            limiter=limiter,
            credit_limit=config.payments.credit_limit,
        ).configure(sections)
    for host in made:
        if host.state is State.FAILED:
            raise ConfigError(f"services.{host.name} failed: {host.reason}.", hint="Repair or disable it.")
    return [host.name for host in made]


async def _no_books(_: Job) -> None:
    raise ConfigError("A service keeps nothing before it is started.")
