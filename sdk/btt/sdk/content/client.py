"""Content for dApps: `quote` what some content costs, `fetch` it and pay piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc.aio

from btt.proto.content.v1 import content_pb2, content_pb2_grpc
from btt.sdk.content.feed import LINE, Source
from btt.sdk.content.magnet import parse_infohash
from btt.sdk.content.resuming import MOST_FIRST, MOST_NODES, ResumeToken
from btt.sdk.content.stream import ContentStream
from btt.sdk.content.torrent import MAX_INFO, MAX_LAYERS, Torrent
from btt.sdk.content.transfer import Transfer
from btt.sdk.errors import BttError, ConnectError, ContentMismatch, InternalError, InvalidRequest
from btt.sdk.identity import NodeAddress
from btt.sdk.keys import Address
from btt.sdk.money import MAX_UNITS, SUPPLY, Amount, Rate
from btt.sdk.payment.connection import NodeConnection
from btt.sdk.rpc import to_error
from btt.sdk.selection import (
    DEFAULT_POLICIES,
    Candidate,
    Cause,
    Policy,
    Rejection,
    cause_of,
    max_price,
    no_providers,
    select,
)

if TYPE_CHECKING:
    from btt.sdk.client import Client
    from btt.sdk.provider import Provider

T = TypeVar("T")


SILENT_S = 10.0
"""Seconds without a part of the metadata after which another node is asked for it."""
LATE_S = 3.0
"""Seconds that other nodes have to answer once one has."""


@dataclass(frozen=True, slots=True)
class Quote:
    """What some content costs.

    Attributes:
        torrent: Its verified metadata.
        total_bytes: Of all files.
        rate: The price of the dearest node that would be used.
        cost: The most that all files cost at that price.
        nodes: Who would be used, the preferred one first.
        rejections: Who would not, and why.
    """

    torrent: Torrent
    total_bytes: int
    rate: Rate
    cost: Amount
    nodes: tuple[NodeQuote, ...]
    rejections: tuple[Rejection, ...]

    @property
    def name(self) -> str:
        """Name of the file or folder."""
        return self.torrent.name

    @property
    def node(self) -> Address:
        """The node that is preferred."""
        return self.nodes[0].node


@dataclass(frozen=True, slots=True)
class NodeQuote:
    """What a node asks.

    Attributes:
        node: Who.
        rate: Its price.
        provider: The node as the client uses it.
    """

    node: Address
    rate: Rate
    provider: Provider = field(repr=False)


class ContentClient:
    """The content service as a dApp uses it: `client.content`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def quote(self, content: str | bytes, *, policies: Sequence[Policy] = DEFAULT_POLICIES) -> Quote:
        """Asks all nodes what some content costs; free of charge.

        Args:
            content: Infohash (hex or 32 bytes) or magnet link.
            policies: Which nodes to use, of those that have it; see `btt.sdk.selection`.

        Raises:
            NoProviders: No node can be used; `rejections` says why for each.
            ContentUnknown: The only node serves no such content.
            ContentMismatch: Its metadata does not belong to the infohash.
            BttError: It could not be reached or trusted.
        """
        infohash = parse_infohash(content) if isinstance(content, str) else content
        asked = {
            asyncio.create_task(self._ask(provider, infohash)): provider
            for provider in self._client.providers
        }
        errors = await _answers(asked)
        answers = {asked[task].name: task.result() for task in asked if task not in errors}
        failed = [
            Rejection(asked[task].name, cause_of(error), error.message)
            if isinstance(error, BttError)
            else Rejection(asked[task].name, Cause.LATE, "Others had answered long before.")
            for task, error in errors.items()
        ]
        candidates = [candidate for candidate, _ in answers.values()]
        while True:
            # Anew after each failure: who only bids low, and does not deliver, shuts nobody out.
            kept, refused = select(candidates, policies)
            if not kept:
                break
            # Whoever it comes from, it is the content's own metadata or it does not verify.
            provider = next(p for p in self._client.providers if p.name == kept[0].address)
            try:
                torrent = await _metadata(provider, infohash, answers[provider.name][1])
            except BttError as error:
                provider.blame(error)
                if len(asked) == 1:
                    raise
                failed.append(kept[0].reject(cause_of(error), error.message))
                candidates.remove(kept[0])
            else:
                kept, dear = max_price(_all_there_is(torrent.total_bytes))(kept)
                refused += dear
                if not kept:
                    break
                return self._quote(torrent, kept, failed + refused)
        if len(asked) == 1 and isinstance(only := next(iter(errors.values()), None), BttError):
            raise only
        raise no_providers("No node can be used for this content", failed + refused)

    async def _ask(self, provider: Provider, infohash: bytes) -> tuple[Candidate, content_pb2.QuoteResponse]:
        node = await provider.node()
        request = content_pb2.QuoteRequest(infohash=infohash)
        sizes = await _from(provider, lambda stub: stub.Quote(request, timeout=20))
        if sizes.info_bytes > MAX_INFO or sizes.layers_bytes > MAX_LAYERS:
            raise InvalidRequest("The content's metadata is too large.")
        paid = self._client.books.paid_total(node.offer.node)
        return Candidate(node.offer.node, provider.name, _rate(node), paid), sizes

    def _quote(self, torrent: Torrent, kept: Sequence[Candidate], rejections: Sequence[Rejection]) -> Quote:
        providers = {provider.name: provider for provider in self._client.providers}
        rate = max((c.rate for c in kept), key=lambda rate: Fraction(rate.amount, rate.per))
        return Quote(
            torrent=torrent,
            total_bytes=torrent.total_bytes,
            rate=rate,
            cost=Amount(rate.owed(torrent.total_bytes)),
            nodes=tuple(NodeQuote(c.node, c.rate, providers[c.address]) for c in kept),
            rejections=tuple(rejections),
        )

    @asynccontextmanager
    async def fetch(
        self,
        content: str | bytes | Quote,
        dest: Path | str,
        *,
        max_rate: Rate | None = None,
        first: Sequence[str] = (),
    ) -> AsyncIterator[Transfer]:
        """Fetches content into a folder from all nodes at once, verifying and paying run by run.

        What is there from an earlier attempt is neither fetched nor paid again.

        Args:
            content: Infohash, magnet link, or a quote.
            dest: The folder.
            max_rate: The highest price to accept; of each node the quoted one if not given.
            first: Files to fetch before the others: paths inside the content, with slashes.

        Yields:
            The running transfer; it is complete when the block ends without an error.

        Raises:
            BudgetExceeded: The budget covers only a part; what arrived is kept.
            ContentMismatch: The only node sent what does not verify; it was not paid.
            NoProviders: No node is left; `rejections` says what became of each.
            BttError: Anything else that ended it.
        """
        quote = await self._quoted(content, max_rate)
        async with self._transfer(
            quote, dest, max_rate, [_file(quote.torrent, path) for path in first]
        ) as transfer:
            yield transfer

    @asynccontextmanager
    async def resume(self, token: str | ResumeToken, dest: Path | str) -> AsyncIterator[Transfer]:
        """Goes on with a transfer that another process began, at no more than the price agreed there.

        Only nodes of this client are used: give it those of the token, if you trust where that is from.

        Args:
            token: As `Transfer.token` was.
            dest: The folder, with what arrived; elsewhere all is fetched anew.

        Yields:
            The running transfer, as `fetch`.

        Raises:
            InvalidRequest: It is no token, or names files that the content does not have.
            BttError: As `fetch`; a node that asks more than was agreed is not used.
        """
        token = ResumeToken.parse(token) if isinstance(token, str) else token
        quote = await self.quote(token.infohash, policies=token.policies)
        if any(file >= len(quote.torrent.files) for file in token.first):
            raise InvalidRequest("The token names files that the content does not have.")
        async with self._transfer(quote, dest, None, token.first, agreed=token.rate) as transfer:
            yield transfer

    @asynccontextmanager
    async def open_stream(
        self,
        content: str | bytes | Quote,
        dest: Path | str,
        *,
        path: str | None = None,
        max_rate: Rate | None = None,
    ) -> AsyncIterator[ContentStream]:
        """Opens one file for reading while it is fetched, as a media player does.

        Only what is read, and a little ahead of it, is fetched and paid. It is kept in the
        folder, where `fetch` or another stream goes on with it.

        Args:
            content: Infohash, magnet link, or a quote.
            dest: The folder.
            path: Of the file inside the content, with slashes; needed if there are several.
            max_rate: The highest price to accept; of each node the quoted one if not given.

        Yields:
            The file.

        Raises:
            InvalidRequest: There is no such file.
            BttError: As `fetch`; from `read`, once the transfer has ended.
        """
        quote = await self._quoted(content, max_rate)
        file = _file(quote.torrent, path)
        async with self._transfer(quote, dest, max_rate, [], everything=False) as transfer:
            stream = await ContentStream.open(transfer, file)
            try:
                yield stream
            finally:
                await stream.close()

    async def _quoted(self, content: str | bytes | Quote, max_rate: Rate | None) -> Quote:
        if isinstance(content, Quote):
            return content
        limits = () if max_rate is None else (max_price(max_rate),)
        return await self.quote(content, policies=(*limits, *DEFAULT_POLICIES))

    def _transfer(
        self,
        quote: Quote,
        dest: Path | str,
        max_rate: Rate | None,
        first: Sequence[int],
        everything: bool = True,
        agreed: Rate | None = None,
    ) -> Transfer:
        providers = {node.provider.name: node.provider for node in quote.nodes}
        places = [(node.node, node.provider.address) for node in quote.nodes[:MOST_NODES]]
        return Transfer(
            quote.torrent,
            Path(dest),
            [Source(node.provider, node.rate, max_rate) for node in quote.nodes],
            token=ResumeToken(
                infohash=quote.torrent.infohash,
                first=tuple(first[:MOST_FIRST]),
                rate=agreed or max_rate or quote.rate,
                nodes=tuple(NodeAddress(node, place.host, place.port) for node, place in places),
            ),
            dropped=lambda source, error: providers[source.seller.name].blame(error, at_last=True),
            first=first,
            everything=everything,
        )


def _file(torrent: Torrent, path: str | None) -> int:
    found = [entry.index for entry in torrent.files if path in (None, "/".join(entry.path))]
    if len(found) != 1:
        names = ", ".join("/".join(entry.path) for entry in torrent.files[:5])
        raise InvalidRequest(f"Name one file of the content, such as: {names}.")
    return found[0]


def _all_there_is(total_bytes: int) -> Rate:
    """Returns the rate at which content costs more BTT than exist."""
    return Rate(SUPPLY, min(max(total_bytes, 1), MAX_UNITS), LINE.unit)


async def _answers(asked: Mapping[asyncio.Task[T], object]) -> dict[asyncio.Task[T], BttError | None]:
    """Waits for answers, not long for late ones; returns what failed (None: late)."""
    try:
        waiting, timeout = set(asked), None
        while waiting:
            done, waiting = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
            if any(task.exception() is None for task in done):
                timeout = LATE_S
    finally:
        late = [task for task in asked if not task.done()]
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    errors: dict[asyncio.Task[T], BttError | None] = dict.fromkeys(late)
    for task in asked:
        if task not in errors and (error := task.exception()) is not None:
            # One node must not take the others away, whatever it did to us.
            if not isinstance(error, BttError):
                error = InternalError(f"Asking it failed here ({error!r}).")
            errors[task] = error
    return errors


async def _from(
    provider: Provider, ask: Callable[[content_pb2_grpc.ContentServiceAsyncStub], Awaitable[T]]
) -> T:
    """Asks a node something that is free."""
    channel = (await provider.node()).channel(label="free")
    try:
        return await ask(content_pb2_grpc.ContentServiceStub(channel))
    except grpc.aio.AioRpcError as failure:
        raise to_error(failure) from failure
    finally:
        await channel.close()


async def _metadata(provider: Provider, infohash: bytes, sizes: content_pb2.QuoteResponse) -> Torrent:
    async def read(stub: content_pb2_grpc.ContentServiceAsyncStub) -> Torrent:
        info, layers = bytearray(), bytearray()
        parts = aiter(stub.GetMetadata(content_pb2.GetMetadataRequest(infohash=infohash), timeout=120))
        while True:
            try:
                async with asyncio.timeout(SILENT_S):
                    part = await anext(parts, None)
            except TimeoutError:
                raise ConnectError(f"The node has sent nothing for {SILENT_S:.0f} seconds.") from None
            if part is None:
                break
            info += part.info
            layers += part.layers
            if len(info) > sizes.info_bytes or len(layers) > sizes.layers_bytes:
                raise ContentMismatch("The node sent more metadata than it announced.")
        return Torrent.from_info(bytes(info), bytes(layers), infohash=infohash)

    return await _from(provider, read)


def _rate(node: NodeConnection) -> Rate:
    price = node.offer.sheet.prices.get(LINE)
    if price is None:
        raise InvalidRequest("The node does not offer content delivery.")
    return price.rate
