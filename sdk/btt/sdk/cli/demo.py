"""`btt demo`: a whole paid transfer on this machine, from nothing, in under a minute."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from btt.sdk.cli import render
from btt.sdk.cli.failures import FAILED
from btt.sdk.cli.options import AsJson
from btt.sdk.errors import ConfigError
from btt.sdk.memory import keep_freed_memory
from btt.sdk.money import BTT, Amount, Rate

if TYPE_CHECKING:
    from btt.sdk.client import Client
    from btt.sdk.content.transfer import Transfer
    from btt.sdk.testing import Devnet, Totals

app = typer.Typer()

_CANDIDATES: Final = ("libtorrent", "grpc._cython.cygrpc", "cryptography.hazmat.bindings._rust")
"""Extension modules that an installation has; the largest one is a real file to send."""
_LEAST_BUDGET: Final = 5 * BTT
_PIECE: Final = 1 << 20
_STEP_SECONDS: Final = 0.05
_MOST_NODES: Final = 9
_MANY_BYTES: Final = 128 << 20
"""A file that several nodes need some time for, so that one of them can be killed midway."""
_SERVED_PIECES: Final = 4
"""Pieces that a node has brought at least when it is killed, while the others have not brought nearly all."""


@dataclass(frozen=True, slots=True)
class Seller:
    """What a node did in a demo.

    Attributes:
        node: Its address.
        bought_bytes: From another node, to sell it too.
        spent: For that, base units.
        served_bytes: To the client and to other nodes.
        earned: For that, taken on the ledger, base units.
        killed: It was killed midway.
    """

    node: str
    bought_bytes: int
    spent: int
    served_bytes: int
    earned: int
    killed: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened in a demo, and whether it adds up.

    Attributes:
        bytes: Length of the file.
        seconds: Of the fetch, from opening payment channels to the last byte on disk.
        paid: By the client, base units.
        spent: By all nodes together, who bought the file from each other, base units.
        earned: By all nodes together, taken on the ledger, base units: what was paid and spent.
        nodes: Each by itself.
        content_sha256_ok: The file that came is the file that was published, and verifies
            against the published infohash.
        supply_conserved: The ledger's accounts and channels hold exactly what was issued.
        channels_closed: The channels of all buyers are closed, and no other is open.
        meters_agree: Nodes and client counted the same bytes and the same money. What a node had on
            its way when its last runs moved to another one may cost the client one piece, and both
            count that.
    """

    bytes: int
    seconds: float
    paid: int
    spent: int
    earned: int
    nodes: tuple[Seller, ...]
    content_sha256_ok: bool
    supply_conserved: bool
    channels_closed: bool
    meters_agree: bool

    @property
    def holds(self) -> bool:
        """All of it is true."""
        return self.content_sha256_ok and self.supply_conserved and self.channels_closed and self.meters_agree

    def as_json(self) -> dict[str, Any]:
        """Returns all fields."""
        return asdict(self)


@app.command()
def demo(
    file: Annotated[
        Path | None, typer.Option(help="What to send.", show_default="a large file of this installation")
    ] = None,
    nodes: Annotated[
        int,
        typer.Option(
            min=1, max=_MOST_NODES, help="Others than the first buy the file from it; one is killed."
        ),
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Start a ledger and nodes, publish a file, fetch it as a dApp and pay for it; leave nothing."""
    keep_freed_memory()
    source = None if nodes > 1 and file is None else _readable(file or _default_file())
    if importlib.util.find_spec("libtorrent") is None:
        raise ConfigError(
            "The demo runs a node, and the node's parts are not installed.",
            hint="pip install 'btt-services[node]'",
        )
    talk = _Talk(quiet=as_json)
    outcome = asyncio.run(_until_interrupted(source, nodes, talk))
    if as_json:
        typer.echo(json.dumps(outcome.as_json()))
    if not outcome.holds:
        raise typer.Exit(FAILED)


def _readable(file: Path) -> Path:
    source = file.absolute()
    try:
        length = source.stat().st_size if source.is_file() else 0
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}.") from error
    if not length:
        raise ConfigError(f"{source} is not a file, or it is empty.", hint="Choose another --file.")
    return source


def _default_file() -> Path:
    found = []
    for name in _CANDIDATES:
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        if spec is not None and spec.origin is not None:
            # Links are not published; some installations are made of them.
            found.append(Path(spec.origin).resolve())
    if not found:
        raise ConfigError("There is no large file to send.", hint="Choose one with --file.")
    return max(found, key=lambda path: path.stat().st_size)


class _Talk:
    """What the demo tells a person."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet

    def say(self, text: str = "") -> None:
        if not self.quiet:
            typer.echo(text)


async def _until_interrupted(source: Path | None, nodes: int, talk: _Talk) -> Outcome:
    """Runs the demo; a signal ends it in order, and a second one does not disturb that."""
    loop = asyncio.get_running_loop()
    work = asyncio.ensure_future(_demo(source, nodes, talk))
    signalled = False

    def stop() -> None:
        nonlocal signalled
        if not signalled:
            signalled = True
            work.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        return await work
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _demo(source: Path | None, nodes: int, talk: _Talk) -> Outcome:
    from btt.sdk.testing import Devnet

    began = time.monotonic()
    talk.say(f"Starting a ledger and {'a node' if nodes == 1 else f'{nodes} nodes'} on this machine ...")
    async with Devnet(nodes=nodes) as net:
        talk.say(f"Ledger   {net.ledger_address}")
        for address in net.node_addresses:
            talk.say(f"Node     {address}")
        published = (
            await asyncio.to_thread(_make_file, net.folder / "random.bin") if source is None else source
        )
        length = published.stat().st_size
        infohash = await net.publish(published)
        talk.say(f"Content  {published.name}, {render.size(length)}, infohash {infohash}")
        spent = [Amount(0)]
        if nodes > 1:
            talk.say("The other nodes buy it from the first one, to sell it ...")
            spent += await asyncio.gather(*(net.add(infohash, node=node) for node in range(1, nodes)))
        outcome = await _transfer(net, published, infohash, spent, talk)
        talk.say(f"All processes end, and their folder goes; {time.monotonic() - began:.1f} s in all.")
    return outcome


def _make_file(path: Path) -> Path:
    with path.open("wb") as out:
        for _ in range(_MANY_BYTES >> 20):
            out.write(os.urandom(1 << 20))
    return path


async def _transfer(net: Devnet, source: Path, infohash: str, spent: list[Amount], talk: _Talk) -> Outcome:
    nodes = len(spent)
    victim = nodes - 1 if nodes > 1 else None
    budget = Amount(max(_LEAST_BUDGET, 2 * net.content_rate.owed(source.stat().st_size)))  # noqa: ASYNC240
    client = await net.client(str(budget))
    async with client as btt:
        quote = await btt.content.quote(infohash)
        talk.say(f"Price    {quote.rate}: {quote.cost} for this file, of a budget of {budget}")
        began = time.monotonic()
        killing: asyncio.Task[None] | None = None
        with render.showing(live=not talk.quiet and render.is_terminal()) as show:
            async with btt.content.fetch(quote, net.folder / "fetched") as transfer:
                async for step in transfer.progress(_STEP_SECONDS if victim is None else _STEP_SECONDS / 10):
                    if not talk.quiet:
                        show(step)
                    if victim is not None and killing is None and _is_midway(transfer, net, victim):
                        killing = asyncio.create_task(net.kill_node(victim))
        seconds = time.monotonic() - began
        if victim is not None and killing is not None:
            await killing
            talk.say(f"Node {victim + 1} was killed on the way, and the others went on; it starts again.")
            await net.start_node(victim)
    assert transfer.receipt is not None
    content_ok = await asyncio.to_thread(_same, source, transfer.receipt.path, net.torrent(infohash))
    # What the ledger gave the nodes, not what they were promised.
    books = [await net.node_status(node) for node in range(nodes)]
    sellers = tuple(
        Seller(
            node=net.node_addresses[node],
            bought_bytes=transfer.torrent.total_bytes if node else 0,
            spent=int(spent[node]),
            served_bytes=int(found["served_bytes"]),
            earned=int(found["captured"]),
            killed=node == victim and killing is not None,
        )
        for node, found in enumerate(books)
    )
    totals = await net.ledger_totals()
    outcome = _add_up(client, transfer, sellers, seconds, totals, rate=quote.rate, is_right=content_ok)
    _summary(outcome, totals, talk)
    return outcome


def _is_midway(transfer: Transfer, net: Devnet, victim: int) -> bool:
    """Says whether half is there and the node to be killed had its part in it, or it gets late."""
    name = net.node_addresses[victim]
    step = transfer.state()
    brought = sum(part.fetched_bytes for part in transfer.parts() if f"//{part.node}@" in name)
    share = 2 if brought >= _SERVED_PIECES * _PIECE else 1.25
    return step.done_bytes * share >= step.total_bytes


def _add_up(
    client: Client,
    transfer: Transfer,
    sellers: tuple[Seller, ...],
    seconds: float,
    totals: Totals,
    *,
    rate: Rate,
    is_right: bool,
) -> Outcome:
    assert transfer.receipt is not None
    receipts, length = client.receipts, transfer.torrent.total_bytes
    paid = sum(receipt.captured for receipt in receipts)
    spent = sum(seller.spent for seller in sellers)
    earned = sum(seller.earned for seller in sellers)
    resold = sum(seller.bought_bytes for seller in sellers)
    # A call that ends early may forfeit one prepaid piece, on both sides' books.
    pieces = sum(seller.served_bytes for seller in sellers) - resold - length
    forfeited = paid - transfer.receipt.spent
    most = _PIECE if len(sellers) > 1 else 0
    return Outcome(
        bytes=length,
        seconds=round(seconds, 3),
        paid=paid,
        spent=spent,
        earned=earned,
        nodes=sellers,
        content_sha256_ok=is_right,
        supply_conserved=totals.is_conserved,
        channels_closed=bool(receipts)
        and all(receipt.channel_closed for receipt in receipts)
        and totals.open_channels == 0
        and totals.closed_channels == len(receipts) + len(sellers) - 1,
        meters_agree=all(receipt.counts_agree for receipt in receipts)
        and transfer.receipt.fetched_bytes == length
        and 0 <= pieces <= most * len(sellers)
        and earned == paid + spent
        and 0 <= forfeited <= rate.owed(pieces),
    )


def _same(source: Path, fetched: Path, torrent_file: Path) -> bool:
    """Compares two files, and the fetched one with the infohash: once more, from the disk."""
    from btt.sdk.content.torrent import Torrent

    torrent, _ = Torrent.from_torrent(torrent_file.read_bytes())
    digests = []
    for path in (source, fetched):
        with path.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").digest())
    with fetched.open("rb") as opened:
        verified = all(
            torrent.verify_run(0, run, opened.read(torrent.run_length(0, run)))
            for run in range(torrent.runs(0))
        )
    return verified and digests[0] == digests[1]


def _summary(outcome: Outcome, totals: Totals, talk: _Talk) -> None:
    if talk.quiet:
        return
    rate = outcome.bytes / outcome.seconds if outcome.seconds else 0.0

    def mark(holds: bool) -> str:
        return "yes" if holds else "NO"

    nodes = []
    for number, seller in enumerate(outcome.nodes, 1):
        name = "Node" if len(outcome.nodes) == 1 else f"Node {number}"
        if seller.bought_bytes:
            nodes.append((f"{name} bought", f"{seller.bought_bytes} bytes for {Amount(seller.spent)}"))
        nodes.append((f"{name} served", f"{seller.served_bytes} bytes{', killed midway' * seller.killed}"))
        nodes.append((f"{name} earned", str(Amount(seller.earned))))
    rows = (
        ("Fetched", f"{render.size(outcome.bytes)} in {outcome.seconds:.2f} s, {render.size(rate)}/s"),
        ("Client paid", str(Amount(outcome.paid))),
        *nodes,
        *([("All nodes earned", str(Amount(outcome.earned)))] if outcome.spent else []),
        ("Ledger issued", str(totals.issued)),
        ("  in accounts", str(totals.accounts)),
        ("  in channels", f"{totals.channels}, {totals.open_channels} open, {totals.closed_channels} closed"),
        ("File is the one published", mark(outcome.content_sha256_ok)),
        ("Node and client counted the same", mark(outcome.meters_agree)),
        ("Channel closed on the ledger", mark(outcome.channels_closed)),
        ("Ledger holds what was issued", mark(outcome.supply_conserved)),
    )
    talk.say()
    for name, value in rows:
        talk.say(f"{name:34}{value}")
    talk.say()
    sys.stdout.flush()
