"""Somebody in a world: a name, files that stay, and a process that comes and goes."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable, Coroutine
from contextlib import closing
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from sim.machine import Process

if TYPE_CHECKING:
    from sim.world import World


class Party:
    """Somebody: a name, files, and what its process does when it runs.

    Args:
        world: Where.
        name: One word.
        main: What it does; run again after each death.
        files: Its folder; it stays.
    """

    def __init__(
        self,
        world: World,
        name: str,
        main: Callable[[Party], Coroutine[Any, Any, None]],
        *,
        mortal: bool = True,
    ) -> None:
        self.world = world
        self.name = name
        self.files = world.root / name
        self.mortal = mortal
        self.gone = False
        self.stop = asyncio.Event()
        self.process: Process | None = None
        self.skew_ms = 0
        self.away_until = 0.0
        """Room time before which it does not start."""
        self._main = main
        self._copies: list[Path] = []
        self._left_behind: set[Path] = set()

    def clock(self) -> int:
        return self.world.now_ms() + self.skew_ms

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.alive

    def start(self) -> None:
        if self.running or self.gone or self.world.room.time() < self.away_until:
            return
        self.stop = asyncio.Event()
        self.process = Process(self.name, self.world.room, self._died)
        quiet = self.world.calm or self.world.tight
        wrong = not self.world.calm and self.world.random.random() < 0.25
        self.skew_ms = self.world.random.randint(-2000, 2000) if wrong else 0
        if self.mortal and not quiet and self.world.random.random() < self.world.harshness:
            self.process.fuse = self.world.random.randint(1, 150)
        self.world.trace(self.name, "starts")
        self.process.spawn(self._run(self.process))

    async def _run(self, process: Process) -> None:
        try:
            await self._main(self)
        except Exception as error:  # noqa: BLE001 - nothing may end a party but its death
            if process.alive:
                self.world.violated(f"{self.name} fails with {error!r}")
        else:
            self.world.trace(self.name, "ends")
        finally:
            if process.alive:
                # An orderly end: its tasks are done, its files are closed.
                process.alive = False
                self.gone = self.world.calm and self.name not in self.world.serving
                self._died(process)

    def _died(self, process: Process) -> None:
        self.world.network.died(process)
        if self.name == "ledger":
            self.world.ledger_is_up(False)
        self.world.witness.lives[self.name] += 1
        if not self.gone:
            self.world.later(self.world.random.uniform(0.5, 15), self.start)

    def kill(self) -> None:
        if self.process is not None and self.process.alive:
            self.world.trace(self.name, "is killed")
            self.process.kill()

    def leave(self, seconds: float) -> None:
        """Goes away for so long; nothing of it runs meanwhile."""
        self.kill()
        self.world.trace(self.name, f"is away for {seconds:.0f} s")
        self.away_until = self.world.room.time() + seconds
        self.world.later(seconds, self.start)

    # Old copies

    def copy(self) -> None:
        """Takes a copy of the party's books, as a backup at this moment would."""
        source = self.world.disks[self.name]
        if not source.exists():
            return
        target = self.world.root / f"{self.name}.copy{len(self._copies)}"
        with sqlite3.Connection(source) as old, sqlite3.Connection(target) as new:
            old.backup(new)
        old.close()
        new.close()
        self._copies.append(target)
        self.world.trace(self.name, "is copied")

    def backup(self, random: Random) -> Path | None:
        """Returns one of the copies that were taken, or None."""
        standing = [copy for copy in self._copies if copy not in self._left_behind]
        return random.choice(standing) if standing else None

    def leave_behind(self, last_seq: int) -> None:
        """No copy of the ledger's books that goes beyond an entry is a backup any more.

        A recovery went back behind it, and the history went on otherwise.
        """
        for copy in self._copies:
            with closing(sqlite3.connect(copy)) as books:
                [(head,)] = books.execute("SELECT max(seq) FROM entries")
            if head > last_seq:
                self._left_behind.add(copy)

    def put_back(self) -> Path | None:
        """Exchanges the books for an old copy; the party does not run.

        Returns:
            Where the newer books are kept, or None if there was no copy.
        """
        if not self._copies:
            return None
        books = self.world.disks[self.name]
        self.world.witness.leave(self.name)
        aside = books.with_name("aside.db")
        with sqlite3.Connection(books) as old:
            old.execute("PRAGMA journal_mode = DELETE").fetchall()
        old.close()
        books.replace(aside)
        shutil.copy(self.world.random.choice(self._copies), books)
        self.world.trace(self.name, "has its books put back")
        return aside
