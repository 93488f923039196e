"""A node inside the process of a test (entry point `btt.devnet`)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from btt.node import registry
from btt.node.folder import init
from btt.node.runtime import Node
from btt.sdk.clock import Clock
from btt.sdk.plugin import ServicePlugin


@asynccontextmanager
async def serve(
    folder: Path,
    *,
    config: dict[str, Any],
    plugins: Mapping[str, type[ServicePlugin]],
    clock: Clock,
) -> AsyncIterator[str]:
    """Makes a node and runs it until the context ends.

    Args:
        folder: New.
        config: Tables of its configuration.
        plugins: Services beside the installed ones, by name.
        clock: The node's time.

    Yields:
        Its address.
    """
    given = {name: lambda plugin=plugin: plugin for name, plugin in plugins.items()}
    made = init(folder, config=config)
    async with Node(made, plugins={**registry.installed(), **given}, clock=clock, grace_s=1.0) as node:
        yield str(node.address)
