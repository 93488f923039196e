"""A ledger in a process of its own, and people who use everything it offers."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from btt.sdk.errors import ChannelLocked, LedgerUnreachable
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerAddress, LedgerClient, SignedReceipt
from btt.sdk.signing import EARLY_CLOSE, ChannelClose, ChannelCommit, ChannelRefund, ChannelUpdate, sign
from btt.services.ledger.journal import Entry, Kind
from kit.chaos import Process

BANK, SHOP, K1, K2 = (PrivateKey(n.to_bytes(32, "big")) for n in (11, 12, 21, 22))
HOUR = 3_600_000
ISSUE = 1_000_000
LEDGER = ("-m", "btt.sdk.cli", "ledger")


def btt_ledger(*words: str) -> dict:
    """Runs a command of `btt ledger` and returns what it says."""
    done = subprocess.run(
        [sys.executable, *LEDGER, *words, "--json"], capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(done.stdout)


def _quiet_port() -> int:
    """A free port that no connection takes while the ledger is away: below those the system hands out."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


class LedgerProcess:
    """`btt ledger serve` on one folder; it keeps its port when it is started again."""

    def __init__(
        self, home: Path, *, log: Path, env: dict[str, str] | None = None, clock: Path | None = None
    ) -> None:
        self.home = home
        self._log = log
        self._port = _quiet_port()
        self._process = Process(log=log)
        self.env = env or {}
        self._clock = () if clock is None else ("--clock", str(clock))

    @classmethod
    def make(cls, home: Path, *, log: Path, clock: Path | None = None) -> LedgerProcess:
        btt_ledger(
            "init", str(home), "--name", "test", "--supply-to", str(BANK.address),
            "--supply", f"{ISSUE} base units", "--min-challenge", "1ms", "--min-lifetime", "1s",
        )  # fmt: skip
        return cls(home, log=log, clock=clock)

    def start(self) -> LedgerAddress:
        self._process = Process(
            *LEDGER, "serve", str(self.home), "--listen", f"127.0.0.1:{self._port}", "--stdin-lifeline",
            *self._clock, log=self._log, env=self.env,
        )  # fmt: skip
        return LedgerAddress.parse(self._process.ready())

    def kill(self) -> None:
        self._process.kill()

    def signal(self, number: int) -> None:
        self._process.signal(number)

    def stop(self) -> int:
        return self._process.terminate()

    def end(self, how: Callable[[subprocess.Popen[str]], None]) -> int:
        return self._process.end(how)

    def audit(self) -> dict:
        """Re-verifies the whole journal, and what the tables say, by the command of the operator."""
        return btt_ledger("audit", str(self.home))


@dataclass(frozen=True)
class Errand:
    """One thing a person wants; asked any number of times it happens once."""

    kind: Kind
    ask: Callable[[LedgerClient], Awaitable[SignedReceipt]]


def errands(ledger: LedgerClient, person: PrivateKey, number: int) -> list[Errand]:
    """Everything that can be done, in an order that works; it costs the person 8, and SHOP gets it.

    A transfer of 1; a channel that is topped up, shown to the ledger, asked to close and finalized
    (3); a channel that its payee closes (4).
    """
    ledger_id, until = ledger.ledger_id, ledger.now_ms() + HOUR

    def name(n: int) -> bytes:
        return (number * 16 + n).to_bytes(16, "big")

    def channel(n: int) -> tuple[bytes, Errand]:
        t1 = ChannelCommit(
            payer=person.address,
            payee=SHOP.address,
            k1=K1.public,
            k2=K2.public,
            amount=10,
            expires_ms=until,
            challenge_ms=1,
            flags=EARLY_CLOSE,
            fee=0,
            nonce=name(n),
            service_ref=bytes(32),
        )
        channel_id = t1.channel_id(ledger_id)
        t2 = sign(K2, ChannelRefund(channel=channel_id, not_before_ms=until), ledger_id)
        return channel_id, Errand(Kind.OPEN_CHANNEL, lambda to: to.open_channel(t1, person, t2))

    left, open_left = channel(0)
    used, open_used = channel(1)
    update = ChannelUpdate(channel=left, cumulative=3)
    t3 = sign(K1, update, ledger_id)
    best = sign(K1, ChannelUpdate(channel=used, cumulative=4), ledger_id)

    async def finalize(to: LedgerClient) -> SignedReceipt:
        while True:
            try:
                return await to.finalize_channel(left)
            except ChannelLocked:
                await asyncio.sleep(0.01)  # another process's clock decides

    return [
        Errand(Kind.TRANSFER, lambda to: to.transfer(person, SHOP.address, 1, name(2), valid_until_ms=until)),
        open_left,
        Errand(Kind.TOP_UP, lambda to: to.top_up(left, person, 5, name(3), valid_until_ms=until)),
        Errand(Kind.UPDATE, lambda to: to.submit_update(update, t3)),
        open_used,
        Errand(Kind.REQUEST_CLOSE, lambda to: to.request_close(left, person, name(4), valid_until_ms=until)),
        Errand(
            Kind.CLOSE_CHANNEL,
            lambda to: to.close_channel(ChannelClose(channel=used, capture=4), K2, 4, best),
        ),
        Errand(Kind.FINALIZE, finalize),
    ]


PRICE = 1 + 3 + 4
"""What the errands of one round cost."""


async def insist(ledger: LedgerClient, errand: Errand) -> SignedReceipt:
    """Asks until there is an answer, as one must when an answer did not come."""
    while True:
        try:
            return await errand.ask(ledger)
        except LedgerUnreachable:
            continue


def same(one: SignedReceipt, other: SignedReceipt) -> bool:
    """True when two receipts are for one entry; a later operator key may have signed the second."""
    a, b = one.receipt, other.receipt
    return (a.request_digest, a.seq, a.entry_hash, a.time_ms) == (
        b.request_digest, b.seq, b.entry_hash, b.time_ms,
    )  # fmt: skip


def every_receipt_is_in(journal: list[Entry], receipts: list[SignedReceipt]) -> None:
    by_seq = {entry.seq: entry for entry in journal}
    assert len({entry.request_digest for entry in journal}) == len(journal), "nothing happened twice"
    for signed in receipts:
        entry = by_seq[signed.seq]
        assert signed.receipt.entry_hash == entry.hash
        assert signed.receipt.request_digest == entry.request_digest
