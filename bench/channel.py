"""What an update of a channel costs on both sides: `python -m bench.channel`.

Many channels at once, as a busy node and a busy wallet have them, in alternating rounds:

- `payee`: for each update the node's own steps (`Session.pay`): a piece is counted as delivered,
  the update is checked against the books, its signature verified, it is saved with the counts of
  its channel in the payee's books (SQLite, synchronous=FULL, many sessions to a sync), and only
  then counts as paid.
- `raw verify`: libsecp256k1 (coincurve) over the same updates, digests and DER made before the
  clock: no message, no state, no disk.
- `payer`: a piece is counted as accepted, what is due is worked out, the intent is saved in the
  wallet's books in the same way, and only then the update is signed.
- `raw sign`: libsecp256k1 over digests made before the clock.

Ratios are of updates per CPU second, all threads together (`per core`), so that neither the
disk's waiting nor a second core counts: `vs_raw_verify` and `vs_raw_sign`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any, Final

import coincurve
import uvloop

from bench.harness import MIB, Contestant, Ratio, Results, alternate, as_json, workspace
from bench.operations import Clock, Operations, missed, report
from bench.transfers import account
from btt.node.payments.session import PayerBook, Session
from btt.node.payments.store import ChannelRecord, PayeeStore
from btt.sdk.channel import Line, Payee, Payer, Price, PriceSheet, SignedUpdate, Standing, Tally
from btt.sdk.channel.prices import Segment
from btt.sdk.keys import PrivateKey
from btt.sdk.money import GIB, Rate, Unit
from btt.sdk.payment.apps import NO_APP
from btt.sdk.payment.store import OPEN, PayerStore, StoredChannel
from btt.sdk.signing import ChannelUpdate, sign

CHANNELS: Final = 256
LEAST: Final = {"vs_raw_verify": 0.5, "vs_raw_sign": 0.5}
LEDGER_ID: Final = bytes(range(32))
DEPOSIT: Final = 10**12
LINE: Final = Line("btt.proto.content.v1.ContentService", Unit.BYTE)
PIECE: Final = MIB
RATE: Final = Rate(10**6, GIB, Unit.BYTE)
SHEET: Final = PriceSheet(bytes(32), {LINE: Price(RATE, PIECE)})
SEGMENT: Final = Segment(SHEET.digest, LINE)
NODE: Final = account(1_000_000).address


def _channel_id(number: int) -> bytes:
    return number.to_bytes(32, "big")


def _updates(key: PrivateKey, number: int, each: int) -> list[SignedUpdate]:
    """Signs what pays for one piece more each time."""
    found = []
    for pieces in range(1, each + 1):
        message = ChannelUpdate(channel=_channel_id(number), cumulative=RATE.owed(pieces * PIECE))
        found.append(SignedUpdate(int(message.cumulative), sign(key, message, LEDGER_ID)))
    return found


def _all(
    work: Callable[[int], Awaitable[None]], clock: Clock, run_loop: Callable[[Any], object] = asyncio.run
) -> None:
    async def run() -> None:
        with clock.running():
            await asyncio.gather(*(work(number) for number in range(CHANNELS)))

    run_loop(run())


def payee(folder: Path, each: int) -> Operations:
    """Takes `each` updates on every channel."""
    clock = Clock()
    keys = [account(number) for number in range(CHANNELS)]
    updates = [_updates(key, number, each) for number, key in enumerate(keys)]
    with closing(PayeeStore(folder / "payments.db")) as store:
        sessions = [_session(store, key, number) for number, key in enumerate(keys)]

        async def take(number: int) -> None:
            session, call_id = sessions[number], bytes(16)
            session.begin(call_id)
            for update in updates[number]:
                session.payee.deliver(call_id, SEGMENT, PIECE)
                await session.pay(update, store)

        _all(take, clock, uvloop.run)  # the node's own loop; a dApp has asyncio's
        for number, (record, tally) in enumerate(asyncio.run(store.channels())):
            if record.best != updates[number][-1] or tally.owed != record.best.cumulative:
                raise RuntimeError("the payee's books are not what was paid")
    return clock.run(CHANNELS * each)


def _session(store: PayeeStore, key: PrivateKey, number: int) -> Session:
    record = ChannelRecord(_channel_id(number), key.address, b"", DEPOSIT, 2**50, 0, None, 0, "open", None, 0)
    asyncio.run(store.add_channel(record))
    standing = Standing(unit=SHEET.unit_charge, limit=DEPOSIT, lease=SHEET.unit_charge)
    side = Payee(
        ledger_id=LEDGER_ID,
        channel_id=record.channel_id,
        key=key.public,
        deposit=DEPOSIT,
        best=None,
        tally=Tally(),
        standing=standing,
    )
    side.pin(SHEET)
    offer: Any = None  # it is looked at when calls are served only
    book = PayerBook(standing, {record.channel_id: side})
    return Session(
        payer=key.address,
        network="127.0.0.0/24",
        book=book,
        payee=side,
        offer=offer,
        epoch=1,
        grace_s=1,
        unpaid=_never,
        app=NO_APP,
    )


async def _never(session: Session) -> None:
    raise AssertionError("nothing waits for payment here")


def raw_verify(folder: Path, each: int) -> Operations:
    """Verifies the same updates."""
    work = []
    for number in range(CHANNELS):
        key = account(number)
        handle = coincurve.PublicKey(key.public.data)
        secret = coincurve.PrivateKey(key.secret)
        for pieces in range(1, each + 1):
            message = ChannelUpdate(channel=_channel_id(number), cumulative=RATE.owed(pieces * PIECE))
            digest = message.digest(LEDGER_ID)
            work.append((handle, secret.sign(digest, None), digest))
    clock = Clock()
    with clock.running():
        valid = sum(handle.verify(der, digest, None) for handle, der, digest in work)
    if valid != len(work):
        raise RuntimeError("a signature did not verify")
    return clock.run(len(work))


def payer(folder: Path, each: int) -> Operations:
    """Signs `each` updates on every channel."""
    clock = Clock()
    sent: list[list[int | bytes]] = [[] for _ in range(CHANNELS)]  # flat: no work for the collector
    keys = [account(number) for number in range(CHANNELS)]
    with closing(PayerStore(folder)) as store:
        payers = [_payer(store, key, number) for number, key in enumerate(keys)]

        async def pay(number: int) -> None:
            side, call_id = payers[number], bytes(16)
            side.begin(call_id)
            for _ in range(each):
                side.received(call_id, SEGMENT, PIECE)
                side.accepted(call_id, SEGMENT, PIECE)
                due = side.due(credit=0, demand=0, flush=True)
                assert due is not None
                sent[number].extend(side.sign(await store.save(side.intend(due))))

        _all(pay, clock)
        saved = {channel.channel_id: channel.signed for channel in store.channels()}
    for number, updates in enumerate(sent):
        # Signing is deterministic, so these are the very bytes.
        if (
            updates != [*chain.from_iterable(_updates(keys[number], number, each))]
            or saved[_channel_id(number)] != updates[-2]
        ):
            raise RuntimeError("what was signed is not what was due, or was not saved")
    return clock.run(CHANNELS * each)


def _payer(store: PayerStore, key: PrivateKey, number: int) -> Payer:
    channel_id = _channel_id(number)
    stored = StoredChannel(
        channel_id, LEDGER_ID, NODE, b"", b"", DEPOSIT, 2**50, 0, "bench", 0, DEPOSIT, OPEN
    )
    store.add_channel(stored, CHANNELS * DEPOSIT)
    side = Payer(
        ledger_id=LEDGER_ID,
        channel_id=channel_id,
        key=key,
        deposit=DEPOSIT,
        signed=0,
        tally=Tally(),
    )
    side.pin(SHEET)
    return side


def raw_sign(folder: Path, each: int) -> Operations:
    """Signs as many digests, with recovery id, as the product's signatures have it."""
    secrets = [coincurve.PrivateKey(account(number).secret) for number in range(CHANNELS)]
    work = [(secret, os.urandom(32)) for secret in secrets for _ in range(each)]
    clock = Clock()
    with clock.running():
        for secret, digest in work:
            secret.sign_recoverable(digest, None)
    return clock.run(len(work))


def ratios(results: Results[Operations]) -> dict[str, Ratio]:
    """Returns the claims of this module."""
    return {
        "vs_raw_verify": results.paired("payee", "raw verify", lambda run: run.per_cpu),
        "vs_raw_sign": results.paired("payer", "raw sign", lambda run: run.per_cpu),
    }


def _progress(number: int, name: str, run: Operations) -> None:
    print(f"round {number + 1} {name}: {run.per_cpu:,.0f} updates per CPU second", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="runs of each contestant; 9 by default")
    parser.add_argument("--each", type=int, help="updates on each of the 256 channels; 64 by default")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 16 updates a channel, under 50 s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (3 if arguments.quick else 9)
    each = arguments.each or (16 if arguments.quick else 64)
    sides: dict[str, Callable[[Path, int], Operations]] = {
        "payee": payee,
        "raw verify": raw_verify,
        "payer": payer,
        "raw sign": raw_sign,
    }
    contestants: dict[str, Contestant[Operations]] = {
        name: lambda folder, side=side: side(folder, each)  # type: ignore[misc]
        for name, side in sides.items()
    }
    with workspace() as folder:
        results = alternate(
            contestants, rounds=rounds, parent=folder, progress=None if arguments.json else _progress
        )
    found = ratios(results)
    facts = {
        "rounds": rounds,
        "channels": CHANNELS,
        "updates_per_channel": each,
        "updates_per_cpu_second": {
            name: round(results.median(name, lambda run: run.per_cpu)) for name in results.runs
        },
        "targets": LEAST,
        "missed": missed(found, LEAST),
    }
    if arguments.json:
        print(as_json(results, found, facts=facts))
    else:
        report(f"{CHANNELS} channels, {rounds} rounds", results, found, facts=facts)


if __name__ == "__main__":
    main()
