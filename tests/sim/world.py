"""A world from one seed: its parties, what goes wrong, and until when.

The seam is `grpc.aio` itself. The whole of the ledger (`serve`), of a node (`Node`) and of a client
(`Client`, `LedgerClient`) runs as it is released, on its own SQLite files; only what touches the
outside is exchanged (`outside`): channels, servers and certificates for those of `network`, threads
and executors for those of `machine`, clocks and randomness for those of the seed.
A fake below the product's stubs was chosen over calling its parts by hand, because the parts that
lose money are the orders in which they are called.

Violations do not raise where they are seen, for the product would take them for errors of its own;
they are kept, and the run ends with the first.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import grpc.aio

from btt.sdk.keys import Address, PrivateKey
from btt.sdk.ledger import LedgerAddress
from btt.services.ledger import folder as ledger_folder
from btt.services.ledger import store
from btt.services.ledger.books import Terms
from sim.books import Books, Violation
from sim.machine import Process, Room
from sim.network import Network
from sim.outside import START_MS, outside
from sim.party import Party
from sim.recovery import Loss
from sim.witness import Witness

WINDOW_S = 240
"""Challenge window, and so the longest absence of a node."""
ALIASES = 12
"""Names under which somebody may come again."""
TAIL = 200
TURMOIL_S = 100.0
_TERMS = Terms(min_challenge_ms=WINDOW_S * 1000, min_lifetime_ms=60_000, max_lifetime_ms=3_600_000)


@cache
def key(name: str) -> PrivateKey:
    """Returns the key of a name, the same in every world."""
    return PrivateKey(hashlib.sha256(name.encode()).digest())


class World:
    """One run.

    Args:
        seed: Decides everything.
        root: Empty folder.
        turmoil_s: Virtual seconds during which things go wrong.
        show: Prints the trace as it happens.
    """

    def __init__(self, seed: int, root: Path, *, turmoil_s: float, show: bool = False) -> None:
        self.seed = seed
        self.root = root
        self.random = Random(seed)
        self.turmoil_s = turmoil_s
        self.calm = False
        self.coverage: Counter[str] = Counter()
        self.violation: str | None = None
        self.parties: dict[str, Party] = {}
        self.disks: dict[str, Path] = {}
        self.nodes: list[str] = []
        self.serving: set[str] = set()
        self.vanishing: list[str] = []
        self.harshness = self.random.choice((0.1, 0.3, 0.8))
        """How often a process is born to die early."""
        self.rolled_back = False
        """True while the ledger's folder holds an old copy of its books."""
        self.lost: Loss | None = None
        """What the ledger is being recovered from, while it is."""
        self.recoveries = 0
        self.branched = -1  # the last entry before the last recovery's own
        self._up_s = 0.0
        self._up_since: float | None = None
        self.away_s = 0.0
        """How long the ledger was away, at times that were chosen for it."""
        self.strikes = self.random.choice((1, 2))
        """Failures that a node bans for."""
        self.early_close = self.random.random() < 0.7
        """Whether payers ask for channels that they may close before the lock time."""
        self.owners: dict[bytes, PrivateKey] = {}
        self.plans: list[tuple[Any, int | None]] = []
        self.tail: deque[str] = deque(maxlen=TAIL)
        self._hash = hashlib.sha256()
        self._show = show
        self.room = Room(crashed=self._crashed, committed=self._committed, latency=self._latency)
        self.network = Network(self.room, self.random, self)
        self.disks["ledger"] = root / "ledger" / ledger_folder.DATABASE
        self.operator = key("operator")
        identity = self._make_ledger()
        self.ledger_id = identity.ledger_id
        self.address = LedgerAddress(self.operator.address, "127.0.0.1", 7000, self.ledger_id)
        self.books = Books(self.ledger_id)
        self.witness = Witness(self, identity.genesis)
        self._committed(str(self.disks["ledger"]))

    def ledger_is_up(self, up: bool) -> None:
        """Takes note of when the ledger serves."""
        self._up_s, self._up_since = self.ledger_up_s, self.room.time() if up else None

    @property
    def ledger_up_s(self) -> float:
        """For how long the ledger has been there, all in all."""
        return self._up_s + (0.0 if self._up_since is None else self.room.time() - self._up_since)

    @property
    def tight(self) -> bool:
        """True while half a challenge window or less is left of any."""
        late = self.now_ms() + WINDOW_S * 500
        return any(0 < line.deadline < late and not line.closed for line in self.books.channels.values())

    def _make_ledger(self) -> Any:
        folder = self.root / "ledger"
        folder.mkdir()
        (folder / ledger_folder.OPERATOR_KEY).write_text(self.operator.secret.hex())
        (folder / ledger_folder.TLS_KEY).write_bytes(b"key")
        (folder / ledger_folder.CERTIFICATE).write_bytes(b"ledger")
        return store.create(
            self.disks["ledger"],
            name="sim",
            operator_key=self.operator,
            supply_to=key("bank").address,
            amount=10**12,
            clock=lambda: START_MS,
            random=self.random.randbytes,
            terms=_TERMS,
        )

    # Time, luck, and what is written down

    def address_of(self, name: str) -> Address:
        """Returns the account of somebody."""
        return key(name).address

    def is_of(self, name: str, account: Address) -> bool:
        """Says whether an account is somebody's, under whatever name."""
        aliases = (name, *(f"{name}{n}" for n in range(ALIASES)))
        return any(key(alias).address == account for alias in aliases)

    def now_ms(self) -> int:
        return START_MS + int(self.room.time() * 1000)

    def later(self, delay: float, do: Callable[[], Any]) -> None:
        self.network.later(delay, do)

    def _latency(self) -> float:
        return self.random.random() * (0.2 if self.random.random() < 0.1 else 0.002)

    def trace(self, who: str, what: str) -> None:
        line = f"{self.room.time():10.3f} {who:10} {what}"
        self._hash.update(line.encode())
        self.tail.append(line)
        if self._show:
            print(line)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def violated(self, what: str) -> None:
        if self.violation is None:
            self.violation = what
            self.trace("!", what)

    def _crashed(self, process: Process, where: str) -> None:
        self.trace(process.name, f"dies {where}")
        self.coverage[f"{process.name.rstrip('0123456789')}: {where}"] += 1

    def _guarded(self, check: Callable[..., None], *args: Any) -> None:
        try:
            check(*args)
        except Violation as error:
            self.violated(str(error))

    def _committed(self, path: str) -> None:
        self._guarded(self.witness.committed, path)

    # What the network's tap sees

    def asked(self, call: Any, data: bytes) -> None:
        self._guarded(self.witness.asked, call, data)

    def answered(self, call: Any, server: Process, data: bytes) -> None:
        self._guarded(self.witness.answered, call, server, data)

    def heard(self, call: Any, data: bytes) -> None:
        self._guarded(self.witness.heard, call, data)

    def failed(self, call: Any, server: Process, code: grpc.StatusCode, text: str) -> None:
        self._guarded(self.witness.failed, call, server, code, text)

    # Parties

    def add(self, name: str, main: Any, *, disk: str = "", honest: bool = True, mortal: bool = True) -> Party:
        party = self.parties[name] = Party(self, name, main, mortal=mortal)
        party.files.mkdir(exist_ok=True)
        if disk:
            self.disks[name] = party.files / disk
        if honest:
            self.witness.honest.add(name)
        return party

    def run(self, scenario: Coroutine[Any, Any, None]) -> None:
        """Runs a scenario to its end.

        Raises:
            Violation: Something that must hold did not.
        """
        with outside(self):
            try:
                self.room.run_until_complete(scenario)
            except Violation as error:
                self.violated(str(error))
            finally:
                self.witness.close()
                for party in self.parties.values():
                    party.gone = True
                    party.kill()
                self.room.bury()
        if self.violation is None and self.room.failures:
            self.violated(self.room.failures[0])
        if self.violation is not None:
            raise Violation(self.violation)

    async def until(self, done: Callable[[], bool], *, most_s: float) -> bool:
        """Waits for something, looking once a second; also ends with a violation."""
        end = self.room.time() + most_s
        while not done() and self.violation is None and self.room.time() < end:  # noqa: ASYNC110 - virtual
            await asyncio.sleep(1)
        if self.violation is not None:
            raise Violation(self.violation)
        return done()


class Outcome(SimpleNamespace):
    """What a run came to: seed, digest, violation or None, tail, coverage, steps, seconds."""


def play(seed: int, *, turmoil_s: float = TURMOIL_S, show: bool = False) -> Outcome:
    """Plays one seed from its beginning to its end."""
    from sim.story import story

    gc.freeze()  # what was there before is not looked at when the run is thrown away
    start = time.process_time()
    shm = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="btt-sim-", dir=shm) as root:
        world = World(seed, Path(root), turmoil_s=turmoil_s, show=show)
        with suppress(Violation):
            world.run(story(world))
    gc.unfreeze()
    return Outcome(
        seed=seed,
        digest=world.digest,
        violation=world.violation,
        tail=list(world.tail),
        coverage=world.coverage,
        steps=world.room.steps,
        entries=world.books.seq,
        seconds=time.process_time() - start,
    )
