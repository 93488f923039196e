"""The least that paying piece by piece takes: signed updates, each saved on both sides, and nothing else.

The unpaid transfer, held to the rules of credit: the server lets a piece leave only while no more is
unpaid than P6 allows, one piece at first and 5 % of what is paid later. The client signs as late as it
can, which makes the fewest updates that these rules leave: 111 for a GiB. Each is saved before it is
signed, goes over a stream of its own connection, is verified, and saved again before it counts.
There is no account, price, session, channel, metering or node runtime. No payment under these rules
takes less with gRPC and SQLite.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from bench.ours import unpaid
from btt.sdk.channel.credit import EARNED_PERCENT
from btt.sdk.database import open_books
from btt.sdk.keys import PrivateKey
from btt.sdk.signing import Updates
from btt.sdk.tls import pinned_channel

_KEY = PrivateKey(bytes(31) + b"\1")
_UPDATES = Updates(bytes(32), bytes(32))
_PAY = "Pay"
_SERVICE = "bench.Least"
_SCHEMA = """
CREATE TABLE paid(pieces INTEGER NOT NULL, signature BLOB);
INSERT INTO paid VALUES(0, NULL);
"""


def _credit(paid: int) -> int:
    """Returns the pieces that may be unpaid once so many are paid."""
    return max(1, paid * EARNED_PERCENT // 100)


class _Books:
    """What was paid last, with its signature: one row."""

    def __init__(self, path: Path) -> None:
        self._db = open_books(path, schema=_SCHEMA, version=1, busy=True)

    def save(self, pieces: int, signature: bytes | None = None) -> None:
        self._db.execute("UPDATE paid SET pieces = ?, signature = ?", (pieces, signature))

    def close(self) -> None:
        self._db.close()


class _Payee:
    def __init__(self, books: _Books) -> None:
        self._books = books
        self._paid = 0
        self._news = asyncio.Event()

    async def pay(self, updates: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        async for update in updates:
            pieces, signature = int.from_bytes(update[:8], "big"), update[8:]
            _UPDATES.verify(_KEY.public, pieces, signature)
            self._books.save(pieces, signature)
            self._paid = pieces
            self._news.set()
        yield b""  # all of them are saved

    async def gate(self, sent: int) -> None:
        while sent - self._paid >= _credit(self._paid):
            self._news.clear()
            await self._news.wait()


class _Payer:
    def __init__(self, books: _Books, stream: Any) -> None:
        self._books = books
        self._stream = stream
        self._accepted = self._paid = self._updates = 0
        self._due = asyncio.Event()

    def accepted(self, message: object) -> None:
        self._accepted += 1
        if self._accepted - self._paid >= _credit(self._paid):
            self._due.set()

    async def run(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            await self._pay()

    async def _pay(self) -> None:
        pieces = self._accepted
        self._books.save(pieces)
        self._paid = pieces
        self._updates += 1
        await self._stream.write(pieces.to_bytes(8, "big") + _UPDATES.sign(_KEY, pieces))

    async def end(self) -> dict[str, int]:
        if self._paid < self._accepted:
            await self._pay()
        await self._stream.done_writing()
        async for _ in self._stream:
            pass
        return {"paid": self._paid, "updates": self._updates}


async def _serve(catalogue: Path, folder: Path) -> None:
    books = _Books(folder / "payee.db")
    payee = _Payee(books)
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        _PAY: grpc.stream_stream_rpc_method_handler(payee.pay)
    }
    await unpaid.serve(catalogue, grpc.method_handlers_generic_handler(_SERVICE, handlers), gate=payee.gate)
    books.close()


async def _fetch(torrent: Path, folder: Path, port: int, certificate: bytes) -> None:
    books = _Books(folder / "payer.db")
    async with (
        pinned_channel("127.0.0.1", port, certificate, unpaid.NAME) as data,
        pinned_channel("127.0.0.1", port, certificate, unpaid.NAME) as control,
    ):
        await control.channel_ready()
        payer = _Payer(books, control.stream_stream(f"/{_SERVICE}/{_PAY}")())
        paying = asyncio.create_task(payer.run())
        await unpaid.fetch(torrent, folder, data, accepted=payer.accepted, settle=payer.end)
        paying.cancel()
    books.close()


if __name__ == "__main__":
    unpaid.play(_serve, _fetch)
