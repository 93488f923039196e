"""The content service over real gRPC: what it sends verifies, and what it cannot send is said."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from btt.proto.content.v1 import content_pb2, content_pb2_grpc
from btt.sdk.content.run import Run
from btt.sdk.content.torrent import RUN, Torrent
from btt.sdk.errors import BttError, ContentUnavailable, ContentUnknown, InvalidRequest
from btt.sdk.rpc import to_error
from btt.services.content import service, source
from btt.services.content.catalogue import Catalogue
from btt.services.content.publish import Published, publish
from btt.services.content.service import ContentServicer, register

SIZES = [0, 1, 16383, 16384, 16385, RUN - 1, RUN, RUN + 1, 2 * RUN, 5 * RUN + 7]
LIMITS = [("grpc.max_receive_message_length", 4 << 20), ("grpc.enable_http_proxy", 0)]


def data_of(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def descriptors(path: Path) -> int:
    """How many descriptors of this process are open on a file."""
    wanted = path.stat()
    count = 0
    for fd in Path("/dev/fd").iterdir():
        try:
            count += os.path.samestat(os.fstat(int(fd.name)), wanted)
        except OSError:
            continue
    return count


@dataclass
class Node:
    catalogue: Catalogue
    stub: Any
    servicer: ContentServicer
    server: grpc.aio.Server

    def fetch(self, made: Published, *, file: int = 0, first: int = 0, runs: int = 1) -> Any:
        return self.stub.Fetch(
            content_pb2.FetchRequest(infohash=made.infohash, file=file, first_run=first, runs=runs)
        )

    async def metadata(self, infohash: bytes) -> list[content_pb2.GetMetadataResponse]:
        return [
            part async for part in self.stub.GetMetadata(content_pb2.GetMetadataRequest(infohash=infohash))
        ]


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    catalogue = Catalogue(tmp_path / "catalogue")
    servicer = ContentServicer(catalogue)
    server = grpc.aio.server()
    register(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=LIMITS) as channel:
        yield Node(catalogue, content_pb2_grpc.ContentServiceStub(channel), servicer, server)
    await server.stop(None)
    servicer.close()
    catalogue.close()


def film(tmp_path: Path, node: Node, size: int = 5 * RUN + 7) -> tuple[Published, Path]:
    path = tmp_path / "film.bin"
    path.write_bytes(data_of(size))
    return publish(path, node.catalogue), path


async def drain(call: Any, into: list[Any]) -> None:
    async for response in call:
        into.append(response)


async def failure(call: Any) -> BttError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (drain(call, []) if hasattr(call, "__aiter__") else call)
    return to_error(caught.value)


async def settled(condition: Callable[[], bool]) -> None:
    """Waits for what the server does after the client has gone; the test's time limit ends it."""
    while not condition():  # noqa: ASYNC110 - it happens in gRPC, which sets no event
        await asyncio.sleep(0)


async def test_every_byte_of_a_folder_arrives_and_verifies(tmp_path: Path, node: Node) -> None:
    root = tmp_path / "album"
    for at, size in enumerate(SIZES):
        path = root / "abc"[at % 3] / f"{size}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data_of(size))
    made = publish(root, node.catalogue)

    quote = await node.stub.Quote(content_pb2.QuoteRequest(infohash=made.infohash))
    parts = await node.metadata(made.infohash)
    info, layers = b"".join(p.info for p in parts), b"".join(p.layers for p in parts)
    torrent = Torrent.from_info(info, layers, infohash=made.infohash)
    assert (quote.total_bytes, quote.info_bytes, quote.layers_bytes) == (sum(SIZES), len(info), len(layers))
    assert torrent.name == "album"
    for entry in torrent.files:
        if not entry.length:
            continue
        count = torrent.runs(entry.index)
        found = [r async for r in node.fetch(made, file=entry.index, runs=count)]
        assert [r.run for r in found] == list(range(count))
        assert all(torrent.verify_run(entry.index, r.run, r.data) for r in found)
        assert b"".join(r.data for r in found) == data_of(entry.length)


async def test_a_range_of_runs_is_sent_and_nothing_else(tmp_path: Path, node: Node) -> None:
    made, path = film(tmp_path, node)
    found = [r async for r in node.fetch(made, first=2, runs=2)]
    assert [(r.run, r.data) for r in found] == [(2, path.read_bytes()[2 * RUN : 3 * RUN]),
                                                (3, path.read_bytes()[3 * RUN : 4 * RUN])]  # fmt: skip
    last = [r async for r in node.fetch(made, first=5)]
    assert [(r.run, len(r.data)) for r in last] == [(5, 7)]


async def test_metadata_comes_in_bounded_parts(
    tmp_path: Path, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = film(tmp_path, node)
    monkeypatch.setattr(service, "METADATA_PART", 100)
    parts = await node.metadata(made.infohash)
    assert all(len(p.info) <= 100 and len(p.layers) <= 100 for p in parts)
    assert sum(len(p.layers) for p in parts) == 6 * 32
    kinds = [bool(p.layers) for p in parts]
    assert kinds == sorted(kinds)  # the info dictionary comes first
    assert service.METADATA_PART <= 64 << 10


async def test_metadata_is_read_once_and_the_memory_of_it_is_bounded(
    tmp_path: Path, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = film(tmp_path, node)
    (tmp_path / "other").write_bytes(data_of(RUN + 1))
    two = publish(tmp_path / "other", node.catalogue)
    first = await node.metadata(one.infohash)
    one.torrent_path.rename(tmp_path / "kept")
    assert await node.metadata(one.infohash) == first
    monkeypatch.setattr(service, "_CACHED_METADATA", 500)
    await node.metadata(two.infohash)
    call = node.stub.GetMetadata(content_pb2.GetMetadataRequest(infohash=one.infohash))
    assert isinstance(await failure(call), ContentUnavailable)


async def test_a_torrent_file_of_other_content_is_not_served(tmp_path: Path, node: Node) -> None:
    one, _ = film(tmp_path, node)
    (tmp_path / "other").write_bytes(b"x")
    two = publish(tmp_path / "other", node.catalogue)
    one.torrent_path.write_bytes(two.torrent_path.read_bytes())
    call = node.stub.GetMetadata(content_pb2.GetMetadataRequest(infohash=one.infohash))
    assert isinstance(await failure(call), ContentUnavailable)


@pytest.mark.parametrize(
    ("file", "first", "runs"),
    [
        (0, 0, 0),
        (0, 0, 7),
        (0, 6, 1),
        (0, 5, 2),
        (1, 0, 1),
        (2**32 - 1, 0, 1),
        (0, 2**64 - 1, 1),
        (0, 1, 2**64 - 1),
    ],
)
async def test_a_range_outside_the_file_is_refused(
    tmp_path: Path, node: Node, file: int, first: int, runs: int
) -> None:
    made, _ = film(tmp_path, node)
    assert type(await failure(node.fetch(made, file=file, first=first, runs=runs))) is InvalidRequest


async def test_an_empty_file_has_no_runs(tmp_path: Path, node: Node) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a").write_bytes(b"")
    (tmp_path / "d/b").write_bytes(b"x")
    made = publish(tmp_path / "d", node.catalogue)
    assert type(await failure(node.fetch(made, file=0))) is InvalidRequest


async def test_unknown_or_malformed_infohashes_are_refused(tmp_path: Path, node: Node) -> None:
    made, _ = film(tmp_path, node)
    for infohash, kind in (
        (bytes(32), ContentUnknown),
        (made.infohash[:20], InvalidRequest),
        (b"", InvalidRequest),
        (made.infohash + b"\0", InvalidRequest),
    ):
        for call in (
            node.stub.Quote(content_pb2.QuoteRequest(infohash=infohash)),
            node.stub.GetMetadata(content_pb2.GetMetadataRequest(infohash=infohash)),
            node.stub.Fetch(content_pb2.FetchRequest(infohash=infohash, runs=1)),
        ):
            assert type(await failure(call)) is kind


@pytest.mark.parametrize("change", ["removed", "shorter", "longer", "touched", "link", "folder", "pipe"])
async def test_a_source_that_changed_is_neither_quoted_nor_sent(
    tmp_path: Path, node: Node, change: str
) -> None:
    made, path = film(tmp_path, node)
    copy = tmp_path / "copy"
    if change == "shorter":
        os.truncate(path, 10)
    elif change == "longer":
        path.write_bytes(path.read_bytes() + b"x")
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    else:
        path.rename(copy)
        if change == "link":
            path.symlink_to(copy)
        elif change == "folder":
            path.mkdir()
        elif change == "pipe":
            os.mkfifo(path)
    assert isinstance(await failure(node.fetch(made)), ContentUnavailable)
    quote = node.stub.Quote(content_pb2.QuoteRequest(infohash=made.infohash))
    assert isinstance(await failure(quote), ContentUnavailable)


async def test_a_source_that_changes_during_a_call_ends_the_call(tmp_path: Path, node: Node) -> None:
    made, path = film(tmp_path, node, 64 * RUN)
    call = node.fetch(made, runs=64)
    got = [await anext(aiter(call))]
    os.truncate(path, RUN)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drain(call, got)
    assert isinstance(to_error(caught.value), ContentUnavailable)
    assert len(got) < 64
    assert all(r.data == data_of(64 * RUN)[r.run * RUN : (r.run + 1) * RUN] for r in got)
    await settled(lambda: descriptors(path) == 0)


async def test_a_short_read_is_never_sent(
    tmp_path: Path, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = film(tmp_path, node)
    real = os.pread
    monkeypatch.setattr(source.os, "pread", lambda fd, size, at: real(fd, size, at)[:-1])
    assert isinstance(await failure(node.fetch(made)), ContentUnavailable)


async def test_a_failing_disk_is_said(tmp_path: Path, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    made, path = film(tmp_path, node)

    def broken(fd: int, size: int, at: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(source.os, "pread", broken)
    assert isinstance(await failure(node.fetch(made, runs=6)), ContentUnavailable)
    await settled(lambda: descriptors(path) == 0)


async def test_a_caller_that_goes_leaves_no_descriptor(tmp_path: Path, node: Node) -> None:
    made, path = film(tmp_path, node)
    for taken in (0, 1, 3):
        call = node.fetch(made, runs=6)
        for _ in range(taken):
            await call.read()
        call.cancel()
        await settled(lambda: descriptors(path) == 0)
    calls = [node.fetch(made, runs=6) for _ in range(20)]
    await asyncio.gather(*(call.read() for call in calls))
    for call in calls:
        call.cancel()
    await settled(lambda: descriptors(path) == 0)
    assert len([r async for r in node.fetch(made, runs=6)]) == 6


async def test_a_caller_that_goes_while_the_file_is_opened_leaves_no_descriptor(
    tmp_path: Path, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = film(tmp_path, node)
    opening, go = threading.Event(), threading.Event()
    opened: list[source.OpenSource] = []

    def slow(file: Any) -> source.OpenSource:
        opening.set()
        go.wait(10)
        opened.append(source.OpenSource(file))
        return opened[0]

    monkeypatch.setattr(service, "OpenSource", slow)
    real = node.servicer._open
    noticed = asyncio.Event()

    async def watched(file: Any) -> source.OpenSource:
        try:
            return await real(file)
        except asyncio.CancelledError:
            noticed.set()
            raise

    monkeypatch.setattr(node.servicer, "_open", watched)
    call = node.fetch(made, runs=6)
    assert await asyncio.to_thread(opening.wait, 10)
    call.cancel()
    await noticed.wait()
    go.set()
    await settled(lambda: bool(opened) and descriptors(path) == 0)


async def test_what_all_callers_read_ahead_together_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls may read ahead here; the others get every run, too, and read ahead once there is room."""
    path, data = tmp_path / "film.bin", data_of(16 * RUN)
    path.write_bytes(data)
    catalogue = Catalogue(tmp_path / "catalogue")
    made = publish(path, catalogue)
    assert service._AHEAD <= 64 << 20
    monkeypatch.setattr(service, "_AHEAD", 16 * RUN)
    servicer = ContentServicer(catalogue)
    request = content_pb2.FetchRequest(infohash=made.infohash, first_run=1, runs=15)
    real, read = service._read, []

    def counted(source: Any, runs: range) -> Any:
        read.extend(runs)
        return real(source, runs)

    async def reads() -> int:
        """How many runs have been read since it was asked last, when nothing more is under way."""
        # Threads take work in order: when all of them have come here, nothing lies before it.
        meeting = threading.Barrier(service._THREADS)
        await asyncio.gather(*(servicer._run(meeting.wait, 10) for _ in range(service._THREADS)))
        count = len(read)
        read.clear()
        return count

    monkeypatch.setattr(service, "_read", counted)
    calls: list[Any] = [servicer.Fetch(request, None) for _ in range(5)]  # type: ignore[arg-type]
    assert [Run.parse(await anext(call)).run for call in calls] == [1] * 5
    assert await reads() == 2 * 8 + 3
    found = [Run.parse(await anext(calls[4]))]
    assert await reads() == 1
    for call in calls[:2]:
        await call.aclose()
    found.append(Run.parse(await anext(calls[4])))
    assert await reads() == 8
    found += [Run.parse(response) async for response in calls[4]]
    assert [r.run for r in found] == list(range(2, 16))
    assert all(r.data == data[r.run * RUN : (r.run + 1) * RUN] for r in found)
    assert await reads() == 5
    calls += [servicer.Fetch(request, None) for _ in range(3)]  # type: ignore[arg-type]
    for call in calls[5:]:
        await anext(call)
    assert await reads() == 2 * 8 + 1, "what calls held is free again, however they ended"
    for call in calls:
        await call.aclose()
    servicer.close()
    catalogue.close()
    assert descriptors(path) == 0


async def test_a_stop_with_calls_under_way_leaves_no_thread_or_descriptor(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "catalogue")
    servicer = ContentServicer(catalogue)
    server = grpc.aio.server()
    register(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    (tmp_path / "film.bin").write_bytes(data_of(16 * RUN))
    made = publish(tmp_path / "film.bin", catalogue)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=LIMITS) as channel:
        call = content_pb2_grpc.ContentServiceStub(channel).Fetch(
            content_pb2.FetchRequest(infohash=made.infohash, runs=16)
        )
        await call.read()
        await server.stop(None)
        servicer.close()
    await settled(lambda: descriptors(tmp_path / "film.bin") == 0)
    assert not [t for t in threading.enumerate() if t.name.startswith("content")]
    catalogue.close()


def test_a_change_of_content_with_the_same_length_is_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(data_of(RUN))
    opened = source.OpenSource(source.SourceFile(path=path, length=RUN, mtime_ns=path.stat().st_mtime_ns))
    path.write_bytes(bytes(RUN))
    os.utime(path, ns=(1, 1))
    with pytest.raises(ContentUnavailable):
        opened.read(0)
    opened.close()
    assert descriptors(path) == 0


def test_a_file_closed_during_a_read_stays_open_until_the_read_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor closed too early may be another file by the time it is read."""
    path = tmp_path / "f"
    path.write_bytes(data_of(RUN))
    about = path.stat()
    opened = source.OpenSource(source.SourceFile(path=path, length=RUN, mtime_ns=about.st_mtime_ns))
    real = os.pread

    def closing(fd: int, size: int, at: int) -> bytes:
        opened.close()
        assert descriptors(path) == 1
        return real(fd, size, at)

    monkeypatch.setattr(source.os, "pread", closing)
    assert opened.read(0) == data_of(RUN)
    assert descriptors(path) == 0
    opened.close()
    with pytest.raises(ContentUnavailable):
        opened.read(0)


def test_every_method_of_the_proto_is_registered() -> None:
    added: dict[str, Any] = {}

    class Server:
        def add_generic_rpc_handlers(self, handlers: Any) -> None:
            added["generic"] = handlers

        def add_registered_method_handlers(self, name: str, handlers: dict[str, Any]) -> None:
            added[name] = handlers

    register(ContentServicer.__new__(ContentServicer), Server())  # type: ignore[arg-type]
    proto = content_pb2.DESCRIPTOR.services_by_name["ContentService"]
    [name] = added.keys() - {"generic"}
    assert (name, set(added[name])) == (proto.full_name, {method.name for method in proto.methods})
    for method in proto.methods:
        assert added[name][method.name].response_streaming == method.server_streaming
