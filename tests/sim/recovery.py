"""The ledger's disk is gone: what its operator does then, and what must be true afterwards.

The operator has a backup, and asks whom it can reach for what they hold (`btt channel receipts`,
`btt node receipts`); the ledger's process does the rest, and may die anywhere in it, like any other.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from btt.node.status import read_updates
from btt.sdk.errors import ConfigError
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import evidence
from btt.sdk.ledger.evidence import Evidence
from btt.sdk.ledger.keeping import RECEIPTS, EvidenceStore
from btt.sdk.signing import ChannelUpdate, sign
from btt.services.ledger.check import entries
from btt.services.ledger.journal import Kind
from btt.services.ledger.rebuild import Report
from btt.services.ledger.recovery import recover
from sim.books import Books, must

if TYPE_CHECKING:
    from sim.world import Party, World

_ENDS = ("", "-wal", "-shm")
_FORGER = PrivateKey(b"forger" + bytes(26))
_OPEN = (Kind.TOP_UP, Kind.UPDATE, Kind.REQUEST_CLOSE, Kind.CLOSE_CHANNEL)
"""Kinds of which only the books know whose signature they need."""


@dataclass(slots=True)
class Loss:
    """One loss of the ledger's disk.

    Args:
        backup: The copy that is left.
        holders: Parties who show what they hold.
        files: What they gave, once they did.
        shown: Requests with receipts in it, by digest; of an update its channel and amount.
        best: Highest update of each channel that a node showed; it may be paid more before the end.
        report: What the recovery says that it comes to, once it said so.
    """

    backup: Path
    holders: list[str]
    files: list[Path] | None = None
    shown: dict[bytes, ChannelUpdate | None] = field(default_factory=dict)
    best: dict[bytes, int] = field(default_factory=dict)
    report: Report | None = None


def lose(world: World, backup: Path) -> Loss:
    """Takes the ledger's books away; its process is dead."""
    database = world.disks["ledger"]
    world.witness.leave("ledger")
    for end in _ENDS:
        database.with_name(database.name + end).unlink(missing_ok=True)
    if world.random.random() < 0.3:
        database.with_name(database.name + ".mark").unlink(missing_ok=True)
    everybody = ["bank", "payer1", "payer2", *world.nodes]
    silent = set() if world.random.random() < 0.6 else {world.random.choice(everybody)}
    holders = [name for name in everybody if name not in silent]
    world.trace("ledger", f"loses its disk; {', '.join(holders)} show what they hold")
    return Loss(backup, holders)


def bring_back(me: Party) -> None:
    """Recovers the ledger, as its operator; called again after a death it goes on.

    Raises:
        Violation: What is recovered is not what it must be.
    """
    world, loss = me.world, me.world.lost
    assert loss is not None
    if loss.files is None:
        loss.files = [file for name in loss.holders for file in _ask(world, loss, name)]
    try:
        found = recover(me.files, source=loss.backup, evidence=loss.files)
        if found is not None:
            again = loss.report is None or _told(loss.report) == _told(found)
            must(again, "the same evidence comes to something else")
            loss.report = found
            recover(me.files, finish=True)
    except ConfigError:
        must(loss.report is not None, "the recovery does not know what to do")  # it had been finished
    _check(world, loss)
    world.coverage["ledger: recovered"] += 1


def _told(report: Report) -> tuple[object, ...]:
    """Returns what a report says; two errors are never equal, what they say may be."""
    refused = [(what, str(error)) for what, error in report.refused]
    return report.epoch, report.ended_seq, report.reached_seq, report.missing, refused, report.head


def _ask(world: World, loss: Loss, name: str) -> list[Path]:
    """Returns a file with what somebody holds, as it would export it; before it one of a forger's."""
    party = world.parties[name]
    unshown = read_updates(world.disks[name]) if name in world.nodes else []
    if not (party.files / RECEIPTS).exists():
        return []
    with closing(EvidenceStore(party.files / RECEIPTS)) as store:
        header = store.header(world.ledger_id)
        found = list(store.operations(world.ledger_id))
    if header is None:
        return []
    for update in (ChannelUpdate.decode(one.body) for one in unshown):
        loss.best[update.channel] = update.cumulative
    target = world.root / f"{name}.{world.random.getrandbits(32):08x}.evidence"
    forged = target.with_suffix(".forged")
    evidence.export(target, header, [*found, *unshown])
    evidence.export(forged, header, [_forge(world, one) for one in (*found, *unshown) if one.kind in _OPEN])
    for one in found:
        loss.shown[one.digest(world.ledger_id)] = (
            one.message if isinstance(one.message, ChannelUpdate) else None
        )
    return [forged, target]


def _forge(world: World, one: Evidence) -> Evidence:
    """The same request, with the ledger's own receipt for it, signed by somebody who had no right to."""
    proof = _FORGER.public.data + sign(_FORGER, one.message, world.ledger_id)
    return replace(one, signatures=proof + one.signatures[98:])


def _check(world: World, loss: Loss) -> None:
    """Holds the new journal against the old one."""
    old, report = world.books, loss.report
    assert report is not None
    books = Books(world.ledger_id)
    for entry in entries(world.witness.disk("ledger")):
        books.take(entry)
    kept = report.ended_seq
    if report.base_seq <= world.branched:
        # From so old a copy, what the last recovery did not know of may come back in its old place.
        kept = min(kept, world.branched)
    world.branched = report.ended_seq
    must(books.hashes[: kept + 1] == old.hashes[: kept + 1], "a recovery rewrote what stands")
    if not report.missing:
        must(not report.refused, f"nothing is missing, and {len(report.refused)} operations are refused")
    lost = [
        one for digest, one in loss.shown.items() if digest not in books.digests and not _paid(books, one)
    ]
    most = len(report.refused) + report.undone
    must(len(lost) <= most, f"{len(lost)} operations were shown and are not there; {most} were refused")
    for node in set(world.nodes) & set(loss.holders):
        _check_node(world, loss, node, books, refused=bool(report.refused))
    world.trace(
        "ledger",
        f"is recovered from {len(loss.shown)} operations: {report.restored} restored, "
        f"{report.repeated} repeated, {len(report.missing)} gaps, {len(report.refused)} refused",
    )
    world.parties["ledger"].leave_behind(report.ended_seq)
    world.books = world.witness.books = books
    world.witness.forget_windows()
    # Whoever asked, and heard, may have been heard by the lost ledger alone.
    world.plans[:] = [(message, None) for message, _ in world.plans]
    # What a node was paid may be lost with the rest, if it alone could have shown it and did not.
    world.witness.silent |= set(world.nodes) - set(loss.holders)
    world.recoveries += 1
    world.lost = None


def _paid(books: Books, update: ChannelUpdate | None) -> bool:
    """Says whether a higher update of the same channel is in the books."""
    line = books.channels.get(update.channel) if update is not None else None
    return line is not None and update.cumulative <= line.best


def _check_node(world: World, loss: Loss, node: str, books: Books, *, refused: bool) -> None:
    """A channel on which a node delivered is there, and so is every payment that the node showed."""
    if not world.disks[node].exists():
        return  # it has not begun yet
    for (channel,) in world.witness.disk(node).execute("SELECT channel_id FROM channels").fetchall():
        line, best = books.channels.get(channel), loss.best.get(channel, 0)
        if line is None:
            served = world.witness.sent[channel] and channel in world.books.channels
            must(refused or not served, f"a channel is lost, on which {node} delivered")
        elif not line.closed:
            must(line.best >= best, f"{node} showed {best}, and the recovered ledger holds {line.best}")
