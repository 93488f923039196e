"""Passes messages between callers who are in one room at the same time; keeps nothing."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

import grpc.aio

from btt.sdk.errors import InvalidRequest, RateLimited
from btt.sdk.plugin import Line, Price, ServiceContext, Unit, check_keys, read_rate
from btt.sdk.rpc import abort
from message_relay.v1 import message_relay_pb2 as pb
from message_relay.v1 import message_relay_pb2_grpc as rpc

BYTES = Line("message_relay.v1.RelayService", Unit.BYTE)
LARGEST = 4096
WAITING = 64
"""Messages that may wait for one listener; who reads slower misses the oldest."""
MOST_ROOMS = 10_000


class Rooms:
    """Who listens where."""

    def __init__(self) -> None:
        self._rooms: dict[str, set[asyncio.Queue[bytes]]] = defaultdict(set)

    def enter(self, room: str) -> asyncio.Queue[bytes]:
        """Returns where the messages for one more listener come."""
        if room not in self._rooms and len(self._rooms) >= MOST_ROOMS:
            raise RateLimited("The relay is full.")
        inbox: asyncio.Queue[bytes] = asyncio.Queue(WAITING)
        self._rooms[room].add(inbox)
        return inbox

    def leave(self, room: str, inbox: asyncio.Queue[bytes]) -> None:
        """Forgets a listener, and the room with the last one."""
        self._rooms[room].discard(inbox)
        if not self._rooms[room]:
            del self._rooms[room]

    def say(self, room: str, text: bytes, speaker: asyncio.Queue[bytes]) -> None:
        """Passes a message to everybody else in the room."""
        for inbox in self._rooms[room] - {speaker}:
            if inbox.full():
                inbox.get_nowait()
            inbox.put_nowait(text)


class Plugin:
    """Sells the passing on of messages."""

    name = "message-relay"

    def __init__(self, context: ServiceContext) -> None:
        check_keys(context.config, known=("rate",))
        self._rate = read_rate(context.config, "rate", default="1 BTT / MiB", unit=Unit.BYTE)
        self._rooms = Rooms()

    async def start(self) -> None:
        """Has nothing to open."""

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to the node."""
        rpc.add_RelayServiceServicer_to_server(RelayServicer(self._rooms), server)

    def prices(self) -> Mapping[Line, Price]:
        """Says what a byte costs, each way."""
        return {BYTES: Price(self._rate, verify_units=LARGEST)}

    async def stop(self) -> None:
        """Has nothing to close: rooms end with the calls in them."""


class RelayServicer(rpc.RelayServiceServicer):
    """Passes messages on; the node counts and is paid, each way."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms

    async def Join(
        self, requests: AsyncIterator[pb.JoinRequest], context: Any
    ) -> AsyncIterator[pb.JoinResponse]:
        """Speaks for the caller, and lets it listen, until it leaves."""
        first = await anext(requests, None)
        if first is None or not 0 < len(first.room) <= 200 or first.text:
            await abort(context, InvalidRequest("The first message names a room, and says nothing."))
        room = first.room
        try:
            inbox = self._rooms.enter(room)
        except RateLimited as full:
            await abort(context, full)

        async def speak() -> None:
            async for request in requests:
                self._rooms.say(room, request.text, inbox)

        speaking = asyncio.create_task(speak(), name="relay-speaker")
        try:
            yield pb.JoinResponse()
            while not speaking.done():
                listening = asyncio.ensure_future(inbox.get())
                try:
                    await asyncio.wait({listening, speaking}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    listening.cancel()
                if listening.done() and not listening.cancelled():
                    yield pb.JoinResponse(text=listening.result())
            await speaking
        finally:
            self._rooms.leave(room, inbox)
            speaking.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait({speaking})
