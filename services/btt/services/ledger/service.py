"""The ledger over gRPC: parse, verify, hand to the sequencer, sign what was committed.

Reads are authenticated, cost one row each, and are answered from committed state only. Everything
unexpected becomes a typed error; nothing a stranger sends is kept before it is bounded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import grpc.aio

from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.proto.ledger.v1.ledger_pb2_grpc import LedgerServiceServicer
from btt.sdk.errors import (
    BttError,
    InternalError,
    RequestExpired,
    SignerMismatch,
)
from btt.sdk.keys import Address, PrivateKey, PublicKey
from btt.sdk.rpc import abort
from btt.sdk.signing import (
    ChannelClose,
    ChannelFinalize,
    ChannelUpdate,
    Query,
)
from btt.services.ledger import watching
from btt.services.ledger.books import HOUR_MS
from btt.services.ledger.genesis import Identity
from btt.services.ledger.hub import Hub
from btt.services.ledger.limits import RateLimiter
from btt.services.ledger.machine import Channel
from btt.services.ledger.reading import Reader
from btt.services.ledger.rules import check_close, check_update, known
from btt.services.ledger.sequencer import Sequencer
from btt.services.ledger.verify import Operation, Verifier, public_key
from btt.services.ledger.voice import Voice

LONGEST_QUERY_MS: Final = HOUR_MS
"""A query may not be valid for longer than this from now."""

_HEARTBEAT: Final = 30.0
_QUERY: Final = b"query "
"""Reads have a bucket of their own: a key that asks a lot can still close its channels."""

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
        hub: Wakes watchers.
        limiter: Bounds what one key may read.
        auditors: Who may read the journal, beside the operator.
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
        hub: Hub,
        limiter: RateLimiter,
        auditors: Iterable[Address] = (),
    ) -> None:
        self._hub = hub
        self._limiter = limiter
        self._auditors = frozenset((operator_key.address, *auditors))
        self._sequencer = sequencer
        self._reader = reader
        self._identity = identity
        self._clock = clock
        self._verifier = Verifier(identity.ledger_id)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger-reader")
        self._voice = Voice(identity, operator_key, certificates, reader.rotations())

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
        receipt = self._signed(self._verifier.transfer, request.transfer)
        return pb.TransferResponse(receipt=await self._answer(context, receipt))

    async def OpenChannel(  # noqa: N802
        self, request: pb.OpenChannelRequest, context: _Context
    ) -> pb.OpenChannelResponse:
        """Opens a channel."""

        async def open_channel() -> pb.OpenChannelResponse:
            signed = request.commit
            receipt = await self._submit(
                lambda: self._verifier.open_channel(
                    signed.body,
                    signer=signed.public_key,
                    signature=signed.signature,
                    refund_signature=request.refund_signature,
                )
            )
            return pb.OpenChannelResponse(receipt=receipt)

        return await self._answer(context, open_channel())

    async def CloseChannel(  # noqa: N802
        self, request: pb.CloseChannelRequest, context: _Context
    ) -> pb.CloseChannelResponse:
        """Closes a channel for the payee."""
        return await self._answer(context, self._close(request))

    async def TopUpChannel(  # noqa: N802
        self, request: pb.TopUpChannelRequest, context: _Context
    ) -> pb.TopUpChannelResponse:
        """Locks more money in a channel."""
        receipt = self._signed(self._verifier.top_up, request.top_up)
        return pb.TopUpChannelResponse(receipt=await self._answer(context, receipt))

    async def SubmitUpdate(  # noqa: N802
        self, request: pb.SubmitUpdateRequest, context: _Context
    ) -> pb.SubmitUpdateResponse:
        """Keeps the highest update of a channel."""
        return await self._answer(context, self._update(request))

    async def RequestClose(  # noqa: N802
        self, request: pb.RequestCloseRequest, context: _Context
    ) -> pb.RequestCloseResponse:
        """Starts the challenge window, for the payer."""
        receipt = self._signed(self._verifier.request_close, request.request)
        return pb.RequestCloseResponse(receipt=await self._answer(context, receipt))

    async def FinalizeChannel(  # noqa: N802
        self, request: pb.FinalizeChannelRequest, context: _Context
    ) -> pb.FinalizeChannelResponse:
        """Pays out a channel that is due."""

        async def finalize() -> pb.FinalizeChannelResponse:
            operation = self._verifier.finalize(ChannelFinalize(channel=request.channel_id).encode())
            known(await self._read(self._reader.channel, operation.channel_id))
            return pb.FinalizeChannelResponse(receipt=await self._submit(lambda: operation))

        return await self._answer(context, finalize())

    async def Watch(  # noqa: N802
        self, request: pb.WatchRequest, context: _Context
    ) -> AsyncIterator[pb.WatchResponse]:
        """Tells what happens to an account or a channel."""
        pages = self._watch(request)
        try:
            while (page := await self._answer(context, anext(pages, None))) is not None:
                yield page
        finally:
            await pages.aclose()

    async def GetOperations(  # noqa: N802
        self, request: pb.GetOperationsRequest, context: _Context
    ) -> pb.GetOperationsResponse:
        """Reads what was acknowledged about an account or a channel, for its holders."""

        async def operations() -> pb.GetOperationsResponse:
            query, _, _ = await self._query(request.query)
            key = public_key(request.query.public_key)
            channel = await self._subject(query, key)
            after = min(request.after_seq, 2**62)
            found, seen_seq, more = await self._read(
                lambda: self._reader.operations(
                    channel=channel, key=key, after=after, most=watching.MOST_OPERATIONS
                )
            )
            told = [watching.operation(entry, self._voice.receipt(entry.ref)) for entry in found]
            return pb.GetOperationsResponse(operations=told, seen_seq=seen_seq, more=more)

        return await self._answer(context, operations())

    async def GetEntries(  # noqa: N802
        self, request: pb.GetEntriesRequest, context: _Context
    ) -> pb.GetEntriesResponse:
        """Reads a page of the journal, for the operator and its auditors."""

        async def entries() -> pb.GetEntriesResponse:
            query, _, _ = await self._query(request.query)
            if query.subject != self._identity.ledger_id:
                raise SignerMismatch("The journal is asked for by the ledger's id.")
            if public_key(request.query.public_key).address not in self._auditors:
                raise SignerMismatch("The journal is read by the operator and the auditors it names.")
            after = min(request.after_seq, 2**62)
            found = await self._read(self._reader.entries, after, watching.MOST_ENTRIES)
            return pb.GetEntriesResponse(
                entries=map(watching.journal_entry, found), genesis=self._identity.genesis
            )

        return await self._answer(context, entries())

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
            raise type(halted)(halted.message)
        return await asyncio.get_running_loop().run_in_executor(self._thread, read, *args)

    async def _now_ms(self) -> int:
        head, _ = await self._read(self._reader.head)
        return max(self._clock(), head.time_ms)

    def _submit(self, verify: Callable[[], Operation]) -> Awaitable[pb.LedgerReceipt]:
        return self._sequencer.carry_out(verify, self._voice.receipt)

    def _signed(self, verify: Callable[..., Operation], signed: pb.SignedBody) -> Awaitable[pb.LedgerReceipt]:
        return self._submit(lambda: verify(signed.body, signer=signed.public_key, signature=signed.signature))

    async def _info(self) -> pb.GetInfoResponse:
        head, _ = await self._read(self._reader.head)
        return pb.GetInfoResponse(info=self._voice.info(head, now_ms=max(self._clock(), head.time_ms)))

    async def _query(self, signed: pb.SignedBody) -> tuple[Query, bytes, int]:
        query, digest = self._verifier.query(
            signed.body, signer=signed.public_key, signature=signed.signature
        )
        self._limiter.charge(_QUERY + signed.public_key)
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
        return pb.GetAccountResponse(account=self._voice.document("AccountState", state))

    async def _own_channel(self, channel_id: bytes, key: PublicKey) -> Channel:
        channel = known(await self._read(self._reader.channel, channel_id))
        if key.data not in (channel.k1, channel.k2) and key.address.data != channel.payer:
            raise SignerMismatch("A channel is read with the payer's account key, K1 or K2.")
        return channel

    async def _subject(self, query: Query, key: PublicKey) -> bytes | None:
        """Returns the channel that a query is about; None for the account of its key."""
        if query.subject == bytes(12) + key.address.data:
            return None
        return (await self._own_channel(query.subject, key)).id

    async def _channel(self, signed: pb.SignedBody) -> pb.GetChannelResponse:
        query, digest, now_ms = await self._query(signed)
        channel = await self._own_channel(query.subject, public_key(signed.public_key))
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
            best_signature=channel.best_signature,
        )
        return pb.GetChannelResponse(channel=self._voice.document("ChannelState", state))

    async def _close(self, request: pb.CloseChannelRequest) -> pb.CloseChannelResponse:
        signed = request.close
        close = ChannelClose.decode(signed.body)
        channel = check_close(
            await self._read(self._reader.channel, close.channel),
            signer=signed.public_key,
            capture=int(close.capture),
            cumulative=request.cumulative,
        )
        receipt = await self._submit(
            lambda: self._verifier.close_channel(
                signed.body,
                signer=signed.public_key,
                signature=signed.signature,
                cumulative=request.cumulative,
                update_signature=request.update_signature,
                k1=channel.k1,
            )
        )
        return pb.CloseChannelResponse(receipt=receipt)

    async def _update(self, request: pb.SubmitUpdateRequest) -> pb.SubmitUpdateResponse:
        channel = check_update(
            await self._read(self._reader.channel, request.channel_id), cumulative=request.cumulative
        )
        message = ChannelUpdate(channel=channel.id, cumulative=request.cumulative)
        receipt = await self._submit(
            lambda: self._verifier.update(message.encode(), k1=channel.k1, signature=request.update_signature)
        )
        return pb.SubmitUpdateResponse(receipt=receipt)

    async def _watch(self, request: pb.WatchRequest) -> AsyncGenerator[pb.WatchResponse, None]:
        query, digest, now_ms = await self._query(request.query)
        key = public_key(request.query.public_key)
        channel = await self._subject(query, key)
        found = watching.pages(
            self._hub,
            self._events,
            channel=channel,
            key=key,
            known=channel is not None or await self._read(self._reader.knows, key),
            after=min(request.after_seq, 2**62),
            seconds=(query.valid_until_ms - now_ms) / 1000,
            heartbeat=_HEARTBEAT,
        )
        async for events, seen_seq in found:
            page = pb.LedgerEvents(
                query_digest=digest, events=events, seen_seq=seen_seq, time_ms=await self._now_ms()
            )
            yield pb.WatchResponse(events=self._voice.document("LedgerEvents", page))

    async def _events(
        self, channel: bytes | None, key: PublicKey, after: int
    ) -> tuple[list[tuple[int, int, int, bytes, bytes, bytes]], int]:
        def read() -> tuple[list[tuple[int, int, int, bytes, bytes, bytes]], int]:
            return self._reader.events(channel=channel, key=key, after=after, most=watching.MOST_EVENTS)

        return await self._read(read)

    async def due(self, most: int) -> list[bytes]:
        """Returns ids of at most `most` channels (of each phase) that anybody may pay out now."""
        return await self._read(self._reader.due, await self._now_ms(), most)
