"""kill -9 of client, node and ledger at random moments of a real fetch; then every book is opened.

Bounds, from the rules of the session. A crash costs the payer at most one verify unit that was
prepaid and not yet used. It costs the node at most what it lent at that moment (5 % of what was paid
before, or the one unit of a newcomer) and what it may write off.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerAddress, LedgerClient
from btt.sdk.money import Rate
from btt.sdk.wallet import Keystore
from kit import chaos
from kit.chaos import Process

pytest.importorskip("libtorrent", reason="the node's parts are not installed")

from btt.node.folder import NodeFolder

MIB = 1 << 20
SIZE = 160 * MIB + 12345
RATE = Rate.parse("1 BTT / GiB")
UNIT = RATE.owed(MIB)
COST = RATE.owed(SIZE)
KILLS = 4
FUNDS = 10**9
BTT = ("-m", "btt.sdk.cli")


@dataclass
class World:
    """A ledger, a node that serves one file, and a wallet; all on disk, all to be killed."""

    root: Path
    ledger: Process
    node: Process
    ledger_address: str
    node_address: str
    faucet: PrivateKey
    infohash: str
    source: Path

    def wallet(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir()
        keystore = Keystore.create(folder / "wallet.json", "")
        self.ask(lambda ledger: ledger.transfer(self.faucet, keystore.key().public.address, FUNDS))
        return folder

    def ask(self, question):
        async def run():
            async with LedgerClient.connect(LedgerAddress.parse(self.ledger_address)) as ledger:
                return await question(ledger)

        return asyncio.run(run())


def run(*words: str, log: Path) -> list[dict]:
    process = Process(*BTT, *words, "--json", log=log).start()
    found = list(process.lines())
    assert process.wait() == 0, log.read_text()
    return found


def port_of(address: str) -> str:
    return "127.0.0.1:" + address.split("@127.0.0.1:")[1].partition("/")[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("chaos")
    log, faucet = root / "log", PrivateKey.generate()
    source = root / "film.bin"
    source.write_bytes(random.Random(7).randbytes(SIZE))
    run(
        "ledger", "init", str(root / "ledger"), "--name", "chaos", "--supply-to", str(faucet.address), log=log
    )
    serve = (*BTT, "ledger", "serve", str(root / "ledger"), "--stdin-lifeline", "--listen")
    ledger = Process(*serve, "127.0.0.1:0", log=log)
    node = None
    try:
        ledger_address = ledger.ready()
        run("node", "init", str(root / "node"), "--ledger", ledger_address, "--listen", "127.0.0.1:0",
            "--content-price", "1 BTT / GiB", log=log)  # fmt: skip
        start = (*BTT, "node", "start", str(root / "node"), "--stdin-lifeline")
        node = Process(*start, log=log)
        node_address = node.ready()
        [published] = run("content", "publish", str(source), "--node", str(root / "node"), log=log)
        # From now on both come back at the address they have.
        ledger._command[-1] = port_of(ledger_address)
        config = root / "node" / "node.toml"
        config.write_text(config.read_text().replace("127.0.0.1:0", port_of(node_address)))
        yield World(root, ledger, node, ledger_address, node_address, faucet, published["infohash"], source)
    finally:
        for process in (node, ledger):
            if process is not None:
                process.kill()


def fetch_under_fire(world: World, victims: list[str], wallet: Path, dest: Path, dice: random.Random) -> None:
    """Fetches, and kills one of the victims at each of some random points, the last one at the end.

    A client that was killed is run again; any other kill the same client must ride out.
    """
    client = Process(
        chaos.__file__, world.node_address, world.ledger_address, str(wallet), "10 BTT", world.infohash,
        str(dest), log=world.root / "log",
    )  # fmt: skip
    points = sorted(dice.choice([0, dice.randrange(SIZE), dice.randrange(SIZE)]) for _ in range(KILLS - 1))
    plan = [(point, dice.choice(victims)) for point in [*points, SIZE]]
    print(f"plan: {[(f'{point / SIZE:.0%}', victim) for point, victim in plan]}")
    servers = {"node": (world.node, world.node_address), "ledger": (world.ledger, world.ledger_address)}
    last: dict = {}
    try:
        while not last.get("finished"):
            killed = False
            client.start()
            for last in client.lines():
                while plan and not killed and last.get("done", -1) >= plan[0][0]:
                    _, victim = plan.pop(0)
                    if victim == "client":
                        killed = True
                        break
                    process, address = servers[victim]
                    process.kill()
                    # The client runs on while it is away, and is there when it comes back.
                    assert process.ready() == address
                if killed:
                    break
            if killed:
                client.kill()
                continue
            code = client.wait()
            assert code == 0, f"{last}\n{(world.root / 'log').read_text()[-3000:]}"
            assert last.get("finished"), "it ended well, and said nothing"
    finally:
        client.kill()
    assert not plan, "every kill happened"
    assert all(last["agree"])


@pytest.mark.parametrize(
    "victims", [["client"], ["node"], ["ledger"], ["client", "node", "ledger"]], ids="-".join
)
def test_a_fetch_survives_kill_9_and_every_book_adds_up(
    world: World, victims: list[str], tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    name = "-".join(victims)
    wallet = world.wallet(f"wallet-{name}")
    folder = NodeFolder.open(world.root / "node")
    earned_before = world.ask(lambda ledger: ledger.account(folder.payee_key)).available
    account = Keystore.open(wallet / "wallet.json", "").key()

    fetch_under_fire(world, victims, wallet, tmp_path, random.Random(seed))

    # What the node could not finish while the ledger was away it finishes when it stops.
    assert world.node.terminate() == 0
    assert world.node.ready() == world.node_address

    assert (tmp_path / "film.bin").read_bytes() == world.source.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["film.bin"]
    totals = world.ask(lambda ledger: ledger.totals())
    assert totals.issued == totals.accounts + totals.channels
    # Three books about the same channels: the wallet's, the node's, the ledger's.
    ours = {
        channel: (signed, deposit)
        for channel, signed, deposit in rows(
            wallet / "payer.db", "SELECT channel_id, signed, deposit FROM channels"
        )
    }
    theirs = rows(
        world.root / "node" / "payments.db",
        "SELECT channel_id, best, capture, written_off, state FROM channels WHERE payer = ?",
        account.public.address.data,
    )
    paid = captured = unclosed = written_off = 0
    for channel, best, capture, excused, state in theirs:
        signed, deposit = ours[channel]
        on_ledger = world.ask(lambda ledger, c=channel: ledger.channel(c, account))
        if state == "closed":
            assert on_ledger.captured == capture <= best <= signed
            captured += capture
        else:
            # Its client died when it was used up, so nobody came back to it: the node closes it in time.
            assert state == "open"
            assert best <= signed == deposit == on_ledger.deposit
            unclosed += deposit
        paid += best if capture is None else capture
        written_off += excused
    earned = world.ask(lambda ledger: ledger.account(folder.payee_key)).available - earned_before
    assert earned == captured, "the node earned what the ledger paid it"
    spent = FUNDS - world.ask(lambda ledger: ledger.account(account)).available
    assert spent == captured + unclosed
    print(f"cost {COST} paid {paid} written off {written_off}")
    # Nothing is paid twice, and nobody loses more than the bounds say.
    assert paid <= COST + KILLS * UNIT
    lent = max(UNIT, COST * 5 // 100)
    allowance = max(UNIT, COST // 100)
    assert paid >= COST - KILLS * (lent + allowance)
    if victims == ["ledger"]:
        assert paid == COST


def rows(path: Path, query: str, *arguments: object) -> list[tuple]:
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return db.execute(query, arguments).fetchall()
    finally:
        db.close()
