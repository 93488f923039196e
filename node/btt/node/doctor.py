"""Looks for what keeps a node from earning, and says what to do about it; changes nothing.

Every check returns a finding, also when it cannot be made, so that it does not hide the others.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import ssl
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any, Final

from btt.node.books import reading
from btt.node.config import NodeConfig, load
from btt.node.folder import CONFIG, NodeFolder, running_address, running_facts
from btt.node.registry import GROUP
from btt.node.values import is_everywhere, parse_listen
from btt.sdk.clock import SYSTEM, duration_text
from btt.sdk.errors import BttError, LedgerUnreachable
from btt.sdk.ledger import LedgerClient
from btt.sdk.money import Amount

SKEW_MS: Final = 2_000
"""A clock may be so far from the ledger's; a session request lives a minute."""
_LEAST_FREE: Final = 1 << 30
_DIAL_S: Final = 3.0


class Result(StrEnum):
    """What came of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line.

    Attributes:
        check: What was looked at.
        result: What came of it.
        found: What was seen.
        do: What to do; empty if nothing.
    """

    check: str
    result: Result
    found: str
    do: str = ""

    def as_json(self) -> dict[str, Any]:
        """Returns it for machines."""
        return asdict(self)


def _ok(check: str, found: str) -> Finding:
    return Finding(check, Result.OK, found)


async def examine(path: Path, *, clock: Callable[[], int] = SYSTEM) -> list[Finding]:
    """Makes all checks.

    Args:
        path: Folder of the node.
        clock: Unix milliseconds.
    """
    try:
        config = load(path / CONFIG)
        folder = NodeFolder.open(path)
    except BttError as error:
        return [Finding("configuration", Result.FAILED, error.message, error.hint)]
    found = [_ok("configuration", f"{path / CONFIG} does"), _running(path)]
    found += await _ledger(config, folder, clock)
    return [
        *found,
        await _port(path, config),
        _disk(path),
        _channels(path, clock),
        *_services(path, config),
    ]


def _running(path: Path) -> Finding:
    facts = running_facts(path)
    if facts is None:
        return Finding("node", Result.WARNING, "it does not run", f"Start it: btt node start {path}.")
    if facts.get("draining"):
        return Finding("node", Result.WARNING, "it drains, and takes no new work")
    return _ok("node", f"it runs as process {facts.get('pid')}")


async def _ledger(config: NodeConfig, folder: NodeFolder, clock: Callable[[], int]) -> list[Finding]:
    try:
        async with LedgerClient.connect(config.ledger.address, timeout=_DIAL_S) as ledger:
            before = clock()
            info = await ledger.info()
            after = clock()
            available = (await ledger.account(folder.payee_key)).available
    except LedgerUnreachable as error:
        do = "Without it nobody can open a session. Check its address below [ledger], and the network."
        return [Finding("ledger", Result.FAILED, error.message, do)]
    except BttError as error:
        if error.reason != "ACCOUNT_UNKNOWN":
            return [Finding("ledger", Result.FAILED, error.message, error.hint)]
        available = 0  # it was never paid
    # The ledger answered at some time in between.
    skew = max(before - info.time_ms, info.time_ms - after, 0)
    late = "ahead of" if before > info.time_ms else "behind"
    findings = [_ok("ledger", f"it answers in {after - before} ms; the payee key holds {Amount(available)}")]
    if skew > SKEW_MS:
        return [
            *findings,
            Finding(
                "clock",
                Result.FAILED,
                f"it is {duration_text(skew)} {late} the ledger's",
                "Set it, best by NTP: signed requests with a wrong time are refused.",
            ),
        ]
    return [*findings, _ok("clock", f"within {SKEW_MS // 1000} s of the ledger's")]


async def _port(path: Path, config: NodeConfig) -> Finding:
    host, port = parse_listen(config.node.listen)
    address = running_address(path)
    if address is not None:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only whether it answers
        try:
            async with asyncio.timeout(_DIAL_S):
                _, writer = await asyncio.open_connection(address.host, address.port, ssl=context)
        except (OSError, TimeoutError) as error:
            return Finding(
                "port",
                Result.FAILED,
                f"{address.host}:{address.port} does not answer ({type(error).__name__})",
                "Check `advertise` below [node], the firewall, and the forwarding of the router.",
            )
        writer.close()
        if is_everywhere(config.node.listen) and not config.node.advertise:
            return Finding(
                "port",
                Result.WARNING,
                f"{address.host}:{address.port} answers, but that address means this machine alone",
                "Say by which host others reach it: btt node config set node.advertise HOST.",
            )
        if host in ("127.0.0.1", "::1", "localhost"):
            return Finding(
                "port",
                Result.WARNING,
                f"{address.host}:{address.port} answers, but to this machine alone",
                'To serve others write, below [node]: listen = "0.0.0.0:7800".',
            )
        return _ok("port", f"{address.host}:{address.port} answers from here")
    if port == 0:
        return _ok("port", "any free one is taken at the start")
    try:
        server = await asyncio.start_server(lambda *_: None, host, port)
    except OSError as error:
        do = "End what uses it, or choose another port below [node]."
        return Finding("port", Result.FAILED, f"{config.node.listen} cannot be taken ({error.strerror})", do)
    server.close()
    await server.wait_closed()
    return _ok("port", f"{config.node.listen} is free")


def _disk(path: Path) -> Finding:
    free = shutil.disk_usage(path).free
    text = f"{free / 2**30:.1f} GiB free for {path}"
    if free < _LEAST_FREE:
        do = "Make room: what cannot be saved is not counted, and calls end."
        return Finding("disk", Result.FAILED, text, do)
    return _ok("disk", text)


def _channels(path: Path, clock: Callable[[], int]) -> Finding:
    try:
        with reading(path) as db:
            rows = db.execute(
                "SELECT state, expires_ms, best FROM channels WHERE state <> 'closed' ORDER BY expires_ms"
            ).fetchall()
    except (BttError, sqlite3.Error) as error:
        return Finding("channels", Result.FAILED, str(error), "Restore the books from a backup.")
    if not rows:
        return _ok("channels", "none is open")
    left, at_risk = rows[0][1] - clock(), sum(row[2] for row in rows if row[1] - clock() < 3_600_000)
    closing = sum(state == "closing" for state, _, _ in rows)
    minutes = max(0, left) // 60_000
    text = f"{len(rows)} open, {closing} of them closing; the next lock time ends in {minutes} min"
    if left <= 0:
        do = "Start the node at once: it closes them, if the payer did not take the money back yet."
        return Finding("channels", Result.FAILED, text, do)
    if at_risk and running_facts(path) is None:
        do = f"Start the node: {Amount(at_risk)} must be closed within the hour."
        return Finding("channels", Result.WARNING, text, do)
    return _ok("channels", text)


def _services(path: Path, config: NodeConfig) -> Iterator[Finding]:
    points = {point.name: point for point in entry_points(group=GROUP)}
    states = (running_facts(path) or {}).get("services", {})
    enabled = [name for name, section in config.services.items() if section.enabled]
    if not enabled:
        do = "Switch one on: btt service enable content."
        yield Finding("services", Result.WARNING, "none is on, so nothing can be earned", do)
    for name in enabled:
        check = f"service {name}"
        if name not in points:
            yield Finding(check, Result.FAILED, "it is not installed", "Install its package, or disable it.")
            continue
        dist = points[name].dist
        about = f"{dist.name} {dist.version}" if dist is not None else "of unknown origin"
        needs = [need for need in (dist.requires or [] if dist else []) if need.startswith("btt-services")]
        about += f", with btt-services {version('btt-services')}" if needs else ""
        state = states.get(name, {})
        if state.get("state") == "failed":
            do = "Look into the log; it is started again after a while."
            yield Finding(check, Result.FAILED, f"{about}: {state.get('reason')}", do)
        else:
            yield _ok(check, f"{about}: {state.get('state', 'not running')}")
