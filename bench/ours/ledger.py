"""The product's ledger: inside this process, and as a server of its own.

In process, requests go to the very servicer that gRPC calls: it parses, checks the signature,
hands the operation to the sequencer, waits for the commit, and signs the receipt. The journal,
the books' constraints, the sums before each COMMIT and the high-water mark are all on; the only
thing turned off is the limit of requests per key, which one busy client would run into.

The books alone are the same without the two signatures of each request: its operation was
verified before the clock, and the client gets the entry that a receipt would be signed over.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from bench.operations import Clock, Operations
from bench.processes import heard, say
from bench.transfers import FUNDS, accounts, signed, streams
from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.clock import SYSTEM
from btt.sdk.keys import PrivateKey, PublicKey
from btt.sdk.ledger.address import tls_name
from btt.sdk.ledger.receipt import SignedReceipt
from btt.sdk.signing import Receipt, Transfer
from btt.services.ledger import folder
from btt.services.ledger.hub import Hub
from btt.services.ledger.journal import EntryRef
from btt.services.ledger.limits import RateLimiter
from btt.services.ledger.reading import Reader
from btt.services.ledger.sequencer import Sequencer
from btt.services.ledger.server import LedgerConfig, serve
from btt.services.ledger.service import LedgerService
from btt.services.ledger.store import Store
from btt.services.ledger.verify import Operation, Verifier

NO_LIMIT: Final = 1e9
SUPPLIER: Final = PrivateKey((7).to_bytes(32, "big"))
CHECKED: Final = 64
"""Receipts of a run that are verified afterwards, spread evenly."""


def make(path: Path, clients: int) -> bytes:
    """Makes a ledger whose benchmark accounts have money; returns its id.

    Args:
        path: Of its new folder.
        clients: How many accounts.
    """
    made, identity = folder.init(path, name="bench", supply_to=SUPPLIER.address)

    async def fund() -> None:
        async with _running(made) as service:
            ledger_id = identity.ledger_id
            await asyncio.gather(
                *(
                    _transfer(service, signed(SUPPLIER, key, FUNDS, ledger_id, number))
                    for number, key in enumerate(accounts(max(clients, 2)), 1)
                )
            )

    asyncio.run(fund())
    return identity.ledger_id


@asynccontextmanager
async def _running(made: folder.LedgerFolder) -> AsyncIterator[LedgerService]:
    store = Store.open(made.database)
    async with Sequencer(store, clock=SYSTEM) as sequencer:
        service = LedgerService(
            sequencer=sequencer,
            reader=Reader(made.database),
            identity=store.identity,
            operator_key=made.operator_key,
            certificates=[],
            clock=SYSTEM,
            hub=Hub(),
            limiter=RateLimiter(rate=NO_LIMIT, burst=int(NO_LIMIT)),
        )
        try:
            yield service
        finally:
            service.close()


async def _transfer(service: LedgerService, request: pb.TransferRequest) -> pb.LedgerReceipt:
    context: Any = None  # only a refusal needs one
    return (await service.Transfer(request, context)).receipt


def in_process(path: Path, *, clients: int, each: int) -> Operations:
    """Lets clients send transfers, each the next one when it has the receipt of the last.

    Args:
        path: An empty folder.
        clients: How many at once.
        each: Transfers of one client.
    """
    ledger_id = make(path / "ledger", clients)
    work = streams(clients, each, ledger_id)
    made = folder.LedgerFolder.open(path / "ledger")
    clock, times = Clock(), []
    receipts: list[tuple[pb.TransferRequest, pb.LedgerReceipt]] = []

    async def client(service: LedgerService, requests: Sequence[pb.TransferRequest]) -> None:
        for request in requests:
            start = time.perf_counter()
            receipt = await _transfer(service, request)
            times.append(time.perf_counter() - start)
            receipts.append((request, receipt))

    async def run() -> None:
        async with _running(made) as service:
            with clock.running():
                await asyncio.gather(*(client(service, requests) for requests in work))

    asyncio.run(run())
    check(receipts, ledger_id, made.operator_key.public)
    return clock.run(len(receipts), times)


def books(path: Path, *, clients: int, each: int) -> Operations:
    """Lets clients have verified transfers entered, each the next one when the last is durable.

    Args:
        path: An empty folder.
        clients: How many at once.
        each: Transfers of one client.
    """
    ledger_id = make(path / "ledger", clients)
    verify = Verifier(ledger_id).transfer
    work = [
        [
            verify(signed.body, signer=signed.public_key, signature=signed.signature)
            for signed in (request.transfer for request in requests)
        ]
        for requests in streams(clients, each, ledger_id)
    ]
    made = folder.LedgerFolder.open(path / "ledger")
    clock, times = Clock(), []
    entered: list[tuple[Operation, EntryRef]] = []

    async def client(sequencer: Sequencer, operations: Sequence[Operation]) -> None:
        for operation in operations:
            start = time.perf_counter()
            entry = await sequencer.submit(operation)
            times.append(time.perf_counter() - start)
            entered.append((operation, entry))

    async def run() -> None:
        async with Sequencer(Store.open(made.database), clock=SYSTEM) as sequencer:
            with clock.running():
                await asyncio.gather(*(client(sequencer, operations) for operations in work))

    asyncio.run(run())
    if len({entry.seq for _, entry in entered}) != len(entered):
        raise RuntimeError("two operations got one entry")
    if any(entry.request_digest != operation.digest for operation, entry in entered):
        raise RuntimeError("an entry is for another operation")
    return clock.run(len(entered), times)


def check(
    receipts: Sequence[tuple[pb.TransferRequest, pb.LedgerReceipt]], ledger_id: bytes, operator: PublicKey
) -> None:
    """Checks that each request has an entry of its own, and that the operator signed for it.

    Raises:
        RuntimeError: A number occurs twice, or a receipt is for something else.
        SignatureInvalid: The operator did not sign one.
    """
    found = [Receipt.decode(receipt.body) for _, receipt in receipts]
    if len({receipt.seq for receipt in found}) != len(found):
        raise RuntimeError("two requests got one entry")
    for (request, receipt), decoded in zip(receipts, found, strict=True):
        if decoded.request_digest != Transfer.decode(request.transfer.body).digest(ledger_id):
            raise RuntimeError("a receipt is for another request")
        if decoded.seq % max(1, len(found) // CHECKED) == 0:
            SignedReceipt(decoded, receipt.signature).verify(operator, ledger_id)


async def _serve(path: Path) -> None:
    async with serve(LedgerConfig(folder=path)) as running:
        opened = folder.LedgerFolder.open(path)
        address = running.address
        say(
            "ready",
            port=address.port,
            certificate=opened.certificate.decode("ascii"),
            name=tls_name(address.operator),
            ledger_id=address.ledger_id.hex(),
            operator=opened.operator_key.public.data.hex(),
        )
        await asyncio.to_thread(heard)


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    # As `btt ledger serve` does.
    asyncio.run(_serve(parser.parse_args().folder))


if __name__ == "__main__":
    _main()
