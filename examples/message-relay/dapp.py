"""Talks in a room of a relay: `python dapp.py ROOM`; every line of standard input is said."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

from message_relay.v1 import message_relay_pb2 as pb
from message_relay.v1.message_relay_pb2_grpc import RelayServiceStub

from btt.sdk import Budget, Client


async def spoken(room: str) -> AsyncIterator[pb.JoinRequest]:
    """Enters the room, then says each line; the end of the input leaves it."""
    yield pb.JoinRequest(room=room)
    while line := await asyncio.to_thread(sys.stdin.readline):
        yield pb.JoinRequest(text=line.rstrip("\n").encode())


async def main(room: str) -> None:
    async with Client.connect(budget=Budget("1 BTT")) as btt:
        service = btt.service(RelayServiceStub, budget="0.5 BTT")
        async with service as relay:
            async for heard in relay.Join(spoken(room)):
                print(heard.text.decode("utf-8", errors="replace") or f"* in {room}", flush=True)
        print(f"spent {service.spent}")


asyncio.run(main(sys.argv[1]))
