"""The work of the ledger's contestants: accounts that anyone can make again, and signed transfers.

Client n pays client n + 1. Keys come from numbers, so that a process which sends and the one that
serves need not tell each other about them. Requests are signed before any clock runs.
"""

from __future__ import annotations

import hashlib
import time

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.keys import PrivateKey
from btt.sdk.signing import Transfer, sign

FUNDS = 10**9
"""Base units that every account begins with."""
HOUR_MS = 3_600_000


def account(number: int) -> PrivateKey:
    """Returns the key of an account of the benchmark."""
    return PrivateKey(hashlib.sha256(b"btt bench %d" % number).digest())


def accounts(count: int) -> list[PrivateKey]:
    """Returns the keys of the first `count` accounts."""
    return [account(number) for number in range(count)]


def signed(key: PrivateKey, to: PrivateKey, amount: int, ledger_id: bytes, name: int) -> pb.TransferRequest:
    """Signs a transfer; `name` makes its request id."""
    message = Transfer(
        sender=key.address,
        recipient=to.address,
        amount=amount,
        request_id=name.to_bytes(16, "big"),
        valid_until_ms=time.time_ns() // 1_000_000 + HOUR_MS,
        memo=bytes(32),
    )
    return pb.TransferRequest(
        transfer=pb.SignedBody(
            body=message.encode(), signature=sign(key, message, ledger_id), public_key=key.public.data
        )
    )


def streams(clients: int, each: int, ledger_id: bytes) -> list[list[pb.TransferRequest]]:
    """Signs what each client will send, one request after the other.

    Args:
        clients: How many.
        each: Requests of one client.
        ledger_id: 32 bytes.
    """
    keys = accounts(clients) if clients > 1 else accounts(2)
    return [
        [
            signed(keys[client], keys[(client + 1) % len(keys)], 1, ledger_id, number)
            for number in range(1, each + 1)
        ]
        for client in range(clients)
    ]
