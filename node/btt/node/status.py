"""What a node is doing and has earned, for its operator: works while it runs and while it does not."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from btt.node.books import reading_file
from btt.node.folder import BOOKS, CERTIFICATE, CONFIG, running_address
from btt.node.payments.store import Earnings, read_best_updates, read_earnings
from btt.proto.ledger.v1.ledger_pb2 import EntryKind
from btt.proto.offer.v1 import offer_pb2
from btt.sdk.channel import Line
from btt.sdk.errors import ConfigError, StorageError
from btt.sdk.identity import NodeAddress, tls_name
from btt.sdk.ledger.evidence import Evidence
from btt.sdk.money import Amount, Rate, Unit
from btt.sdk.signing import ChannelCommit, ChannelUpdate
from btt.sdk.tls import pinned_channel

NOT_RUNNING, NOT_SERVING, SERVING = "not running", "not serving", "serving"


@dataclass(frozen=True, slots=True)
class Status:
    """A node as its operator sees it.

    Attributes:
        state: NOT_RUNNING, NOT_SERVING (it starts, stops or hangs) or SERVING.
        address: Where it listens; None if it does not.
        prices: Of its last offer.
        earnings: Its books.
    """

    state: str
    address: NodeAddress | None
    prices: dict[Line, Rate]
    earnings: Earnings

    def as_json(self) -> dict[str, object]:
        """Returns it for machines; amounts are base units as text, like in every JSON of ours."""
        earned = self.earnings
        return {
            "running": self.state != NOT_RUNNING,
            "state": self.state,
            "address": str(self.address) if self.address else None,
            "services": [
                {
                    "service": line.service,
                    "unit": line.unit.name.lower(),
                    "price": str(rate),
                    "units": earned.units.get(line, 0),
                }
                for line, rate in self.prices.items()
            ],
            "served_bytes": self.served_bytes,
            "paid": str(earned.paid),
            "captured": str(earned.captured),
            "written_off": str(earned.written_off),
            "open_channels": earned.open_channels,
            "closed_channels": earned.closed_channels,
        }

    @property
    def served_bytes(self) -> int:
        """Bytes of all services that were settled."""
        return sum(units for line, units in self.earnings.units.items() if line.unit is Unit.BYTE)

    def lines(self) -> list[tuple[str, str]]:
        """Returns it for people."""
        earned = self.earnings
        return [
            ("state", self.state),
            ("address", str(self.address) if self.address else "-"),
            *((line.service.rpartition(".")[2], str(rate)) for line, rate in self.prices.items()),
            ("served", f"{self.served_bytes:,} bytes"),
            ("paid", str(Amount(earned.paid))),
            ("captured", str(Amount(earned.captured))),
            ("written off", str(Amount(earned.written_off))),
            ("channels", f"{earned.open_channels} open, {earned.closed_channels} closed"),
        ]


async def read_status(path: Path, *, timeout: float = 5.0) -> Status:
    """Looks at the node of a folder.

    Args:
        path: Of the folder.
        timeout: Seconds that a running node may take to answer.

    Raises:
        ConfigError: There is no node.
        StorageError: Its books cannot be read.
    """
    if not (path / CONFIG).exists():
        raise ConfigError(f"There is no node in {path}.", hint="Make one with `btt node init`.")
    address = running_address(path)
    # The address for others may lead nowhere from here, as behind a router.
    local = running_address(path, "local")
    state = NOT_RUNNING if local is None else await _ask(path, local, timeout)
    earnings, prices = await asyncio.to_thread(_read_books, path / BOOKS)
    return Status(state, address, prices, earnings)


async def _ask(path: Path, address: NodeAddress, timeout: float) -> str:
    import grpc.aio
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    assert address.node is not None
    certificate = (path / CERTIFICATE).read_bytes()
    async with pinned_channel(address.host, address.port, certificate, tls_name(address.node)) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
                health_pb2.HealthCheckRequest(), timeout=timeout
            )
        except grpc.aio.AioRpcError:
            return NOT_SERVING
    return SERVING if answer.status == health_pb2.HealthCheckResponse.SERVING else NOT_SERVING


def read_updates(path: Path) -> list[Evidence]:
    """Returns the best update of each channel in a node's books: evidence, though no ledger saw it.

    Args:
        path: Of the books; a node that was never started has none.

    Raises:
        StorageError: They cannot be read.
    """
    if not path.exists():
        return []
    with _books(path) as db:
        rows = read_best_updates(db)
    return [
        Evidence(
            int(EntryKind.ENTRY_KIND_UPDATE),
            ChannelUpdate(channel=channel_id, cumulative=best).encode(),
            ChannelCommit.decode(commit).k1.data + signature,
            None,
        )
        for commit, channel_id, best, signature in rows
    ]


@contextmanager
def _books(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with reading_file(path) as db:
            yield db
    except DecodeError as error:
        raise StorageError(f"The node's books cannot be read ({error}).") from error


def _read_books(path: Path) -> tuple[Earnings, dict[Line, Rate]]:
    if not path.exists():
        return Earnings(0, 0, 0, {}, 0, 0), {}  # it was never started
    with _books(path) as db:
        earnings = read_earnings(db)
        row = db.execute("SELECT payload FROM offers ORDER BY serial DESC LIMIT 1").fetchone()
        offer = offer_pb2.Offer.FromString(row[0]) if row else offer_pb2.Offer()
    prices = {Line(p.service, Unit(p.unit)): Rate(p.amount, p.per, Unit(p.unit)) for p in offer.prices}
    return earnings, prices
