"""Child processes of a devnet: started, read, and stopped so that none is ever left.

A child lives on its standard input: we hold the other end and never write, so it ends when this
process does, even by kill -9. Each child is in a process group of its own, because Ctrl-C on a
terminal goes to the whole group and the children are to be stopped in order, by us.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, Final

from btt.sdk.clock import VARIABLE
from btt.sdk.errors import BttError, InternalError

READY_SECONDS: Final = 30.0
STOP_SECONDS: Final = 10.0
_END_SECONDS: Final = 0.5
_TAIL_LINES: Final = 12
COMMAND: Final = (sys.executable, "-m", "btt.sdk.cli")


def environment(clock: Path | None = None) -> dict[str, str]:
    """Returns the environment of a child.

    Args:
        clock: File of the clock that it shares with the devnet, if it takes none as an option.
    """
    # What the user configured for the real network must not reach a devnet.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BTT_")}
    shared = {VARIABLE: str(clock)} if clock is not None else {}
    return {**kept, **shared, "PYTHONUNBUFFERED": "1"}


async def _spawn(
    arguments: tuple[str, ...], log: Path, clock: Path | None = None
) -> asyncio.subprocess.Process:
    with log.open("ab") as errors:
        return await asyncio.create_subprocess_exec(
            *COMMAND,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=environment(clock),
            start_new_session=True,
        )


def tail(log: Path, lines: int = _TAIL_LINES) -> str:
    """Returns the end of a log."""
    try:
        found = log.read_text("utf-8", errors="replace").splitlines()[-lines:]
    except OSError:
        found = []
    return "\n".join(found) or "(it wrote nothing)"


async def run(*arguments: str, log: Path, clock: Path | None = None) -> str:
    """Runs a `btt` command to its end and returns its output.

    Args:
        arguments: The words after `btt`.
        log: File that takes its standard error.
        clock: File of the devnet's clock.

    Raises:
        InternalError: It failed; the text has the last lines of its log.
    """
    process = await _spawn(arguments, log, clock)
    try:
        assert process.stdout is not None
        output = await process.stdout.read()
        code = await process.wait()
    finally:
        await _end(process)
    if code:
        raise InternalError(f"`btt {' '.join(arguments[:2])}` failed ({code}): {tail(log)}")
    return output.decode()


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kills a process that still runs, and waits; safe to be cancelled in."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    if process.stdin is not None:
        process.stdin.close()


class Server:
    """A process that serves until it is stopped.

    Attributes:
        name: For people.
        address: What it said it can be reached at.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.address = ""
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @classmethod
    async def start(cls, name: str, *arguments: str, log: Path) -> Server:
        """Starts a `btt` command that serves, and waits until it is ready.

        Args:
            name: For people.
            arguments: The words after `btt`; the lifeline option is added.
            log: File that takes its standard error.

        Raises:
            InternalError: It did not become ready; the text has the last lines of its log.
        """
        process = await _spawn((*arguments, "--stdin-lifeline"), log)
        server = cls(name, process, log)
        try:
            async with asyncio.timeout(READY_SECONDS):
                server.address = str((await server._ready())["address"])
        except TimeoutError:
            await _end(process)
            raise InternalError(f"The {name} was not ready in {READY_SECONDS:.0f} s: {tail(log)}") from None
        except BaseException:
            await _end(process)
            raise
        return server

    async def _ready(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and found.get("ready"):
                    return found
        await self._process.wait()
        raise InternalError(f"The {self.name} did not start: {tail(self._log)}")

    async def explain(self, error: BttError) -> None:
        """Adds to an error what the process said last, if it has ended by itself."""
        with contextlib.suppress(TimeoutError):
            # Its end may have caused the error a moment ago, and be on its way to us.
            async with asyncio.timeout(_END_SECONDS):
                await self._process.wait()
        if self._process.returncode is not None:
            error.add_note(
                f"The {self.name} had ended ({self._process.returncode}). The end of its log:\n"
                + tail(self._log)
            )

    async def kill(self) -> None:
        """Kills it at once, as a power cut would."""
        await _end(self._process)

    async def stop(self) -> None:
        """Asks it to stop, waits, and kills it when that takes too long or we are cancelled."""
        try:
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.terminate()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STOP_SECONDS):
                        await self._process.wait()
        finally:
            await _end(self._process)
