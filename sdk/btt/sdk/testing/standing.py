"""A devnet that stands: its processes live on when the command that started them has ended.

Every process holds a lock on a file of its own, which it got from whoever started it and which
only its end releases. So a process that lives is known for certain, whatever became of its process
id, and no other process is ever signalled in its place.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from btt.sdk.clock import VARIABLE, SharedClock
from btt.sdk.errors import BttError, ConfigError, InternalError, StorageError
from btt.sdk.keys import Address
from btt.sdk.money import Amount
from btt.sdk.testing import layout, processes
from btt.sdk.wallet import Keystore

PURSE: Final = Amount.parse("1000 BTT")
"""What the wallet of a new devnet holds."""
_STATE: Final = "devnet.json"
_FAUCET: Final = "faucet.json"
_LOOK_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class Part:
    """The ledger or a node of a devnet.

    Attributes:
        name: "ledger", "node-1" and so on.
        pid: Its process.
        address: Where it is reached.
        running: Whether it lives.
        stopped: It is a node, was told to stop, and did.
        last_words: The last line of its log, if it does not live.
    """

    name: str
    pid: int
    address: str
    running: bool
    stopped: bool = False
    last_words: str = ""


class StandingDevnet:
    """A devnet in a folder.

    Args:
        folder: Of the devnet; made by `up`, removed by `down`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def exists(self) -> bool:
        """Whether there is a devnet, though some of it may have crashed."""
        return (self.folder / _STATE).exists()

    def environment(self) -> dict[str, str]:
        """Returns the variables by which a dApp finds the devnet."""
        parts = self.parts()
        return {
            "BTT_LEDGER": parts[0].address,
            "BTT_NODES": ",".join(part.address for part in parts[1:]),
            "BTT_WALLET": str(self.folder / "wallet"),
            VARIABLE: str(self.folder / layout.CLOCK),
        }

    def parts(self) -> list[Part]:
        """Returns the ledger and the nodes, as they are now.

        Raises:
            ConfigError: There is no devnet.
        """
        found = []
        # In the order of their names, whichever started first: "ledger", "node-1", "node-2" ... "node-10".
        for name, kept in sorted(self._state().items(), key=lambda part: (len(part[0]), part[0])):
            running = self._is_running(name)
            words = "" if running else processes.tail(self.folder / f"{name}.log", 1)
            stopped = not running and layout.has_stopped(self.folder / name)
            found.append(Part(name, kept["pid"], kept["address"], running, stopped, words))
        if len(found) < 2:
            raise ConfigError("The devnet was never finished.", hint="Remove it: btt devnet down.")
        return found

    @property
    def clock(self) -> SharedClock:
        """The time of the devnet."""
        self._state()
        return SharedClock(self.folder / layout.CLOCK)

    # Up

    async def up(self, *, nodes: int | None = None, services: Sequence[str] = ()) -> None:
        """Starts what does not run; does nothing if all of it does.

        Args:
            nodes: How many; if not given, those that there are, or one.
            services: Installed services that the nodes offer beside content.

        Raises:
            ConfigError: The folder holds something else, or another number of nodes.
            InternalError: A process did not start; nothing of a new devnet is left.
        """
        with self._alone():
            if self.exists:
                kept = self._state()
                there = len(kept) - 1
                if nodes not in (None, there):
                    raise ConfigError(
                        f"The devnet in {self.folder} has {there} node{'s' * (there != 1)}, not {nodes}.",
                        hint=f"Say --nodes {there} or nothing, or end it first: btt devnet down.",
                    )
                await self._restart(kept)
                return
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ConfigError(f"{self.folder} is not empty.", hint="Choose another --dir.")
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                await self._make(nodes or 1, services)
            except BaseException:
                self._end(self._state_or_none())
                raise

    async def _make(self, nodes: int, services: Sequence[str]) -> None:
        folder = self.folder
        SharedClock.create(folder / layout.CLOCK)
        self._save({})
        faucet = Keystore.create(folder / _FAUCET, "").key()
        (folder / "wallet").mkdir(mode=0o700)
        wallet = Keystore.create(folder / "wallet" / "wallet.json", "")
        await self._command(*layout.make_ledger(folder, faucet.public.address))
        ledger = await self._start("ledger", layout.serve_ledger(folder))
        await layout.fund(ledger, faucet, wallet.address, PURSE)
        sections: dict[str, dict[str, Any]] = {name: {"enabled": True} for name in ("content", *services)}

        async def start(node: Path) -> None:
            await self._command(*layout.make_node(node, ledger))
            layout.configure(node, sections)
            await self._start(node.name, layout.serve_node(folder, node))

        try:
            async with asyncio.TaskGroup() as group:
                for node in layout.node_folders(folder, nodes):
                    group.create_task(start(node))
        except* BttError as failed:
            raise failed.exceptions[0] from None

    async def _restart(self, kept: dict[str, Any]) -> None:
        for name, part in kept.items():
            if self._is_running(name):
                continue
            # It comes back where it was, for its address is known by then.
            listen = part["address"].partition("@")[2].partition("/")[0]
            if name == layout.LEDGER:
                await self._start(name, layout.serve_ledger(self.folder, listen))
            else:
                words = layout.serve_node(self.folder, self.folder / name)
                await self._start(name, words, BTT_NODE__NODE__LISTEN=listen)

    async def _command(self, *words: str) -> str:
        return await processes.run(*words, log=self.folder / "made.log")

    async def _start(self, name: str, words: Sequence[str], **environment: str) -> str:
        """Starts a process that outlives this one, and waits until it is ready."""
        output, log = (self.folder / f"{name}.{kind}" for kind in ("out", "log"))
        process = self._spawn(name, words, environment, output, log)
        deadline = time.monotonic() + processes.READY_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            if address := _ready(output):
                self._save({**self._state(), name: {"pid": process.pid, "address": address}})
                return address
            await asyncio.sleep(_LOOK_S)
        raise InternalError(f"The {name} did not start: {processes.tail(log)}")

    def _spawn(
        self, name: str, words: Sequence[str], environment: dict[str, str], output: Path, log: Path
    ) -> subprocess.Popen[bytes]:
        lock = os.open(self._lock(name), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with output.open("wb") as out, log.open("ab") as errors:
                process = subprocess.Popen(  # noqa: S603 - our own program
                    [*processes.COMMAND, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=errors,
                    env={**processes.environment(), **environment},
                    pass_fds=(lock,),
                    start_new_session=True,
                    cwd=self.folder,
                )
        finally:
            os.close(lock)
        # Known before anything else can happen, so that `down` finds it.
        state = self._state()
        self._save({**state, name: {"address": "", **state.get(name, {}), "pid": process.pid}})
        return process

    # Everything else

    async def fund(self, address: Address | str, amount: Amount | str) -> None:
        """Gives an account money of the devnet.

        Args:
            address: Of the account.
            amount: Such as "5 BTT", or base units.
        """
        ledger = self.parts()[0].address
        await layout.fund(ledger, Keystore.open(self.folder / _FAUCET, "").key(), address, amount)

    def down(self) -> None:
        """Ends all processes and removes the folder; nodes settle while the ledger still answers.

        Raises:
            ConfigError: There is no devnet.
        """
        with self._alone():
            self._end(self._state())

    def _end(self, state: dict[str, Any]) -> None:
        nodes = {name: part for name, part in state.items() if name != layout.LEDGER}
        for group in (nodes, {name: part for name, part in state.items() if name == layout.LEDGER}):
            self._signal(group, signal.SIGTERM)
            deadline = time.monotonic() + 2 * processes.STOP_SECONDS
            while self._any_running(group) and time.monotonic() < deadline:
                time.sleep(_LOOK_S)
            self._signal(group, signal.SIGKILL)
            while self._any_running(group):
                time.sleep(_LOOK_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _signal(self, parts: dict[str, Any], number: int) -> None:
        for name, part in parts.items():
            if self._is_running(name):
                with suppress(ProcessLookupError):
                    os.kill(part["pid"], number)

    def _any_running(self, parts: dict[str, Any]) -> bool:
        return any(self._is_running(name) for name in parts)

    def _is_running(self, name: str) -> bool:
        try:
            lock = os.open(self._lock(name), os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        else:
            return False
        finally:
            os.close(lock)

    def _lock(self, name: str) -> Path:
        return self.folder / f"{name}.lock"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lets one command at a time change the devnet; the lock lies beside its folder."""
        path = self.folder.with_name(self.folder.name + ".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            if not self.exists:
                path.unlink(missing_ok=True)
            os.close(lock)

    def _state(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / _STATE).read_text("utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"There is no devnet in {self.folder}.", hint="Start one: btt devnet up."
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.folder / _STATE} cannot be read: {error}.") from None
        assert isinstance(found, dict)
        return found

    def _state_or_none(self) -> dict[str, Any]:
        return self._state() if self.exists else {}

    def _save(self, state: dict[str, Any]) -> None:
        unfinished = self.folder / f"{_STATE}.new"
        unfinished.write_text(json.dumps(state), "utf-8")
        unfinished.rename(self.folder / _STATE)


def _ready(output: Path) -> str:
    for line in output.read_text("utf-8").splitlines(keepends=True):
        with suppress(ValueError):
            found = json.loads(line) if line.endswith("\n") else None
            if isinstance(found, dict) and found.get("ready"):
                return str(found["address"])
    return ""


def as_json(devnet: StandingDevnet) -> dict[str, Any]:
    """Returns what `btt devnet status --json` says."""
    parts = devnet.parts()
    clock = devnet.clock
    return {
        "folder": str(devnet.folder),
        "running": all(part.running for part in parts),
        "time_ms": clock(),
        "ahead_ms": clock.offset_ms,
        "ledger": asdict(parts[0]),
        "nodes": [asdict(part) for part in parts[1:]],
        "environment": devnet.environment(),
    }
