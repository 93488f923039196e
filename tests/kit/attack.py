"""What an attacker sends to a ledger: signed requests of every kind, past the checks of our client."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient
from btt.sdk.rpc import to_error
from btt.sdk.signing import (
    EARLY_CLOSE,
    ChannelClose,
    ChannelCommit,
    ChannelRefund,
    ChannelUpdate,
    CloseRequest,
    Message,
    Query,
    TopUp,
    Transfer,
    sign,
)

START, HOUR = 1_800_000_000_000, 3_600_000
UNTIL = START + HOUR
ALICE, BOB, K1, K2 = (PrivateKey(n.to_bytes(32, "big")) for n in (11, 12, 21, 22))
ISSUE, DEPOSIT = 10_000, 100


class Clock:
    def __init__(self) -> None:
        self.now_ms = START

    def __call__(self) -> int:
        return self.now_ms


async def ask(method: Any, request: Any) -> Any:
    """Makes a call once; raises the error that the ledger named."""
    try:
        return await method(request)
    except grpc.aio.AioRpcError as failure:
        raise to_error(failure) from None


def t1(name: int = 0, **changes: Any) -> ChannelCommit:
    fields: dict[str, Any] = {
        "payer": ALICE.address,
        "payee": BOB.address,
        "k1": K1.public,
        "k2": K2.public,
        "amount": DEPOSIT,
        "expires_ms": UNTIL,
        "challenge_ms": 5000,
        "flags": EARLY_CLOSE,
        "fee": 0,
        "nonce": name.to_bytes(16, "big"),
        "service_ref": bytes(32),
    }
    return ChannelCommit(**(fields | changes))


async def opened(ledger: LedgerClient, commit: ChannelCommit) -> bytes:
    channel = commit.channel_id(ledger.ledger_id)
    refund = ChannelRefund(channel=channel, not_before_ms=commit.expires_ms)
    await ledger.open_channel(commit, ALICE, sign(K2, refund, ledger.ledger_id))
    return channel


def contents(home: Path) -> list[tuple[str, int]]:
    """How many rows each table has; what a request cost us."""
    with closing(sqlite3.connect(f"file:{home}/ledger.sqlite3?mode=ro", uri=True)) as db:
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return [(name, db.execute(f"SELECT count(*) FROM {name}").fetchone()[0]) for name in tables]


@dataclass(frozen=True)
class Kind:
    """One kind of signed request: who signs it, over what, and how it is sent."""

    key: PrivateKey
    message: Callable[[bytes], Message]
    send: Callable[[LedgerClient, bytes, pb.SignedBody, bytes], Any]


def body_of(what: str) -> Callable[[LedgerClient, bytes, pb.SignedBody, bytes], Any]:
    method, request, field = {
        "Transfer": ("Transfer", pb.TransferRequest, "transfer"),
        "TopUp": ("TopUpChannel", pb.TopUpChannelRequest, "top_up"),
        "CloseRequest": ("RequestClose", pb.RequestCloseRequest, "request"),
        "ChannelClose": ("CloseChannel", pb.CloseChannelRequest, "close"),
        "Query": ("GetChannel", pb.GetChannelRequest, "query"),
    }[what]
    return lambda to, channel, signed, refund: ask(getattr(to._stub, method), request(**{field: signed}))


def send_t1(to: LedgerClient, channel: bytes, signed: pb.SignedBody, refund: bytes) -> Any:
    return ask(to._stub.OpenChannel, pb.OpenChannelRequest(commit=signed, refund_signature=refund))


def send_t2(to: LedgerClient, channel: bytes, signed: pb.SignedBody, refund: bytes) -> Any:
    """The signature under test is T2's; T1 is as it should be."""
    body = t1(9)
    good = pb.SignedBody(
        body=body.encode(), public_key=ALICE.public.data, signature=sign(ALICE, body, to.ledger_id)
    )
    return ask(to._stub.OpenChannel, pb.OpenChannelRequest(commit=good, refund_signature=signed.signature))


def send_t3(to: LedgerClient, channel: bytes, signed: pb.SignedBody, refund: bytes) -> Any:
    request = pb.SubmitUpdateRequest(channel_id=channel, cumulative=7, update_signature=signed.signature)
    return ask(to._stub.SubmitUpdate, request)


# Where bodies are alike, as those of a close and an update, nothing but the type tells them apart.
KINDS = {
    "Transfer": Kind(
        ALICE,
        lambda c: Transfer(
            sender=ALICE.address, recipient=BOB.address, amount=1, request_id=bytes(16),
            valid_until_ms=UNTIL, memo=bytes(32),
        ),
        body_of("Transfer"),
    ),
    "ChannelCommit": Kind(ALICE, lambda c: t1(8), send_t1),
    "ChannelRefund": Kind(K2, lambda c: ChannelRefund(channel=c, not_before_ms=UNTIL), send_t2),
    "TopUp": Kind(
        ALICE,
        lambda c: TopUp(channel=c, amount=1, request_id=bytes(15) + b"1", valid_until_ms=UNTIL),
        body_of("TopUp"),
    ),
    "ChannelUpdate": Kind(K1, lambda c: ChannelUpdate(channel=c, cumulative=7), send_t3),
    "Query": Kind(K2, lambda c: Query(subject=c, nonce=bytes(16), valid_until_ms=UNTIL), body_of("Query")),
    "CloseRequest": Kind(
        ALICE,
        lambda c: CloseRequest(channel=c, request_id=bytes(15) + b"2", valid_until_ms=UNTIL),
        body_of("CloseRequest"),
    ),
    "ChannelClose": Kind(K2, lambda c: ChannelClose(channel=c, capture=0), body_of("ChannelClose")),
}  # fmt: skip
