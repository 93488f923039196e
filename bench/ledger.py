"""What the ledger costs beside what it stands on: `python -m bench.ledger`.

Contestants in alternating rounds, on one disk, every commit synced:

- `ledger, 1 client` and `ledger, 256 clients`: the product in process (`bench.ours.ledger`): the
  servicer that gRPC calls, with real signatures checked, rules, journal, books, sums and receipts.
- `books, 256 clients`: the same from the verified operation to its durable entry: no signature is
  checked and no receipt signed within the time.
- `raw, 1 a commit` and `raw, 512 a commit`: the same rows into the same tables by SQLite alone
  (`bench.peers.raw_ledger`). `plain, 512 a commit` does so without constraints and look-up
  indexes; it is no storage that a ledger could use, and shows what those cost.
- `ledger, gRPC` and `bare RPC`: 64 clients with TLS connections of their own to `btt ledger serve`
  and to a server that answers the same messages with a receipt made beforehand. CPU is told for
  the server and for the clients, which share this machine.

Then 50 transfers a second for a minute, at fixed times, to a ledger that checkpoints meanwhile;
times count from when a transfer should have left, so that a stall is not hidden.

Ratios: `vs_raw_commit`, `vs_raw_batched`, `vs_plain_batched` and `signed_vs_raw_batched` compare the
rates, `p99_vs_bare_rpc` the 99th percentiles (above 1 is slower). `vs_raw_batched` and
`vs_plain_batched` are of the books, because libsecp256k1 alone takes three times as long for the two
signatures of a transfer as SQLite for its rows; `signed_vs_raw_batched` tells what is left with them.
The peer of `vs_raw_commit` is one commit of SQLite itself: BEGIN, the rows, COMMIT, in WAL with
synchronous=FULL. Its target depends on the disk: where an fsync, measured there in the same run,
takes less than 0.2 ms, a single client waits for the processor and not for the disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Final

from bench.callers import call
from bench.harness import Contestant, Ratio, Results, alternate, as_json, random_file, workspace
from bench.operations import Operations, missed, report
from bench.ours.ledger import books, in_process, make
from bench.peers import bare_rpc
from bench.peers.raw_ledger import BATCH, raw
from bench.processes import Child

CLIENTS: Final = 256
CALLERS: Final = 64
PACE: Final = 50.0
"""Transfers a second that the white paper calls the least a ledger must do."""
QUICK_DISK_S: Final = 0.0002
LEAST_BATCHED: Final = 0.30
LEAST_COMMIT: Final = 0.7
LEAST_COMMIT_QUICK_DISK: Final = 0.35
MOST_PACED_P99_S: Final = 1.0
PAGE: Final = 4096


def contestants(*, single: int, each: int, calls: int) -> dict[str, Contestant[Operations]]:
    """Returns them all by name.

    Args:
        single: Transfers of the one client.
        each: Transfers of each of the 256.
        calls: Transfers of each of the 64 that call by gRPC.
    """
    many = CLIENTS * each
    return {
        "ledger, 1 client": lambda folder: in_process(folder, clients=1, each=single),
        "raw, 1 a commit": lambda folder: raw(folder, clients=2, operations=single, batch=1),
        "ledger, 256 clients": lambda folder: in_process(folder, clients=CLIENTS, each=each),
        "books, 256 clients": lambda folder: books(folder, clients=CLIENTS, each=each),
        "raw, 512 a commit": lambda folder: raw(folder, clients=CLIENTS, operations=many, batch=BATCH),
        "plain, 512 a commit": lambda folder: raw(
            folder, clients=CLIENTS, operations=many, batch=BATCH, plain=True
        ),
        "ledger, gRPC": lambda folder: _served(folder, clients=CALLERS, each=calls),
        "bare RPC": lambda folder: bare_rpc.contestant(clients=CALLERS, each=calls),
    }


def _served(folder: Path, *, clients: int, each: int, pace: float = 0.0) -> Operations:
    make(folder / "ledger", clients)
    with Child("server", "bench.ours.ledger", [str(folder / "ledger")]) as server:
        return call(server, clients=clients, each=each, pace=pace)


def paced(folder: Path, seconds: int) -> tuple[Operations, int]:
    """Sends PACE transfers a second.

    Args:
        folder: An empty one.
        seconds: How long.

    Returns:
        The run, and how many pages checkpoints added to the database meanwhile (it has more rewritten).
    """
    clients = 10
    each = round(PACE * seconds) // clients
    database = folder / "ledger" / "ledger.sqlite3"
    make(folder / "ledger", clients)
    before = database.stat().st_size
    with Child("server", "bench.ours.ledger", [str(folder / "ledger")]) as server:
        run = call(server, clients=clients, each=each, pace=PACE)
        # Only a checkpoint writes the database itself; the one at the end is still to come.
        return run, (database.stat().st_size - before) // PAGE


def sync_seconds(folder: Path, times: int = 200) -> float:
    """Returns the median time of an fsync after 4 KiB were written over a part of a file.

    Over, not behind it: SQLite's log keeps its size, so that a commit waits for no more than this.
    It decides which target holds, and is no contestant.
    """
    taken = []
    with random_file(folder / "sync", times * PAGE).open("r+b", buffering=0) as file:
        for _ in range(times):
            file.write(os.urandom(PAGE))
            start = time.perf_counter()
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - start)
    (folder / "sync").unlink()
    return statistics.median(taken)


def ratios(results: Results[Operations]) -> dict[str, Ratio]:
    """Returns the claims of this module."""
    return {
        "vs_raw_commit": results.paired("ledger, 1 client", "raw, 1 a commit"),
        "vs_raw_batched": results.paired("books, 256 clients", "raw, 512 a commit"),
        "vs_plain_batched": results.paired("books, 256 clients", "plain, 512 a commit"),
        "signed_vs_raw_batched": results.paired("ledger, 256 clients", "raw, 512 a commit"),
        "p99_vs_bare_rpc": results.paired("ledger, gRPC", "bare RPC", lambda run: run.p99),
    }


def _progress(number: int, name: str, run: Operations) -> None:
    print(f"round {number + 1} {name}: {run.rate:,.0f} operations/s", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="runs of each contestant; 7 by default")
    parser.add_argument("--seconds", type=int, help="of the paced run; 60 by default")
    parser.add_argument(
        "--quick", action="store_true", help="2 short rounds and a paced run of 5 s, under 50 s"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    quick = arguments.quick
    rounds = arguments.rounds or (2 if quick else 7)
    seconds = arguments.seconds or (5 if quick else 60)
    sizes = {"single": 300, "each": 12, "calls": 15} if quick else {"single": 2000, "each": 64, "calls": 100}
    with workspace() as folder:
        sync = sync_seconds(folder)
        results = alternate(
            contestants(**sizes),
            rounds=rounds,
            parent=folder,
            progress=None if arguments.json else _progress,
        )
        steady, pages = paced(folder, seconds)
    found = ratios(results)
    least = {
        "vs_raw_commit": LEAST_COMMIT_QUICK_DISK if sync < QUICK_DISK_S else LEAST_COMMIT,
        "vs_raw_batched": LEAST_BATCHED,
    }
    slow = ["p99 at 50 a second"] if steady.p99 >= MOST_PACED_P99_S else []
    facts: dict[str, Any] = {
        "rounds": rounds,
        "sync_ms": round(sync * 1e3, 3),
        "paced": {
            "seconds": seconds,
            "per_second": round(steady.rate, 1),
            "p50_ms": round(steady.p50 * 1e3, 2),
            "p99_ms": round(steady.p99 * 1e3, 2),
            "longest_ms": round(steady.extra["longest"] * 1e3, 2),
            "pages_added_by_checkpoints": pages,
        },
        "targets": {**least, "paced_p99_ms": MOST_PACED_P99_S * 1e3},
        "missed": missed(found, least) + slow,
    }
    if arguments.json:
        print(as_json(results, found, facts=facts))
    else:
        report(f"Ledger, {rounds} rounds", results, found, facts=facts)


if __name__ == "__main__":
    main()
