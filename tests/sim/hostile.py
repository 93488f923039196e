"""Those in the world who want more than is theirs.

They use the product's parts with a rule left out, or speak to it directly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from btt.sdk.errors import BttError
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient, SignedReceipt
from btt.sdk.signing import (
    EARLY_CLOSE,
    ChannelClose,
    ChannelCommit,
    ChannelRefund,
    ChannelUpdate,
    sign,
)
from btt.sdk.wallet import derive_channel_key
from sim.market import UNIT
from sim.parties import FAILURES, buy, client
from sim.world import ALIASES, WINDOW_S, key

if TYPE_CHECKING:
    from sim.world import Party, World

Move = Callable[[LedgerClient], Awaitable[SignedReceipt]]


async def old_state(me: Party) -> None:
    """Buys, then closes on the ledger with its first update, and collects as soon as it may."""
    world, account = me.world, key(me.name)
    if world.calm:
        return
    victim = world.random.choice(world.nodes)
    with suppress(*FAILURES):
        async with client(me, victim, keep=True) as btt:
            for _ in range(world.random.randint(2, 6)):
                with suppress(*FAILURES):
                    await buy(me, await btt.session(20 * UNIT), careful=False)
    for channel, line in list(world.books.channels.items()):
        if line.terms.payer != account.address or line.closed:
            continue
        k1 = derive_channel_key(account, line.terms.nonce)
        old = ChannelUpdate(channel=channel, cumulative=1)
        world.witness.signed[channel] = max(world.witness.signed[channel], 1)
        while (now := world.books.channels.get(channel)) is not None and not now.closed:
            line = now
            with suppress(*FAILURES):
                async with LedgerClient.connect(world.address) as books:
                    with suppress(BttError):
                        await books.submit_update(old, sign(k1, old, world.ledger_id))
                    if not line.deadline:
                        await books.request_close(channel, account)
                    await books.finalize_channel(channel)
            await asyncio.sleep(5)
        world.trace(me.name, f"got {line.captured} of {world.witness.signed[channel]} taken")
    await asyncio.sleep(world.random.uniform(20, 60))


async def withholder(me: Party) -> None:
    """Takes what it is given on credit, pays nothing, and comes again under another name."""
    world = me.world
    alias = ""
    while not world.calm:
        with suppress(*FAILURES):
            if not alias or world.random.random() < 0.6:
                alias = f"withhold{world.random.randrange(ALIASES)}"
            async with client(me, world.nodes[0], keep=True, wallet=alias) as btt:
                session = await btt.session(5 * UNIT)
                session._due = lambda: None  # type: ignore[method-assign]
                await buy(me, session, careful=False)
        await asyncio.sleep(world.random.uniform(1, 10))


async def hair_splitter(me: Party) -> None:
    """Pays himself through channels of his own, and makes every move about when it is just allowed or not."""
    world, draw, account = me.world, me.world.random, key(me.name)
    k1, k2 = key(f"{me.name} k1"), key(f"{me.name} k2")
    while not world.calm:
        commit = ChannelCommit(
            payer=account.address,
            payee=k2.address,
            k1=k1.public,
            k2=k2.public,
            amount=UNIT,
            expires_ms=world.now_ms() + draw.choice((65_000, 100_000, 600_000)),
            challenge_ms=WINDOW_S * 1000,
            flags=draw.choice((0, EARLY_CLOSE)),
            fee=0,
            nonce=draw.randbytes(16),
            service_ref=bytes(32),
        )
        channel = commit.channel_id(world.ledger_id)
        refund = ChannelRefund(channel=channel, not_before_ms=commit.expires_ms)
        with suppress(*FAILURES):
            async with LedgerClient.connect(world.address) as books:
                await books.open_channel(commit, account, sign(k2, refund, world.ledger_id))
        while (line := world.books.channels.get(channel)) is not None and not line.closed:
            world.witness.signed[channel] = UNIT
            due = (line.deadline or line.terms.expires_ms) - world.now_ms()
            await asyncio.sleep(
                draw.choice((due / 1000 + draw.uniform(-1, 5), draw.uniform(1, 60))) if due > 0 else 1
            )
            cumulative = draw.randint(1, UNIT)
            with suppress(*FAILURES):
                async with LedgerClient.connect(world.address) as books:
                    for _ in range(3):
                        with suppress(BttError):
                            await draw.choice(_moves(world, channel, account, k1, k2, cumulative))(books)
        await asyncio.sleep(draw.uniform(1, 10))


def _moves(
    world: World, channel: bytes, account: PrivateKey, k1: PrivateKey, k2: PrivateKey, cumulative: int
) -> list[Move]:
    update = ChannelUpdate(channel=channel, cumulative=cumulative)
    close = ChannelClose(channel=channel, capture=cumulative)
    signature = sign(k1, update, world.ledger_id)
    return [
        lambda b: b.submit_update(update, signature),
        lambda b: b.request_close(channel, account),
        lambda b: b.top_up(channel, account, 1),
        lambda b: b.finalize_channel(channel),
        lambda b: b.close_channel(close, k2, cumulative, signature),
    ]


async def replayer(me: Party) -> None:
    """Sends again what others sent, word for word, to whom it was meant and to whom it was not."""
    world, draw = me.world, me.world.random
    while not world.calm:
        await asyncio.sleep(draw.uniform(1, 20))
        if not world.witness.captured:
            continue
        path, data, metadata = draw.choice(world.witness.captured)
        ends = list(world.network.servers)
        if not ends:
            continue
        channel = world.network.channel(*_host(draw.choice(ends)), b"", "")
        with suppress(*FAILURES):
            await channel.unary_unary(path)(data, timeout=10, metadata=metadata)
        await channel.close()


def _host(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host, int(port)


async def forger(me: Party) -> None:
    """Claims what is not his: with his own keys, other channels' updates, another ledger's words."""
    world, draw = me.world, me.world.random
    while not world.calm:
        await asyncio.sleep(draw.uniform(1, 15))
        channels = [c for c, line in world.books.channels.items() if not line.closed]
        if not channels:
            continue
        channel = draw.choice(channels)
        forgeries = _forgeries(world, channel, key(me.name))
        attempt = draw.randrange(len(forgeries))
        try:
            async with LedgerClient.connect(world.address) as books:
                await forgeries[attempt](books)
        except FAILURES:
            continue
        world.violated(f"the ledger took forgery {attempt}")


def _forgeries(world: World, channel: bytes, own: PrivateKey) -> list[Move]:
    """Returns requests of which the ledger must take none."""
    line = world.books.channels[channel]
    k1 = _key1(world, line.terms)
    update = ChannelUpdate(channel=channel, cumulative=line.deposit)
    close = ChannelClose(channel=channel, capture=line.deposit)
    stolen = sign(own, update, world.ledger_id)
    others = (found for c, found in world.witness.updates.items() if c != channel)
    amount, signature = next((next(iter(found.items())) for found in others), (line.deposit, bytes(65)))
    borrowed = ChannelUpdate(channel=channel, cumulative=amount)
    return [
        lambda b: b.submit_update(update, stolen),
        lambda b: b.submit_update(update, sign(k1, update, bytes(32))),
        lambda b: b.submit_update(borrowed, signature),
        lambda b: b.close_channel(close, own, line.deposit, stolen),
        lambda b: b.close_channel(close, k1),
        lambda b: b.transfer(k1, own.address, 1),
        lambda b: b.request_close(channel, k1),
        lambda b: b.request_close(channel, own),
        lambda b: b.top_up(channel, own, 1),
    ]


def _key1(world: World, terms: ChannelCommit) -> PrivateKey:
    """K1 of a channel: whoever steals it can pay, and nothing else."""
    return derive_channel_key(world.owners[terms.payer.data], terms.nonce)


async def grasping(me: Party) -> None:
    """Holds the keys of the cheating node, and closes its channels with all that was ever signed."""
    world, draw = me.world, me.world.random
    k2 = key("cheat payee")
    while not world.calm:
        await asyncio.sleep(draw.uniform(20, 90))
        for channel, updates in list(world.witness.updates.items()):
            line = world.books.channels.get(channel)
            if line is None or line.closed or line.terms.k2 != k2.public:
                continue
            best = max(updates)
            all_of_it = ChannelClose(channel=channel, capture=best)
            and_more = ChannelClose(channel=channel, capture=best + 1)
            with suppress(*FAILURES):
                async with LedgerClient.connect(world.address) as books:
                    close = and_more if draw.random() < 0.5 else all_of_it
                    await books.close_channel(close, k2, best, updates[best])
