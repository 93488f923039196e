"""The connection under `LedgerClient`: who answers is checked, and everything it signs.

First contact: read the certificate, pin the connection to it, and demand a LedgerInfo that is
signed by the operator key of the configured address (or by the key it was handed over to) and
names that very certificate. Afterwards every receipt and every state is checked against the
operator's key and the very request it answers, so a ledger's front end or the network can refuse
service but not invent it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, Self, TypeVar

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
    LedgerEquivocated,
    LedgerForgot,
    LedgerUnreachable,
    OutcomeUnknown,
    RateLimited,
    RequestExpired,
    SignatureInvalid,
    StorageError,
    TransportError,
)
from btt.sdk.keys import PrivateKey, PublicKey
from btt.sdk.ledger.address import LedgerAddress, tls_name
from btt.sdk.ledger.evidence import Evidence
from btt.sdk.ledger.receipt import SignedReceipt
from btt.sdk.ledger.rotation import OperatorKey, follow, signer_of
from btt.sdk.rpc import to_error
from btt.sdk.signing import (
    Message,
    Query,
    Receipt,
    open_document,
    sign,
)
from btt.sdk.tls import certificate_sha256, pinned_channel, read_certificate

if TYPE_CHECKING:
    from btt.sdk.ledger.keeping import EvidenceStore

TRIES: Final = 3
"""How often a call is made when the ledger does not answer; every call may be repeated."""
REQUEST_MS: Final = 3_600_000
"""For how long a request is valid whose caller did not say."""
_PAUSES: Final = (0.1, 0.5)
_QUERY_MS: Final = 60_000

_log = logging.getLogger(__name__)
_State = TypeVar("_State", pb.AccountState, pb.ChannelState, pb.LedgerEvents)
_Answer = TypeVar("_Answer")
_Request = TypeVar("_Request", contravariant=True)
_Response = TypeVar("_Response", covariant=True)


class _Method(Protocol[_Request, _Response]):
    def __call__(
        self, request: _Request, /, *, timeout: float | None = None, wait_for_ready: bool | None = None
    ) -> Awaitable[_Response]: ...


class Connection:
    """A checked connection to one ledger."""

    def __init__(
        self,
        address: LedgerAddress,
        channel: grpc.aio.Channel,
        certificate: bytes,
        timeout: float,
        keeper: EvidenceStore | None = None,
    ) -> None:
        self.address = address
        self._stub = LedgerServiceStub(channel)
        self._certificate = certificate_sha256(certificate)
        self._timeout = timeout
        self._keys: tuple[OperatorKey, ...] = ()
        self._header = pb.EvidenceHeader(ledger_id=address.ledger_id)
        self._keeper = keeper
        self._clock_offset_ms = 0
        self._lost_sight = False

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, address: LedgerAddress, *, timeout: float = 5.0, keeper: EvidenceStore | None = None
    ) -> AsyncIterator[Self]:
        """Connects to a ledger and checks who it is.

        Args:
            address: From one's own configuration.
            timeout: Seconds for one try of a call.
            keeper: Keeps what the ledger acknowledges, with its receipts.

        Raises:
            LedgerUnreachable: Nobody answers there.
            IdentityError: Somebody else answers there.
            LedgerForgot: It has forgotten what the keeper holds a receipt for.
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
            client = cls(address, channel, certificate, timeout, keeper)
            await client.info()
            yield client

    @property
    def ledger_id(self) -> bytes:
        """32 bytes; part of everything that is signed for this ledger."""
        return self.address.ledger_id

    @property
    def operator_key(self) -> PublicKey:
        """The operator's current key."""
        return self._keys[-1].key

    @property
    def operator_keys(self) -> tuple[OperatorKey, ...]:
        """All keys of the operator, from the one in the ledger's address to the current one."""
        return self._keys

    @property
    def recovered(self) -> int:
        """Epoch of the last recovery, 0 before the first: places in the journal of before mean nothing."""
        return max((known.epoch for known in self._keys if known.resumed_after is not None), default=0)

    def now_ms(self) -> int:
        """Returns about what the ledger's time is, Unix milliseconds; this machine's clock may be wrong."""
        return _wall_ms() + self._clock_offset_ms

    async def info(self) -> pb.LedgerInfo:
        """Returns what the ledger is, verified; follows the operator's key, and sets `now_ms`.

        Raises:
            IdentityError: It is not the ledger of the address.
            LedgerForgot: Its journal ends before what it gave us a receipt for.
            LedgerUnreachable: Nobody answers.
        """
        document, info = await self._described()
        if await self._missing(info) is not None:
            # It may have been acknowledged to another program of ours since the ledger answered.
            document, info = await self._described()
            if (missing := await self._missing(info)) is not None:
                await self._went_back(document, info, missing)
        self._lost_sight = False
        return info

    async def _missing(self, info: pb.LedgerInfo) -> SignedReceipt | None:
        """Returns a kept receipt of an entry that is not in the ledger's journal."""
        if self._keeper is None:
            return None
        kept = await asyncio.to_thread(self._keeper.promised, self.ledger_id, self._keys)
        if kept is None:
            return None
        said = kept.receipt
        beyond = (said.seq, said.epoch) > (info.head_seq, info.epoch) or said.epoch > info.epoch
        another = said.seq == info.head_seq and said.entry_hash != info.head_hash
        return kept if beyond or another else None

    async def _went_back(
        self, document: SignedDocument, info: pb.LedgerInfo, missing: SignedReceipt
    ) -> NoReturn:
        assert self._keeper is not None
        try:
            await asyncio.to_thread(self._keeper.keep_head, self.ledger_id, document)
        except StorageError as error:
            _log.warning("%s", error.message)  # the receipt alone proves enough to whoever has it
        raise LedgerForgot(
            f"The ledger's journal ends with entry {info.head_seq} of epoch {info.epoch}, and it gave us a "
            f"receipt for entry {missing.seq} of epoch {missing.receipt.epoch}, which is not in it."
        )

    async def _described(self) -> tuple[SignedDocument, pb.LedgerInfo]:
        response = await self._call(self._stub.GetInfo, pb.GetInfoRequest())
        info = pb.LedgerInfo()
        try:
            # The key is read from the document it verifies; its address is what we trust.
            info.ParseFromString(response.info.payload)
            operator_key = PublicKey(info.operator_key)
            keys = follow(self.address.operator, operator_key, info.rotations, ledger_id=self.ledger_id)
            open_document(response.info, "LedgerInfo", self.ledger_id, operator_key)
        except (DecodeError, InvalidRequest) as error:
            raise IdentityError(f"The ledger's description is not signed by its operator: {error}") from error
        if info.ledger_id != self.ledger_id:
            raise IdentityError("The operator answers with another ledger.")
        if self._certificate not in info.certificate_sha256:
            raise IdentityError("The connection is not the ledger's own: its certificate is another one.")
        if [known.key for known in self._keys] != [new.key for new in keys[: len(self._keys)]]:
            raise IdentityError(
                "The ledger's operator key went back to an older one.",
                hint="Ask the operator: only after a recovery from a copy that is older than its last one "
                "is that right. Then start again.",
            )
        self._keys = keys
        self._header = pb.EvidenceHeader(
            ledger_id=info.ledger_id, operator_key=info.operator_key, rotations=info.rotations
        )
        self._clock_offset_ms = info.time_ms - _wall_ms()
        return response.info, info

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

    async def _call(self, method: _Method[_Request, _Answer], request: _Request) -> _Answer:
        if self._lost_sight and not isinstance(request, pb.GetInfoRequest):
            await self.info()  # what answers there now may have forgotten what we hold
        failed: BttError | None = None
        for attempt in range(TRIES):
            try:
                return await method(request, timeout=self._timeout, wait_for_ready=attempt > 0)
            except grpc.aio.AioRpcError as failure:
                error = explain(failure)
            if not isinstance(error, RateLimited):
                failed = error
            self._lost_sight |= isinstance(error, LedgerUnreachable | TransportError)
            if not error.retryable or attempt == TRIES - 1:
                break
            wait = error.retry_after if isinstance(error, RateLimited) else 0.0
            await asyncio.sleep(max(_PAUSES[attempt], wait))
        # To be told to wait says nothing about a try before that.
        raise failed or error

    async def _timely(self, attempt: Callable[[int], Awaitable[_Answer]]) -> _Answer:
        try:
            return await attempt(self.now_ms())
        except RequestExpired:
            await self.info()  # this machine slept, or a clock was set
            return await attempt(self.now_ms())

    async def _once(
        self,
        ask: Callable[[bytes, int], Awaitable[SignedReceipt]],
        request_id: bytes | None,
        valid_until_ms: int | None,
    ) -> SignedReceipt:
        """Makes a request that moves money, under the name its caller gave it or under a new one."""
        if request_id is not None:
            if valid_until_ms is None:  # the ledger forgets an id some time after its validity
                raise InvalidRequest("A request_id names a request only together with valid_until_ms.")
            return await ask(request_id, valid_until_ms)
        name = secrets.token_bytes(16)

        async def attempt(until_ms: int) -> SignedReceipt:
            try:
                return await ask(name, until_ms)
            except BttError as error:
                if not error.retryable or isinstance(error, RateLimited):
                    raise
                # Also after a StorageError: what a sync failed on may be on the disk. Its caller
                # could only make another request, and pay twice.
                raise OutcomeUnknown(
                    f"It is not known whether it happened. {error.message}",
                    request_id=name,
                    valid_until_ms=until_ms,
                ) from error

        if valid_until_ms is not None:
            return await attempt(valid_until_ms)
        # Signing anew after RequestExpired is safe: the ledger looks for the entry before the time.
        return await self._timely(lambda now_ms: attempt(now_ms + REQUEST_MS))

    def _signed(self, key: PrivateKey, message: Message) -> pb.SignedBody:
        return pb.SignedBody(
            body=message.encode(), signature=sign(key, message, self.ledger_id), public_key=key.public.data
        )

    def _query(
        self, key: PrivateKey, subject: bytes, now_ms: int, *, valid_ms: int = _QUERY_MS
    ) -> tuple[pb.SignedBody, bytes]:
        query = Query(subject=subject, nonce=secrets.token_bytes(16), valid_until_ms=now_ms + valid_ms)
        return self._signed(key, query), query.digest(self.ledger_id)

    def _open(self, document: SignedDocument, name: str, state: _State) -> _State:
        try:
            state.ParseFromString(open_document(document, name, self.ledger_id, self.operator_key))
        except (DecodeError, SignatureInvalid) as error:
            raise IdentityError(f"The ledger's {name} is not signed by its operator.") from error
        return state

    async def _refreshed(self, check: Callable[[], _Answer]) -> _Answer:
        """Checks an answer; once more after asking whether the operator's key was handed over."""
        try:
            return check()
        except IdentityError:
            known = len(self._keys)
            await self.info()
            if len(self._keys) == known:
                raise
            return check()

    async def _opened(self, document: SignedDocument, name: str, state: _State) -> _State:
        return await self._refreshed(lambda: self._open(document, name, state))

    async def _accepted(self, answer: pb.LedgerReceipt, digest: bytes) -> SignedReceipt:
        return await self._refreshed(lambda: self._receipt(answer, digest))

    async def _acknowledged(
        self, kind: pb.EntryKind.ValueType, message: Message, proof: bytes, answer: pb.LedgerReceipt
    ) -> SignedReceipt:
        """Verifies the receipt of a request of ours, and keeps both."""
        receipt = await self._accepted(answer, message.digest(self.ledger_id))
        if self._keeper is not None:
            kept = [Evidence(int(kind), message.encode(), proof, receipt)]
            try:
                await asyncio.to_thread(self._keeper.keep, self._header, kept)
                rival = await asyncio.to_thread(self._keeper.rival, self.ledger_id, kept[0])
            except StorageError as error:
                # The ledger has done it: to call it a failure would make somebody pay twice. `gather`
                # fetches it again.
                _log.warning("%s", error.message)
            else:
                if rival is not None:
                    raise LedgerEquivocated(f"The ledger signed both of these: {kept[0]}; {rival}.")
        return receipt

    def _receipt(self, answer: pb.LedgerReceipt, digest: bytes) -> SignedReceipt:
        try:
            receipt = SignedReceipt(Receipt.decode(answer.body), answer.signature)
        except InvalidRequest as error:
            raise IdentityError("The ledger's receipt is not signed by its operator.") from error
        signer_of(receipt, self._keys, self.ledger_id)
        if receipt.receipt.request_digest != digest or receipt.receipt.code != 0:
            raise IdentityError("The ledger's receipt is for another request.")
        return receipt


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


def explain(failure: grpc.aio.AioRpcError) -> BttError:
    """Returns the error that a failed call means."""
    error = to_error(failure, by="ledger")
    if isinstance(error, TransportError) and failure.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ):
        return LedgerUnreachable(f"The ledger does not answer: {error.message}")
    return error


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
