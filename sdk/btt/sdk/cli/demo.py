"""`btt demo`: a whole paid transfer on this machine, from nothing, in under a minute."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from btt.sdk.cli import render
from btt.sdk.cli.failures import FAILED
from btt.sdk.cli.options import AsJson
from btt.sdk.errors import ConfigError
from btt.sdk.memory import keep_freed_memory
from btt.sdk.money import BTT, Amount

if TYPE_CHECKING:
    from btt.sdk.testing import Devnet, Totals

app = typer.Typer()

_CANDIDATES: Final = ("libtorrent", "grpc._cython.cygrpc", "cryptography.hazmat.bindings._rust")
"""Extension modules that an installation has; the largest one is a real file to send."""
_LEAST_BUDGET: Final = 5 * BTT
_STEP_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened in a demo, and whether it adds up.

    Attributes:
        bytes: Length of the file.
        seconds: Of the fetch, from opening the payment channel to the last byte on disk.
        paid: By the client, base units.
        earned: By the node, taken on the ledger, base units.
        content_sha256_ok: The file that came is the file that was published, and verifies
            against the published infohash.
        supply_conserved: The ledger's accounts and channels hold exactly what was issued.
        channels_closed: The client's channel is closed, and no other is open.
        meters_agree: Node and client counted the same bytes and the same money.
    """

    bytes: int
    seconds: float
    paid: int
    earned: int
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
        return {name: getattr(self, name) for name in self.__slots__}


@app.command()
def demo(
    file: Annotated[
        Path | None, typer.Option(help="What to send.", show_default="a large file of this installation")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start a ledger and a node, publish a file, fetch it as a dApp and pay for it; leave nothing."""
    keep_freed_memory()
    source = _default_file() if file is None else file.absolute()
    try:
        length = source.stat().st_size if source.is_file() else 0
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}.") from error
    if not length:
        raise ConfigError(f"{source} is not a file, or it is empty.", hint="Choose another --file.")
    if importlib.util.find_spec("libtorrent") is None:
        raise ConfigError(
            "The demo runs a node, and the node's parts are not installed.",
            hint="pip install 'btt-services[node]'",
        )
    outcome = asyncio.run(_until_interrupted(source, length, _Talk(quiet=as_json)))
    if as_json:
        typer.echo(json.dumps(outcome.as_json()))
    if not outcome.holds:
        raise typer.Exit(FAILED)


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


async def _until_interrupted(source: Path, length: int, talk: _Talk) -> Outcome:
    """Runs the demo; a signal ends it in order, and a second one does not disturb that."""
    loop = asyncio.get_running_loop()
    work = asyncio.ensure_future(_demo(source, length, talk))
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


async def _demo(source: Path, length: int, talk: _Talk) -> Outcome:
    from btt.sdk.testing import Devnet

    began = time.monotonic()
    talk.say("Starting a ledger and a node on this machine ...")
    async with Devnet() as net:
        talk.say(f"Ledger   {net.ledger_address}")
        talk.say(f"Node     {net.node_address}")
        infohash = await net.publish(source)
        talk.say(f"Content  {source.name}, {render.size(length)}, infohash {infohash}")
        outcome = await _transfer(net, source, infohash, length, talk)
        talk.say(f"All processes end, and their folder goes; {time.monotonic() - began:.1f} s in all.")
    return outcome


async def _transfer(net: Devnet, source: Path, infohash: str, length: int, talk: _Talk) -> Outcome:
    budget = Amount(max(_LEAST_BUDGET, 2 * net.content_rate.owed(length)))
    client = await net.client(str(budget))
    async with client as btt:
        quote = await btt.content.quote(infohash)
        talk.say(f"Price    {quote.rate}: {quote.cost} for this file, of a budget of {budget}")
        began = time.monotonic()
        with render.showing(live=not talk.quiet and render.is_terminal()) as show:
            async with btt.content.fetch(quote, net.folder / "fetched") as transfer:
                async for step in transfer.progress(_STEP_SECONDS):
                    if not talk.quiet:
                        show(step)
        seconds = time.monotonic() - began
    assert transfer.receipt is not None
    content_ok = await asyncio.to_thread(_same, source, transfer.receipt.path, net.torrent(infohash))
    status, totals = await net.node_status(), await net.ledger_totals()
    # What the ledger gave the node, not what it was promised.
    earned, served = int(status["captured"]), int(status["served_bytes"])
    receipts = client.receipts
    paid = sum(receipt.paid for receipt in receipts)
    outcome = Outcome(
        bytes=length,
        seconds=round(seconds, 3),
        paid=paid,
        earned=earned,
        content_sha256_ok=content_ok,
        supply_conserved=totals.is_conserved,
        channels_closed=bool(receipts)
        and all(receipt.channel_closed for receipt in receipts)
        and totals.open_channels == 0
        and totals.closed_channels == len(receipts),
        meters_agree=all(receipt.counts_agree for receipt in receipts)
        and served == transfer.receipt.fetched_bytes == length
        and earned == paid == transfer.receipt.spent,
    )
    _summary(outcome, served, totals, talk)
    return outcome


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


def _summary(outcome: Outcome, served: int, totals: Totals, talk: _Talk) -> None:
    if talk.quiet:
        return
    rate = outcome.bytes / outcome.seconds if outcome.seconds else 0.0

    def mark(holds: bool) -> str:
        return "yes" if holds else "NO"

    rows = (
        ("Fetched", f"{render.size(outcome.bytes)} in {outcome.seconds:.2f} s, {render.size(rate)}/s"),
        ("Client paid", str(Amount(outcome.paid))),
        ("Node served", f"{served} bytes"),
        ("Node earned", str(Amount(outcome.earned))),
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
