"""The peer `bare gRPC`: the product's own messages over TLS, and nothing else.

A server that reads runs of 1 MiB from the page cache and a client that writes them to
disk and syncs once: no hash, no payment, no interceptor. It bounds what a product in
Python can reach over gRPC, so it has the fastest shape and options that we found.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio

from bench.harness import MIB, Run, measure
from bench.processes import Child, heard, say
from btt.proto.content.v1 import content_pb2, content_pb2_grpc
from btt.sdk.memory import keep_freed_memory
from btt.sdk.tls import make_certificate, server_credentials

NAME = "bare.btt"
STREAMS = 2
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", 4 * MIB),
    ("grpc.max_send_message_length", 4 * MIB),
    # One frame a message instead of 64: fewer slices to join.
    ("grpc.http2.max_frame_size", MIB),
    # A fixed window per stream. The probe would let it grow to what loopback takes, which is memory only.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4 * MIB),
)


async def _serve(source: Path) -> None:
    key, certificate = make_certificate(NAME)
    file = os.open(source, os.O_RDONLY)

    async def fetch(
        request: content_pb2.FetchRequest, context: object
    ) -> AsyncIterator[content_pb2.FetchResponse]:
        for run in range(request.first_run, request.first_run + request.runs):
            yield content_pb2.FetchResponse(run=run, data=os.pread(file, MIB, run * MIB))

    handler = grpc.unary_stream_rpc_method_handler(
        fetch, content_pb2.FetchRequest.FromString, content_pb2.FetchResponse.SerializeToString
    )
    service = content_pb2.DESCRIPTOR.services_by_name["ContentService"].full_name
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Fetch": handler}),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(key, certificate))
    await server.start()
    say("ready", port=port, certificate=certificate.decode("ascii"))
    await asyncio.to_thread(heard)
    await server.stop(None)


async def _fetch(target: Path, size: int, port: int, certificate: bytes) -> None:
    runs = -(-size // MIB)
    credentials = grpc.ssl_channel_credentials(certificate)
    options = [*OPTIONS, ("grpc.ssl_target_name_override", NAME)]
    async with grpc.aio.secure_channel(f"ipv4:127.0.0.1:{port}", credentials, options=options) as channel:
        await channel.channel_ready()
        stub = content_pb2_grpc.ContentServiceStub(channel)
        say("ready")
        await asyncio.to_thread(heard)
        start = time.perf_counter()
        file = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY)

        async def part(number: int) -> int:
            first, end = runs * number // STREAMS, runs * (number + 1) // STREAMS
            written = 0
            request = content_pb2.FetchRequest(infohash=bytes(32), first_run=first, runs=end - first)
            async for response in stub.Fetch(request):
                written += os.pwrite(file, response.data, response.run * MIB)
            return written

        written = sum(await asyncio.gather(*(part(number) for number in range(STREAMS))))
        transferred = time.perf_counter() - start
        os.fsync(file)
        seconds = time.perf_counter() - start
        os.close(file)
        say("done", seconds=seconds, bytes=written, before_fsync=transferred)
        await asyncio.to_thread(heard)


def contestant(source: Path, folder: Path) -> Run:
    """Lets a bare client fetch the file from a bare server.

    Args:
        source: The server's file.
        folder: The client's, on the same file system.
    """
    module = "bench.peers.bare_grpc"
    with Child("server", module, ["serve", str(source)]) as server:
        ready = server.expect("ready")
        size = source.stat().st_size
        arguments = ["fetch", str(folder / "out"), str(size), str(ready["port"]), ready["certificate"]]
        with Child("client", module, arguments) as client:
            client.expect("ready")
            return measure(client, server, source=source, folder=folder)


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["serve", "fetch"])
    parser.add_argument("path", type=Path)
    parser.add_argument("size", type=int, nargs="?", default=0)
    parser.add_argument("port", type=int, nargs="?", default=0)
    parser.add_argument("certificate", nargs="?", default="")
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.role == "serve":
        asyncio.run(_serve(arguments.path))
    else:
        certificate = arguments.certificate.encode("ascii")
        asyncio.run(_fetch(arguments.path, arguments.size, arguments.port, certificate))


if __name__ == "__main__":
    _main()
