"""A node that lies about content is not paid for it, and what was good stays, verified and paid once."""

from __future__ import annotations

from pathlib import Path

import pytest

from btt.proto.content.v1 import content_pb2
from btt.sdk.content.feed import LINE
from btt.sdk.content.store import Destination
from btt.sdk.content.torrent import MAX_INFO, MAX_LAYERS
from btt.sdk.errors import ContentMismatch, InvalidRequest, NodeBanned
from btt.sdk.payment.faults import NODE_BANS
from btt.services.content.service import ContentServicer
from kit import economy as kit
from kit.economy import CONTENT_PRICE, RUN, content

RUNS = 8
BAD = 5
"""The run at which the node begins to lie."""
TAIL = 4321
DATA = content(RUNS * RUN + TAIL)
BAN_MS = NODE_BANS.first_ms
"""For so long a wallet leaves a liar alone."""
OWED = CONTENT_PRICE[LINE].rate.owed


class Liar(ContentServicer):
    """Serves content, after some `lie` has had its way with it."""

    lie = None
    quote_lie = None
    metadata_lie = None

    async def Fetch(self, request, context):  # noqa: N802
        async for response in super().Fetch(request, context):
            run = content_pb2.FetchResponse.FromString(response)
            for message in self.lie(run) if self.lie else [run]:
                yield message.SerializeToString()

    async def Quote(self, request, context):  # noqa: N802
        answer = await super().Quote(request, context)
        return self.quote_lie(answer) if self.quote_lie else answer

    async def GetMetadata(self, request, context):  # noqa: N802
        parts = [part async for part in super().GetMetadata(request, context)]
        for part in self.metadata_lie(parts) if self.metadata_lie else parts:
            yield part


@pytest.fixture
async def liar(economy, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(kit, "ContentServicer", Liar)
        node, infohash = await economy.content_node({"film.bin": DATA, "other.bin": content(RUN + 1, 9)})
    node.infohash, node.other = infohash["film.bin"], infohash["other.bin"]
    return node


def message(run: int, data: bytes) -> content_pb2.FetchResponse:
    return content_pb2.FetchResponse(run=run, data=data)


def at_bad(change):
    return lambda response: change(response) if response.run == BAD else [response]


def flipped(at: int):
    def flip(response):
        data = bytearray(response.data)
        data[at] ^= 1
        return [message(response.run, bytes(data))]

    return flip


LIES = {
    "first byte": at_bad(flipped(0)),
    "a byte inside": at_bad(flipped(RUN // 3)),
    "last byte": at_bad(flipped(RUN - 1)),
    "truncated": at_bad(lambda r: [message(r.run, r.data[:-1])]),
    "padding": at_bad(lambda r: [message(r.run, r.data[: RUN // 2])]),
    "zeros": at_bad(lambda r: [message(r.run, bytes(RUN))]),
    "another run's number": at_bad(lambda r: [message(r.run + 1, r.data)]),
    "another run's data": at_bad(lambda r: [message(r.run, DATA[:RUN])]),
    "a number out of range": at_bad(lambda r: [message(2**63, r.data)]),
    "the run before again": at_bad(lambda r: [message(r.run - 1, DATA[(BAD - 1) * RUN : BAD * RUN]), r]),
    "no data": at_bad(lambda r: [message(r.run, b"")]),
    "nothing at all": at_bad(lambda r: [content_pb2.FetchResponse()]),
    "left out": at_bad(lambda r: []),
}


async def fetch(btt, infohash, folder):
    async with btt.content.fetch(infohash, folder) as transfer:
        async for _ in transfer.progress(interval_s=0.01):
            pass
    return transfer.receipt


def runs_on_disk(torrent, folder: Path) -> list[int]:
    """What anyone finds there who trusts nothing but the infohash."""
    with Destination(folder, torrent) as destination:
        destination.scan()
        missing = {run for runs in destination.missing(0) for run in runs}
    return [run for run in range(torrent.runs(0)) if run not in missing]


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_is_not_paid_and_what_came_before_it_is_kept_and_paid_once(liar, economy, tmp_path, lie):
    folder, wallet = tmp_path / "out", await economy.wallet()
    liar.servicer.lie = LIES[lie]
    async with economy.client(liar, wallet) as btt:
        quote = await btt.content.quote(liar.infohash)
        with pytest.raises(ContentMismatch):
            await fetch(btt, quote, folder)
    assert not (folder / "film.bin").exists()
    assert runs_on_disk(quote.torrent, folder) == list(range(BAD))
    [receipt] = btt.receipts
    assert receipt.counts_agree
    assert receipt.owed == receipt.paid == receipt.captured == OWED(BAD * RUN)
    assert (await economy.ledger.account(liar.payee_key)).available == OWED(BAD * RUN)

    honest, infohash = await economy.content_node({"film.bin": DATA})
    assert infohash["film.bin"] == liar.infohash
    async with economy.client(honest, wallet) as btt:
        done = await fetch(btt, liar.infohash, folder)
    assert (folder / "film.bin").read_bytes() == DATA
    assert done.fetched_bytes == len(DATA) - BAD * RUN
    assert done.spent == OWED(done.fetched_bytes)
    [receipt] = btt.receipts
    assert receipt.owed == receipt.captured == OWED(done.fetched_bytes)


@pytest.mark.parametrize("extra", [lambda r: [r, r], lambda r: [r, message(r.run + 1, DATA[:RUN])]])
async def test_more_than_was_asked_for_is_not_paid(liar, economy, tmp_path, extra):
    liar.servicer.lie = lambda r: extra(r) if r.run == RUNS else [r]
    async with economy.client(liar, await economy.wallet()) as btt:
        await btt.session(OWED(4 * len(DATA)))  # the channel would cover it; the request does not
        done = await fetch(btt, liar.infohash, tmp_path)  # all was there before the lie came
        [part] = done.parts
        assert isinstance(part.error, ContentMismatch)
        with pytest.raises(NodeBanned):
            await btt.content.quote(liar.infohash)
        economy.clock.ahead_ms += BAN_MS
        assert (await btt.content.quote(liar.infohash)).total_bytes == len(DATA)
    assert (tmp_path / "film.bin").read_bytes() == DATA
    [receipt] = btt.receipts
    assert receipt.counts_agree
    assert receipt.owed == receipt.captured == OWED(len(DATA))


def grown(parts):
    return [*parts, content_pb2.GetMetadataResponse(layers=bytes(1 << 16))]


def corrupted(parts):
    info = bytearray(parts[0].info)
    info[len(info) // 2] ^= 1
    return [content_pb2.GetMetadataResponse(info=bytes(info)), *parts[1:]]


def corrupted_layers(parts):
    layers = bytearray(parts[-1].layers)
    layers[7] ^= 1
    return [*parts[:-1], content_pb2.GetMetadataResponse(layers=bytes(layers))]


@pytest.mark.parametrize(
    "lie",
    [grown, corrupted, corrupted_layers, lambda parts: parts[:-1], lambda parts: parts[1:], lambda parts: []],
    ids=["more", "another info", "other layers", "no layers", "no info", "nothing"],
)
async def test_metadata_that_is_not_the_infohashs_is_refused(liar, economy, tmp_path, lie):
    liar.servicer.metadata_lie = lie
    async with economy.client(liar, await economy.wallet()) as btt:
        with pytest.raises(ContentMismatch):
            await fetch(btt, liar.infohash, tmp_path / "out")
    assert btt.receipts == []
    assert not (tmp_path / "out").exists()


async def test_the_metadata_of_another_infohash_is_refused(liar, economy):
    class Swapped:
        def __init__(self, request):
            self.infohash = liar.other

    real_quote, real_metadata = ContentServicer.Quote, ContentServicer.GetMetadata
    async with economy.client(liar, await economy.wallet()) as btt:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ContentServicer, "Quote", lambda self, r, c: real_quote(self, Swapped(r), c))
            patch.setattr(
                ContentServicer, "GetMetadata", lambda self, r, c: real_metadata(self, Swapped(r), c)
            )
            with pytest.raises(ContentMismatch):
                await btt.content.quote(liar.infohash)
        economy.clock.ahead_ms += BAN_MS
        assert (await btt.content.quote(liar.infohash)).total_bytes == len(DATA)


@pytest.mark.parametrize("sizes", [{"info_bytes": MAX_INFO + 1}, {"layers_bytes": MAX_LAYERS + 1}])
async def test_too_much_metadata_is_refused_before_it_is_asked_for(liar, economy, sizes):
    def boast(answer):
        for name, value in sizes.items():
            setattr(answer, name, value)
        return answer

    asked = []
    liar.servicer.quote_lie = boast
    liar.servicer.metadata_lie = lambda parts: asked.append(parts) or parts
    async with economy.client(liar, await economy.wallet()) as btt:
        with pytest.raises(InvalidRequest, match="too large"):
            await btt.content.quote(liar.infohash)
    assert asked == []


async def test_a_boast_about_the_size_changes_neither_cost_nor_content(liar, economy, tmp_path):
    def boast(answer):
        answer.total_bytes = 1
        return answer

    liar.servicer.quote_lie = boast
    async with economy.client(liar, await economy.wallet()) as btt:
        quote = await btt.content.quote(liar.infohash)
        assert (quote.total_bytes, quote.cost) == (len(DATA), OWED(len(DATA)))
        await fetch(btt, quote, tmp_path)
    assert (tmp_path / "film.bin").read_bytes() == DATA
