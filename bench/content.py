"""How fast content arrives, verified and paid, and what paying costs: `python -m bench.content`.

These contestants in alternating rounds move one file over loopback to a disk and sync it:

- `btt`: a ledger, a node and a dApp with a new wallet; default price and credit.
- `btt, known`: the same with a wallet that has fetched the file there before, so that it is lent more.
- `unpaid`: the same service and transfer without payment.
- `least`: that, and for each update that the rules of credit ask for a signature, a commit on
  either side and a message; nothing else of the product.
- `bare gRPC`: the same messages over TLS, no hash, no payment.
- `libtorrent`: a tuned seeder and leecher of the same torrent, no `seed_mode`.
- with `--nodes N` also `btt, N nodes`: the same dApp fetches from all of N nodes at once.

Ratios: `vs_bare_grpc` and `vs_libtorrent` compare the rates, `payment_cpu_overhead` is how
much more CPU time a newcomer's paid GiB takes than an unpaid one, all processes together and with
the channel opened and closed. The two beginning with `known_payer` say the same of a payer that
the node knows, and the two beginning with `least` what no payment under these rules can fall
below. `nodes_vs_one` is the rate from N nodes against that from one: on one machine they share its
cores and its disk, so this is what sharing costs, not what it brings.
`--memory` shows instead that peaks do not grow with the file, and `--kinds` what paying costs by
each kind of call (`bench.kinds`).
"""

from __future__ import annotations

import argparse
import asyncio
import filecmp
import itertools
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop

from bench.harness import (
    GIB,
    MIB,
    Ratio,
    Results,
    Run,
    alternate,
    as_json,
    random_file,
    report_ratios,
    workspace,
)
from bench.kinds import kind_ratios, measure_kinds
from bench.ours import paid, unpaid
from bench.peers import bare_grpc, libtorrent_pair
from btt.sdk.testing import Devnet

LEAST = {"vs_bare_grpc": 0.60, "vs_libtorrent": 1.0}
MOST = {"payment_cpu_overhead": 0.05}
MOST_MEMORY = 150 * MIB
MEMORY_SIZES = (64 * MIB, GIB, 4 * GIB)
FUNDS = "100 BTT"


class Field:
    """The file, the devnet that publishes it, and everyone who fetches it.

    Args:
        net: A devnet that runs.
        loop: Its event loop; the contestants run in another thread.
        source: The published file.
        infohash: Of the file, hex.
    """

    def __init__(self, net: Devnet, loop: asyncio.AbstractEventLoop, source: Path, infohash: str) -> None:
        self._net = net
        self._loop = loop
        self._source = source
        self._infohash = infohash
        self._known = source.with_name("known payer's wallet")

    def contestants(self) -> dict[str, Callable[[Path], Run]]:
        """Returns them all by name."""
        many = {f"btt, {self._count} nodes": self.paid_many} if self._count > 1 else {}
        return {
            "btt": self.paid,
            "btt, known": self.known,
            **many,
            "unpaid": lambda folder: self._bare("bench.ours.unpaid", folder),
            "least": lambda folder: self._bare("bench.ours.least", folder),
            "bare gRPC": lambda folder: self._checked(bare_grpc.contestant(self._source, folder), folder),
            "libtorrent": lambda folder: self._checked(
                libtorrent_pair.contestant(self._source, self._torrent, folder), folder
            ),
        }

    @property
    def _torrent(self) -> Path:
        return self._net.torrent(self._infohash)

    @property
    def _count(self) -> int:
        return len(self._net.node_addresses)

    def paid(self, folder: Path) -> Run:
        """The product, for a newcomer."""
        return self._paid(folder, 1, folder / "wallet")

    def known(self, folder: Path) -> Run:
        """The product, for a wallet that has paid the node before; the first run is the newcomer's."""
        return self._paid(folder, 1, self._known)

    def paid_many(self, folder: Path) -> Run:
        """The product, from all nodes at once."""
        return self._paid(folder, self._count, folder / "wallet")

    def _paid(self, folder: Path, count: int, wallet: Path) -> Run:
        ledger, *nodes = self._net.pids
        roles = [("node", nodes[0]), *((f"node {n + 1}", nodes[n]) for n in range(1, count))]
        run = paid.contestant(
            self._source,
            folder,
            nodes=self._net.node_addresses[:count],
            ledger=self._net.ledger_address,
            infohash=self._infohash,
            fund=self._fund,
            servers=[*roles, ("ledger", ledger)],
            wallet=wallet,
        )
        return self._checked(run, folder)

    def _bare(self, module: str, folder: Path) -> Run:
        """The product's service and transfer without the product's payment."""
        catalogue = self._net.node_folder / "content"
        run = unpaid.contestant(
            self._source, folder, catalogue=catalogue, torrent=self._torrent, module=module
        )
        return self._checked(run, folder)

    def _fund(self, account: str) -> None:
        asyncio.run_coroutine_threadsafe(self._net.fund(account, FUNDS), self._loop).result(60)

    def _checked(self, run: Run, folder: Path) -> Run:
        found = [path for path in (folder / self._source.name, folder / "out") if path.exists()]
        whole = run.bytes == self._source.stat().st_size
        if not whole or len(found) != 1 or not filecmp.cmp(self._source, found[0], shallow=False):
            raise RuntimeError("what arrived is not what was sent")
        return run


@contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """Makes the devnet put its books on the same disk as the files."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _progress(number: int, name: str, run: Run) -> None:
    print(
        f"round {number + 1} {name}: {run.rate / MIB:.0f} MiB/s, {run.cpu_per_gib:.2f} CPU s/GiB",
        file=sys.stderr,
    )


async def measure_speed(size: int, rounds: int, *, nodes: int = 1, quiet: bool) -> Results[Run]:
    """Runs all contestants.

    Args:
        size: Bytes of the file.
        rounds: Runs of each.
        nodes: How many sell it.
        quiet: Say nothing on the way.
    """
    with workspace() as folder, _beside(folder):
        source = random_file(folder / "content.bin", size)
        async with Devnet(nodes=nodes) as net:
            infohash = await net.publish(source)
            for node in range(1, nodes):
                await net.add(infohash, node=node)
            field = Field(net, asyncio.get_running_loop(), source, infohash)
            with tempfile.TemporaryDirectory(dir=folder) as before:
                await asyncio.to_thread(field.known, Path(before))
            return await asyncio.to_thread(
                alternate,
                field.contestants(),
                rounds=rounds,
                parent=folder,
                progress=None if quiet else _progress,
            )


async def measure_memory(sizes: tuple[int, ...], *, quiet: bool) -> dict[int, Run]:
    """Runs the product once for each size, each time with a new node.

    Args:
        sizes: Bytes of each file.
        quiet: Say nothing on the way.
    """
    runs = {}
    for size in sizes:
        with workspace() as folder, _beside(folder):
            source = random_file(folder / "content.bin", size)
            async with Devnet() as net:
                field = Field(net, asyncio.get_running_loop(), source, await net.publish(source))
                target = folder / "run"
                target.mkdir()
                runs[size] = await asyncio.to_thread(field.paid, target)
        if not quiet:
            _progress(len(runs) - 1, f"btt, {size / MIB:.0f} MiB", runs[size])
    return runs


def ratios(results: Results[Run]) -> dict[str, Ratio]:
    """Returns the claims of this module."""
    many = next((name for name in results.runs if name.endswith("nodes")), None)

    def overhead(name: str) -> Ratio:
        more = results.paired(name, "unpaid", lambda run: run.cpu_per_gib)
        return Ratio(more.median - 1, more.low - 1, more.high - 1)

    return {
        **({"nodes_vs_one": results.paired(many, "btt")} if many else {}),
        "vs_bare_grpc": results.paired("btt", "bare gRPC"),
        "vs_libtorrent": results.paired("btt", "libtorrent"),
        "payment_cpu_overhead": overhead("btt"),
        "known_payer_vs_libtorrent": results.paired("btt, known", "libtorrent"),
        "known_payer_cpu_overhead": overhead("btt, known"),
        "least_vs_unpaid": results.paired("least", "unpaid"),
        "least_cpu_overhead": overhead("least"),
    }


def peak(results: Results[Run], name: str, role: str) -> int:
    """Returns the most memory that a role of a contestant had in any round, bytes of RssAnon."""
    return max(run.anonymous[role] for run in results.runs[name])


def report(
    title: str, results: Results[Run], ratios: dict[str, Ratio], *, facts: dict[str, Any] | None = None
) -> None:
    """Prints the contestants and their ratios as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=title)
    for column in ("contestant", "MiB/s (min-max)", "CPU s/GiB", "peak anon MiB"):
        table.add_column(column)
    for name, runs in results.runs.items():
        rates = sorted(run.rate / MIB for run in runs)
        cpu = {
            role: results.median(name, lambda run, role=role: run.cpu[role] * GIB / run.bytes)  # type: ignore[misc]
            for role in results.roles(name)
        }
        table.add_row(
            name,
            f"{statistics.median(rates):.0f} ({rates[0]:.0f}-{rates[-1]:.0f})",
            f"{results.median(name, lambda run: run.cpu_per_gib):.2f}: "
            + ", ".join(f"{role} {value:.2f}" for role, value in cpu.items()),
            ", ".join(f"{role} {peak(results, name, role) / MIB:.0f}" for role in results.roles(name)),
        )
    console.print(table)
    report_ratios(console, ratios, facts=facts)


def _missed(found: dict[str, Ratio]) -> list[str]:
    return [name for name, least in LEAST.items() if found[name].median < least] + [
        name for name, most in MOST.items() if found[name].median > most
    ]


def _speed(arguments: argparse.Namespace) -> None:
    quick = arguments.quick
    size = arguments.size or (128 * MIB if quick else GIB)
    rounds = arguments.rounds or (2 if quick else 7)
    results = asyncio.run(measure_speed(size, rounds, nodes=arguments.nodes, quiet=arguments.json))
    found = ratios(results)
    peaks = {role: peak(results, "btt", role) for role in results.roles("btt")}
    facts: dict[str, Any] = {
        "size": size,
        "rounds": rounds,
        "peak_anonymous_bytes": peaks,
        "settled_after_written_s": round(
            statistics.median(run.seconds - run.extra["before_settled"] for run in results.runs["btt"]), 4
        ),
        "missed": _missed(found) + [f"memory of {r}" for r, peak in peaks.items() if peak > MOST_MEMORY],
    }
    if arguments.json:
        print(as_json(results, found, facts=facts))
    else:
        report(f"{size / MIB:.0f} MiB, {rounds} rounds", results, found, facts=facts)


def _memory(arguments: argparse.Namespace) -> None:
    runs = asyncio.run(measure_memory(MEMORY_SIZES, quiet=arguments.json))
    roles = list(next(iter(runs.values())).anonymous)
    peaks = {str(size): dict(run.anonymous) for size, run in runs.items()}
    # With little paid there is little credit, and less in flight than the windows hold.
    sizes = sorted(runs)
    found = {
        f"{role}_memory_{before // MIB}_to_{after // MIB}_mib": round(
            runs[after].anonymous[role] / runs[before].anonymous[role], 4
        )
        for before, after in itertools.pairwise(sizes)
        for role in roles
    }
    if arguments.json:
        print(json.dumps({"ratios": found, "peak_anonymous_bytes": peaks}))
        return
    for size, run in runs.items():
        cells = ", ".join(f"{role} {run.anonymous[role] / MIB:.0f} MiB" for role in roles)
        print(f"{size / MIB:.0f} MiB: {cells}")
    for name, ratio in found.items():
        print(f"{name}: {ratio:.2f}")


def _kinds(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    size = arguments.size or (64 * MIB if arguments.quick else 256 * MIB)
    results = uvloop.run(measure_kinds(size, arguments.rounds or (2 if arguments.quick else 7)))
    found = kind_ratios(results)
    if arguments.json:
        print(as_json(results, found, facts={"size": size}))
        return
    for name in results.runs:
        rate, cpu = (results.median(name, value) for value in (lambda w: w.rate, lambda w: w.cpu_per_gib))
        print(f"{name}: {rate / MIB:.0f} MiB/s, {cpu:.2f} CPU s/GiB")
    report_ratios(Console(), found)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*(MiB|GiB)", text)
    if match is None:
        raise argparse.ArgumentTypeError("write a size such as 512MiB or 1GiB")
    return int(match[1]) * (MIB if match[2] == "MiB" else GIB)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=_size, help="size of the file; 1GiB by default")
    parser.add_argument("--rounds", type=int, help="runs of each contestant; 7 by default")
    parser.add_argument("--nodes", type=int, default=1, help="fetch from so many nodes as well")
    parser.add_argument("--quick", action="store_true", help="128 MiB and 2 rounds, under 50 s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--memory", action="store_true", help="measure peaks at 64 MiB, 1 GiB and 4 GiB")
    parser.add_argument("--kinds", action="store_true", help="compare the kinds of calls, paid and bare")
    arguments = parser.parse_args()
    if arguments.memory:
        _memory(arguments)
    elif arguments.kinds:
        _kinds(arguments)
    else:
        _speed(arguments)


if __name__ == "__main__":
    main()
