"""The same content service and the same transfer code, with payment left out.

The server registers the product's servicer without any interceptor; the client hands the
product's `Transfer` a session that counts nothing, on a channel without interceptors.
Reading, TLS, verifying, writing and syncing are the product's own. What the paid fetch
costs beyond this, in all its processes, is what paying costs.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import grpc.aio
import uvloop

from bench.harness import Run, measure
from bench.processes import Child, heard, say
from btt.sdk.content.feed import LINE, Source
from btt.sdk.content.torrent import Torrent
from btt.sdk.content.transfer import Transfer
from btt.sdk.keys import Address
from btt.sdk.memory import keep_freed_memory
from btt.sdk.money import Rate, Unit
from btt.sdk.tls import TRANSPORT_OPTIONS, make_certificate, pinned_channel, server_credentials
from btt.services.content.catalogue import Catalogue
from btt.services.content.service import ContentServicer, register

Accepted = Callable[[object], None]
Gate = Callable[[int], Awaitable[None]]
Fetching = Callable[[Path, Path, int, bytes], Coroutine[Any, Any, None]]
NAME = "unpaid.btt"
RATE = Rate(0, 1, Unit.BYTE)


async def serve(catalogue: Path, *more: grpc.GenericRpcHandler, gate: Gate | None = None) -> None:
    """Serves the content until the harness says otherwise.

    Args:
        catalogue: Folder of the catalogue.
        more: Handlers of further methods.
        gate: Awaited before each message of a fetch leaves, with the number of those before it.
    """
    key, certificate = make_certificate(NAME)
    opened = Catalogue(catalogue)
    servicer = ContentServicer(opened) if gate is None else _Gated(opened, gate)
    server = grpc.aio.server(options=TRANSPORT_OPTIONS)
    register(servicer, server)
    server.add_generic_rpc_handlers(more)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(key, certificate))
    await server.start()
    say("ready", port=port, certificate=certificate.decode("ascii"))
    await asyncio.to_thread(heard)
    await server.stop(None)
    servicer.close()
    opened.close()


def _ignore(message: object) -> None:
    pass


async def _nothing() -> dict[str, int]:
    return {}


class _Gated(ContentServicer):
    def __init__(self, catalogue: Catalogue, gate: Gate) -> None:
        super().__init__(catalogue)
        self._gate = gate

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[bytes]:  # type: ignore[override]  # noqa: N802
        sent = 0
        async with aclosing(super().Fetch(request, context)) as messages:  # type: ignore[type-var]
            async for message in messages:
                await self._gate(sent)
                sent += 1
                yield message


class _Verdicts:
    def __init__(self, accepted: Accepted) -> None:
        self.accept = accepted

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def reject(self, message: object) -> None:
        raise AssertionError("an honest server's message was rejected")


class _Payer:
    """A channel without a bottom, from which nothing is ever taken."""

    tally = SimpleNamespace(owed=0)

    def affordable(self, segment: object) -> int:
        return 1 << 62

    def reserve(self, segment: object, units: int) -> None:
        pass

    release = reserve


async def fetch(
    torrent: Path,
    folder: Path,
    channel: grpc.aio.Channel,
    *,
    accepted: Accepted = _ignore,
    settle: Callable[[], Awaitable[dict[str, int]]] = _nothing,
) -> None:
    """Fetches what a torrent describes when the harness says so, and tells it.

    Args:
        torrent: The torrent file.
        folder: Where it goes.
        channel: To the server.
        accepted: Called for each message that verified.
        settle: Awaited at the end, and part of what is timed; returns what to tell besides.
    """
    parsed, _ = Torrent.from_torrent(torrent.read_bytes())  # noqa: ASYNC240 - nothing runs yet
    await channel.channel_ready()
    sheet = SimpleNamespace(prices={LINE: SimpleNamespace(rate=RATE)})
    session: Any = SimpleNamespace(
        channel=channel,
        offer=SimpleNamespace(sheet=sheet, digest=bytes(32), node=Address(bytes(20))),
        payer=_Payer(),
        verdicts=lambda: _Verdicts(accepted),
    )

    async def open_session(need: int) -> Any:
        return session

    say("ready")
    await asyncio.to_thread(heard)
    start = time.perf_counter()
    seller: Any = SimpleNamespace(session=open_session, name="unpaid")
    async with Transfer(parsed, folder, [Source(seller, RATE)], token="") as transfer:
        async for _ in transfer.progress():
            pass
    told = await settle()
    seconds = time.perf_counter() - start
    assert transfer.receipt is not None
    say("done", seconds=seconds, bytes=transfer.receipt.fetched_bytes, **told)
    await asyncio.to_thread(heard)


async def _fetch(torrent: Path, folder: Path, port: int, certificate: bytes) -> None:
    async with pinned_channel("127.0.0.1", port, certificate, NAME) as channel:
        await fetch(torrent, folder, channel)


def contestant(
    source: Path, folder: Path, *, catalogue: Path, torrent: Path, module: str = "bench.ours.unpaid"
) -> Run:
    """Lets a client fetch the file.

    Args:
        source: The file that is published.
        folder: The client's, on the same file system.
        catalogue: Folder of the catalogue that has it.
        torrent: Its torrent file.
        module: What server and client run, by `play`.
    """
    with Child("server", module, ["serve", str(catalogue), str(folder)]) as server:
        ready = server.expect("ready")
        arguments = ["fetch", str(torrent), str(folder), str(ready["port"]), ready["certificate"]]
        with Child("client", module, arguments) as client:
            client.expect("ready")
            return measure(client, server, source=source, folder=folder)


def play(serving: Callable[[Path, Path], Coroutine[Any, Any, None]], fetching: Fetching) -> None:
    """Runs the part that the command line asks for.

    Args:
        serving: Serves a catalogue; also given the folder of this run.
        fetching: Fetches by a torrent file to a folder, from a port with a certificate.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["serve", "fetch"])
    parser.add_argument("path", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("port", type=int, nargs="?", default=0)
    parser.add_argument("certificate", nargs="?", default="")
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.role == "serve":
        # The node's own loop; a dApp has asyncio's.
        uvloop.run(serving(arguments.path, arguments.folder))
    else:
        certificate = arguments.certificate.encode("ascii")
        asyncio.run(fetching(arguments.path, arguments.folder, arguments.port, certificate))


if __name__ == "__main__":
    play(lambda catalogue, _: serve(catalogue), _fetch)
