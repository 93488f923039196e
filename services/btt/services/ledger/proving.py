"""Verifies the signatures of a journal ahead of its audit, in processes of their own.

A prover answers which claims "this key signed this digest" it has verified; the audit itself
derives every claim anew and verifies what is not among them. So a prover can save the audit work,
and cannot make it accept or refuse anything.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from typing import Final

from btt.sdk.errors import InvalidRequest
from btt.sdk.signing import (
    ChannelClose,
    ChannelCommit,
    ChannelExtension,
    ChannelRefund,
    ChannelUpdate,
    CloseRequest,
    Message,
    TopUp,
    Transfer,
)
from btt.services.ledger.journal import Entry, Kind
from btt.services.ledger.verify import Verifier, public_key

CHUNK: Final = 512
"""Entries that a prover gets at once."""
_MESSAGES: Final[dict[int, type[Message]]] = {
    Kind.TRANSFER: Transfer,
    Kind.OPEN_CHANNEL: ChannelCommit,
    Kind.CLOSE_CHANNEL: ChannelClose,
    Kind.TOP_UP: TopUp,
    Kind.UPDATE: ChannelUpdate,
    Kind.REQUEST_CLOSE: CloseRequest,
    Kind.EXTEND: ChannelExtension,
}
_Signed = tuple[int, bytes, bytes, bytes]
_Part = tuple[list[Entry], "Future[list[bytes]]"]


def claim(key: bytes, digest: bytes, signature: bytes) -> bytes:
    """Returns the claim that a key (33 bytes) signed a digest (32 bytes), as bytes to compare."""
    return key + digest + signature


def claims(ledger_id: bytes, entries: Iterable[_Signed]) -> list[bytes]:
    """Returns what holds among the signatures of entries.

    Args:
        ledger_id: 32 bytes.
        entries: Kind, body, signatures, and the channel's K1 (or nothing) of each.
    """
    found: list[bytes] = []
    for kind, body, proof, k1 in entries:
        with suppress(InvalidRequest):
            found += _claims(ledger_id, kind, body, proof, k1)
    return found


def _claims(ledger_id: bytes, kind: int, body: bytes, proof: bytes, k1: bytes) -> Iterator[bytes]:
    message = _MESSAGES[kind].decode(body)
    digest = message.digest(ledger_id)
    said = [(proof[:33], digest, proof[33:98])]
    if isinstance(message, ChannelCommit):
        refund = ChannelRefund(channel=digest, not_before_ms=message.expires_ms)
        said.append((message.k2.data, refund.digest(ledger_id), proof[98:]))
    elif isinstance(message, ChannelClose) and k1 and len(proof) > 106:
        shown = ChannelUpdate(channel=message.channel, cumulative=int.from_bytes(proof[98:106], "big"))
        said.append((k1, shown.digest(ledger_id), proof[106:]))
    for key, signed, signature in said:
        if public_key(key).verify(signed, signature):
            yield claim(key, signed, signature)


class ProvenVerifier(Verifier):
    """A verifier that spares itself what was proven before, for this very key, digest and signature."""

    proven: frozenset[bytes] = frozenset()
    """Claims that hold."""

    def _holds(self, key: bytes, digest: bytes, signature: bytes) -> bool:
        return claim(key, digest, signature) in self.proven or super()._holds(key, digest, signature)


class Provers:
    """Processes that prove ahead; a context manager.

    Args:
        ledger_id: 32 bytes.
        workers: How many processes.
        k1_of: Returns the K1 of a channel that the audit knows already, or nothing.
    """

    def __init__(self, ledger_id: bytes, workers: int, k1_of: Callable[[bytes], bytes]) -> None:
        self._ledger_id = ledger_id
        self._ahead = 2 * workers
        self._k1_of = k1_of
        self._pool = ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn"), initializer=_live_with_parent
        )

    def __enter__(self) -> Provers:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def over(self, entries: Iterator[Entry]) -> Iterator[tuple[list[Entry], list[bytes]]]:
        """Yields the entries in order, in parts, each with the claims that hold in it."""
        parts: deque[_Part] = deque()
        while True:
            while len(parts) < self._ahead and (part := list(islice(entries, CHUNK))):
                parts.append((part, self._submit(part)))
            if not parts:
                return
            part, proven = parts.popleft()
            try:
                yield part, proven.result()
            except BrokenProcessPool:
                yield part, []  # the audit verifies them itself

    def _k1(self, entry: Entry) -> bytes:
        return self._k1_of(entry.body[:32]) if entry.kind is Kind.CLOSE_CHANNEL else b""

    def _submit(self, part: list[Entry]) -> Future[list[bytes]]:
        signed = [(int(e.kind), e.body, e.signatures, self._k1(e)) for e in part if e.kind in _MESSAGES]
        try:
            return self._pool.submit(claims, self._ledger_id, signed)
        except BrokenProcessPool as error:
            failed: Future[list[bytes]] = Future()
            failed.set_exception(error)
            return failed


def _live_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
