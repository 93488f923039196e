"""The ledger over real gRPC and TLS, through its client; and liars in its place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.proto.ledger.v1.ledger_pb2_grpc import (
    LedgerServiceServicer,
    LedgerServiceStub,
    add_LedgerServiceServicer_to_server,
)
from btt.sdk.errors import (
    AccountUnknown,
    BttError,
    ChannelClosed,
    ChannelUnknown,
    ConfigError,
    IdentityError,
    InsufficientFunds,
    InvalidRequest,
    InvariantBroken,
    LedgerUnreachable,
    OutcomeUnknown,
    RequestConflict,
    RequestExpired,
    SignatureInvalid,
    SignerMismatch,
    StorageError,
    TermsRefused,
)
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerAddress, LedgerClient, SignedReceipt, tls_name
from btt.sdk.ledger import connection as client_module
from btt.sdk.rpc import to_error
from btt.sdk.signing import (
    ChannelClose,
    ChannelCommit,
    ChannelRefund,
    ChannelUpdate,
    Query,
    Receipt,
    sign,
    sign_document,
)
from btt.sdk.tls import make_certificate, pinned_channel, read_certificate, server_credentials
from btt.services.ledger import folder, server
from btt.services.ledger.books import Terms
from btt.services.ledger.journal import EntryRef
from btt.services.ledger.voice import Voice

START = 1_800_000_000_000
HOUR = 3_600_000
ALICE, BOB, CAROL, K1, K2 = (PrivateKey(n.to_bytes(32, "big")) for n in (11, 12, 13, 21, 22))
ISSUE = 1_000_000


class Clock:
    def __init__(self) -> None:
        self.now_ms = START

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def home(tmp_path: Path, clock: Clock) -> Path:
    made = tmp_path / "ledger"
    folder.init(
        made,
        name="test",
        supply_to=ALICE.address,
        amount=ISSUE,
        terms=Terms(min_challenge_ms=1000, min_lifetime_ms=1000),
        clock=clock,
    )
    return made


@pytest.fixture
async def running(home: Path, clock: Clock) -> AsyncIterator[server.RunningLedger]:
    async with server.serve(server.LedgerConfig(folder=home), clock=clock) as ledger:
        yield ledger


@pytest.fixture
async def ledger(running: server.RunningLedger) -> AsyncIterator[LedgerClient]:
    async with LedgerClient.connect(running.address) as client:
        yield client


@asynccontextmanager
async def raw(address: LedgerAddress) -> AsyncIterator[LedgerServiceStub]:
    """Calls without a client's checks."""
    certificate = await read_certificate(address.host, address.port)
    name = tls_name(address.operator)
    async with pinned_channel(address.host, address.port, certificate, name) as channel:
        yield LedgerServiceStub(channel)


async def refusal(call: Any) -> BttError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return to_error(failed.value)


def terms(ledger: LedgerClient, **changes: Any) -> tuple[ChannelCommit, bytes]:
    """T1 and K2's signature of T2."""
    fields: dict[str, Any] = {
        "payer": ALICE.address,
        "payee": BOB.address,
        "k1": K1.public,
        "k2": K2.public,
        "amount": 100,
        "expires_ms": ledger.now_ms() + HOUR,
        "challenge_ms": 5000,
        "flags": 1,
        "fee": 0,
        "nonce": bytes(16),
        "service_ref": bytes(32),
    }
    t1 = ChannelCommit(**(fields | changes))
    t2 = ChannelRefund(channel=t1.channel_id(ledger.ledger_id), not_before_ms=t1.expires_ms)
    return t1, sign(K2, t2, ledger.ledger_id)


async def test_what_the_ledger_is(ledger: LedgerClient, running: server.RunningLedger, clock: Clock) -> None:
    info = await ledger.info()
    assert (info.name, info.unbacked, info.epoch, info.head_seq) == ("test", True, 1, 1)
    assert info.ledger_id == running.identity.ledger_id == ledger.ledger_id
    assert info.time_ms == clock.now_ms
    assert (info.min_challenge_ms, info.min_lifetime_ms) == (1000, 1000)
    assert ledger.operator_key.address == running.address.operator


async def test_transfer(ledger: LedgerClient) -> None:
    receipt = await ledger.transfer(ALICE, BOB.address, 300, bytes(16), valid_until_ms=START + HOUR)
    receipt.verify(ledger.operator_key, ledger.ledger_id)
    assert receipt.seq == 2
    again = await ledger.transfer(ALICE, BOB.address, 300, bytes(16), valid_until_ms=START + HOUR)
    assert again == receipt
    with pytest.raises(RequestConflict):
        await ledger.transfer(ALICE, BOB.address, 301, bytes(16), valid_until_ms=START + HOUR)
    with pytest.raises(RequestExpired):
        await ledger.transfer(ALICE, BOB.address, 1, valid_until_ms=START)
    with pytest.raises(InsufficientFunds):
        await ledger.transfer(BOB, ALICE.address, 301)
    with pytest.raises(AccountUnknown):
        await ledger.transfer(CAROL, ALICE.address, 1)
    alice, bob, carol = [await ledger.account(key) for key in (ALICE, BOB, CAROL)]
    assert (alice.available, bob.available, carol.available) == (ISSUE - 300, 300, 0)


async def test_a_channel_from_open_to_close(ledger: LedgerClient) -> None:
    t1, t2 = terms(ledger)
    channel = t1.channel_id(ledger.ledger_id)
    opened = await ledger.open_channel(t1, ALICE, t2)
    assert await ledger.open_channel(t1, ALICE, t2) == opened
    for key in (ALICE, K1, K2):
        state = await ledger.channel(channel, key)
        assert (state.phase, state.deposit, state.best) == (pb.CHANNEL_PHASE_OPEN, 100, 0)
        assert state.commit == t1.encode()
    account = await ledger.account(ALICE)
    assert (account.available, account.locked) == (ISSUE - 100, 100)
    totals = await ledger.totals()
    assert (totals.issued, totals.accounts, totals.channels) == (ISSUE, ISSUE - 100, 100)
    assert (totals.open_channels, totals.closed_channels) == (1, 0)

    update = sign(K1, ChannelUpdate(channel=channel, cumulative=70), ledger.ledger_id)
    close = ChannelClose(channel=channel, capture=60)
    closed = await ledger.close_channel(close, K2, 70, update)
    assert await ledger.close_channel(close, K2, 70, update) == closed
    with pytest.raises(ChannelClosed):
        await ledger.close_channel(ChannelClose(channel=channel, capture=70), K2, 70, update)
    state = await ledger.channel(channel, K2)
    assert (state.phase, state.captured, state.best) == (pb.CHANNEL_PHASE_CLOSED, 60, 70)
    assert (await ledger.account(BOB)).available == 60
    account = await ledger.account(ALICE)
    assert (account.available, account.locked) == (ISSUE - 60, 0)
    totals = await ledger.totals()
    assert (totals.accounts, totals.channels, totals.head_seq) == (ISSUE, 0, 3)
    assert (totals.open_channels, totals.closed_channels) == (0, 1)


async def test_refusals_reach_the_caller(ledger: LedgerClient) -> None:
    t1, t2 = terms(ledger, challenge_ms=999)
    with pytest.raises(TermsRefused):
        await ledger.open_channel(t1, ALICE, t2)
    t1, t2 = terms(ledger)
    with pytest.raises(SignatureInvalid):
        await ledger.open_channel(t1, ALICE, t2[:32] + bytes(33))
    with pytest.raises(SignerMismatch):
        await ledger.open_channel(t1, K1, t2)
    await ledger.open_channel(t1, ALICE, t2)
    channel = t1.channel_id(ledger.ledger_id)
    with pytest.raises(SignerMismatch):
        await ledger.close_channel(ChannelClose(channel=channel, capture=0), K1)
    update = sign(K2, ChannelUpdate(channel=channel, cumulative=70), ledger.ledger_id)
    with pytest.raises(SignatureInvalid):
        await ledger.close_channel(ChannelClose(channel=channel, capture=70), K2, 70, update)
    with pytest.raises(ChannelUnknown):
        await ledger.close_channel(ChannelClose(channel=bytes(32), capture=0), K2)
    with pytest.raises(ChannelUnknown):
        await ledger.channel(bytes(32), K2)
    for stranger in (BOB, CAROL):
        with pytest.raises(SignerMismatch):
            await ledger.channel(channel, stranger)


async def test_accounts_are_read_by_their_owner(ledger: LedgerClient, running: server.RunningLedger) -> None:
    def query(signer: PrivateKey, until: int = START + 1000) -> pb.GetAccountRequest:
        asked = Query(subject=bytes(12) + ALICE.address.data, nonce=bytes(16), valid_until_ms=until)
        signature = sign(signer, asked, ledger.ledger_id)
        return pb.GetAccountRequest(
            query=pb.SignedBody(body=asked.encode(), signature=signature, public_key=signer.public.data)
        )

    async with raw(running.address) as stub:
        await stub.GetAccount(query(ALICE))
        assert isinstance(await refusal(stub.GetAccount(query(BOB))), SignerMismatch)
        for until in (0, START, START + HOUR + 1):
            assert isinstance(await refusal(stub.GetAccount(query(ALICE, until))), RequestExpired)
        forged = query(ALICE)
        forged.query.signature = query(BOB).query.signature
        assert isinstance(await refusal(stub.GetAccount(forged)), SignatureInvalid)


async def test_malformed_requests(running: server.RunningLedger) -> None:
    async with raw(running.address) as stub:
        for body in (b"", bytes(91), bytes(10_000)):
            signed = pb.SignedBody(body=body, signature=bytes(65), public_key=ALICE.public.data)
            for call in (
                stub.Transfer(pb.TransferRequest(transfer=signed)),
                stub.OpenChannel(pb.OpenChannelRequest(commit=signed)),
                stub.CloseChannel(pb.CloseChannelRequest(close=signed)),
                stub.GetAccount(pb.GetAccountRequest(query=signed)),
                stub.GetChannel(pb.GetChannelRequest(query=signed)),
            ):
                assert type(await refusal(call)) is InvalidRequest
        large = pb.SignedBody(body=bytes(server.MAX_MESSAGE))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.Transfer(pb.TransferRequest(transfer=large))
        assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_ledger_time_decides(ledger: LedgerClient, clock: Clock) -> None:
    assert abs(ledger.now_ms() - START) < 60_000
    clock.now_ms += 48 * HOUR
    assert (await ledger.account(ALICE)).time_ms == clock.now_ms
    clock.now_ms += 48 * HOUR
    assert (await ledger.transfer(ALICE, BOB.address, 1)).time_ms == clock.now_ms
    clock.now_ms -= 10 * HOUR
    assert (await ledger.info()).time_ms == clock.now_ms + 10 * HOUR


async def test_a_halted_ledger_answers_nothing_else(
    ledger: LedgerClient, running: server.RunningLedger
) -> None:
    running.sequencer.halted = InvariantBroken("The books do not add up.")
    t1, t2 = terms(ledger)
    for call in (
        ledger.info(),
        ledger.totals(),
        ledger.account(ALICE),
        ledger.channel(bytes(32), ALICE),
        ledger.transfer(ALICE, BOB.address, 1),
        ledger.open_channel(t1, ALICE, t2),
        ledger.close_channel(ChannelClose(channel=bytes(32), capture=0), K2),
    ):
        with pytest.raises(InvariantBroken, match="do not add up"):
            await call


async def test_a_failed_disk_is_tried_again_with_the_same_request(
    ledger: LedgerClient, running: server.RunningLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_PAUSES", (0.0, 0.0))
    carry_out, tries = running.sequencer.carry_out, []

    async def fails_once(check: Any, answer: Any) -> Any:
        tries.append(check().digest)
        if len(tries) == 1:
            raise StorageError("The disk failed.")
        return await carry_out(check, answer)

    monkeypatch.setattr(running.sequencer, "carry_out", fails_once)
    receipt = await ledger.transfer(ALICE, BOB.address, 5)
    assert tries == [receipt.receipt.request_digest] * 2
    tries.clear()
    monkeypatch.setattr(client_module, "TRIES", 1)
    with pytest.raises(OutcomeUnknown, match="The disk failed"):
        await ledger.transfer(ALICE, BOB.address, 5)


class TestIdentity:
    async def test_nobody_there(self, running: server.RunningLedger, home: Path, clock: Clock) -> None:
        # A port that nobody listens on: one that was just given up.
        listener = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        listener.close()
        await listener.wait_closed()
        with pytest.raises(LedgerUnreachable):
            async with LedgerClient.connect(replace(running.address, port=port)):
                pass

    async def test_another_operator(self, running: server.RunningLedger) -> None:
        with pytest.raises(IdentityError, match="not the ledger"):
            async with LedgerClient.connect(replace(running.address, operator=BOB.address)):
                pass

    async def test_another_ledger_id(self, running: server.RunningLedger) -> None:
        with pytest.raises(IdentityError, match="not signed"):
            async with LedgerClient.connect(replace(running.address, ledger_id=bytes(32))):
                pass

    async def test_an_operator_with_two_ledgers(
        self, running: server.RunningLedger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def confused(self: Voice, name: str, info: pb.LedgerInfo) -> Any:
            info.ledger_id = bytes(32)
            return sign_document(self._key, name, self._identity.ledger_id, info.SerializeToString())

        monkeypatch.setattr(Voice, "document", confused)
        with pytest.raises(IdentityError, match="another ledger"):
            async with LedgerClient.connect(running.address):
                pass

    async def test_a_man_in_the_middle(self, running: server.RunningLedger) -> None:
        """He has a certificate with the right name and passes on the true description."""

        async with raw(running.address) as stub:
            description = await stub.GetInfo(pb.GetInfoRequest())

        class Relay(LedgerServiceServicer):
            async def GetInfo(self, request: object, context: object) -> pb.GetInfoResponse:  # noqa: N802
                return description

        middle = grpc.aio.server()
        add_LedgerServiceServicer_to_server(Relay(), middle)
        own = make_certificate(tls_name(running.address.operator))
        port = middle.add_secure_port("127.0.0.1:0", server_credentials(*own))
        await middle.start()
        try:
            with pytest.raises(IdentityError, match="certificate"):
                async with LedgerClient.connect(replace(running.address, port=port)):
                    pass
        finally:
            await middle.stop(0)


def _other_request(self: Voice, entry: EntryRef) -> pb.LedgerReceipt:
    return Voice.receipt(self, replace(entry, request_digest=bytes(32)))


def _other_signer(self: Voice, entry: EntryRef) -> pb.LedgerReceipt:
    body = Voice.receipt(self, entry).body
    forged = sign(CAROL, Receipt.decode(body), self._identity.ledger_id)
    return pb.LedgerReceipt(body=body, signature=forged)


def _failure_code(self: Voice, entry: EntryRef) -> pb.LedgerReceipt:
    receipt = replace(Receipt.decode(Voice.receipt(self, entry).body), code=1)
    signature = sign(self._key, receipt, self._identity.ledger_id)
    return pb.LedgerReceipt(body=receipt.encode(), signature=signature)


def _garbage(self: Voice, entry: EntryRef) -> pb.LedgerReceipt:
    return pb.LedgerReceipt(body=b"receipt", signature=bytes(65))


@pytest.mark.parametrize("says", [_other_request, _other_signer, _failure_code, _garbage])
async def test_lies_in_receipts(
    ledger: LedgerClient, monkeypatch: pytest.MonkeyPatch, says: Callable[..., Any]
) -> None:
    t1, t2 = terms(ledger)
    await ledger.open_channel(t1, ALICE, t2)
    honest = Voice.receipt
    fake = says.__get__  # the original must stay reachable for the lie

    def lie(self: Voice, entry: EntryRef) -> pb.LedgerReceipt:
        with monkeypatch.context() as patch:
            patch.setattr(Voice, "receipt", honest)
            made: pb.LedgerReceipt = fake(self)(entry)
            return made

    monkeypatch.setattr(Voice, "receipt", lie)
    for call in (
        ledger.transfer(ALICE, BOB.address, 1),
        ledger.open_channel(t1, ALICE, t2),
        ledger.close_channel(ChannelClose(channel=t1.channel_id(ledger.ledger_id), capture=0), K2),
    ):
        with pytest.raises(IdentityError, match="receipt"):
            await call


@pytest.mark.parametrize("field", ["query_digest", "address", "channel_id", "commit", "signer", "name"])
async def test_lies_in_states(ledger: LedgerClient, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    t1, t2 = terms(ledger)
    await ledger.open_channel(t1, ALICE, t2)
    other, consent = terms(ledger, nonce=b"\1" * 16)
    await ledger.open_channel(other, ALICE, consent)

    def lie(self: Voice, name: str, state: pb.AccountState | pb.ChannelState) -> Any:
        if field == "commit" and isinstance(state, pb.ChannelState):
            state.commit = other.encode()
        elif field not in ("commit", "signer", "name") and hasattr(state, field):
            setattr(state, field, bytes(len(getattr(state, field))))
        key = CAROL if field == "signer" else self._key
        name = "LedgerInfo" if field == "name" else name
        return sign_document(key, name, self._identity.ledger_id, state.SerializeToString())

    monkeypatch.setattr(Voice, "document", lie)
    if field not in ("channel_id", "commit"):
        with pytest.raises(IdentityError):
            await ledger.account(ALICE)
    if field != "address":
        with pytest.raises(IdentityError):
            await ledger.channel(t1.channel_id(ledger.ledger_id), K1)


async def test_many_callers_at_once(ledger: LedgerClient, running: server.RunningLedger) -> None:
    receipts: list[SignedReceipt] = await asyncio.gather(
        *(ledger.transfer(ALICE, BOB.address, 1) for _ in range(100))
    )
    assert sorted(receipt.seq for receipt in receipts) == list(range(2, 102))
    assert running.sequencer.batches < 100
    assert (await ledger.account(BOB)).available == 100


async def test_one_ledger_per_folder_and_port(
    running: server.RunningLedger, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="Another process"):
        async with server.serve(server.LedgerConfig(folder=home)):
            pass
    other = tmp_path / "other"
    folder.init(other, name="other")
    with pytest.raises(ConfigError, match="cannot listen"):
        async with server.serve(server.LedgerConfig(folder=other, port=running.address.port)):
            pass
    async with server.serve(server.LedgerConfig(folder=other)) as second:
        assert second.address.port != running.address.port


def test_a_new_folder(tmp_path: Path) -> None:
    home = tmp_path / "deep" / "ledger"
    made, identity = folder.init(home, name="mine")
    assert home.stat().st_mode & 0o777 == 0o700
    assert {p.name: p.stat().st_mode & 0o777 for p in home.iterdir()} == dict.fromkeys(
        ("ledger.sqlite3", "operator.key", "tls.key", "tls.pem"), 0o600
    )
    assert folder.LedgerFolder.open(home) == made
    with pytest.raises(ConfigError, match="already"):
        folder.init(home, name="mine")
    (home / "ledger.sqlite3").unlink()  # as if the first attempt had broken off
    again, other = folder.init(home, name="mine")
    assert again.operator_key == made.operator_key
    assert other.ledger_id != identity.ledger_id
    with pytest.raises(ConfigError, match="no ledger"):
        folder.LedgerFolder.open(tmp_path)


class TestAddress:
    TEXT = f"btt-ledger://{ALICE.address}@127.0.0.1:7400/{bytes(range(32)).hex()}"

    def test_reads_what_it_writes(self) -> None:
        address = LedgerAddress.parse(self.TEXT)
        assert address == LedgerAddress(ALICE.address, "127.0.0.1", 7400, bytes(range(32)))
        assert str(address) == self.TEXT
        six = replace(address, host="::1")
        assert LedgerAddress.parse(str(six)) == six

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("btt-ledger", "btt"),
            ("@", ""),
            (":7400", ""),
            (":7400", ":0"),
            (":7400", ":65536"),
            (":7400", ":-1"),
            (":7400", ":٣"),
            ("127.0.0.1", ""),
            ("127.0.0.1", "::1"),
            ("127.0.0.1", "a@b"),
            ("127.0.0.1", "a b"),
            ("/00", "/0"),
            ("/00", "/zz"),
            ("/00", "/ 0"),
            ("/00", ""),
            (str(ALICE.address), str(ALICE.address)[:-1]),
        ],
    )
    def test_refuses_the_rest(self, old: str, new: str) -> None:
        assert old in self.TEXT
        with pytest.raises(InvalidRequest):
            LedgerAddress.parse(self.TEXT.replace(old, new, 1))
