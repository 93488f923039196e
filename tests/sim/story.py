"""What happens in one world: who is there, what goes wrong, and what must be true when it is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from btt.services.ledger import mark
from sim import hostile, parties, recovery
from sim.books import Violation, must
from sim.network import Weather
from sim.world import ALIASES, WINDOW_S, Party, World, key

GRACE_S = 120.0
"""Beyond expiry + window + grace of the last channel, for whoever must be asked again."""


async def story(world: World) -> None:
    """Plays one world: some time of turmoil, then calm until all money is out.

    Raises:
        Violation: Something that must hold did not.
    """
    _settle(world)
    for party in world.parties.values():
        world.later(world.random.uniform(0, 5), party.start)
    await _turmoil(world)
    _calm(world)
    for name in world.vanishing:
        world.parties[name].gone = True
        world.parties[name].kill()
    await world.until(lambda: _all_out(world), most_s=_longest(world))
    _judge(world)


def _settle(world: World) -> None:
    draw = world.random
    world.nodes = ["node1", "node2"]
    honest = ["payer1", "payer2"]
    greedy = {
        "oldstate": hostile.old_state,
        "withhold": hostile.withholder,
        "replay": hostile.replayer,
        "forger": hostile.forger,
        "splitter": hostile.hair_splitter,
    }
    aliases = [f"withhold{n}" for n in range(ALIASES)]
    world.owners = {key(n).address.data: key(n) for n in ("bank", *honest, *greedy, *aliases)}
    world.plans = parties.grants(world)
    world.add("ledger", parties.ledger)
    for name in world.nodes:
        world.add(name, parties.node(), disk="payments.db")
    world.add("bank", parties.bank)
    shops = list(world.nodes)
    if draw.random() < 0.5:
        shops.append("cheat")
        world.add("cheat", parties.node(generosity=0.5), disk="payments.db", honest=False)
        world.add("grasp", hostile.grasping, honest=False)
    for name in honest:
        world.add(name, parties.payer(shops), disk="payer.db")
    for name, main in greedy.items():
        if draw.random() < 0.5:
            world.add(name, main, honest=False)
    if draw.random() < 0.5:
        world.add("tower", parties.tower)
    world.serving = {"ledger", *world.nodes, "cheat"}
    world.vanishing = [n for n in (*honest, *greedy, "cheat") if n in world.parties and draw.random() < 0.3]


# What goes wrong


async def _turmoil(world: World) -> None:
    draw = world.random
    world.network.weather = Weather(
        loss=draw.choice((0, 0.02, 0.1)),
        duplicate=draw.choice((0, 0.1)),
        breaks=draw.choice((0, 0.005, 0.03)),
        slow=draw.choice((0, 0.05)),
    )
    fair = world.network.weather
    faults: list[Callable[[World], None]] = [
        *(_kill, _light, _light, _part, _stop, _copy, _copy, _put_back),
        *(_go_away, _lose),
    ]
    while world.room.time() < world.turmoil_s and world.violation is None:
        await asyncio.sleep(draw.expovariate(world.harshness / 4))
        # A node may be away for as long as the window, and no longer: that is what it was told.
        tight = world.tight
        world.network.weather = Weather() if tight else fair
        for party in world.parties.values():
            if tight and party.process is not None:
                party.process.fuse = 0
        if not tight:
            draw.choice(faults)(world)
    if world.violation is not None:
        raise Violation(world.violation)


def _some(world: World) -> Party:
    return world.random.choice(list(world.parties.values()))


def _kill(world: World) -> None:
    _some(world).kill()


def _light(world: World) -> None:
    party = _some(world)
    if party.running:
        assert party.process is not None
        party.process.fuse = world.random.randint(1, 60)


def _part(world: World) -> None:
    one, other = world.random.sample(list(world.parties), 2)
    seconds = world.random.uniform(1, 30)
    world.trace("network", f"parts {one} from {other} for {seconds:.0f} s")
    world.network.cut(one, other, seconds)


def _stop(world: World) -> None:
    party = world.parties[world.random.choice(["ledger", *world.nodes])]
    if party.running:
        world.trace(party.name, "is told to stop")
        party.stop.set()


def _go_away(world: World) -> None:
    """Somebody is away for long: a node for as long as it was told it may, or for too long."""
    party = world.parties[world.random.choice(["ledger", *world.nodes, "payer1", "payer2"])]
    if world.room.time() < party.away_until:
        return
    seconds = world.random.uniform(30, 0.8 * WINDOW_S)
    if world.random.random() < 0.3:
        seconds = world.random.uniform(1.2, 2) * WINDOW_S
    what = "long" if seconds > WINDOW_S else "away"
    if party.name == "ledger":
        world.away_s += seconds
    elif party.name in world.nodes:
        if seconds > WINDOW_S:
            world.witness.overdue.add(party.name)
        elif any(line.deadline and not line.closed for line in world.books.channels.values()):
            return  # it was away already, maybe, while this window ran
    world.coverage[f"{party.name.rstrip('12')}: {what}"] += 1
    party.leave(seconds)


def _lose(world: World) -> None:
    """The ledger's disk is gone; there is a backup, and what the others hold."""
    ledger = world.parties["ledger"]
    if world.lost is not None or world.rolled_back or world.random.random() < 0.5:
        return
    backup = ledger.backup(world.random)
    if backup is not None:
        ledger.kill()
        world.lost = recovery.lose(world, backup)


def _copied(world: World) -> Party:
    return world.parties[world.random.choice([name for name in world.disks if name in world.parties])]


def _copy(world: World) -> None:
    _copied(world).copy()


def _put_back(world: World) -> None:
    party = _copied(world)
    if party.name == "ledger":
        _roll_back(world, party)
        return
    party.kill()
    if party.put_back() is not None:
        world.coverage[f"{party.name.rstrip('12')}: put back"] += 1
        world.witness.restored.add(party.name)


def _roll_back(world: World, ledger: Party) -> None:
    """Starts the ledger on an old copy: it must refuse, and go on where it was."""
    if world.lost is not None:
        return
    ledger.kill()
    noted = mark.read(mark.path_of(world.disks["ledger"]))
    aside = ledger.put_back()
    if aside is None:
        return
    copied = world.witness._one("ledger", "SELECT seq FROM head")
    world.witness.leave("ledger")

    def restore() -> None:
        ledger.kill()
        aside.replace(world.disks["ledger"])
        world.rolled_back = False
        world.trace("ledger", "has its own books again")

    if noted is None or copied >= noted.seq:
        restore()  # nothing was forgotten, as far as the mark can know
        return
    world.rolled_back = True
    ledger.start()
    world.later(0.2, restore)


# What must be true in the end


def _calm(world: World) -> None:
    world.calm = True
    world.network.heal()
    for party in world.parties.values():
        if party.process is not None:
            party.process.fuse = 0
    world.trace("world", "is calm")


def _all_out(world: World) -> bool:
    return (
        world.lost is None
        and all(line.closed for line in world.books.channels.values())
        and all(done is not None for _, done in world.plans)
    )


def _longest(world: World) -> float:
    last = max((line.abandoned for line in world.books.channels.values()), default=world.now_ms())
    back = max(0.0, world.parties["ledger"].away_until - world.room.time())
    return max(0, last - world.now_ms()) / 1000 + back + world.away_s + GRACE_S


def _judge(world: World) -> None:
    must(all(done is not None for _, done in world.plans), "a request was never answered")
    nodes = {key(f"{n} payee").public.data: n for n in world.nodes}
    payers = {key(n).address.data: n for n in ("payer1", "payer2")}
    world.witness.final(nodes, payers)
    hours = world.room.time() / 3600
    for node, lost in world.witness.strangers(nodes).items():
        if node not in world.witness.restored | world.witness.overdue:
            must(lost <= parties.STRANGERS * (1 + hours), f"strangers took {lost} from {node}")
