"""Ways to break things at a chosen moment: a relay that cuts connections, processes that are killed."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import StreamReader, StreamWriter


class Relay:
    """A TCP relay to one port; `cut` drops every connection as a dead line would."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._links: set[StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.cuts = 0

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    def cut(self) -> None:
        self.cuts += 1
        for link in list(self._links):
            link.transport.abort()

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, far_writer}
        self._links |= pair
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, far_writer, pair))
                group.create_task(_pump(far_reader, writer, pair))
        finally:
            self._links -= pair


async def _pump(reader: StreamReader, writer: StreamWriter, pair: set[StreamWriter]) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 18):
            writer.write(data)
            await writer.drain()
    for end in pair:
        end.transport.abort()
