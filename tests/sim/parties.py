"""The honest: a ledger, nodes, payers, a bank and a tower; the product with a little application code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from typing import TYPE_CHECKING, Any

import grpc.aio

from btt.node.config import NodeConfig
from btt.node.folder import NodeFolder
from btt.node.runtime import Node
from btt.node.services import Patience
from btt.sdk.budget import Budget
from btt.sdk.client import Client, Wallet
from btt.sdk.errors import BttError, IdentityError, InsufficientFunds, LedgerRolledBack, RequestExpired
from btt.sdk.identity import NodeAddress, tls_name
from btt.sdk.keys import Address
from btt.sdk.ledger import LedgerClient
from btt.sdk.ledger.keeping import RECEIPTS, EvidenceStore
from btt.sdk.signing import (
    ChannelUpdate,
    TopUp,
    Transfer,
)
from btt.services.ledger.server import LedgerConfig, serve
from sim.books import Violation, must
from sim.market import FUNDS, UNIT, plugin, rpc
from sim.market import pb as market_pb
from sim.recovery import bring_back
from sim.world import WINDOW_S, key

if TYPE_CHECKING:
    from sim.world import Party, World

STRANGERS = 2 * UNIT
"""What strangers may owe a node together in an hour."""
FAILURES = (BttError, grpc.aio.AioRpcError, TimeoutError)


# The honest


async def ledger(me: Party) -> None:
    """The ledger; it must refuse to start on books that are older than its mark."""
    world = me.world
    if world.lost is not None:
        bring_back(me)
    config = LedgerConfig(folder=me.files, port=world.address.port, sweep_every=20.0)
    try:
        async with serve(config, clock=me.clock):
            world.trace(me.name, "serves")
            world.ledger_is_up(True)
            must(not world.rolled_back, "the ledger serves books that are older than its mark")
            await me.stop.wait()
    except LedgerRolledBack:
        world.trace(me.name, "refuses its old books")
        world.coverage["ledger: rolled back"] += 1


def node(generosity: float = 1.0) -> Any:
    """Returns a node that sends this share of what it was asked for."""

    async def run(me: Party) -> None:
        world = me.world
        identity, payee = key(f"{me.name} identity"), key(f"{me.name} payee")
        port = 7100 + sum(me.name.encode())
        config = NodeConfig(
            node={"listen": f"127.0.0.1:{port}"},
            ledger={"address": str(world.address)},
            payments={
                "min_challenge": f"{WINDOW_S}s",
                "min_lifetime": "15m",
                "max_lifetime": "20m",
                "close_margin": "5m",
                "grace": "20s",
                "credit_limit": f"{4 * UNIT} base units",
                "strangers_per_hour": f"{STRANGERS} base units",
                "strangers_per_network": f"{STRANGERS} base units",
                "min_amount": f"{UNIT} base units",
            },
            bans={"after": world.strikes, "first": "1m"},
            services={"sim": {"enabled": True}},
        )
        certificate = tls_name(identity.address).encode()
        folder = NodeFolder(me.files, config, identity, payee, b"key", certificate)
        plugins = {"sim": lambda: plugin(generosity, world.random.random)}
        async with Node(
            folder, plugins=plugins, clock=me.clock, grace_s=2.0, patience=Patience(block_s=0)
        ) as running:
            world.trace(me.name, "serves")
            stopped = asyncio.ensure_future(me.stop.wait())
            failed = asyncio.ensure_future(running.failed())
            await asyncio.wait([stopped, failed], return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                raise failed.result()

    return run


def node_address(name: str) -> NodeAddress:
    return NodeAddress(key(f"{name} identity").address, "127.0.0.1", 7100 + sum(name.encode()))


def client(me: Party, at: str, *, keep: bool, wallet: str = "") -> Client:
    return Client.connect(
        str(node_address(at)),
        budget=Budget(FUNDS, name="sim"),
        ledger=str(me.world.address),
        wallet=Wallet(me.files / wallet, key(wallet or me.name)),
        keep_channels=keep,
        clock=me.clock,
    )


async def buy(me: Party, session: Any, *, careful: bool) -> None:
    """Makes one call, takes what comes, and now and then breaks off or turns something down."""
    draw = me.world.random
    stub = rpc.SimServiceStub(session.channel)
    ask = market_pb.Ask(messages=draw.randint(1, 8), size=draw.choice((10, 400, UNIT)))
    kind = draw.random()
    if kind < 0.2:
        await stub.One(ask, timeout=30)
        return
    async with asyncio.timeout(60):
        if kind < 0.6:
            async for _ in stub.Many(ask):
                if careful and draw.random() < 0.05:
                    break
        else:
            with session.verdicts() as verdicts:
                async for message in stub.ManyChecked(ask):
                    if careful and draw.random() < 0.05:
                        verdicts.reject(message)
                        break  # whoever turns a message down and asks for more does not pay for what it asks
                    verdicts.accept(message)
                    me.world.witness.taken[session.payer.channel_id] += len(message.data)


def payer(nodes: list[str]) -> Any:
    """Returns a payer that buys from these nodes until it is calm, and then goes home or does not."""

    async def run(me: Party) -> None:
        world, draw = me.world, me.world.random
        while not world.calm:
            try:
                async with client(me, draw.choice(nodes), keep=draw.random() < 0.5) as btt:
                    for _ in range(draw.randint(1, 6)):
                        await buy(me, await btt.session(draw.choice((3, 8, 20)) * UNIT), careful=True)
                        await asyncio.sleep(draw.uniform(0, 10))
            except FAILURES as error:
                world.trace(me.name, f"meets {type(error).__name__}: {str(error)[:100]}")
            await asyncio.sleep(draw.uniform(1, 30))
        if draw.random() < 0.5:
            await refund(me)

    return run


async def refund(me: Party) -> None:
    """Asks for what its channels still hold, as `btt channel refund` does, until they are closed."""
    world, account = me.world, key(me.name)
    mine = [c for c, line in world.books.channels.items() if line.terms.payer == account.address]
    while any(not line.closed for c, line in world.books.channels.items() if c in mine):
        with suppress(*FAILURES):
            async with LedgerClient.connect(world.address) as books:
                for channel in mine:
                    line = world.books.channels.get(channel)
                    if line is None or line.closed:
                        continue
                    if not line.deadline and me.clock() >= line.terms.expires_ms:
                        await books.request_close(channel, account)
                    elif line.deadline and me.clock() >= line.deadline:
                        await books.finalize_channel(channel)
        await asyncio.sleep(60)


async def bank(me: Party) -> None:
    """Moves money and tops channels up; it asks until it knows, always with the same words.

    What it means to do it has written down before it asks (`plans` outlives its process), so that a
    death between asking and hearing leaves it with the same request.
    """
    world, draw = me.world, me.world.random
    plans = world.plans
    while not world.calm or world.lost is not None or any(seq is None for _, seq in plans):
        try:
            async with _kept(me) as keeper, LedgerClient.connect(world.address, keeper=keeper) as books:
                while True:
                    for number, (message, done) in enumerate(plans):
                        if done is None or draw.random() < 0.02:
                            recoveries = world.recoveries
                            seq = await _ask(world, books, message)
                            if recoveries != world.recoveries:
                                continue  # it is not known which of the two ledgers answered
                            must(done in (None, seq), f"one request made entries {done} and {seq}")
                            plans[number] = message, seq
                    if world.calm:
                        break
                    await asyncio.sleep(draw.uniform(1, 20))
                    _plan(me)
        except FAILURES as error:
            world.trace(me.name, f"meets {type(error).__name__}")
        except Violation as error:
            world.violated(str(error))
        await asyncio.sleep(draw.uniform(1, 5))


@asynccontextmanager
async def _kept(me: Party) -> AsyncIterator[EvidenceStore]:
    """What the bank keeps of the ledger's receipts."""
    with closing(EvidenceStore(me.files / RECEIPTS)) as keeper:
        yield keeper


async def _ask(world: World, books: LedgerClient, message: Transfer | TopUp) -> int:
    """Returns the entry that a request made; -1 where it was refused for good."""
    common = {"request_id": message.request_id, "valid_until_ms": message.valid_until_ms}
    try:
        if isinstance(message, Transfer):
            sender = world.owners[message.sender.data]
            receipt = await books.transfer(
                sender, message.recipient, message.amount, memo=message.memo, **common
            )
        else:
            line = world.books.channels.get(message.channel)
            if line is None:
                return -1  # a recovery lost it
            owner = world.owners[line.terms.payer.data]
            receipt = await books.top_up(message.channel, owner, message.amount, **common)
    except (RequestExpired, InsufficientFunds):
        return -1
    except BttError as error:
        if error.retryable or isinstance(error, IdentityError):
            raise  # it says nothing of the request
        return -1  # the channel is closed, or the account unknown
    return receipt.seq


def _plan(me: Party) -> None:
    world, draw = me.world, me.world.random
    until = me.clock() + 3_000_000
    channels = [c for c, line in world.books.channels.items() if not line.closed]
    if channels and draw.random() < 0.5:
        top_up = TopUp(
            channel=draw.choice(channels),
            amount=draw.randint(1, UNIT),
            request_id=draw.randbytes(16),
            valid_until_ms=until,
        )
        world.plans.append((top_up, None))
        return
    sender, recipient = draw.sample(sorted(world.owners), 2)
    amount = draw.choice((1, UNIT, FUNDS, 100 * FUNDS))
    world.plans.append((_transfer(world, sender, recipient, amount, until), None))


def _transfer(world: World, sender: bytes, recipient: bytes, amount: int, until_ms: int) -> Transfer:
    return Transfer(
        sender=Address(sender),
        recipient=Address(recipient),
        amount=amount,
        request_id=world.random.randbytes(16),
        valid_until_ms=until_ms,
        memo=bytes(32),
    )


def grants(world: World) -> list[tuple[Transfer | TopUp, int | None]]:
    """Returns the plans that fund everybody."""
    bank_address, until = key("bank").address, world.now_ms() + 3_000_000
    return [
        (_transfer(world, bank_address.data, owner, 2 * FUNDS, until), None)
        for owner in sorted(world.owners)
        if owner != bank_address.data
    ]


async def tower(me: Party) -> None:
    """A watchtower of the nodes: holds updates as they pass, and shows them where a channel closes."""
    world, draw = me.world, me.world.random
    while True:
        with suppress(*FAILURES):
            async with LedgerClient.connect(world.address) as books:
                for channel, updates in list(world.witness.updates.items()):
                    line = world.books.channels.get(channel)
                    best = max(updates)
                    if line is None or line.closed or best <= line.best:
                        continue
                    if line.deadline or draw.random() < 0.1:
                        with suppress(BttError):
                            await books.submit_update(
                                ChannelUpdate(channel=channel, cumulative=best), updates[best]
                            )
        await asyncio.sleep(45 if world.calm else 15)
