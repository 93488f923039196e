"""What is sold in the simulator: bytes at one base unit each, a thousand to the verify unit."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from btt.sdk.channel import Line, Price
from btt.sdk.money import Rate, Unit
from btt.sdk.plugin import ServiceContext
from kit.protos import compile_proto

pb, rpc = compile_proto(Path(__file__).parent / "sim.proto")

UNIT = 1000
"""Base units of a verify unit: what one side may lose at first."""
FUNDS = 60 * UNIT
"""What each payer grants its program, base units."""
LINE = Line("sim.v1.SimService", Unit.BYTE)


class Servicer(rpc.SimServiceServicer):  # type: ignore[misc]
    """Sends what is asked for; a cheat sends a part of it, once it is paid for."""

    def __init__(self, generosity: float, draw: Any) -> None:
        self._generosity = generosity
        self._draw = draw

    def _pieces(self, request: Any) -> int:
        return sum(self._draw() < self._generosity for _ in range(request.messages))

    async def One(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.Piece(data=bytes(request.size))

    async def Many(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        for _ in range(self._pieces(request)):
            yield pb.Piece(data=bytes(request.size))

    async def ManyChecked(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        for _ in range(self._pieces(request)):
            yield pb.Checked(data=bytes(request.size))


def plugin(generosity: float, draw: Any) -> Any:
    """Returns the service as a node takes it.

    Args:
        generosity: Share of the messages that are sent.
        draw: Returns a random number below 1.
    """

    class Plugin:
        name = "sim"

        def __init__(self, context: ServiceContext) -> None:
            pass

        async def start(self) -> None:
            pass

        def register(self, server: Any) -> None:
            rpc.add_SimServiceServicer_to_server(Servicer(generosity, draw), server)

        def prices(self) -> Mapping[Line, Price]:
            return {LINE: Price(Rate(1, 1, Unit.BYTE), UNIT)}

        async def stop(self) -> None:
            pass

    return Plugin
