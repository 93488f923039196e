"""Reading a file while it is fetched, folders of many files, and taking up what a killed fetch left."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys

import pytest

from btt.sdk.content.feed import GROW_RUNS, LINE, STREAMS
from btt.sdk.content.run import Run, serialise
from btt.sdk.content.stream import READ_AHEAD
from btt.sdk.errors import ContentMismatch, InvalidRequest
from btt.sdk.money import Amount
from btt.services.content.catalogue import Catalogue
from btt.services.content.publish import publish
from btt.services.content.service import ContentServicer, register
from kit import chaos
from kit import economy as kit
from kit.economy import CONTENT_PRICE, RUN, content

RUNS = 40
DATA = content(RUNS * RUN + 4321)
OWED = CONTENT_PRICE[LINE].rate.owed
FILES = {"a/one.bin": 3 * RUN + 5, "a/two.bin": 17, "b.bin": 2 * RUN, "c/d/e.bin": RUN + 1, "empty": 0} | {
    f"many/{number:03}.bin": 1000 + number for number in range(60)
}


class Watched(ContentServicer):
    """Notes which files it is asked for, in `asked`, and keeps one back until it may be sent."""

    kept, free = -1, None

    async def Fetch(self, request, context):  # noqa: N802
        self.asked.append(request.file)
        if request.file == self.kept:
            await self.free.wait()
        async for response in super().Fetch(request, context):
            yield response


@pytest.fixture
async def two(economy):
    nodes = []
    for _ in range(2):
        node, infohash = await economy.content_node({"film.bin": DATA})
        node.infohash = infohash["film.bin"]
        nodes.append(node)
    return nodes


async def test_a_reader_gets_what_it_seeks_and_only_that_is_fetched_and_paid(economy, two, tmp_path):
    async with economy.client(two, await economy.wallet()) as btt:
        quote = await btt.content.quote(two[0].infohash)
        async with btt.content.open_stream(quote, tmp_path) as stream:
            assert stream.size == len(DATA)
            assert await stream.read(0) == b""
            assert await stream.read(1000) == DATA[:1000]
            assert stream.tell() == 1000
            assert stream.seek(-4321, os.SEEK_END) == RUNS * RUN
            assert await stream.read() == DATA[RUNS * RUN :]
            assert await stream.read(10) == b""
            middle = 30 * RUN + RUN // 2
            assert stream.seek(middle) == middle
            assert await stream.read(RUN) == DATA[middle : middle + RUN]
            assert stream.seek(-RUN, os.SEEK_CUR) == middle
            assert await stream.read(7) == DATA[middle : middle + 7]
            with pytest.raises(InvalidRequest):
                stream.seek(-1)
    paid = sum(receipt.captured for receipt in btt.receipts)
    assert all(receipt.counts_agree for receipt in btt.receipts)
    assert paid <= OWED((2 * READ_AHEAD + 4) * RUN)
    assert not (tmp_path / "film.bin").exists()

    async with economy.client(two, await economy.wallet()) as btt:
        quote = await btt.content.quote(two[0].infohash)
        async with btt.content.fetch(quote, tmp_path) as transfer:
            pass
    assert (tmp_path / "film.bin").read_bytes() == DATA
    assert OWED(len(DATA)) <= paid + transfer.receipt.spent <= OWED(len(DATA)) + 6, "nothing was paid twice"


@pytest.mark.parametrize("nodes", [1, 2])
async def test_a_file_read_from_start_to_end_is_whole_in_the_folder(economy, two, tmp_path, nodes):
    async with economy.client(two[:nodes], await economy.wallet()) as btt:
        async with btt.content.open_stream(two[0].infohash, tmp_path) as stream:
            parts = []
            while part := await stream.read(300_000):
                parts.append(part)
        assert b"".join(parts) == DATA
        async with btt.content.fetch(two[0].infohash, tmp_path) as transfer:
            pass
    assert transfer.receipt.fetched_bytes == 0
    assert (tmp_path / "film.bin").read_bytes() == DATA
    assert OWED(len(DATA)) <= sum(receipt.captured for receipt in btt.receipts) < OWED(len(DATA)) + nodes


async def test_a_reader_leaves_the_budget_to_others_but_for_what_it_is_about_to_read(economy, tmp_path):
    runs = 4 * READ_AHEAD + GROW_RUNS
    node, infohash = await economy.content_node({"film.bin": bytes(runs * RUN)})
    other, book = await economy.content_node({"book": DATA[:1000]})
    budget = str(Amount(OWED(runs * RUN)))
    async with (
        economy.client([node, other], await economy.wallet(), budget) as btt,
        btt.content.open_stream(infohash["film.bin"], tmp_path) as stream,
    ):
        await stream.read(1)
        assert btt.providers[0].live.payer.deposit < OWED(runs * RUN)
        async with btt.content.fetch(book["book"], tmp_path):
            pass
    assert (tmp_path / "book").read_bytes() == DATA[:1000]


async def test_a_reader_hears_that_the_only_node_lies(economy, tmp_path, monkeypatch):
    real = ContentServicer.Fetch

    async def lie(self, request, context):
        async for response in real(self, request, context):
            run = Run.parse(response)
            yield serialise(run.run, bytes(len(run.data)))

    liar, infohash = await lying_node(economy, monkeypatch, lie)
    async with (
        economy.client(liar, await economy.wallet()) as btt,
        btt.content.open_stream(infohash, tmp_path) as stream,
    ):
        with pytest.raises(ContentMismatch):
            await stream.read(1)
    assert sum(receipt.captured for receipt in btt.receipts) == 0


async def lying_node(economy, monkeypatch, lie):
    class Liar(ContentServicer):
        Fetch = lie

    with monkeypatch.context() as patch:
        patch.setattr(kit, "ContentServicer", Liar)
        node, infohash = await economy.content_node({"film.bin": DATA})
    return node, infohash["film.bin"]


@pytest.fixture
async def folder(economy, tmp_path):
    """A folder of many files at two nodes."""
    source, dice = tmp_path / "shows", random.Random(5)
    for name, size in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(dice.randbytes(size))
    nodes, asked = [], []
    for at in range(2):
        catalogue = Catalogue(tmp_path / f"catalogue{at}")
        infohash = publish(source, catalogue).infohash
        servicer = Watched(catalogue)
        servicer.asked = asked
        economy.stack.callback(catalogue.close)
        economy.stack.callback(servicer.close)
        node = await economy.node(lambda r, s=servicer: register(s, r))
        node.servicer = servicer
        nodes.append(node)
    return source, nodes, infohash


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


async def test_a_folder_of_many_files_comes_from_many_nodes_the_wanted_files_first(economy, folder, tmp_path):
    source, nodes, infohash = folder
    asked, names = nodes[0].servicer.asked, ["many/059.bin", "many/031.bin"]
    async with economy.client(nodes, await economy.wallet()) as btt:
        quote = await btt.content.quote(infohash)
        async with btt.content.fetch(quote, tmp_path / "out", first=names) as transfer:
            pass
        with pytest.raises(InvalidRequest, match="Name one file"):
            async with btt.content.fetch(quote, tmp_path / "out", first=["nothing"]):
                pass
        with pytest.raises(InvalidRequest, match="Name one file"):
            async with btt.content.open_stream(quote, tmp_path / "out"):
                pass
        async with btt.content.open_stream(quote, tmp_path / "out", path="a/two.bin") as stream:
            assert await stream.read() == (source / "a/two.bin").read_bytes()
    assert tree(tmp_path / "out" / "shows") == tree(source)
    wanted = {entry.index for entry in quote.torrent.files if "/".join(entry.path) in names}
    assert wanted <= set(asked[: len(nodes) * STREAMS])
    assert all(receipt.counts_agree for receipt in btt.receipts)
    assert transfer.receipt.fetched_bytes == sum(FILES.values())
    assert transfer.receipt.spent <= OWED(sum(FILES.values())) + 1


async def test_files_are_whole_before_the_transfer_is(economy, folder, tmp_path):
    _, [node, _], infohash = folder
    node.servicer.kept, node.servicer.free = len(FILES) - 1, asyncio.Event()
    async with (
        economy.client(node, await economy.wallet()) as btt,
        btt.content.fetch(infohash, tmp_path / "out") as transfer,
    ):
        async for _ in transfer.progress(0.01):
            if (tmp_path / "out" / "shows" / "a" / "one.bin").exists():
                node.servicer.free.set()
    assert transfer.receipt.fetched_bytes == sum(FILES.values())


async def test_a_fetch_from_two_nodes_that_was_killed_goes_on_and_pays_nothing_twice(economy, two, tmp_path):
    wallet = await economy.wallet()
    from btt.sdk.wallet import Keystore

    Keystore.create(wallet.folder / "wallet.json", "")
    keystore = Keystore.open(wallet.folder / "wallet.json", "")
    await economy.ledger.transfer(economy.faucet, keystore.key().public.address, 10**9)
    words = [
        chaos.__file__, ",".join(str(node.address) for node in two), str(economy.running.address),
        str(wallet.folder), "5 BTT", two[0].infohash.hex(), str(tmp_path / "out"),
    ]  # fmt: skip

    async def client(stop_at):
        process = await asyncio.create_subprocess_exec(
            sys.executable, *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        last = {}
        async for line in process.stdout:
            last = json.loads(line)
            if last.get("done", 0) >= stop_at:
                process.kill()
                break
        await process.stdout.read()
        await process.wait()
        return last

    await client(RUNS // 3 * RUN)
    last = await client(1 << 62)
    assert last["finished"]
    assert all(last["agree"])
    assert (tmp_path / "out" / "film.bin").read_bytes() == DATA
    earned = sum([(await economy.ledger.account(node.payee_key)).available for node in two])
    # Each kill costs at most one prepaid piece for each node; what was accepted is not bought again.
    assert earned <= OWED(len(DATA)) + 2 * OWED(RUN) + 2
    totals = await economy.ledger.totals()
    assert totals.issued == totals.accounts + totals.channels
