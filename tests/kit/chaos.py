"""Ways to break things at a chosen moment: a relay that cuts connections, processes that are killed.

As a program it is a client to be killed: it fetches some content and says on each line how far it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any


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


class Process:
    """A child that prints one JSON object a line, ends with us, and can be killed and started again."""

    def __init__(self, *command: str, log: Path, env: dict[str, str] | None = None) -> None:
        self._command = [sys.executable, *command]
        self._log = log
        self._env = {**os.environ, **(env or {})}
        self._popen: subprocess.Popen[str] | None = None
        self.starts = 0

    def start(self) -> Process:
        assert self._popen is None
        self.starts += 1
        with self._log.open("a") as log:
            self._popen = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._env,
            )
        return self

    def lines(self) -> Iterator[Any]:
        """Yields what it prints, until it ends."""
        assert self._popen is not None
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            yield json.loads(line)

    def tell(self, line: str) -> None:
        """Writes a line to it."""
        assert self._popen is not None
        assert self._popen.stdin is not None
        self._popen.stdin.write(f"{line}\n")
        self._popen.stdin.flush()

    def ready(self) -> str:
        """Starts it, waits until it serves, and returns its address."""
        self.start()
        for line in self.lines():
            if line.get("ready"):
                return str(line["address"])
        raise AssertionError(f"{self._command} did not start:\n{self._log.read_text()[-2000:]}")

    def signal(self, number: int) -> None:
        """Sends it a signal."""
        assert self._popen is not None
        self._popen.send_signal(number)

    def kill(self) -> None:
        """Kills it as a power cut would; nothing it could do about it."""
        if self._popen is not None:
            self._popen.kill()
            self.wait()

    def terminate(self) -> int:
        return self.end(subprocess.Popen.terminate)

    def end(self, how: Callable[[subprocess.Popen[str]], None]) -> int:
        """Does something that makes it end, and returns its exit code."""
        assert self._popen is not None
        how(self._popen)
        return self.wait()

    def wait(self) -> int:
        assert self._popen is not None
        popen, self._popen = self._popen, None
        code = popen.wait()
        for pipe in (popen.stdin, popen.stdout):
            assert pipe is not None
            pipe.close()
        return code


async def _insist(work: Callable[[], Awaitable[object]]) -> None:
    from btt.sdk.errors import BttError

    for _ in range(100):
        try:
            await work()
        except BttError as error:
            if not error.retryable:
                raise
            await asyncio.sleep(0.1)
        else:
            return


async def _fetch(node: str, ledger: str, wallet: str, budget: str, infohash: str, dest: str) -> None:
    from btt.sdk.budget import Budget
    from btt.sdk.client import Client, Wallet

    def say(**facts: object) -> None:
        print(json.dumps(facts), flush=True)

    opened = Wallet.open(Path(wallet), "")
    async with Client.connect(node, budget=Budget(budget), ledger=ledger, wallet=opened) as btt:
        async with btt.content.fetch(infohash, Path(dest)) as transfer:
            async for step in transfer.progress(interval_s=0.005):
                say(done=0 if step.phase == "checking" else step.done_bytes)
        assert transfer.receipt is not None
        if not transfer.receipt.fetched_bytes:
            # The one before us died with its channel open; taken up, it is closed with ours.
            await _insist(lambda: btt.session(1))
    say(finished=True, spent=transfer.receipt.spent, fetched=transfer.receipt.fetched_bytes,
        agree=[r.counts_agree for r in btt.receipts])  # fmt: skip


if __name__ == "__main__":

    def ends_with_us() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=ends_with_us, daemon=True).start()
    asyncio.run(_fetch(*sys.argv[1:]))
