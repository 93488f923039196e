"""Talks to a ledger and believes only what its operator signed.

First contact: read the certificate, pin the connection to it, and demand a LedgerInfo that is
signed by the operator key of the configured address and names that very certificate. Afterwards
every receipt and every state is checked against the operator's key and the very request it
answers, so a ledger's front end or the network can refuse service but not invent it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, Protocol, Self, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from btt.proto.common.v1.document_pb2 import SignedDocument
from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.proto.ledger.v1.ledger_pb2_grpc import LedgerServiceStub
from btt.sdk.errors import (
    BttError,
    IdentityError,
    InvalidRequest,
    LedgerUnreachable,
    RequestExpired,
    SignatureInvalid,
    TransportError,
)
from btt.sdk.keys import Address, PrivateKey, PublicKey
from btt.sdk.ledger.address import LedgerAddress, tls_name
from btt.sdk.ledger.receipt import SignedReceipt
from btt.sdk.rpc import to_error
from btt.sdk.signing import (
    ChannelClose,
    ChannelCommit,
    Message,
    Query,
    Receipt,
    Transfer,
    open_document,
    sign,
    verify,
)
from btt.sdk.tls import certificate_sha256, pinned_channel, read_certificate

TRIES: Final = 3
"""How often a call is made when the ledger does not answer; every call may be repeated."""
_PAUSES: Final = (0.1, 0.5)
_QUERY_MS: Final = 60_000
_TRANSFER_MS: Final = 3_600_000

_Answer = TypeVar("_Answer")
_Request = TypeVar("_Request", contravariant=True)
_Response = TypeVar("_Response", covariant=True)


class _Method(Protocol[_Request, _Response]):
    def __call__(
        self, request: _Request, /, *, timeout: float | None = None, wait_for_ready: bool | None = None
    ) -> Awaitable[_Response]: ...


class LedgerClient:
    """A connection to one ledger; make it with `LedgerClient.connect`."""

    def __init__(
        self, address: LedgerAddress, channel: grpc.aio.Channel, certificate: bytes, timeout: float
    ) -> None:
        self.address = address
        self._stub = LedgerServiceStub(channel)
        self._certificate = certificate_sha256(certificate)
        self._timeout = timeout
        self._operator_key: PublicKey | None = None
        self._clock_offset_ms = 0

    @classmethod
    @asynccontextmanager
    async def connect(cls, address: LedgerAddress, *, timeout: float = 5.0) -> AsyncIterator[Self]:
        """Connects to a ledger and checks who it is.

        Args:
            address: From one's own configuration.
            timeout: Seconds for one try of a call.

        Raises:
            LedgerUnreachable: Nobody answers there.
            IdentityError: Somebody else answers there.
        """
        try:
            certificate = await read_certificate(address.host, address.port, timeout=timeout)
            _check_name(certificate, tls_name(address.operator))
            channel = pinned_channel(address.host, address.port, certificate, tls_name(address.operator))
        except IdentityError:
            raise
        except TransportError as error:
            raise LedgerUnreachable(f"The ledger {address} could not be reached: {error.message}") from error
        async with channel:
            client = cls(address, channel, certificate, timeout)
            await client.info()
            yield client

    @property
    def ledger_id(self) -> bytes:
        """32 bytes; part of everything that is signed for this ledger."""
        return self.address.ledger_id

    @property
    def operator_key(self) -> PublicKey:
        """The operator's key, whose address is in the ledger's address."""
        assert self._operator_key is not None
        return self._operator_key

    def now_ms(self) -> int:
        """Returns about what the ledger's time is, Unix milliseconds; this machine's clock may be wrong."""
        return _wall_ms() + self._clock_offset_ms

    async def info(self) -> pb.LedgerInfo:
        """Returns what the ledger is, verified; also sets the clock of `now_ms`.

        Raises:
            IdentityError: It is not the ledger of the address.
            LedgerUnreachable: Nobody answers.
        """
        response = await self._call(self._stub.GetInfo, pb.GetInfoRequest())
        info = pb.LedgerInfo()
        try:
            # The key is read from the document it verifies; its address is what we trust.
            info.ParseFromString(response.info.payload)
            operator_key = PublicKey(info.operator_key)
            if operator_key.address != self.address.operator:
                raise IdentityError(
                    f"The ledger is run by {operator_key.address}, not by the expected operator."
                )
            open_document(response.info, "LedgerInfo", self.ledger_id, operator_key)
        except (DecodeError, InvalidRequest) as error:
            raise IdentityError(f"The ledger's description is not signed by its operator: {error}") from error
        if info.ledger_id != self.ledger_id:
            raise IdentityError("The operator answers with another ledger.")
        if self._certificate not in info.certificate_sha256:
            raise IdentityError("The connection is not the ledger's own: its certificate is another one.")
        self._operator_key = operator_key
        self._clock_offset_ms = info.time_ms - _wall_ms()
        return info

    async def account(self, key: PrivateKey) -> pb.AccountState:
        """Returns what the account of a key holds; an account that never received anything holds 0.

        Args:
            key: The account's key; only its owner may ask.
        """

        async def ask(now_ms: int) -> pb.AccountState:
            signed, digest = self._query(key, bytes(12) + key.address.data, now_ms)
            response = await self._call(self._stub.GetAccount, pb.GetAccountRequest(query=signed))
            state = self._open(response.account, "AccountState", pb.AccountState())
            if state.query_digest != digest or state.address != key.address.data:
                raise IdentityError("The ledger answered another question.")
            return state

        return await self._timely(ask)

    async def channel(self, channel_id: bytes, key: PrivateKey) -> pb.ChannelState:
        """Returns the live state of a channel.

        Args:
            channel_id: 32 bytes.
            key: The payer's account key, K1 or K2.

        Raises:
            ChannelUnknown: There is no such channel.
            SignerMismatch: The key is none of the channel's.
        """

        async def ask(now_ms: int) -> pb.ChannelState:
            signed, digest = self._query(key, channel_id, now_ms)
            response = await self._call(self._stub.GetChannel, pb.GetChannelRequest(query=signed))
            state = self._open(response.channel, "ChannelState", pb.ChannelState())
            if state.query_digest != digest or state.channel_id != channel_id:
                raise IdentityError("The ledger answered another question.")
            if ChannelCommit.decode(state.commit).channel_id(self.ledger_id) != channel_id:
                raise IdentityError("The ledger answered with the terms of another channel.")
            return state

        return await self._timely(ask)

    async def transfer(
        self,
        key: PrivateKey,
        to: Address,
        amount: int,
        request_id: bytes | None = None,
        *,
        valid_until_ms: int | None = None,
        memo: bytes = bytes(32),
    ) -> SignedReceipt:
        """Moves money to another account.

        Args:
            key: Of the account it comes from.
            to: Account it goes to; it begins with its first credit.
            amount: Base units, at least 1.
            request_id: 16 bytes that name the intent; keep them, with `valid_until_ms`, to ask again
                after a crash without paying twice. Random by default.
            valid_until_ms: Ledger time after which it must not happen, at most 24 hours ahead; one
                hour by default.
            memo: 32 bytes for the recipient.

        Raises:
            InsufficientFunds, AccountUnknown: The account does not have it.
            RequestConflict: The request id was used for something else.
            LedgerUnreachable: No answer; the same call again tells what happened.
        """
        name = secrets.token_bytes(16) if request_id is None else request_id

        async def move(until_ms: int) -> SignedReceipt:
            message = Transfer(
                sender=key.address,
                recipient=to,
                amount=amount,
                request_id=name,
                valid_until_ms=until_ms,
                memo=memo,
            )
            signed = self._signed(key, message)
            response = await self._call(self._stub.Transfer, pb.TransferRequest(transfer=signed))
            return self._receipt(response.receipt, message.digest(self.ledger_id))

        if valid_until_ms is not None:
            return await move(valid_until_ms)
        # Signing anew after RequestExpired is safe: the ledger looks for the entry before the time.
        return await self._timely(lambda now_ms: move(now_ms + _TRANSFER_MS))

    async def open_channel(
        self, commit: ChannelCommit, payer_key: PrivateKey, refund_signature: bytes
    ) -> SignedReceipt:
        """Locks money in a channel; the same T1 again gives the same receipt.

        Args:
            commit: T1.
            payer_key: The payer's account key.
            refund_signature: K2 over T2, 65 bytes: the payee's consent.

        Raises:
            InsufficientFunds, AccountUnknown, TermsRefused, ChannelExpired: The ledger refuses it.
            SignatureInvalid: The refund is not signed by K2.
        """
        request = pb.OpenChannelRequest(
            commit=self._signed(payer_key, commit), refund_signature=refund_signature
        )
        response = await self._call(self._stub.OpenChannel, request)
        return self._receipt(response.receipt, commit.digest(self.ledger_id))

    async def close_channel(
        self,
        close: ChannelClose,
        k2: PrivateKey,
        update_cumulative: int = 0,
        update_signature: bytes = b"",
    ) -> SignedReceipt:
        """Closes a channel for the payee, at once and finally; the same close gives the same receipt.

        Args:
            close: What the payee takes.
            k2: The payee's key of the channel.
            update_cumulative: Of the best update, base units; 0 without one.
            update_signature: K1 over that update, 65 bytes; empty without one.

        Raises:
            ChannelUnknown, ChannelClosed, UpdateInvalid: The ledger refuses it.
        """
        request = pb.CloseChannelRequest(
            close=self._signed(k2, close), cumulative=update_cumulative, update_signature=update_signature
        )
        response = await self._call(self._stub.CloseChannel, request)
        return self._receipt(response.receipt, close.digest(self.ledger_id))

    def check_receipt(self, body: bytes, signature: bytes, digest: bytes) -> SignedReceipt:
        """Verifies a receipt that somebody else got from this ledger.

        Args:
            body: The canonical Receipt.
            signature: Of the operator, 65 bytes.
            digest: Of the request it must be for, 32 bytes.

        Raises:
            IdentityError: It is not this ledger's, or for another request.
        """
        return self._receipt(pb.LedgerReceipt(body=body, signature=signature), digest)

    async def totals(self) -> pb.GetTotalsResponse:
        """Returns the sums of the books."""
        return await self._call(self._stub.GetTotals, pb.GetTotalsRequest())

    async def _call(self, method: _Method[_Request, _Answer], request: _Request) -> _Answer:
        for attempt in range(TRIES):
            try:
                return await method(request, timeout=self._timeout, wait_for_ready=attempt > 0)
            except grpc.aio.AioRpcError as failure:
                error = _explain(failure)
            if not error.retryable or attempt == TRIES - 1:
                break
            await asyncio.sleep(_PAUSES[attempt])
        raise error

    async def _timely(self, attempt: Callable[[int], Awaitable[_Answer]]) -> _Answer:
        try:
            return await attempt(self.now_ms())
        except RequestExpired:
            await self.info()  # this machine slept, or a clock was set
            return await attempt(self.now_ms())

    def _signed(self, key: PrivateKey, message: Message) -> pb.SignedBody:
        return pb.SignedBody(
            body=message.encode(), signature=sign(key, message, self.ledger_id), public_key=key.public.data
        )

    def _query(self, key: PrivateKey, subject: bytes, now_ms: int) -> tuple[pb.SignedBody, bytes]:
        query = Query(subject=subject, nonce=secrets.token_bytes(16), valid_until_ms=now_ms + _QUERY_MS)
        return self._signed(key, query), query.digest(self.ledger_id)

    def _open(self, document: SignedDocument, name: str, state: _State) -> _State:
        try:
            state.ParseFromString(open_document(document, name, self.ledger_id, self.operator_key))
        except (DecodeError, SignatureInvalid) as error:
            raise IdentityError(f"The ledger's {name} is not signed by its operator.") from error
        return state

    def _receipt(self, answer: pb.LedgerReceipt, digest: bytes) -> SignedReceipt:
        try:
            receipt = Receipt.decode(answer.body)
            verify(self.operator_key, receipt, self.ledger_id, answer.signature)
        except InvalidRequest as error:
            raise IdentityError("The ledger's receipt is not signed by its operator.") from error
        if receipt.request_digest != digest or receipt.code != 0:
            raise IdentityError("The ledger's receipt is for another request.")
        if receipt.operator_key_id != self.address.operator:
            raise IdentityError("The ledger's receipt names another operator.")
        return SignedReceipt(receipt, answer.signature)


_State = TypeVar("_State", pb.AccountState, pb.ChannelState)


def _check_name(certificate: bytes, name: str) -> None:
    """Tells a wrong ledger from a broken network, before TLS refuses it without a reason."""
    from cryptography import x509

    try:
        extensions = x509.load_pem_x509_certificate(certificate).extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        known = name in names.get_values_for_type(x509.DNSName)
    except (ValueError, x509.ExtensionNotFound):
        known = False
    if not known:
        raise IdentityError(f"What answers there is not the ledger {name}.")


def _explain(failure: grpc.aio.AioRpcError) -> BttError:
    error = to_error(failure)
    if isinstance(error, TransportError) and failure.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ):
        return LedgerUnreachable(f"The ledger does not answer: {error.message}")
    return error


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
