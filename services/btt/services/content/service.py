"""The gRPC side of the content service: quote, metadata, and runs of files.

It holds no payment code: what is charged stands in the proto and is counted by interceptors,
which need every message to be yielded. Runs are yielded as they go out, serialised. Files and
database are read in a few threads of its own, a little ahead of the caller, so that neither a slow
disk nor a slow caller holds up others. What all callers together may leave lying in memory that
way is bounded.
"""

from __future__ import annotations

import asyncio
import collections
import functools
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc

from btt.proto.content.v1 import content_pb2, content_pb2_grpc
from btt.sdk.content.run import serialise
from btt.sdk.content.torrent import RUN, Torrent
from btt.sdk.errors import BttError, ContentUnavailable, ContentUnknown, InvalidRequest
from btt.sdk.rpc import abort
from btt.services.content.catalogue import Catalogue, Entry, SourceFile
from btt.services.content.source import OpenSource

if TYPE_CHECKING:
    import grpc.aio

    Context = grpc.aio.ServicerContext[object, object]

T = TypeVar("T")

SERVICE: Final = content_pb2.DESCRIPTOR.services_by_name["ContentService"].full_name
METADATA_PART = 64 << 10
"""Most bytes of one metadata message."""

_THREADS = 4
_BATCH = 4  # runs read at a time: a thread costs more to wake than a run to read
_AHEAD = 64 << 20  # bytes; calls that find no room in it read one run at a time, when it is wanted
_CACHED_METADATA = 32 << 20  # bytes
_QUOTE_CHECKS = 64  # files looked at before content is quoted


class ContentServicer(content_pb2_grpc.ContentServiceServicer):
    """Serves the published content of a node; call `close` after the server has stopped.

    Args:
        catalogue: What is published. It stays open.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="content")
        # A call that reads ahead holds the batch that it sends and the next one.
        self._room = _AHEAD // (2 * _BATCH * RUN)
        self._metadata: collections.OrderedDict[bytes, tuple[bytes, bytes]] = collections.OrderedDict()

    def close(self) -> None:
        """Ends the threads; reads under way are finished, others dropped."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def Quote(  # noqa: N802
        self, request: content_pb2.QuoteRequest, context: Context
    ) -> content_pb2.QuoteResponse:
        """Says whether the content is here, and its size."""
        try:
            entry = await self._run(self._quote, request.infohash)
        except BttError as error:
            await abort(context, error)
        return content_pb2.QuoteResponse(
            total_bytes=entry.total_bytes, info_bytes=entry.info_bytes, layers_bytes=entry.layers_bytes
        )

    async def GetMetadata(  # noqa: N802
        self, request: content_pb2.GetMetadataRequest, context: Context
    ) -> AsyncIterator[content_pb2.GetMetadataResponse]:
        """Sends the info dictionary, then the piece layers in the order of the file tree."""
        try:
            info, layers = await self._run(self._read_metadata, request.infohash)
        except BttError as error:
            await abort(context, error)
        for at in range(0, len(info), METADATA_PART):
            yield content_pb2.GetMetadataResponse(info=info[at : at + METADATA_PART])
        for at in range(0, len(layers), METADATA_PART):
            yield content_pb2.GetMetadataResponse(layers=layers[at : at + METADATA_PART])

    async def Fetch(  # type: ignore[override]  # noqa: N802
        self, request: content_pb2.FetchRequest, context: Context
    ) -> AsyncIterator[bytes]:
        """Sends runs of one file in order, each a serialised FetchResponse."""
        source: OpenSource | None = None
        reading: asyncio.Future[list[bytes]] | None = None
        batch = 1
        try:
            file = await self._run(self._find, request)
            source = await self._open(file)
            run, end = request.first_run, request.first_run + request.runs
            while run < end:
                if batch == 1 and self._room:
                    self._room -= 1
                    batch = _BATCH
                if reading is None:
                    reading = self._run(_read, source, range(run, min(run + batch, end)))
                responses = await reading
                run += len(responses)
                reading = None
                if batch > 1 and run < end:
                    reading = self._run(_read, source, range(run, min(run + batch, end)))
                for response in responses:
                    yield response
        except BttError as error:
            await abort(context, error)
        finally:
            if batch > 1:
                self._room += 1
            if reading is not None:
                reading.cancel()
                reading.add_done_callback(_forget)
            if source is not None:
                source.close()

    def _run(self, work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(work, *args))

    async def _open(self, file: SourceFile) -> OpenSource:
        opening = self._run(OpenSource, file)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The thread may be opening it right now; whoever called has gone.
            opening.add_done_callback(_close_opened)
            raise

    def _quote(self, infohash: bytes) -> Entry:
        entry = self._entry(infohash)
        for file in self._catalogue.files(infohash, count=_QUOTE_CHECKS):
            OpenSource(file).close()
        return entry

    def _entry(self, infohash: bytes) -> Entry:
        if len(infohash) != 32:
            raise InvalidRequest("A v2 infohash has 32 bytes.")
        entry = self._catalogue.get(infohash)
        if entry is None:
            raise ContentUnknown("The node serves no content with this infohash.")
        return entry

    def _find(self, request: content_pb2.FetchRequest) -> SourceFile:
        entry = self._entry(request.infohash)
        file = self._catalogue.file(request.infohash, request.file)
        if file is None:
            raise InvalidRequest(f"The content has files 0 to {entry.files - 1}, not {request.file}.")
        count = -(-file.length // RUN)
        if request.runs < 1 or request.first_run + request.runs > count:
            raise InvalidRequest(
                f"The file has {count} runs; asked for {request.runs} from {request.first_run}."
            )
        return file

    def _read_metadata(self, infohash: bytes) -> tuple[bytes, bytes]:
        entry = self._entry(infohash)
        cached = self._metadata.get(entry.infohash)
        if cached is not None:
            return cached
        try:
            torrent, info = Torrent.from_torrent(self._catalogue.torrent_path(infohash).read_bytes())
        except (OSError, BttError) as failed:
            raise ContentUnavailable("The node can no longer read the metadata of this content.") from failed
        if torrent.infohash != entry.infohash:
            raise ContentUnavailable("The node can no longer read the metadata of this content.")
        found = info, torrent.layers()
        self._metadata[entry.infohash] = found
        while len(self._metadata) > 1 and self._cached_bytes() > _CACHED_METADATA:
            self._metadata.popitem(last=False)
        return found

    def _cached_bytes(self) -> int:
        return sum(len(info) + len(layers) for info, layers in list(self._metadata.values()))


def register(servicer: ContentServicer, server: grpc.aio.Server) -> None:
    """Adds the service to a server, as generated code does, but for runs that are serialised already."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Quote": grpc.unary_unary_rpc_method_handler(
            servicer.Quote, content_pb2.QuoteRequest.FromString, content_pb2.QuoteResponse.SerializeToString
        ),
        "GetMetadata": grpc.unary_stream_rpc_method_handler(
            servicer.GetMetadata,
            content_pb2.GetMetadataRequest.FromString,
            content_pb2.GetMetadataResponse.SerializeToString,
        ),
        "Fetch": grpc.unary_stream_rpc_method_handler(
            servicer.Fetch, content_pb2.FetchRequest.FromString, bytes
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_registered_method_handlers(SERVICE, handlers)


def _read(source: OpenSource, runs: range) -> list[bytes]:
    return [serialise(run, source.read(run)) for run in runs]


def _close_opened(opening: asyncio.Future[OpenSource]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _forget(read: asyncio.Future[list[bytes]]) -> None:
    """Takes note of a failure that nobody will ask for, so that it is not logged as lost."""
    if not read.cancelled():
        read.exception()
