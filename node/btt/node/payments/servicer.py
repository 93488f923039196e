"""PaymentService: agrees to channels, binds sessions, takes updates, gives receipts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

import grpc.aio
import structlog

from btt.node.payments.agreement import Nonces, check_channel, check_terms
from btt.node.payments.bans import Failure
from btt.node.payments.closing import Closer
from btt.node.payments.deposits import Deposits
from btt.node.payments.ledger import PayeeLedger
from btt.node.payments.network import network_of
from btt.node.payments.session import ATTACH_S, Session
from btt.node.payments.sessions import Sessions
from btt.node.payments.store import CLOSED, CLOSING, ChannelRecord, PayeeStore
from btt.proto.ledger.v1 import ledger_pb2
from btt.proto.payment.v1 import payment_pb2, payment_pb2_grpc
from btt.sdk.channel import SignedUpdate
from btt.sdk.errors import (
    AppRefused,
    BttError,
    ChannelClosed,
    ChannelClosing,
    CountsDiffer,
    Draining,
    InternalError,
    InvalidRequest,
    PriceChanged,
    RequestExpired,
    SessionEnded,
    SignatureInvalid,
    SignerMismatch,
    StorageError,
    UpdateInvalid,
)
from btt.sdk.identity import Offer
from btt.sdk.keys import Address, PrivateKey
from btt.sdk.payment.apps import NO_APP, AppGrant, open_grant
from btt.sdk.payment.wire import count_protos, counts_of, read_counts, update_proto
from btt.sdk.rpc import abort
from btt.sdk.signing import (
    APP_UNKNOWN,
    ChannelCommit,
    ChannelRefund,
    SessionOpen,
    sign,
    sign_document,
    verify,
)

log = structlog.get_logger(__name__)

MAX_OPEN_AHEAD_MS = 5 * 60_000
Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"


class PaymentServicer(payment_pb2_grpc.PaymentServiceServicer):
    """The payment side of a node.

    Args:
        ledger_id: 32 bytes.
        ledger: The ledger of the node's own configuration.
        identity: Signs statements.
        payee_key: K2.
        store: The payee's books.
        sessions: The live sessions.
        closer: Closes channels.
        offers: Returns the offers that a session may pin now: the current one, and the one
            before it while it is valid.
        serves: Raises AppRefused for an application that the operator does not serve.
        clock: Unix milliseconds.
    """

    def __init__(
        self,
        *,
        ledger_id: bytes,
        ledger: PayeeLedger,
        identity: PrivateKey,
        payee_key: PrivateKey,
        store: PayeeStore,
        sessions: Sessions,
        closer: Closer,
        offers: Callable[[], list[Offer]],
        serves: Callable[[Address], None],
        clock: Callable[[], int],
    ) -> None:
        self._ledger_id = ledger_id
        self._ledger = ledger
        self._identity = identity
        self._payee_key = payee_key
        self._store = store
        self._sessions = sessions
        self._closer = closer
        self._offers = offers
        self._serves = serves
        self._clock = clock
        self._deposits = Deposits(store=store, ledger=ledger, key=payee_key)
        self._nonces = Nonces(clock)
        self.draining = False

    async def Begin(  # noqa: N802
        self, request: payment_pb2.BeginRequest, context: Context
    ) -> payment_pb2.BeginResponse:
        """Returns a nonce for one Open."""
        return payment_pb2.BeginResponse(server_nonce=self._nonces.give())

    async def AgreeRefund(  # noqa: N802
        self, request: payment_pb2.AgreeRefundRequest, context: Context
    ) -> payment_pb2.AgreeRefundResponse:
        """Signs T2 for a channel whose terms suit (paper: step 4)."""
        try:
            if self.draining:
                raise Draining("The node is stopping.")
            commit = ChannelCommit.decode(request.commit)
            check_terms(commit, self._offers()[0], now_ms=self._clock())
            # Nobody shall lock money in a channel that will be refused.
            await self._sessions.bans.check(commit.payer, network_of(context.peer()))
            refund = ChannelRefund(
                channel=commit.channel_id(self._ledger_id), not_before_ms=commit.expires_ms
            )
            return payment_pb2.AgreeRefundResponse(signature=sign(self._payee_key, refund, self._ledger_id))
        except BttError as error:
            await abort(context, error)

    async def Open(  # noqa: N802
        self, request: payment_pb2.OpenRequest, context: Context
    ) -> payment_pb2.OpenResponse:
        """Binds a channel to a new session."""
        try:
            return await self._open(request, network_of(context.peer()))
        except BttError as error:
            await abort(context, error)

    async def _open(self, request: payment_pb2.OpenRequest, network: str) -> payment_pb2.OpenResponse:
        if self.draining:
            raise Draining("The node is stopping.")
        body = SessionOpen.decode(request.open)
        offer = self._check_open(body)
        async with self._sessions.lock(body.channel):
            known = await self._store.channel(body.channel)
            if known is not None and known[0].state in (CLOSING, CLOSED):
                raise ChannelClosed("The channel is closed.")
            if known is not None:  # a banned payer gets no work out of the ledger
                commit = ChannelCommit.decode(known[0].commit)
                await self._admit(commit, body, request.signature, network)
            # An old receipt proves nothing: the live state decides before any credit.
            state = await self._ledger.channel(body.channel, self._payee_key)
            if state.phase == ledger_pb2.CHANNEL_PHASE_CLOSED:
                raise ChannelClosed("The channel is closed on the ledger.")
            if state.phase != ledger_pb2.CHANNEL_PHASE_OPEN:
                raise ChannelClosing("The channel is closing on the ledger.")
            commit = ChannelCommit.decode(state.commit)
            check_channel(commit, offer, now_ms=self._clock())
            app = self._check_app(body, request, commit)
            if known is None:
                await self._admit(commit, body, request.signature, network)
            if known is None or known[0].deposit < state.deposit:
                # With T1, its top-ups and their receipts in our hands, a ledger that forgets can be reminded.
                await self._ledger.gather(self._payee_key, channel_id=body.channel)
            if known is None:
                await self._store.add_channel(
                    ChannelRecord(
                        channel_id=body.channel,
                        payer=commit.payer,
                        commit=state.commit,
                        deposit=state.deposit,
                        expires_ms=commit.expires_ms,
                        epoch=0,
                        best=None,
                        written_off=0,
                        state="open",
                        capture=None,
                        arrears=0,
                    )
                )
            elif known[0].deposit < state.deposit:
                await self._store.raise_deposit(body.channel, state.deposit)
            best = _update(request.best) if request.HasField("best") else None
            try:
                session, settled = await self._sessions.open(
                    channel_id=body.channel,
                    commit=commit,
                    deposit=state.deposit,
                    offer=offer,
                    network=network,
                    best=best,
                    accepted=read_counts(request.accepted),
                    app=app,
                )
            except BttError as error:
                failure = _failure(error, best, state.deposit)
                if failure is not None:
                    await self._sessions.failed(commit.payer, network, failure)
                raise
        name = "unknown" if app is NO_APP else str(app.app)
        log.info("session.open", channel=body.channel.hex(), epoch=session.epoch, app=name)
        return payment_pb2.OpenResponse(
            token=session.token,
            epoch=session.epoch,
            best=update_proto(session.payee.best),
            settled=counts_of(settled),
            credit=session.payee.standing.credit,
        )

    async def _admit(self, commit: ChannelCommit, body: SessionOpen, signature: bytes, network: str) -> None:
        """Checks that the channel's payer asks, and that it is not banned."""
        try:
            verify(commit.k1, body, self._ledger_id, signature)
        except SignatureInvalid:
            await self._sessions.bans.network_failed(network)
            raise
        await self._sessions.bans.check(commit.payer, network)

    def _check_open(self, body: SessionOpen) -> Offer:
        now = self._clock()
        current = self._offers()
        if body.node != current[0].node:
            raise SignerMismatch("The session is for another node.")
        if not now <= body.valid_until_ms <= now + MAX_OPEN_AHEAD_MS:
            raise RequestExpired("The session request is not current.")
        self._nonces.take(body.server_nonce)
        offer = next((offer for offer in current if offer.digest == body.offer_digest), None)
        if offer is None:
            raise PriceChanged("The node's offer has changed.")
        return offer

    def _check_app(
        self, body: SessionOpen, request: payment_pb2.OpenRequest, commit: ChannelCommit
    ) -> AppGrant:
        grant = NO_APP
        if body.app != APP_UNKNOWN:
            grant = open_grant(
                request.app_grant,
                channel_key=commit.k1,
                ledger_id=self._ledger_id,
                now_ms=self._clock(),
            )
            if grant.app != body.app:
                raise AppRefused("The application's grant is of another application.")
        self._serves(grant.app)
        return grant

    async def Pay(  # noqa: N802
        self, request_iterator: AsyncIterator[payment_pb2.PayRequest], context: Context
    ) -> AsyncIterator[payment_pb2.PayResponse]:
        """Takes updates and reports, gives statements and settlements; its end ends the session."""
        session: Session | None = None
        reader: asyncio.Task[None] | None = None
        try:
            session = await self._attach(request_iterator, network_of(context.peer()))
            reader = asyncio.create_task(self._hear(session, request_iterator))
            while True:
                news = await session.news()
                for call_id, messages in news.acknowledged.items():
                    yield payment_pb2.PayResponse(
                        acknowledgement=payment_pb2.Acknowledgement(call_id=call_id, messages=messages)
                    )
                for call_id, counts in news.settlements:
                    yield payment_pb2.PayResponse(
                        settlement=payment_pb2.Settlement(call_id=call_id, settled=counts_of(counts))
                    )
                if news.stale:
                    yield payment_pb2.PayResponse(statement=_statement(session))
        except BttError as error:
            await abort(context, error)
        finally:
            if session is not None:
                self._sessions.end(session, SessionEnded("The payment stream ended."))
                # What was delivered and not paid is remembered over a restart, too.
                meter = session.payee.meter
                with contextlib.suppress(BttError):
                    await self._store.save_books(session.payee.channel_id, meter.tally, meter.written_off)
            if reader is not None:
                reader.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reader

    async def _attach(self, requests: AsyncIterator[payment_pb2.PayRequest], network: str) -> Session:
        try:
            async with asyncio.timeout(ATTACH_S):
                first = await anext(requests, None)
        except TimeoutError:
            first = None
        if first is None or not first.HasField("attach"):
            raise InvalidRequest("The payment stream does not begin with a token.")
        attach = first.attach
        session = await self._find(attach, network)
        if session.attached:
            raise SessionEnded("The session has a payment stream already.")
        session.attach()
        return session

    async def _find(self, proof: payment_pb2.Attach | payment_pb2.CloseRequest, network: str) -> Session:
        try:
            return self._sessions.find(proof.token, proof.call_id, proof.signature)
        except SignatureInvalid:
            await self._sessions.bans.network_failed(network)
            raise

    async def _hear(self, session: Session, requests: AsyncIterator[payment_pb2.PayRequest]) -> None:
        update = None
        try:
            async for request in requests:
                if session.error is not None:
                    return  # what an Open settled meanwhile counts neither for nor against anybody
                if request.HasField("update"):
                    update = _update(request.update)
                    await session.pay(update, self._store)
                    self._sessions.paid(session)
                elif request.HasField("report"):
                    report = request.report
                    if len(report.call_id) != 16:
                        raise InvalidRequest("A call id has 16 bytes.")
                    session.settle(report.call_id, read_counts(report.accepted))
                    session.advance()
                elif request.HasField("deposit"):
                    update = None  # what follows is no payment's fault
                    await self._deposits.check(session, request.deposit)
                else:
                    raise InvalidRequest("The payment stream carries an unknown message.")
            self._sessions.end(session, SessionEnded("The payer ended the payment stream."))
        except BttError as error:
            failure = _failure(error, update, session.payee.meter.deposit)
            with contextlib.suppress(StorageError):
                if failure is not None:
                    await self._sessions.failed(session.payer, session.network, failure)
            self._sessions.end(session, error)
        except grpc.aio.AbortError:
            return  # the stream's other half has ended the session already
        except Exception as error:
            log.exception("session.defect")
            self._sessions.end(session, InternalError(f"The payment stream failed ({error})."))

    async def Close(  # noqa: N802
        self, request: payment_pb2.CloseRequest, context: Context
    ) -> payment_pb2.CloseResponse:
        """Ends a session with a signed statement, and closes its channel if asked."""
        try:
            session = await self._find(request, network_of(context.peer()))
            channel_id = session.payee.channel_id
            async with self._sessions.lock(channel_id):
                if session.payee.open_calls:
                    raise CountsDiffer("Calls of this session were not reported yet.")
                meter = session.payee.meter
                await self._store.save_books(channel_id, meter.tally, meter.written_off)
                statement = payment_pb2.SessionStatement(
                    channel_id=channel_id,
                    epoch=session.epoch,
                    settled=count_protos(meter.tally),
                    owed=meter.owed,
                    paid=meter.paid,
                    written_off=meter.written_off,
                    time_ms=self._clock(),
                )
                receipt, signature = b"", b""
                if request.close_channel:
                    receipt, signature = await self._closer.close(channel_id)
                else:
                    self._sessions.end(session, SessionEnded("The session was closed."))
            return payment_pb2.CloseResponse(
                statement=sign_document(
                    self._identity, "SessionStatement", self._ledger_id, statement.SerializeToString()
                ),
                ledger_receipt=receipt,
                ledger_signature=signature,
            )
        except BttError as error:
            await abort(context, error)


def _statement(session: Session) -> payment_pb2.Statement:
    meter = session.payee.meter
    return payment_pb2.Statement(
        owed=meter.owed,
        paid=meter.paid,
        credit=session.payee.standing.credit,
        demand=session.demand,
        deposit=meter.deposit,
    )


def _failure(error: BttError, update: SignedUpdate | None, deposit: int) -> Failure | None:
    """Names what counts against the payer: what no honest program sends.

    An update above a deposit that has grown meanwhile is none of that.
    """
    if isinstance(error, CountsDiffer):
        return Failure.LIED
    if isinstance(error, UpdateInvalid) and update is not None and update.cumulative <= deposit:
        return Failure.FORGED
    return None


def _update(proto: payment_pb2.Update) -> SignedUpdate:
    return SignedUpdate(proto.cumulative, proto.signature)
