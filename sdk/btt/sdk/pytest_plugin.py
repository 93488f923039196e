"""Fixtures for tests of dApps and services, in every pytest beside which this SDK is installed.

`devnet` is a running network inside the test's process, `network` is that or one that stands
already, as `--btt` says; `devnet_options` is theirs to override. They need pytest-asyncio, and a
devnet needs the installation for operators (`[node]`). Nothing is imported before it is used.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final

import pytest

try:
    from pytest_asyncio import fixture as async_fixture
except ImportError:  # another plugin may run async fixtures
    async_fixture = pytest.fixture  # type: ignore[assignment]

if TYPE_CHECKING:
    from btt.sdk.testing import Devnet, Network

_DEVNET: Final = "devnet"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the switch between a devnet and a network that stands."""
    parser.getgroup("btt").addoption(
        "--btt",
        default=_DEVNET,
        metavar="NODES",
        help=(
            'Where tests with the fixture `network` run: "devnet", or addresses of nodes, separated '
            "by commas; then BTT_LEDGER names the ledger and BTT_WALLET the wallet that pays."
        ),
    )


@pytest.fixture
def devnet_options() -> dict[str, Any]:
    """Arguments of the `Devnet`; override it beside your tests, to name your plugin for instance."""
    return {}


@pytest.fixture
def _make_devnet(devnet_options: dict[str, Any]) -> Callable[[], Devnet]:
    from btt.sdk.testing import Devnet

    return lambda: Devnet(**{"in_process": True, **devnet_options})


@async_fixture
async def devnet(_make_devnet: Callable[[], Devnet]) -> AsyncIterator[Devnet]:
    """A running network in this process; it ends with the test."""
    async with _make_devnet() as net:
        yield net


@async_fixture
async def network(request: pytest.FixtureRequest) -> AsyncIterator[Network]:
    """Gives funded clients: of a devnet, or of the network that `--btt` names."""
    from btt.sdk.testing import Elsewhere

    nodes = request.config.getoption("--btt")
    if nodes != _DEVNET:
        yield Elsewhere(nodes)
        return
    async with request.getfixturevalue("_make_devnet")() as net:
        yield net
