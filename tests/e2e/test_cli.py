"""The commands as a person and a script use them, against a devnet."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import random
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from btt.sdk.errors import BttError, ConfigError, InternalError
from btt.sdk.money import Amount
from btt.sdk.testing import Devnet

pytest.importorskip("libtorrent", reason="the node's parts are not installed")

# One devnet serves all tests here; each has a wallet of its own.
pytestmark = pytest.mark.asyncio(loop_scope="module")

BTT = [sys.executable, "-m", "btt.sdk.cli"]
MIB = 2**20


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Person:
    """Somebody with a home folder, who types commands."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.variables: dict[str, str] = {}

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("BTT_", "XDG_"))}
        return {**kept, "HOME": str(self.home), "PYTHONUNBUFFERED": "1", **self.variables}

    async def start(self, *words: str, stdin: int = asyncio.subprocess.DEVNULL) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *BTT, *words, stdin=stdin, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            cwd=self.home, env=self.environment(),
        )  # fmt: skip

    async def btt(self, *words: str) -> Done:
        process = await self.start(*words)
        out, err = await process.communicate()
        assert b"Traceback" not in err, err.decode()
        assert process.returncode is not None
        return Done(process.returncode, out.decode(), err.decode())


@pytest.fixture
def person(tmp_path: Path) -> Person:
    (tmp_path / "home").mkdir()
    return Person(tmp_path / "home")


@dataclass
class Market:
    """A devnet with content, and a person who can pay."""

    net: Devnet
    person: Person
    infohash: str
    data: bytes

    async def balance(self) -> int:
        done = await self.person.btt("wallet", "balance", "--json")
        return int(done.json["balance"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def net() -> AsyncIterator[Devnet]:
    async with Devnet(nodes=2) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def market(net: Devnet, person: Person, tmp_path: Path) -> Market:
    data = random.Random(1).randbytes(8 * MIB + 5)
    source = tmp_path / "film.bin"
    source.write_bytes(data)
    made = await person.btt("wallet", "create", "--no-password", "--json")
    await net.fund(made.json["address"], "10 BTT")
    person.variables |= {"BTT_NODES": net.node_address, "BTT_LEDGER": net.ledger_address}
    published = await person.btt("content", "publish", str(source), "--node", str(net.node_folder), "--json")
    return Market(net, person, published.json["infohash"], data)


async def test_a_wallet_is_made_once_and_shows_its_words_once(person: Person) -> None:
    made = await person.btt("wallet", "create")
    assert made.code == 0
    assert made.err.startswith("warning: The wallet has no password")
    words = next(line for line in made.out.splitlines() if line.startswith("Words")).split()[1:]
    assert len(words) == 12
    (file,) = person.home.rglob("wallet.json")
    assert not any(" ".join(words[at : at + 2]) in file.read_text() for at in range(11))
    assert file.stat().st_mode & 0o077 == 0

    address = await person.btt("wallet", "address")
    assert address.out.strip() in made.out
    assert (await person.btt("wallet", "address", "--json")).json == {"address": address.out.strip()}

    again = await person.btt("wallet", "create", "--json")
    assert again.code == 3
    assert "already" in again.json["error"]["message"]
    assert again.err.startswith("error: ")


async def test_a_password_protects_the_wallet(person: Person) -> None:
    person.variables["BTT_WALLET_PASSWORD"] = "correct horse"
    made = await person.btt("wallet", "create")
    assert (made.code, made.err) == (0, "")
    assert (await person.btt("wallet", "address")).code == 0
    person.variables["BTT_WALLET_PASSWORD"] = "wrong"
    assert (await person.btt("wallet", "address")).code == 3
    del person.variables["BTT_WALLET_PASSWORD"]
    unasked = await person.btt("wallet", "address")
    assert unasked.code == 3
    assert "BTT_WALLET_PASSWORD" in unasked.err


async def test_a_wallet_of_ones_own_choice(person: Person) -> None:
    person.variables["BTT_WALLET"] = "purse"
    assert (await person.btt("wallet", "create")).code == 0
    assert (person.home / "purse" / "wallet.json").exists()
    assert (await person.btt("wallet", "address", "--wallet", "other")).code == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("wallet", "balance", "--ledger", "nowhere"), "btt-ledger"),
        (("ledger", "status", "foo"), "btt-ledger"),
        (("ledger", "init", "books", "--name", "x", "--min-challenge", "3600"), "--min-challenge"),
        (("peers", "ban", "192.0.2.1", "--for", "0s"), "--for"),
        (("content", "quote", "123"), "INFOHASH"),
        (("content", "fetch", "00" * 32), "--budget"),
        (("content", "fetch", "00" * 32, "--budget", "five"), "--budget"),
        (("content", "fetch", "00" * 32, "--budget", "5 BTT", "--from", "btt://x"), "--from"),
    ],
)
async def test_what_cannot_be_read_is_a_usage_error(
    person: Person, words: tuple[str, ...], says: str
) -> None:
    person.variables |= {"BTT_NODES": "127.0.0.1:1", "BTT_LEDGER": "btt-ledger://x"}
    done = await person.btt(*words)
    assert done.code == 2
    assert says in done.err


async def test_publishing_needs_a_node(person: Person) -> None:
    (person.home / "file").write_bytes(b"data")
    done = await person.btt("content", "publish", "file", "--json")
    assert done.code == 3
    assert "btt node init" in done.json["error"]["hint"]


async def test_a_port_that_is_taken_is_told_in_one_line(net: Devnet, person: Person) -> None:
    taken = net.node_address.partition("@")[2]
    assert (
        await person.btt("node", "init", "n", "--ledger", net.ledger_address, "--listen", taken)
    ).code == 0
    done = await person.btt("node", "start", "n")
    assert done.code == 3
    *log, told = done.err.splitlines()
    assert told.startswith(f"error: The node cannot listen on {taken}. ")
    assert all(json.loads(line)["level"] == "info" for line in log), "nothing of gRPC's before it"


def address_of(node: str) -> str:
    return node.removeprefix("btt://").partition("@")[0]


async def test_a_node_buys_content_sells_it_on_and_drops_it(market: Market) -> None:
    net, person = market.net, market.person
    first, second = net.node_addresses
    folder = str(net.node_folders[1])
    cost = -(-len(market.data) * 10**6 // 2**30)
    bought = await person.btt(
        "content", "add", market.infohash, "--node", folder, "--from", first, "--budget", "1 BTT", "--yes"
    )
    assert bought.code == 0, bought.err
    assert "On sale at this node" in bought.out
    assert await market.balance() == 10_000_000 - cost
    listed = await person.btt("content", "ls", "--node", folder, "--json")
    [entry] = [entry for entry in listed.json if entry["infohash"] == market.infohash]
    place = Path(entry["source"])
    assert place.read_bytes() == market.data
    assert market.infohash in (await person.btt("content", "ls", "--node", folder)).out

    person.variables["BTT_NODES"] = f"{first},{second}"
    quoted = await person.btt("content", "quote", market.infohash, "--json")
    assert {node["node"] for node in quoted.json["nodes"]} == {address_of(first), address_of(second)}
    done = await person.btt(
        "content", "fetch", market.infohash, "--budget", "1 BTT", "--dest", "in", "--yes", "--json"
    )
    assert done.code == 0, done.err
    assert (person.home / "in" / "film.bin").read_bytes() == market.data
    assert sum(node["bytes"] for node in done.json["nodes"]) == len(market.data)
    assert done.json["unsettled"] == {}

    assert (await person.btt("content", "rm", market.infohash, "--node", folder)).code == 0
    assert not place.exists()
    gone = await person.btt("content", "rm", market.infohash, "--node", folder, "--json")
    assert (gone.code, gone.json["error"]["reason"]) == (6, "CONTENT_UNKNOWN")
    quoted = await person.btt("content", "quote", market.infohash)
    assert f"{second}, without this content" in quoted.out


async def test_no_node_can_serve_it_and_the_command_says_why_for_each(market: Market) -> None:
    net, person = market.net, market.person
    person.variables["BTT_NODES"] = ",".join(
        [*net.node_addresses, "btt://TVKu5aKY5ihcxmcnCmsdHYBW1aw6BLuD2v@127.0.0.1:1"]
    )
    words = ("content", "quote", "ab" * 32)
    failed = await person.btt(*words, "--json")
    assert failed.code == 6
    assert failed.json["error"]["counts"] == {"without this content": 2, "unreachable": 1}
    assert len(failed.json["error"]["rejections"]) == 3
    told = await person.btt(*words)
    assert "2 without this content, 1 unreachable" in told.err
    assert all(f"{node} is without this content" in told.err for node in net.node_addresses)


async def test_quote_fetch_resume_and_balance(market: Market) -> None:
    person = market.person
    cost = -(-len(market.data) * 10**6 // 2**30)
    assert await market.balance() == 10_000_000

    quoted = await person.btt("content", "quote", market.infohash, "--json")
    assert quoted.json == {
        "infohash": market.infohash, "name": "film.bin", "files": 1, "total_bytes": len(market.data),
        "rate": "1 BTT / GiB", "cost": str(cost), "rejections": [],
        "nodes": [{"node": address_of(market.net.node_address), "rate": "1 BTT / GiB"}],
    }  # fmt: skip
    shown = await person.btt("content", "quote", f"magnet:?xt=urn:btmh:1220{market.infohash}")
    assert str(Amount(cost)) in shown.out

    done = await person.btt("content", "fetch", market.infohash, "--budget", "1 BTT", "--dest", "in", "--yes")
    assert done.code == 0, done.err
    assert (person.home / "in" / "film.bin").read_bytes() == market.data
    assert f"Paid   {Amount(cost)} for 8.0 MiB" in done.out
    assert "100 %" in done.out
    assert await market.balance() == 10_000_000 - cost

    again = await person.btt(
        "content", "fetch", market.infohash, "--budget", "1 BTT", "--dest", "in", "--yes", "--json"
    )
    assert again.json["fetched_bytes"] == 0
    assert again.json["paid"] == "0"
    assert await market.balance() == 10_000_000 - cost
    totals = await market.net.ledger_totals()
    assert totals.is_conserved
    assert totals.open_channels == 0


async def test_a_budget_that_is_too_small_keeps_what_it_bought(market: Market) -> None:
    words = ("content", "fetch", market.infohash, "--yes", "--json", "--dest", "in", "--budget")
    short = await market.person.btt(*words, "0.004 BTT")
    assert short.code == 5
    assert short.json["error"]["reason"] == "BUDGET_EXCEEDED"
    spent = 10_000_000 - await market.balance()
    assert 0 < spent <= 4000
    told = short.json["error"]
    assert int(told["paid"]) == spent
    assert f"Paid   {Amount(spent)} for {told['fetched_bytes'] / MIB:.1f} MiB\n" in short.err

    # Another process goes on by what the first one printed alone: it names content, nodes and price.
    words = shlex.split(short.err.partition("To go on: btt ")[2].splitlines()[0])
    assert words[:4] == ["content", "fetch", "--resume", told["resume"]]
    assert words[4:] == ["--dest", "in", "--budget", "0.004 BTT"]
    del market.person.variables["BTT_NODES"]
    rest = await market.person.btt(*words[:-1], "1 BTT", "--yes", "--json")
    assert rest.code == 0, rest.err
    assert 0 < rest.json["fetched_bytes"] < len(market.data)
    assert (market.person.home / "in" / "film.bin").read_bytes() == market.data


async def test_what_was_chosen_is_chosen_again_to_go_on(market: Market) -> None:
    person, net = market.person, market.net
    made = await person.btt("wallet", "create", "--wallet", "purse", "--no-password", "--json")
    assert made.err == "", "it was said"
    await net.fund(made.json["address"], "1 BTT")
    chosen = ["--from", net.node_address, "--ledger", net.ledger_address, "--wallet", "purse"]
    words = ("content", "fetch", market.infohash, *chosen, "--budget", "0.004 BTT", "--dest", "in", "--yes")
    short = await person.btt(*words)
    assert short.code == 5
    again = shlex.split(short.err.partition("To go on: btt ")[2].splitlines()[0])
    assert again[4:10] == chosen
    rest = await person.btt(*again[:-1], "1 BTT", "--yes")
    assert rest.code == 0, rest.err
    assert await market.balance() == 10_000_000, "the own wallet paid nothing"


async def test_nobody_is_told_to_go_on_where_that_cannot_help(market: Market) -> None:
    words = ("content", "fetch", market.infohash, "--yes", "--budget")
    nothing = await market.person.btt(*words, "0 BTT", "--dest", "in")
    (market.person.home / "file").touch()
    nowhere = await market.person.btt(*words, "1 BTT", "--dest", "file")
    for done in (nothing, nowhere):
        assert done.code != 0
        assert "error: " in done.err
        assert "To go on" not in done.err


async def test_nothing_is_spent_unasked(market: Market) -> None:
    words = ("content", "fetch", market.infohash, "--budget", "1 BTT")
    unasked = await market.person.btt(*words)
    assert unasked.code == 3
    assert "--yes" in unasked.err
    assert (await market.person.btt(*words, "--json")).code == 3
    moved = await market.person.btt("wallet", "transfer", "T" * 34, "1 BTT")
    assert moved.code == 2
    payee = str((await market.person.btt("wallet", "address")).out).strip()
    moved = await market.person.btt("wallet", "transfer", payee, "1 BTT")
    assert (moved.code, "--yes" in moved.err) == (3, True)

    controller, terminal = pty.openpty()
    try:
        os.write(controller, b"n\n")
        process = await market.person.start(*words, stdin=terminal)
        out, err = await process.communicate()
    finally:
        os.close(controller)
        os.close(terminal)
    assert process.returncode == 1
    assert b"Spend up to" in err
    assert b"Nothing was spent." in out
    assert not (market.person.home / "film.bin").exists()
    assert await market.balance() == 10_000_000


async def test_what_is_not_there_is_told_by_the_exit_code(market: Market) -> None:
    unknown = await market.person.btt("content", "quote", "ab" * 32, "--json")
    assert unknown.code == 6
    assert unknown.json["error"]["reason"] == "CONTENT_UNKNOWN"

    person, place = market.person, market.net.node_address.partition("@")[0]
    nobody = await person.btt("content", "quote", market.infohash, "--from", f"{place}@127.0.0.1:1")
    assert nobody.code == 4
    ledger = market.net.ledger_address.partition("@")
    away = await person.btt("wallet", "balance", "--ledger", f"{ledger[0]}@127.0.0.1:1/{'00' * 32}", "--json")
    assert away.code == 4
    assert away.json["error"]["reason"] == "LEDGER_UNREACHABLE"


async def test_an_empty_wallet_cannot_pay(market: Market) -> None:
    assert (await market.person.btt("wallet", "create", "--wallet", "empty")).code == 0
    done = await market.person.btt(
        "content", "fetch", market.infohash, "--wallet", "empty", "--budget", "1 BTT", "--yes", "--json"
    )
    assert done.code == 5
    balance = await market.person.btt("wallet", "balance", "--wallet", "empty", "--json")
    assert balance.json["balance"] == "0"


async def test_a_bare_endpoint_is_trusted_once_and_on_purpose(market: Market) -> None:
    bare = market.net.node_address.partition("@")[2]
    words = ("content", "quote", market.infohash, "--from", bare, "--json")
    refused = await market.person.btt(*words)
    assert refused.code == 4
    assert "--trust-new" in refused.err
    assert (await market.person.btt(*words, "--trust-new")).code == 0
    assert (await market.person.btt(*words)).code == 0


async def test_ctrl_c_in_a_fetch_resumes_without_paying_twice(market: Market) -> None:
    words = ("content", "fetch", market.infohash, "--budget", "1 BTT", "--dest", "in")
    process = await market.person.start(*words, "--yes")
    assert process.stdout is not None
    while (line := await process.stdout.readline()) and b"%" not in line:
        pass
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode in (130, 0)  # 0: it was faster
    assert b"Traceback" not in err
    if process.returncode:
        assert b"Paid   " in err
        words = tuple(shlex.split(err.decode().partition("To go on: btt ")[2].splitlines()[0]))
        assert "--resume" in words
    done = await market.person.btt(*words, "--yes", "--json")
    assert done.code == 0, done.err
    assert (market.person.home / "in" / "film.bin").read_bytes() == market.data
    cost = -(-len(market.data) * 10**6 // 2**30)
    # Each of the two channels rounds up by itself.
    assert cost <= 10_000_000 - await market.balance() <= cost + 1


async def test_publishing_shows_what_fetches_it(market: Market, tmp_path: Path) -> None:
    folder = tmp_path / "album"
    folder.mkdir()
    (folder / "one").write_bytes(b"1" * 100)
    (folder / "two").write_bytes(b"2" * 200)
    shown = await market.person.btt("content", "publish", str(folder), "--node", str(market.net.node_folder))
    assert shown.code == 0
    fields = dict(line.split(None, 1) for line in shown.out.splitlines())
    quoted = await market.person.btt("content", "quote", fields["Magnet"], "--json")
    assert quoted.json["infohash"] == fields["Infohash"]
    assert quoted.json["files"] == 2
    assert quoted.json["total_bytes"] == 300


async def test_a_devnet_needs_to_run() -> None:
    net = Devnet()
    with pytest.raises(ConfigError):
        _ = net.folder
    with pytest.raises(ConfigError):
        Devnet(content_price="much")


async def test_a_devnet_shows_the_log_of_a_child_that_died() -> None:
    with pytest.raises(BttError) as raised:
        async with Devnet() as net:
            folder = net.folder
            os.kill(net.pids[0], signal.SIGKILL)
            await net.ledger_totals()
    assert any("The ledger had ended" in note for note in raised.value.__notes__)
    assert not folder.exists()


async def test_a_devnet_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    # A price that only the node refuses: content is paid by the byte.
    with pytest.raises(InternalError, match=r"(?s)node.*rate"):
        async with Devnet(content_price="1 BTT / call"):
            pass
    assert [*tmp_path.rglob("*")] == []
