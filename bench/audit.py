"""How fast a journal is re-verified, and in how much memory: `python -m bench.audit`.

A journal of 1,000,000 entries is made first: seven transfers for each channel that is opened, shown
an update and closed, all signed and taken by the ledger's own rules, written in the format of
`btt ledger export`. Then `btt ledger audit` re-verifies it, and one of a tenth of the length, in a
process of its own; its memory is the peak of private memory of that process and its workers.

Ratios: `vs_raw_verify` is the rate of entries against what one core of libsecp256k1 does with as
many signatures, and nothing else; `memory_growth` is the peak for the whole journal over that for
a tenth of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import coincurve

from bench.harness import MIB, workspace
from bench.processes import private_bytes
from bench.transfers import FUNDS, HOUR_MS, accounts
from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.keys import PrivateKey
from btt.sdk.money import SUPPLY
from btt.sdk.signing import (
    ChannelClose,
    ChannelCommit,
    ChannelRefund,
    ChannelUpdate,
    Message,
    Transfer,
    document_digest,
    sign,
)
from btt.services.ledger import export, genesis
from btt.services.ledger.books import Account, Request, Terms
from btt.services.ledger.journal import NO_HASH, EntryRef, Head
from btt.services.ledger.machine import Channel, Phase
from btt.services.ledger.overlay import Batch
from btt.services.ledger.verify import Operation, Verifier
from btt.services.ledger.watching import journal_entry

ACCOUNTS: Final = 1000
TRANSFERS: Final = 7
"""Between two channels."""
PER_ENTRY: Final = (TRANSFERS + 5) / (TRANSFERS + 3)
"""Signatures: an opening has T1 and T2, a close shows an update."""
MOST_GROWTH: Final = 1.10
SAMPLE_S: Final = 0.05
_NOW: Final = 1_800_000_000_000


class _Books:
    """The ledger's state in memory: what a batch stands on."""

    def __init__(self) -> None:
        self.head = Head(1, 0, NO_HASH, 0)
        self.next_account = 1
        self._accounts: dict[bytes, Account] = {}
        self._channels: dict[bytes, Channel] = {}

    def account(self, account: bytes) -> Account | None:
        return self._accounts.get(account)

    def channel(self, channel_id: bytes) -> Channel | None:
        return self._channels.get(channel_id)

    def request(self, account: bytes, request_id: bytes) -> Request | None:
        return None

    def entry(self, request_digest: bytes) -> EntryRef | None:
        return None

    def keep(self, batch: Batch) -> None:
        self.head, self.next_account = batch.head, batch.next_account
        self._accounts.update(batch.accounts)
        for channel in batch.channels.values():
            if channel.phase is Phase.CLOSED:
                self._channels.pop(channel.id, None)
            else:
                self._channels[channel.id] = channel


class _Signers:
    """Everybody who signs; makes verified operations without end."""

    def __init__(self, ledger_id: bytes) -> None:
        self._id = ledger_id
        self._verifier = Verifier(ledger_id)
        self._keys = accounts(ACCOUNTS)
        self._k1, self._k2 = PrivateKey((3).to_bytes(32, "big")), PrivateKey((4).to_bytes(32, "big"))
        self._named = 0

    def _signed(self, key: PrivateKey, message: Message) -> dict[str, bytes]:
        return {"signer": key.public.data, "signature": sign(key, message, self._id)}

    def transfer(self, source: PrivateKey, to: PrivateKey, amount: int) -> Operation:
        self._named += 1
        message = Transfer(
            sender=source.address,
            recipient=to.address,
            amount=amount,
            request_id=self._named.to_bytes(16, "big"),
            valid_until_ms=_NOW + HOUR_MS,
            memo=bytes(32),
        )
        return self._verifier.transfer(message.encode(), **self._signed(source, message))

    def funding(self, supplier: PrivateKey) -> Iterator[Operation]:
        return (self.transfer(supplier, key, FUNDS) for key in self._keys)

    def business(self) -> Iterator[Operation]:
        turn = 0
        while True:
            for _ in range(TRANSFERS):
                turn += 1
                source, to = self._keys[turn % ACCOUNTS], self._keys[(turn + 1) % ACCOUNTS]
                yield self.transfer(source, to, 1)
            yield from self._channel(self._keys[turn % ACCOUNTS], self._keys[(turn + 1) % ACCOUNTS])

    def _channel(self, payer: PrivateKey, payee: PrivateKey) -> Iterator[Operation]:
        self._named += 1
        k1, k2 = self._k1, self._k2
        commit = ChannelCommit(
            payer=payer.address,
            payee=payee.address,
            k1=k1.public,
            k2=k2.public,
            amount=1000,
            expires_ms=_NOW + 48 * HOUR_MS,
            challenge_ms=HOUR_MS,
            flags=1,
            fee=0,
            nonce=self._named.to_bytes(16, "big"),
            service_ref=bytes(32),
        )
        channel = commit.channel_id(self._id)
        refund = ChannelRefund(channel=channel, not_before_ms=commit.expires_ms)
        yield self._verifier.open_channel(
            commit.encode(), refund_signature=sign(k2, refund, self._id), **self._signed(payer, commit)
        )
        update = ChannelUpdate(channel=channel, cumulative=400)
        yield self._verifier.update(update.encode(), k1=k1.public.data, signature=sign(k1, update, self._id))
        close = ChannelClose(channel=channel, capture=500)
        yield self._verifier.close_channel(
            close.encode(),
            cumulative=500,
            update_signature=sign(k1, ChannelUpdate(channel=channel, cumulative=500), self._id),
            k1=k1.public.data,
            **self._signed(k2, close),
        )


def journal(path: Path, count: int) -> Path:
    """Writes a journal of `count` entries, signed and in order."""
    operator = supplier = PrivateKey((7).to_bytes(32, "big"))
    description = genesis.describe("bench", operator_key=operator.public.data, nonce=bytes(32))
    ledger_id = genesis.ledger_id(description)
    signers = _Signers(ledger_id)

    def entries() -> Iterator[pb.JournalEntry]:
        books, terms = _Books(), Terms()
        batch = Batch(books, clock_ms=_NOW, terms=terms)
        body, effect = genesis.issue(supplier.address.data, SUPPLY)
        digest = document_digest(genesis.DOCUMENT, ledger_id, body)
        batch.absorb(
            effect, digest=digest, body=body, signatures=operator.public.data + operator.sign(digest)
        )
        funding, business = signers.funding(supplier), signers.business()
        written = 0
        while True:
            for entry in batch.entries:
                if written == count:
                    return
                written += 1
                yield journal_entry(entry)
            books.keep(batch)
            batch = Batch(books, clock_ms=_NOW + written, terms=terms)
            for _ in range(100):
                outcome = batch.run(next(funding, None) or next(business))
                if not isinstance(outcome, EntryRef):
                    raise outcome

    with path.open("xb") as file:
        export.write(file, description, entries())
    return path


def _family(pid: int) -> Iterator[int]:
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def audit(path: Path) -> dict[str, Any]:
    """Runs `btt ledger audit`; returns what it says, with its peak of memory in bytes."""
    import subprocess

    peak = 0
    ended = threading.Event()
    with subprocess.Popen(
        [sys.executable, "-m", "btt.sdk.cli", "ledger", "audit", str(path), "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def sample() -> None:
            nonlocal peak
            while not ended.wait(SAMPLE_S):
                peak = max(peak, sum(private_bytes(pid) for pid in _family(process.pid)))

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            output, _ = process.communicate()
        finally:
            ended.set()
            sampler.join()
    found: dict[str, Any] = json.loads(output)
    if process.returncode or not found["ok"]:
        raise RuntimeError(f"the journal does not hold: {found}")
    return {**found, "peak_anonymous_bytes": peak, "rate": found["entries"] / found["seconds"]}


def raw_rate(signatures: int) -> float:
    """Returns how many signatures one core verifies in a second, doing nothing else."""
    secret = coincurve.PrivateKey((5).to_bytes(32, "big"))
    work = [(secret.sign(digest, None), digest) for digest in (os.urandom(32) for _ in range(signatures))]
    key = secret.public_key
    start = time.perf_counter()
    if not all(key.verify(der, digest, None) for der, digest in work):
        raise RuntimeError("a signature did not verify")
    return signatures / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--entries", type=int, help="of the journal; 1,000,000 by default")
    parser.add_argument("--quick", action="store_true", help="50,000 entries, under 50 s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    count = arguments.entries or (50_000 if arguments.quick else 1_000_000)
    with workspace() as folder:
        short = audit(journal(folder / "short", max(count // 10, 1)))
        before = raw_rate(10_000)
        long = audit(journal(folder / "long", count))
        raw = (before + raw_rate(10_000)) / 2
    growth = long["peak_anonymous_bytes"] / short["peak_anonymous_bytes"]
    found = {
        "ratios": {
            "vs_raw_verify": round(long["rate"] * PER_ENTRY / raw, 4),
            "memory_growth": round(growth, 4),
        },
        "facts": {
            "entries": count,
            "entries_per_second": round(long["rate"]),
            "seconds": long["seconds"],
            "peak_anonymous_bytes": long["peak_anonymous_bytes"],
            "raw_verifications_per_second": round(raw),
            "missed": ["memory_growth"] if growth > MOST_GROWTH else [],
        },
    }
    if arguments.json:
        print(json.dumps(found))
        return
    facts = found["facts"]
    print(f"{count:,} entries in {long['seconds']:.1f} s: {long['rate']:,.0f} a second")
    print(f"peak memory {long['peak_anonymous_bytes'] / MIB:.0f} MiB")
    for name, value in found["ratios"].items():
        print(f"{name}: {value:.3f}")
    print(f"missed: {facts['missed']}")


if __name__ == "__main__":
    main()
