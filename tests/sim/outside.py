"""What is outside a world, exchanged for what is inside it while it is played.

Most things are exchanged by identity: whichever module of the product has taken hold of a function
or a class gets the other one, so that nothing here knows where the product keeps it.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import logging
import os
import queue
import secrets
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import grpc.aio
import structlog

from btt.sdk import database, tls
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import connection as ledger_connection
from btt.sdk.payment import connection as node_connection
from btt.sdk.payment import opening
from btt.sdk.signing import EARLY_CLOSE
from btt.services.ledger import mark
from sim import machine
from sim.machine import CURRENT, SimConnection, SimExecutor, SimQueue, SimThread

if TYPE_CHECKING:
    from sim.world import World

START_MS = 1_700_000_000_000


@contextmanager
def outside(world: World) -> Iterator[None]:
    """Puts the simulated outside in the place of the real one."""
    started = START_MS / 1000
    exchanged: list[tuple[Any, Any]] = [
        (ThreadPoolExecutor, SimExecutor),
        (threading, SimpleNamespace(Thread=SimThread, Lock=threading.Lock, RLock=threading.RLock)),
        (queue, SimpleNamespace(SimpleQueue=SimQueue, Empty=queue.Empty)),
        (tls.pinned_channel, world.network.channel),
        (tls.read_certificate, world.network.read_certificate),
        (tls.certificate_sha256, lambda certificate: hashlib.sha256(certificate).digest()),
        (tls.server_credentials, lambda _, certificate: certificate),
        (node_connection._certificate_name, lambda certificate: certificate.decode()),
        (ledger_connection._check_name, lambda *_: None),
    ]
    draw = world.random.random
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("btt."):
                for attribute, value in list(vars(module).items()):
                    for old, new in exchanged:
                        if value is old:
                            stack.enter_context(mock.patch.object(module, attribute, new))
        for target, attribute, new in (
            (grpc.aio, "server", world.network.server),
            (sqlite3, "connect", lambda path, **options: SimConnection(path, **options)),
            (PrivateKey, "generate", lambda: PrivateKey(world.random.randbytes(32))),
            (secrets, "token_bytes", lambda n=32: world.random.randbytes(n)),
            (secrets, "token_hex", lambda n=32: world.random.randbytes(n).hex()),
            (time, "time_ns", lambda: _wall_ms(world) * 1_000_000),
            (time, "time", lambda: _wall_ms(world) / 1000),
            (time, "monotonic", lambda: started + world.room.time()),
            # Disks are quick or slow: the stores commit in place, or hand over to their writer.
            (time, "perf_counter", lambda: world.room.time() + draw() * 0.006),
            (database, "LOG_PAGES", 16),
            (opening, "EARLY_CLOSE", EARLY_CLOSE if world.early_close else 0),
            (os, "fsync", lambda _: None),
            (os, "close", machine.close),
            (fcntl, "flock", machine.flock),
            (mark.MarkWriter, "__init__", _mark_writer(world, mark.MarkWriter.__init__)),
        ):
            stack.enter_context(mock.patch.object(target, attribute, new))
        stack.enter_context(_logs(world))
        stack.enter_context(_collected_later())
        yield


def _wall_ms(world: World) -> int:
    process = CURRENT.get()
    party = world.parties.get(process.name) if process else None
    return party.clock() if party else world.now_ms()


def _mark_writer(world: World, inner: Any) -> Any:
    def make(writer: Any, path: Path, **options: Any) -> None:
        inner(writer, path, clock=world.room.time, **options)
        machine.own(writer._file)

    return make


@contextmanager
def _logs(world: World) -> Iterator[None]:
    """Silences the product; what it calls an error is one here."""

    def take(_: Any, level: str, event: dict[str, Any]) -> Any:
        process = CURRENT.get()
        if level in ("error", "exception", "critical") and (process is None or process.alive):
            world.violated(f"logged: {event}")
        raise structlog.DropEvent

    class Handler(logging.Handler):
        def emit(handler, record: logging.LogRecord) -> None:  # noqa: N805
            process = CURRENT.get()
            if process is None or process.alive:
                world.violated(f"logged: {record.getMessage()} {record.exc_info}")

    before = structlog.get_config()
    structlog.configure(processors=[take])
    log, handler = logging.getLogger("btt"), Handler(logging.ERROR)
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = True
        structlog.configure(**before)


@contextmanager
def _collected_later() -> Iterator[None]:
    """No collector in the middle: when it comes is not of the seed."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
