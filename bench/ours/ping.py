"""The smallest paid service, in a node and bare, in one process: `python -m bench.ours.ping`.

The node is the product's own, with this service as a third party would plug it in; beside it
listens a gRPC server with the same handlers and nothing around them. A ledger runs here too,
which is idle while calls are.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc.aio
import structlog
import uvloop
from grpc_tools import protoc

from bench.processes import ROOT, heard, say
from btt.node import folder as node_folder
from btt.node.runtime import Node
from btt.sdk.keys import Address
from btt.sdk.plugin import Line, Price, Rate, ServiceContext, Unit
from btt.sdk.tls import TRANSPORT_OPTIONS, make_certificate, server_credentials
from btt.services.ledger import folder as ledger_folder
from btt.services.ledger.server import LedgerConfig, serve

NAME = "bare.btt"
PRICES = {
    Line("bench.ping.v1.PingService", Unit.BYTE): Price(Rate.parse("1 BTT / MiB"), 16384),
    Line("bench.ping.v1.BulkService", Unit.BYTE): Price(Rate.parse("1 BTT / GiB"), 262144),
}
SUPPLY = 10**15


def compile_proto() -> tuple[ModuleType, ModuleType]:
    """Compiles ping.proto as a third party's build would."""
    google = resources.files("grpc_tools") / "_proto"
    with tempfile.TemporaryDirectory() as out:
        includes = [f"-I{Path(__file__).parent}", f"-I{ROOT / 'proto'}", f"-I{google}"]
        outputs = [f"--python_out={out}", f"--grpc_python_out={out}"]
        if protoc.main(["protoc", *includes, *outputs, "ping.proto"]):
            raise RuntimeError("ping.proto does not compile")
        sys.path.insert(0, out)
        try:
            return importlib.import_module("ping_pb2"), importlib.import_module("ping_pb2_grpc")
        finally:
            sys.path.remove(out)


pb, rpc = compile_proto()


class Ping(rpc.PingServiceServicer):  # type: ignore[name-defined,misc]
    """Gives bytes; streams meet before they begin."""

    def __init__(self, meet: int) -> None:
        self._meet = asyncio.Barrier(meet)

    async def One(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.PongResponse(data=bytes(request.size))

    async def Many(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        data = bytes(request.size)
        await self._meet.wait()
        for _ in range(request.messages):
            yield pb.PongResponse(data=data)


class Bulk(rpc.BulkServiceServicer):  # type: ignore[name-defined,misc]
    """Moves bytes by every kind of call."""

    async def Get(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.PongResponse(data=bytes(request.size))

    async def Read(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        for _ in range(request.messages):
            yield pb.PongResponse(data=bytes(request.size))

    async def Write(self, requests: AsyncIterator[Any], context: Any) -> Any:  # noqa: N802
        total = 0
        async for request in requests:
            total += len(request.data)
        return pb.BulkSum(bytes=total)

    async def Echo(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        async for request in requests:
            yield pb.PongResponse(data=request.data)


class PingPlugin:
    """Both as one service of a node."""

    name = "ping"

    def __init__(self, context: ServiceContext) -> None:
        self._meet = int(context.config["meet"])

    async def start(self) -> None:
        pass

    def register(self, server: grpc.aio.Server) -> None:
        _register(self._meet, server)

    def prices(self) -> Mapping[Line, Price]:
        return PRICES

    async def stop(self) -> None:
        pass


def _register(meet: int, server: grpc.aio.Server) -> None:
    rpc.add_PingServiceServicer_to_server(Ping(meet), server)
    rpc.add_BulkServiceServicer_to_server(Bulk(), server)


async def _serve(folder: Path, account: Address, streams: int) -> None:
    ledger_folder.init(folder / "ledger", name="bench", supply_to=account, amount=SUPPLY)
    async with serve(LedgerConfig(folder=folder / "ledger")) as ledger:
        made = node_folder.init(
            folder / "node",
            config={
                "node": {"listen": "127.0.0.1:0"},
                "ledger": {"address": str(ledger.address)},
                "limits": {"calls": 65536, "calls_per_payer": 65536},
                "services": {"ping": {"enabled": True, "meet": streams}},
            },
        )
        key, certificate = make_certificate(NAME)
        bare = grpc.aio.server(options=TRANSPORT_OPTIONS)
        _register(streams, bare)
        port = bare.add_secure_port("127.0.0.1:0", server_credentials(key, certificate))
        await bare.start()
        async with Node(made, plugins={"ping": lambda: PingPlugin}) as node:
            say(
                "ready",
                ledger=str(ledger.address),
                node=str(node.address),
                port=port,
                certificate=certificate.decode("ascii"),
            )
            await asyncio.to_thread(heard)
        await bare.stop(None)


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("account")
    parser.add_argument("streams", type=int)
    arguments = parser.parse_args()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger("warning"),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    uvloop.run(_serve(arguments.folder, Address.parse(arguments.account), arguments.streams))


if __name__ == "__main__":
    _main()
