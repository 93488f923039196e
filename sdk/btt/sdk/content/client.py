"""Content for dApps: `quote` what some content costs, `fetch` it and pay piece by piece."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio

from btt.proto.content.v1 import content_pb2, content_pb2_grpc
from btt.sdk.content.magnet import parse_infohash
from btt.sdk.content.torrent import MAX_INFO, MAX_LAYERS, Torrent
from btt.sdk.content.transfer import LINE, Transfer
from btt.sdk.errors import ContentMismatch, InvalidRequest
from btt.sdk.keys import Address
from btt.sdk.money import Amount, Rate
from btt.sdk.payment.connection import NodeConnection
from btt.sdk.rpc import to_error

if TYPE_CHECKING:
    from btt.sdk.client import Client


@dataclass(frozen=True, slots=True)
class Quote:
    """What some content costs at a node.

    Attributes:
        torrent: Its verified metadata.
        total_bytes: Of all files.
        rate: The node's price.
        cost: Of all files at that price.
        node: Whose price it is.
    """

    torrent: Torrent
    total_bytes: int
    rate: Rate
    cost: Amount
    node: Address

    @property
    def name(self) -> str:
        """Name of the file or folder."""
        return self.torrent.name


class ContentClient:
    """The content service as a dApp uses it: `client.content`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def quote(self, content: str | bytes) -> Quote:
        """Asks what some content costs; free of charge.

        Args:
            content: Infohash (hex or 32 bytes) or magnet link.

        Raises:
            ContentUnknown: The node serves no such content.
            ContentMismatch: Its metadata does not belong to the infohash.
            BttError: The node could not be reached or trusted.
        """
        infohash = parse_infohash(content) if isinstance(content, str) else content
        node = await self._client.node()
        channel = node.channel(label="free")
        try:
            stub: content_pb2_grpc.ContentServiceAsyncStub = content_pb2_grpc.ContentServiceStub(channel)
            torrent = await _metadata(stub, infohash)
        except grpc.aio.AioRpcError as failure:
            raise to_error(failure) from failure
        except ContentMismatch as error:
            self._client.blame(error)
            raise
        finally:
            await channel.close()
        rate = _rate(node)
        return Quote(
            torrent, torrent.total_bytes, rate, Amount(rate.owed(torrent.total_bytes)), node.offer.node
        )

    @asynccontextmanager
    async def fetch(
        self, content: str | bytes | Quote, dest: Path | str, *, max_rate: Rate | None = None
    ) -> AsyncIterator[Transfer]:
        """Fetches content into a folder, verifying and paying run by run; resumes what is there.

        Args:
            content: Infohash, magnet link, or a quote.
            dest: The folder.
            max_rate: The highest price to accept; the quoted one if not given.

        Yields:
            The running transfer; it is complete when the block ends without an error.

        Raises:
            BudgetExceeded: The budget covers only a part; what arrived is kept.
            ContentMismatch: The node sent what does not verify; it was not paid.
            BttError: Anything else that ended it.
        """
        quote = content if isinstance(content, Quote) else await self.quote(content)
        transfer = Transfer(
            quote.torrent,
            Path(dest),
            max_rate or quote.rate,
            self._client.session,
            partial(self._client.blame, at_last=True),
        )
        async with transfer:
            yield transfer


async def _metadata(stub: content_pb2_grpc.ContentServiceAsyncStub, infohash: bytes) -> Torrent:
    quote = await stub.Quote(content_pb2.QuoteRequest(infohash=infohash), timeout=20)
    if quote.info_bytes > MAX_INFO or quote.layers_bytes > MAX_LAYERS:
        raise InvalidRequest("The content's metadata is too large.")
    info, layers = bytearray(), bytearray()
    async for part in stub.GetMetadata(content_pb2.GetMetadataRequest(infohash=infohash), timeout=120):
        info += part.info
        layers += part.layers
        if len(info) > quote.info_bytes or len(layers) > quote.layers_bytes:
            raise ContentMismatch("The node sent more metadata than it announced.")
    return Torrent.from_info(bytes(info), bytes(layers), infohash=infohash)


def _rate(node: NodeConnection) -> Rate:
    price = node.offer.sheet.prices.get(LINE)
    if price is None:
        raise InvalidRequest("The node does not offer content delivery.")
    return price.rate
