"""Signed messages used where they do not belong, amounts at every edge, and junk: nothing moves.

Everything is sent over gRPC as an attacker would, past the checks of our own client.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.errors import (
    AccountUnknown,
    BttError,
    ChannelUnknown,
    InsufficientFunds,
    InvalidRequest,
    RateLimited,
    SignatureInvalid,
    UpdateInvalid,
)
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerClient
from btt.sdk.money import SUPPLY
from btt.sdk.signing import (
    ChannelClose,
    ChannelRefund,
    ChannelUpdate,
    Message,
    sign,
)
from btt.sdk.signing.layout import preimage
from btt.services.ledger import folder, server
from btt.services.ledger.books import Terms
from kit.attack import (
    ALICE,
    BOB,
    DEPOSIT,
    HOUR,
    ISSUE,
    K1,
    K2,
    KINDS,
    UNTIL,
    Clock,
    ask,
    contents,
    opened,
    t1,
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    made = tmp_path / "ledger"
    terms = Terms(min_challenge_ms=1000, min_lifetime_ms=1000, min_update_delta=5)
    folder.init(made, name="test", supply_to=ALICE.address, amount=ISSUE, terms=terms, clock=Clock())
    return made


@pytest.fixture
async def running(home: Path) -> AsyncIterator[server.RunningLedger]:
    config = server.LedgerConfig(folder=home, sweep_every=3600, rate=10**6, burst=10**6)
    async with server.serve(config, clock=Clock()) as ledger:
        yield ledger


@pytest.fixture
async def ledger(running: server.RunningLedger) -> AsyncIterator[LedgerClient]:
    async with LedgerClient.connect(running.address) as client:
        yield client


async def test_no_message_counts_as_another_or_elsewhere(ledger: LedgerClient, home: Path) -> None:
    """Types x types x ledgers x channels, each sent where each is taken."""
    here = ledger.ledger_id
    channel, other_channel = await opened(ledger, t1()), await opened(ledger, t1(1))
    before = contents(home)
    places = [(here, channel), (sha256(b"another ledger").digest(), channel), (here, other_channel)]
    tried = 0
    for (name, kind), (source, made), (ledger_id, of) in product(KINDS.items(), KINDS.items(), places):
        wanted_channel = t1(9).channel_id(here) if name == "ChannelRefund" else channel
        target = wanted_channel if of == channel else other_channel
        message, wanted = made.message(target), kind.message(wanted_channel)
        # Signed by whoever may sign what it is sent as: only what was signed is wrong.
        signature = sign(kind.key, message, ledger_id)
        for body in {message.encode(), wanted.encode()}:
            if signature == sign(kind.key, wanted, here) and body == wanted.encode():
                assert (name, ledger_id) == (source, here)
                continue
            if (
                name not in ("ChannelUpdate", "ChannelRefund")
                and source == name
                and ledger_id == here
                and body == message.encode()
            ):
                continue  # honest, about another channel
            signed = pb.SignedBody(body=body, public_key=kind.key.public.data, signature=signature)
            refund = sign(K2, ChannelRefund(channel=t1(8).channel_id(here), not_before_ms=UNTIL), here)
            with pytest.raises(InvalidRequest):
                await kind.send(ledger, channel, signed, refund)
            tried += 1
    assert tried > 2 * len(KINDS) ** 2
    assert contents(home) == before
    for name, kind in KINDS.items():  # each is good where it belongs
        wanted = kind.message(t1(9).channel_id(here) if name == "ChannelRefund" else channel)
        signed = pb.SignedBody(
            body=wanted.encode(), public_key=kind.key.public.data, signature=sign(kind.key, wanted, here)
        )
        refund = sign(K2, ChannelRefund(channel=t1(8).channel_id(here), not_before_ms=UNTIL), here)
        await kind.send(ledger, channel, signed, refund)


async def test_a_replay_moves_nothing_however_late(home: Path) -> None:
    """After the request id is forgotten, and after a restart, the journal still knows the request."""
    clock = Clock()
    config = server.LedgerConfig(folder=home, sweep_every=3600)
    requests = []

    async def send(address: Any) -> list[bytes]:
        async with LedgerClient.connect(address) as to:
            return [
                (await ask(getattr(to._stub, method), request)).receipt.body for method, request in requests
            ]

    async with server.serve(config, clock=clock) as running, LedgerClient.connect(running.address) as to:
        channel = await opened(to, t1())
        for name in ("Transfer", "TopUp"):
            kind = KINDS[name]
            message = kind.message(channel)
            signed = pb.SignedBody(
                body=message.encode(),
                public_key=ALICE.public.data,
                signature=sign(ALICE, message, to.ledger_id),
            )
            if name == "Transfer":
                requests.append(("Transfer", pb.TransferRequest(transfer=signed)))
            else:
                requests.append(("TopUpChannel", pb.TopUpChannelRequest(top_up=signed)))
        first = await send(running.address)
        account = await to.account(ALICE)
        clock.now_ms += 72 * HOUR
        await to.transfer(BOB, ALICE.address, 1, valid_until_ms=clock.now_ms + HOUR)  # purges
        assert dict(contents(home))["requests"] == 1
        assert await send(running.address) == first
    async with server.serve(config, clock=clock) as running, LedgerClient.connect(running.address) as to:
        assert await send(running.address) == first
        again = await to.account(ALICE)
        assert (again.available, again.locked) == (account.available + 1, account.locked)


def test_no_transaction_of_tron_has_the_bytes_we_sign() -> None:
    """TRON signs protobuf; what we sign begins with a byte that no protobuf begins with."""
    from google.protobuf.message import DecodeError
    from google.protobuf.wrappers_pb2 import BytesValue

    for kind in KINDS.values():
        signed = kind.message(bytes(32)).preimage(sha256(b"a ledger").digest())
        assert signed[0] == 0
        with pytest.raises(DecodeError):
            BytesValue().ParseFromString(signed)


EDGES = (0, 1, SUPPLY, SUPPLY + 1, 2**63 - 1, 2**63, 2**64 - 1)
FIELDS = {
    "transfer": (KINDS["Transfer"], 40),
    "deposit": (KINDS["ChannelCommit"], 106),
    "fee": (KINDS["ChannelCommit"], 130),
    "top up": (KINDS["TopUp"], 32),
    "capture": (KINDS["ChannelClose"], 32),
}
"""Amounts, and where they are in what is signed."""


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("field", [*FIELDS, "update", "shown update"])
async def test_amounts_at_every_edge(ledger: LedgerClient, home: Path, field: str, edge: int) -> None:
    here = ledger.ledger_id
    channel = await opened(ledger, t1())
    before = contents(home)
    number = edge.to_bytes(8, "big")
    raw = preimage(ChannelUpdate.TAG, here, channel + number)
    update_signature = K1.sign(sha256(raw).digest())
    if field == "update":
        request = pb.SubmitUpdateRequest(
            channel_id=channel, cumulative=edge, update_signature=update_signature
        )
        call = ask(ledger._stub.SubmitUpdate, request)
        allowed = False  # 1 is less than the least raise of this ledger
    elif field == "shown update":
        close = ChannelClose(channel=channel, capture=0)
        request = pb.CloseChannelRequest(
            close=ledger._signed(K2, close),
            cumulative=edge,
            update_signature=update_signature if edge else b"",
        )
        call = ask(ledger._stub.CloseChannel, request)
        allowed = edge <= DEPOSIT
    else:
        kind, at = FIELDS[field]
        whole = kind.message(channel)
        body = whole.encode()[:at] + number + whole.encode()[at + 8 :]
        digest = sha256(preimage(whole.TAG, here, body)).digest()
        signed = pb.SignedBody(body=body, public_key=kind.key.public.data, signature=kind.key.sign(digest))
        refund = K2.sign(
            sha256(preimage(ChannelRefund.TAG, here, digest + UNTIL.to_bytes(8, "big"))).digest()
        )
        call = kind.send(ledger, channel, signed, refund)
        allowed = edge == {"capture": 0, "fee": 0}.get(field, 1)
    if allowed:
        await call
    else:
        with pytest.raises(BttError) as refused:
            await call
        assert refused.value.reason not in ("INTERNAL", "INVARIANT_BROKEN", "STORAGE", "")
        assert edge <= SUPPLY or field not in FIELDS or isinstance(refused.value, InvalidRequest)
        remembered = isinstance(refused.value, InsufficientFunds) and field in ("transfer", "top up")
        assert contents(home) == [(n, count + (remembered and n == "requests")) for n, count in before]
    totals = await ledger.totals()
    assert (totals.issued, totals.accounts + totals.channels) == (ISSUE, ISSUE)


async def test_junk_costs_us_nothing_that_stays(
    ledger: LedgerClient, running: server.RunningLedger, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row, and no commit either."""
    channel = await opened(ledger, t1())
    books = running.sequencer._store
    commit, commits = books.commit, []
    monkeypatch.setattr(books, "commit", lambda batch: (commits.append(batch), commit(batch)))
    before = contents(home)
    here, stub = ledger.ledger_id, ledger._stub

    def signed(key: PrivateKey, message: Message, signature: bytes = b"") -> pb.SignedBody:
        return pb.SignedBody(
            body=message.encode(), public_key=key.public.data, signature=signature or sign(key, message, here)
        )

    def wrong(key: PrivateKey, message: Message) -> pb.SignedBody:
        return signed(key, message, sign(key, t1(77), here))

    transfer, more = KINDS["Transfer"].message(channel), KINDS["TopUp"].message(channel)
    update, ask_close = KINDS["ChannelUpdate"].message(channel), KINDS["CloseRequest"].message(channel)
    close, look = ChannelClose(channel=channel, capture=0), KINDS["Query"].message(channel)
    # A channel that its K2 did not consent to: dust for somebody else's books.
    no_consent = pb.OpenChannelRequest(commit=signed(ALICE, t1(3)), refund_signature=bytes(65))
    by_k2 = sign(K2, update, here)
    junk: list[tuple[Any, Any, type[BttError]]] = [
        (stub.Transfer, pb.TransferRequest(transfer=wrong(ALICE, transfer)), SignatureInvalid),
        (stub.Transfer, pb.TransferRequest(transfer=pb.SignedBody(body=b"x" * 104)), InvalidRequest),
        (stub.OpenChannel, pb.OpenChannelRequest(commit=wrong(ALICE, t1(3))), SignatureInvalid),
        (stub.OpenChannel, no_consent, SignatureInvalid),
        (stub.TopUpChannel, pb.TopUpChannelRequest(top_up=wrong(ALICE, more)), SignatureInvalid),
        (stub.RequestClose, pb.RequestCloseRequest(request=wrong(ALICE, ask_close)), SignatureInvalid),
        (stub.CloseChannel, pb.CloseChannelRequest(close=wrong(K2, close)), SignatureInvalid),
        (
            stub.SubmitUpdate,
            pb.SubmitUpdateRequest(channel_id=channel, cumulative=7, update_signature=by_k2),
            SignatureInvalid,
        ),
        (stub.SubmitUpdate, pb.SubmitUpdateRequest(channel_id=bytes(32), cumulative=7), ChannelUnknown),
        (stub.FinalizeChannel, pb.FinalizeChannelRequest(channel_id=bytes(32)), ChannelUnknown),
        (stub.FinalizeChannel, pb.FinalizeChannelRequest(channel_id=b"x"), InvalidRequest),
        (stub.GetChannel, pb.GetChannelRequest(query=wrong(K2, look)), SignatureInvalid),
    ]
    rounds = 100
    for method, request, expected in junk:
        outcomes = await asyncio.gather(
            *(ask(method, request) for _ in range(rounds)), return_exceptions=True
        )
        assert all(isinstance(outcome, expected) for outcome in outcomes), (request, set(map(type, outcomes)))
    # Well signed, and refused by the books.
    small = ChannelUpdate(channel=channel, cumulative=4)
    for _ in range(rounds):
        stranger = PrivateKey(secrets.token_bytes(32))
        with pytest.raises(AccountUnknown):
            await ledger.transfer(stranger, BOB.address, 1, valid_until_ms=UNTIL)
        with pytest.raises(UpdateInvalid):
            await ledger.submit_update(small, sign(K1, small, here))
    assert contents(home) == before
    assert commits == []
    await ledger.transfer(ALICE, BOB.address, 1, valid_until_ms=UNTIL)
    assert len(commits) == 1


async def test_a_flood_of_one_key_is_cut_off_at_its_rate(home: Path) -> None:
    config = server.LedgerConfig(folder=home, sweep_every=3600, rate=0.001, burst=20)
    async with (
        server.serve(config, clock=Clock()) as running,
        LedgerClient.connect(running.address) as ledger,
    ):
        channel = await opened(ledger, t1(amount=500))
        updates = [ChannelUpdate(channel=channel, cumulative=n) for n in range(5, 505, 5)]
        calls = (
            ask(
                ledger._stub.SubmitUpdate,
                pb.SubmitUpdateRequest(
                    channel_id=channel,
                    cumulative=u.cumulative,
                    update_signature=sign(K1, u, ledger.ledger_id),
                ),
            )
            for u in updates
        )
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        cut_off = [outcome for outcome in outcomes if isinstance(outcome, RateLimited)]
        assert len(updates) - len(cut_off) == 20
        assert all(error.retryable and error.retry_after > 0 for error in cut_off)
        # It has not touched what the payee may ask: to close.
        await ledger.close_channel(ChannelClose(channel=channel, capture=0), K2)
