"""Talks to a ledger and believes only what its operator signed; see `connection` for how.

Every request may be repeated: one that the ledger has seen gets the receipt it got before. A transfer
or a top-up is the same request only with the same `request_id` and `valid_until_ms`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Final

import grpc
import grpc.aio

from btt.proto.common.v1.document_pb2 import SignedDocument
from btt.proto.ledger.v1 import ledger_pb2 as pb
from btt.sdk.errors import (
    IdentityError,
    LedgerUnreachable,
)
from btt.sdk.keys import Address, PrivateKey, PublicKey
from btt.sdk.ledger.connection import REQUEST_MS, explain
from btt.sdk.ledger.gathering import Gathering
from btt.sdk.ledger.receipt import SignedReceipt
from btt.sdk.signing import (
    ChannelClose,
    ChannelCommit,
    ChannelFinalize,
    ChannelUpdate,
    CloseRequest,
    TopUp,
    Transfer,
    verify,
)

_WATCH_MS: Final = 1_800_000
_SILENT_S: Final = 90.0
"""A ledger that is there tells its watchers so every 30 seconds."""


class LedgerClient(Gathering):
    """A connection to one ledger; make it with `LedgerClient.connect`."""

    async def account(self, key: PrivateKey) -> pb.AccountState:
        """Returns what the account of a key holds; an account that never received anything holds 0.

        Args:
            key: The account's key; only its owner may ask.
        """

        async def ask(now_ms: int) -> pb.AccountState:
            signed, digest = self._query(key, bytes(12) + key.address.data, now_ms)
            response = await self._call(self._stub.GetAccount, pb.GetAccountRequest(query=signed))
            state = await self._opened(response.account, "AccountState", pb.AccountState())
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
        return (await self.channel_document(channel_id, key))[1]

    async def channel_document(
        self, channel_id: bytes, key: PrivateKey
    ) -> tuple[SignedDocument, pb.ChannelState]:
        """Returns the live state of a channel as the ledger signed it, to keep; as `channel`."""

        async def ask(now_ms: int) -> tuple[SignedDocument, pb.ChannelState]:
            signed, digest = self._query(key, channel_id, now_ms)
            response = await self._call(self._stub.GetChannel, pb.GetChannelRequest(query=signed))
            state = await self._opened(response.channel, "ChannelState", pb.ChannelState())
            if state.query_digest != digest or state.channel_id != channel_id:
                raise IdentityError("The ledger answered another question.")
            if ChannelCommit.decode(state.commit).channel_id(self.ledger_id) != channel_id:
                raise IdentityError("The ledger answered with the terms of another channel.")
            return response.channel, state

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

        Without `request_id` each call is a payment of its own. To be able to ask again whatever comes
        between, a crash as well, make and keep `request_id` and `valid_until_ms` first: with both, the
        same call pays once however often it is made.

        Args:
            key: Of the account it comes from.
            to: Account it goes to; it begins with its first credit.
            amount: Base units, at least 1.
            request_id: 16 random bytes that name the request, together with `valid_until_ms`; new ones
                by default.
            valid_until_ms: Ledger time (`now_ms`) after which it must not happen, at most 24 hours ahead;
                one hour by default.
            memo: 32 bytes for the recipient.

        Raises:
            InsufficientFunds, AccountUnknown: The account does not have it.
            RequestConflict: The request id was used for something else.
            InvalidRequest: A request id without `valid_until_ms`.
            OutcomeUnknown: No answer to a call without `request_id`; the error has what asks again.
            LedgerUnreachable: No answer to a call with both; the same call again tells what happened.
        """

        async def move(name: bytes, until_ms: int) -> SignedReceipt:
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
            return await self._acknowledged(pb.ENTRY_KIND_TRANSFER, message, _proof(signed), response.receipt)

        return await self._once(move, request_id, valid_until_ms)

    async def open_channel(
        self, commit: ChannelCommit, payer_key: PrivateKey, refund_signature: bytes
    ) -> SignedReceipt:
        """Locks money in a channel; the same T1 again gives the same receipt.

        Args:
            commit: T1.
            payer_key: The payer's account key.
            refund_signature: K2 over T2, 65 bytes: its consent.

        Raises:
            InsufficientFunds, AccountUnknown, TermsRefused, ChannelExpired: The ledger refuses it.
            SignatureInvalid: The refund is not signed by K2.
        """
        signed = self._signed(payer_key, commit)
        request = pb.OpenChannelRequest(commit=signed, refund_signature=refund_signature)
        response = await self._call(self._stub.OpenChannel, request)
        proof = _proof(signed) + refund_signature
        return await self._acknowledged(pb.ENTRY_KIND_OPEN_CHANNEL, commit, proof, response.receipt)

    async def close_channel(
        self,
        close: ChannelClose,
        k2: PrivateKey,
        update_cumulative: int = 0,
        update_signature: bytes = b"",
    ) -> SignedReceipt:
        """Closes a channel for the payee, at once and finally; the same close gives the same receipt.

        The ledger may hold a higher update than the one shown (`channel().best`); it counts as well.

        Args:
            close: What the payee takes.
            k2: The payee's key of the channel.
            update_cumulative: Of the best update, base units; 0 without one.
            update_signature: K1 over that update, 65 bytes; empty without one.

        Raises:
            ChannelUnknown, ChannelClosed, UpdateInvalid: The ledger refuses it.
        """
        signed = self._signed(k2, close)
        request = pb.CloseChannelRequest(
            close=signed, cumulative=update_cumulative, update_signature=update_signature
        )
        response = await self._call(self._stub.CloseChannel, request)
        proof = _proof(signed) + update_cumulative.to_bytes(8, "big") + update_signature
        return await self._acknowledged(pb.ENTRY_KIND_CLOSE_CHANNEL, close, proof, response.receipt)

    async def top_up(
        self,
        channel_id: bytes,
        payer_key: PrivateKey,
        amount: int,
        request_id: bytes | None = None,
        *,
        valid_until_ms: int | None = None,
    ) -> SignedReceipt:
        """Locks more money in an open channel.

        Args:
            channel_id: 32 bytes.
            payer_key: The payer's account key.
            amount: Base units, at least 1.
            request_id: 16 bytes that name the request, as for `transfer`.
            valid_until_ms: As for `transfer`.

        Raises:
            InsufficientFunds: The account does not have it.
            ChannelExpired, ChannelClosing, ChannelClosed: The channel takes no more.
            TermsRefused: The account would have more locked than the ledger allows.
            OutcomeUnknown, LedgerUnreachable: No answer; as for `transfer`.
        """

        async def add(name: bytes, until_ms: int) -> SignedReceipt:
            message = TopUp(channel=channel_id, amount=amount, request_id=name, valid_until_ms=until_ms)
            signed = self._signed(payer_key, message)
            response = await self._call(self._stub.TopUpChannel, pb.TopUpChannelRequest(top_up=signed))
            return await self._acknowledged(pb.ENTRY_KIND_TOP_UP, message, _proof(signed), response.receipt)

        return await self._once(add, request_id, valid_until_ms)

    async def submit_update(
        self, update: ChannelUpdate, update_signature: bytes, *, k1: PublicKey | None = None
    ) -> SignedReceipt:
        """Shows an update: the ledger keeps it, and pays it out if nobody closes with a higher one.

        Args:
            update: T3.
            update_signature: K1 over it, 65 bytes.
            k1: The channel's K1; with it the receipt is kept, as that of every other request.

        Raises:
            UpdateInvalid: The ledger has a higher one, or the raise is too small.
            ChannelClosing, ChannelClosed: It came too late.
            SignatureInvalid: The update is not signed by K1.
        """
        if k1 is not None:  # what is kept must hold: one wrong proof makes all evidence of a file worthless
            verify(k1, update, self.ledger_id, update_signature)
        request = pb.SubmitUpdateRequest(
            channel_id=update.channel, cumulative=update.cumulative, update_signature=update_signature
        )
        response = await self._call(self._stub.SubmitUpdate, request)
        if k1 is None:
            return await self._accepted(response.receipt, update.digest(self.ledger_id))
        proof = k1.data + update_signature
        return await self._acknowledged(pb.ENTRY_KIND_UPDATE, update, proof, response.receipt)

    async def request_close(
        self,
        channel_id: bytes,
        payer_key: PrivateKey,
        request_id: bytes | None = None,
        *,
        valid_until_ms: int | None = None,
    ) -> SignedReceipt:
        """Asks for the rest of a channel; it comes after the challenge window (`channel().deadline_ms`).

        Args:
            channel_id: 32 bytes.
            payer_key: The payer's account key.
            request_id: 16 bytes that name the intent, as for `transfer`.
            valid_until_ms: As for `transfer`.

        Raises:
            ChannelLocked: The lock time has not come, and T1 allows no early close.
            ChannelClosing, ChannelClosed: It was asked before, or is over.
        """
        name = secrets.token_bytes(16) if request_id is None else request_id

        async def ask(until_ms: int) -> SignedReceipt:
            message = CloseRequest(channel=channel_id, request_id=name, valid_until_ms=until_ms)
            signed = self._signed(payer_key, message)
            response = await self._call(self._stub.RequestClose, pb.RequestCloseRequest(request=signed))
            return await self._acknowledged(
                pb.ENTRY_KIND_REQUEST_CLOSE, message, _proof(signed), response.receipt
            )

        if valid_until_ms is not None:
            return await ask(valid_until_ms)
        return await self._timely(lambda now_ms: ask(now_ms + REQUEST_MS))

    async def finalize_channel(self, channel_id: bytes) -> SignedReceipt:
        """Pays out a channel whose window has ended; anybody may.

        Args:
            channel_id: 32 bytes.

        Raises:
            ChannelLocked: It is not due.
            ChannelClosed: The payee closed it.
        """
        request = pb.FinalizeChannelRequest(channel_id=channel_id)
        response = await self._call(self._stub.FinalizeChannel, request)
        message = ChannelFinalize(channel=channel_id)
        return await self._acknowledged(pb.ENTRY_KIND_FINALIZE, message, b"", response.receipt)

    async def watch(
        self, key: PrivateKey, *, channel_id: bytes | None = None, after_seq: int = 0
    ) -> AsyncIterator[pb.LedgerEvents]:
        """Tells what happens, for ever; every page is verified.

        Args:
            key: Of the account, or one of the channel's keys.
            channel_id: 32 bytes; without it, all that concerns the key: its account, and the channels
                that it pays, is paid by, or closes.
            after_seq: `seen_seq` of the last page already handled; 0 for all.

        Yields:
            Events in order; a page without events says that the ledger is alive.

        Raises:
            LedgerUnreachable: The connection broke, or nothing came for 90 seconds; go on with the last
                `seen_seq`, or from the beginning when `recovered` is another than before.
        """
        subject = bytes(12) + key.address.data if channel_id is None else channel_id
        if self._lost_sight:
            await self.info()
        recovered = self.recovered
        while True:
            signed, digest = self._query(key, subject, self.now_ms(), valid_ms=_WATCH_MS)
            stream = self._stub.Watch(pb.WatchRequest(query=signed, after_seq=after_seq))
            try:
                responses = aiter(stream)
                while True:
                    # A network or a ledger that stands still breaks no connection on which we only listen.
                    async with asyncio.timeout(_SILENT_S):
                        response = await anext(responses, None)
                    if response is None:
                        break
                    page = await self._opened(response.events, "LedgerEvents", pb.LedgerEvents())
                    if self.recovered != recovered:
                        raise LedgerUnreachable("The ledger was recovered; its journal is another one.")
                    if page.query_digest != digest or page.seen_seq < after_seq:
                        raise IdentityError("The ledger answered another question.")
                    after_seq = page.seen_seq
                    yield page
            except TimeoutError:
                self._lost_sight = True
                raise LedgerUnreachable("The ledger fell silent.") from None
            except grpc.aio.AioRpcError as failure:
                self._lost_sight = True
                raise explain(failure) from None
            finally:
                stream.cancel()

    async def entries(self, key: PrivateKey, *, after_seq: int = 0) -> AsyncIterator[pb.GetEntriesResponse]:
        """Reads the journal to its end, page by page; check it with `btt ledger audit`.

        Args:
            key: Of the operator or an auditor.
            after_seq: Number of the entry before the first one wanted.

        Raises:
            SignerMismatch: The key may not.
        """
        while True:

            async def ask(now_ms: int, after: int = after_seq) -> pb.GetEntriesResponse:
                signed, _ = self._query(key, self.ledger_id, now_ms)
                request = pb.GetEntriesRequest(query=signed, after_seq=after)
                return await self._call(self._stub.GetEntries, request)

            page = await self._timely(ask)
            if not page.entries:
                return
            if page.entries[0].seq != after_seq + 1:
                raise IdentityError("The ledger left out entries of its journal.")
            after_seq = page.entries[-1].seq
            yield page

    async def totals(self) -> pb.GetTotalsResponse:
        """Returns the sums of the books."""
        return await self._call(self._stub.GetTotals, pb.GetTotalsRequest())


def _proof(signed: pb.SignedBody) -> bytes:
    return signed.public_key + signed.signature
