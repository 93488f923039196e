"""Makes tests/vectors/signing.json, which pins every byte that gets signed.

Run `python tools/make_vectors.py` after adding a message type; `--check` fails when the file
differs from what the code makes. A change of an existing entry breaks every wallet and ledger.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from btt.sdk.keys import Address, PrivateKey, PublicKey
from btt.sdk.money import SUPPLY
from btt.sdk.signing import (
    APP_UNKNOWN,
    EARLY_CLOSE,
    ChannelClose,
    ChannelCommit,
    ChannelExtension,
    ChannelFinalize,
    ChannelRefund,
    ChannelUpdate,
    CloseRequest,
    KeyRotation,
    LedgerRecovery,
    Message,
    Query,
    Receipt,
    SessionCall,
    SessionOpen,
    TopUp,
    Transfer,
    document_digest,
    service_reference,
    sign,
    sign_document,
)
from btt.sdk.wallet import derive_channel_key

FILE = Path(__file__).resolve().parent.parent / "tests" / "vectors" / "signing.json"


def seed(text: str, size: int = 32) -> bytes:
    """Bytes that look random and never change."""
    return sha256(b"btt vectors: " + text.encode()).digest()[:size]


LEDGER = seed("ledger")
PAYER, PAYEE, K1, K2, NODE, OPERATOR = (
    PrivateKey(seed(name)) for name in ("payer", "payee", "k1", "k2", "node", "operator")
)
COMMIT = ChannelCommit(
    payer=PAYER.address,
    payee=PAYEE.address,
    k1=K1.public,
    k2=K2.public,
    amount=5_000_000,
    expires_ms=1_767_225_600_000,
    challenge_ms=3_600_000,
    flags=EARLY_CLOSE,
    fee=1_000,
    nonce=seed("nonce", 16),
    service_ref=service_reference(NODE.address),
)
CHANNEL = COMMIT.channel_id(LEDGER)
REQUEST, UNTIL = seed("request", 16), 1_767_000_000_000

SIGNED: list[tuple[PrivateKey, Message]] = [
    (PAYER, COMMIT),
    (
        PrivateKey(bytes(31) + b"\1"),
        ChannelCommit(
            payer=Address(bytes(20)),
            payee=Address(b"\xff" * 20),
            k1=K2.public,
            k2=K1.public,
            amount=SUPPLY,
            expires_ms=2**63 - 1,
            challenge_ms=2**32 - 1,
            flags=0,
            fee=0,
            nonce=bytes(16),
            service_ref=bytes(32),
        ),
    ),
    (K2, ChannelRefund(channel=CHANNEL, not_before_ms=COMMIT.expires_ms)),
    (K1, ChannelUpdate(channel=CHANNEL, cumulative=0)),
    (K1, ChannelUpdate(channel=CHANNEL, cumulative=1_234_567)),
    (K1, ChannelUpdate(channel=CHANNEL, cumulative=SUPPLY)),
    (K2, ChannelClose(channel=CHANNEL, capture=1_234_567)),
    (
        PAYER,
        Transfer(
            sender=PAYER.address,
            recipient=PAYEE.address,
            amount=500_000,
            request_id=REQUEST,
            valid_until_ms=UNTIL,
            memo=b"for the music".ljust(32, b"\0"),
        ),
    ),
    (K1, Query(subject=CHANNEL, nonce=seed("query", 16), valid_until_ms=UNTIL)),
    (
        K1,
        SessionOpen(
            node=NODE.address,
            channel=CHANNEL,
            offer_digest=seed("offer"),
            app=APP_UNKNOWN,
            client_nonce=seed("client", 16),
            server_nonce=seed("server", 16),
            valid_until_ms=UNTIL,
        ),
    ),
    (K1, SessionCall(session=sha256(seed("token")).digest(), call_id=seed("call", 16))),
    (
        OPERATOR,
        Receipt(
            request_digest=CHANNEL,
            seq=42,
            entry_hash=seed("entry"),
            time_ms=1_766_999_999_999,
            code=0,
            epoch=1,
            operator_key_id=OPERATOR.address,
        ),
    ),
    (PAYER, TopUp(channel=CHANNEL, amount=2_000_000, request_id=REQUEST, valid_until_ms=UNTIL)),
    (PAYER, CloseRequest(channel=CHANNEL, request_id=REQUEST, valid_until_ms=UNTIL)),
    (PAYER, ChannelFinalize(channel=CHANNEL)),
    (OPERATOR, ChannelExtension(channel=CHANNEL, deadline_ms=UNTIL)),
    (OPERATOR, KeyRotation(epoch=2, next_key=NODE.public)),
    (
        OPERATOR,
        LedgerRecovery(epoch=3, next_key=NODE.public, ended_seq=42, ended_hash=seed("entry"), reached_seq=45),
    ),
]


def show(value: Address | PublicKey | bytes | int) -> str:
    """Bytes as hexadecimal, numbers as decimal text, since JSON numbers are floats to many readers."""
    if isinstance(value, int):
        return str(int(value))
    return (value if isinstance(value, bytes) else value.data).hex()


def message_vector(key: PrivateKey, message: Message) -> dict[str, Any]:
    return {
        "type": type(message).__name__,
        "tag": message.TAG.decode(),
        "fields": {f.name: show(getattr(message, f.name)) for f in fields(cast(Any, message))},
        "body": message.encode().hex(),
        "preimage": message.preimage(LEDGER).hex(),
        "digest": message.digest(LEDGER).hex(),
        "secret": key.secret.hex(),
        "public_key": key.public.data.hex(),
        "address": str(key.address),
        "signature": sign(key, message, LEDGER).hex(),
    }


def document_vector(name: str, payload: bytes) -> dict[str, str]:
    return {
        "name": name,
        "payload": payload.hex(),
        "digest": document_digest(name, LEDGER, payload).hex(),
        "secret": NODE.secret.hex(),
        "public_key": NODE.public.data.hex(),
        "signature": sign_document(NODE, name, LEDGER, payload).signature.hex(),
    }


def vectors() -> str:
    channel_nonces = (bytes(16), COMMIT.nonce)
    found = {
        "ledger_id": LEDGER.hex(),
        "messages": [message_vector(key, message) for key, message in SIGNED],
        "documents": [document_vector("Offer", b""), document_vector("Offer", b"\x08\x01 any bytes")],
        "channel_keys": [
            {
                "account": PAYER.secret.hex(),
                "nonce": nonce.hex(),
                "secret": derive_channel_key(PAYER, nonce).secret.hex(),
            }
            for nonce in channel_nonces
        ],
    }
    return json.dumps(found, indent=1) + "\n"


def main() -> int:
    made = vectors()
    if "--check" not in sys.argv:
        FILE.write_text(made)
        return 0
    if FILE.read_text() != made:
        print(f"{FILE.name} differs from what the code makes; signed bytes have changed")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
