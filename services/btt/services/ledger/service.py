"""The ledger over gRPC: parse, verify, hand to the sequencer, sign what was committed.

Reads are authenticated, cost one row each, and are answered from committed state only. Everything
unexpected becomes a typed error; nothing a stranger sends is kept before it is bounded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import grpc.aio

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.proto.ledger.v1.ledger_pb2_grpc import LedgerServiceServicer
from btt.sdk.errors import (
    BttError,
    ChannelUnknown,
    InternalError,
    InvariantBroken,
    RequestExpired,
    SignerMismatch,
)
from btt.sdk.keys import PrivateKey
from btt.sdk.rpc import abort
from btt.sdk.signing import ChannelClose, Query, Receipt, sign, sign_document
from btt.services.ledger.books import HOUR_MS, check_close
from btt.services.ledger.genesis import Identity
from btt.services.ledger.journal import EntryRef
from btt.services.ledger.sequencer import Sequencer
from btt.services.ledger.store import Reader
from btt.services.ledger.verify import Operation, Verifier, public_key

LONGEST_QUERY_MS: Final = HOUR_MS
"""A query may not be valid for longer than this from now."""

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_Context = grpc.aio.ServicerContext[Any, Any]


class LedgerService(LedgerServiceServicer):
    """Answers LedgerService.

    Args:
        sequencer: Running.
        reader: Of the same books; used in a thread of its own.
        identity: Of the ledger.
        operator_key: Signs receipts and documents.
        certificates: SHA-256 of the DER certificates: current, then next.
        clock: Unix milliseconds.
    """

    def __init__(
        self,
        *,
        sequencer: Sequencer,
        reader: Reader,
        identity: Identity,
        operator_key: PrivateKey,
        certificates: Sequence[bytes],
        clock: Callable[[], int],
    ) -> None:
        self._sequencer = sequencer
        self._reader = reader
        self._identity = identity
        self._operator_key = operator_key
        self._certificates = tuple(certificates)
        self._clock = clock
        self._verifier = Verifier(identity.ledger_id)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger-reader")

    def close(self) -> None:
        """Ends the reader's thread and closes its connection."""
        self._thread.shutdown()
        self._reader.close()

    async def GetInfo(self, request: pb.GetInfoRequest, context: _Context) -> pb.GetInfoResponse:  # noqa: N802
        """Says what the ledger is."""
        return await self._answer(context, self._info())

    async def GetAccount(  # noqa: N802
        self, request: pb.GetAccountRequest, context: _Context
    ) -> pb.GetAccountResponse:
        """Reads an account, for its owner."""
        return await self._answer(context, self._account(request.query))

    async def GetChannel(  # noqa: N802
        self, request: pb.GetChannelRequest, context: _Context
    ) -> pb.GetChannelResponse:
        """Reads a channel, for one of its keys."""
        return await self._answer(context, self._channel(request.query))

    async def Transfer(self, request: pb.TransferRequest, context: _Context) -> pb.TransferResponse:  # noqa: N802
        """Moves money between accounts."""

        async def transfer() -> pb.TransferResponse:
            signed = request.transfer
            operation = self._verifier.transfer(
                signed.body, signer=signed.public_key, signature=signed.signature
            )
            return pb.TransferResponse(receipt=await self._submit(operation))

        return await self._answer(context, transfer())

    async def OpenChannel(  # noqa: N802
        self, request: pb.OpenChannelRequest, context: _Context
    ) -> pb.OpenChannelResponse:
        """Opens a channel."""

        async def open_channel() -> pb.OpenChannelResponse:
            signed = request.commit
            operation = self._verifier.open_channel(
                signed.body,
                signer=signed.public_key,
                signature=signed.signature,
                refund_signature=request.refund_signature,
            )
            return pb.OpenChannelResponse(receipt=await self._submit(operation))

        return await self._answer(context, open_channel())

    async def CloseChannel(  # noqa: N802
        self, request: pb.CloseChannelRequest, context: _Context
    ) -> pb.CloseChannelResponse:
        """Closes a channel for the payee."""
        return await self._answer(context, self._close(request))

    async def GetTotals(self, request: pb.GetTotalsRequest, context: _Context) -> pb.GetTotalsResponse:  # noqa: N802
        """Reads the sums of the books."""

        async def totals() -> pb.GetTotalsResponse:
            head, sums = await self._read(self._reader.head)
            return pb.GetTotalsResponse(
                issued=sums.issued,
                accounts=sums.accounts,
                channels=sums.channels,
                open_channels=sums.open_channels,
                closed_channels=sums.closed_channels,
                head_seq=head.seq,
            )

        return await self._answer(context, totals())

    async def _answer(self, context: _Context, work: Awaitable[_Result]) -> _Result:
        try:
            return await work
        except BttError as error:
            known = error
        except Exception:  # noqa: BLE001 (a stranger gets a typed error, the operator the traceback)
            _log.exception("a ledger call failed")
            known = InternalError("The ledger failed.")
        await abort(context, known)
        raise AssertionError("abort returned")

    async def _read(self, read: Callable[..., _Result], *args: object) -> _Result:
        if (halted := self._sequencer.halted) is not None:
            raise InvariantBroken(halted.message)
        return await asyncio.get_running_loop().run_in_executor(self._thread, read, *args)

    async def _now_ms(self) -> int:
        head, _ = await self._read(self._reader.head)
        return max(self._clock(), head.time_ms)

    async def _submit(self, operation: Operation) -> pb.LedgerReceipt:
        return self._receipt(await self._sequencer.submit(operation))

    def _receipt(self, entry: EntryRef) -> pb.LedgerReceipt:
        receipt = Receipt(
            request_digest=entry.request_digest,
            seq=entry.seq,
            entry_hash=entry.hash,
            time_ms=entry.time_ms,
            code=0,
            epoch=entry.epoch,
            operator_key_id=self._operator_key.address,
        )
        return pb.LedgerReceipt(
            body=receipt.encode(), signature=sign(self._operator_key, receipt, self._identity.ledger_id)
        )

    async def _info(self) -> pb.GetInfoResponse:
        head, _ = await self._read(self._reader.head)
        identity, terms = self._identity, self._identity.terms
        info = pb.LedgerInfo(
            ledger_id=identity.ledger_id,
            name=identity.name,
            operator_key=self._operator_key.public.data,
            epoch=head.epoch,
            certificate_sha256=self._certificates,
            unbacked=identity.unbacked,
            min_challenge_ms=terms.min_challenge_ms,
            max_challenge_ms=terms.max_challenge_ms,
            min_lifetime_ms=terms.min_lifetime_ms,
            max_lifetime_ms=terms.max_lifetime_ms,
            time_ms=max(self._clock(), head.time_ms),
            head_seq=head.seq,
            head_hash=head.hash,
        )
        return pb.GetInfoResponse(info=self._document("LedgerInfo", info.SerializeToString()))

    def _document(self, name: str, payload: bytes) -> Any:
        return sign_document(self._operator_key, name, self._identity.ledger_id, payload)

    async def _query(self, signed: pb.SignedBody) -> tuple[Query, bytes, int]:
        query, digest = self._verifier.query(
            signed.body, signer=signed.public_key, signature=signed.signature
        )
        now_ms = await self._now_ms()
        if not now_ms < query.valid_until_ms <= now_ms + LONGEST_QUERY_MS:
            raise RequestExpired(f"The query's valid_until is not within an hour after {now_ms}.")
        return query, digest, now_ms

    async def _account(self, signed: pb.SignedBody) -> pb.GetAccountResponse:
        query, digest, now_ms = await self._query(signed)
        address = public_key(signed.public_key).address
        if query.subject != bytes(12) + address.data:
            raise SignerMismatch("An account is read by its owner.")
        account = await self._read(self._reader.account, address.data)
        state = pb.AccountState(
            query_digest=digest,
            address=address.data,
            available=account.balance if account else 0,
            locked=account.locked if account else 0,
            time_ms=now_ms,
        )
        return pb.GetAccountResponse(account=self._document("AccountState", state.SerializeToString()))

    async def _channel(self, signed: pb.SignedBody) -> pb.GetChannelResponse:
        query, digest, now_ms = await self._query(signed)
        channel = await self._read(self._reader.channel, query.subject)
        if channel is None:
            raise ChannelUnknown("There is no such channel.")
        key = public_key(signed.public_key)
        if key.data not in (channel.k1, channel.k2) and key.address.data != channel.payer:
            raise SignerMismatch("A channel is read with the payer's account key, K1 or K2.")
        state = pb.ChannelState(
            query_digest=digest,
            channel_id=channel.id,
            commit=channel.commit,
            phase=pb.ChannelPhase.ValueType(channel.phase),
            deposit=channel.deposit,
            best=channel.best,
            captured=channel.captured,
            deadline_ms=channel.deadline_ms,
            time_ms=now_ms,
        )
        return pb.GetChannelResponse(channel=self._document("ChannelState", state.SerializeToString()))

    async def _close(self, request: pb.CloseChannelRequest) -> pb.CloseChannelResponse:
        signed = request.close
        close = ChannelClose.decode(signed.body)
        channel = check_close(
            await self._read(self._reader.channel, close.channel),
            signer=signed.public_key,
            capture=int(close.capture),
            cumulative=request.cumulative,
        )
        operation = self._verifier.close_channel(
            signed.body,
            signer=signed.public_key,
            signature=signed.signature,
            cumulative=request.cumulative,
            update_signature=request.update_signature,
            k1=channel.k1,
        )
        return pb.CloseChannelResponse(receipt=await self._submit(operation))
