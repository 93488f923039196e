"""A payment session: one channel bound to one offer, paying while calls run.

Two tasks keep it: one reads statements, one signs. The signing task sleeps until
something is due, saves the intent, signs, sends, and then reports calls that ended. If
the Pay stream breaks the session is over, with everything it still carried: opening it
again settles by cumulative counts, whatever was lost on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable

import grpc.aio

from btt.proto.ledger.v1 import ledger_pb2
from btt.proto.payment.v1 import payment_pb2, payment_pb2_grpc
from btt.sdk.channel import Payer
from btt.sdk.errors import (
    BttError,
    BudgetExceeded,
    ChannelClosed,
    ChannelClosing,
    CountsDiffer,
    InternalError,
    RemoteError,
    SessionEnded,
)
from btt.sdk.identity import Offer
from btt.sdk.payment.binding import bind
from btt.sdk.payment.calls import (
    PayStreamStream,
    PayStreamUnary,
    PayUnaryStream,
    PayUnaryUnary,
    end_on_break,
)
from btt.sdk.payment.capacity import Capacity
from btt.sdk.payment.connection import NodeConnection
from btt.sdk.payment.ending import Ending
from btt.sdk.payment.metered import MeteredCall
from btt.sdk.payment.opening import OpenedChannel, obtain_channel
from btt.sdk.payment.outcome import look
from btt.sdk.payment.purse import Purse
from btt.sdk.payment.receipt import SessionReceipt, read_receipt
from btt.sdk.payment.store import CLOSED, CLOSING
from btt.sdk.payment.verdicts import Verdicts
from btt.sdk.payment.wire import counts_of, read_counts, sign_call, update_proto
from btt.sdk.rpc import to_error

SETTLE_S = 60.0
"""Seconds that a node may take to settle what has ended."""
STALL_S = 0.5
"""Seconds that a node waits for payment before something is prepaid although more is under way."""
REASON_S = 2.0
"""Seconds that a broken stream may take to say why it broke."""
PayStream = grpc.aio.StreamStreamCall[payment_pb2.PayRequest, payment_pb2.PayResponse]


class PaymentSession:
    """An open session; made by `open`."""

    def __init__(
        self,
        purse: Purse,
        node: NodeConnection,
        opened: OpenedChannel,
        payer: Payer,
        control: grpc.aio.Channel,
    ) -> None:
        self._purse = purse
        self._node = node
        self._opened = opened
        self._key = purse.channel_key(opened.commit)
        self.payer = payer
        self.offer: Offer = node.offer
        self.token = b""
        self.error: BttError | None = None
        self._credit = 0
        self._most_credit = 0
        self._demand = 0
        self._stated = 0
        self._stalled = False
        self._discarded = False
        self._paid = payer.signed
        self._calls: dict[bytes, MeteredCall] = {}
        self._reports: list[MeteredCall] = []
        self._settling: set[bytes] = set()
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.capacity = Capacity(self, purse, opened.stored, wake=self._wake, changed=self._changed)
        self._control = control
        self._stub: payment_pb2_grpc.PaymentServiceAsyncStub = payment_pb2_grpc.PaymentServiceStub(
            self._control
        )
        self.channel = end_on_break(
            node.channel(
                label="data",
                interceptors=[
                    PayUnaryUnary(self),
                    PayUnaryStream(self),
                    PayStreamUnary(self),
                    PayStreamStream(self),
                ],
            )
        )
        self.channel.get_state(try_to_connect=True)  # while node and ledger agree to the session

    # Opening

    @classmethod
    async def open(
        cls, purse: Purse, node: NodeConnection, *, need: int, only: bytes | None = None
    ) -> PaymentSession:
        """Opens a session with a node, on a channel it has or on a new one.

        Args:
            purse: What pays.
            node: Whom.
            need: Base units the coming work is expected to cost.
            only: Take up this channel, and open no other.

        Raises:
            BudgetExceeded: The budget covers no channel.
            ChannelClosed, ChannelClosing: `only` is.
            CaptureDisputed: The node closed the channel with more than was its due.
            CountsDiffer: The node claims what was neither accepted nor paid, or that the channel
                which was opened for it is closed.
            BttError: The node or the ledger refused, or did not answer.
        """
        while True:
            control = node.channel(label="payment")
            try:
                stub: payment_pb2_grpc.PaymentServiceAsyncStub = payment_pb2_grpc.PaymentServiceStub(control)
                opened = await obtain_channel(purse, node.offer, stub, need, only)
            except BaseException:
                await control.close()
                raise
            stored = opened.stored
            payer = Payer(
                ledger_id=stored.ledger_id,
                channel_id=stored.channel_id,
                key=purse.channel_key(opened.commit),
                deposit=stored.deposit,
                limit=stored.cap,
                signed=stored.signed,
                tally=purse.store.tally(stored.channel_id),
            )
            payer.pin(node.offer.sheet)
            session = cls(purse, node, opened, payer, control)
            try:
                await session._start()
            except (ChannelClosed, ChannelClosing):
                # The node says so; the ledger says what it took. Either way it pays no more.
                await session._discard()
                purse.store.set_state(stored.channel_id, CLOSING)
                state = await look(purse, stored.channel_id)
                if opened.is_new and state.phase == ledger_pb2.CHANNEL_PHASE_OPEN:
                    # Another one would lock more of the budget, and so on to its end.
                    raise CountsDiffer(
                        "The node says that the channel is closed which it just agreed to."
                    ) from None
                if only is not None or opened.is_new:
                    raise
                continue
            except BaseException:
                await session._discard()
                raise
            return session

    async def _start(self) -> None:
        bound = await bind(self._purse, self._stub, self._key, self.offer, self.payer)
        self.token = bound.token
        self._credit = self._most_credit = bound.credit
        self._paid = self.payer.signed
        stream = self._stub.Pay()
        self._ending = Ending(stream)
        call_id = secrets.token_bytes(16)
        attach = payment_pb2.Attach(token=self.token, call_id=call_id, signature=self.proof(call_id))
        await stream.write(payment_pb2.PayRequest(attach=attach))
        self._tasks = [
            asyncio.create_task(self._guard(self._read, stream), name="payment-statements"),
            asyncio.create_task(self._guard(self._sign, stream), name="payment-updates"),
        ]
        self.nudge()

    def proof(self, call_id: bytes) -> bytes:
        """Signs a call of this session with K1, so that a stolen token is worth nothing."""
        return sign_call(self._key, self.token, call_id, self.offer.ledger_id)

    # Calls

    def verdicts(self) -> Verdicts:
        """Returns a block in which verified methods may be called; see `Verdicts`."""
        return Verdicts()

    def begin_call(self, call: MeteredCall) -> None:
        """Opens a metered call.

        Raises:
            BttError: The session has ended; the error says why.
            BudgetExceeded: Not one more unit can be paid.
        """
        if self.error is not None:
            raise self.error
        if self.payer.tally.owed >= self.payer.limit:
            raise BudgetExceeded("The channel is used up.")
        self.payer.begin(call.call_id)
        self._calls[call.call_id] = call

    def report_call(self, call: MeteredCall) -> None:
        """Reports a call that has ended and whose messages are all decided."""
        self._calls.pop(call.call_id, None)
        if self.error is None:
            self._reports.append(call)
            self._settling.add(call.call_id)
            self._wake.set()
            self._changed.set()

    def nudge(self) -> None:
        """Wakes the signing task if something is due."""
        if self._due() is not None:
            self._wake.set()

    def _due(self) -> int | None:
        # Nothing is prepaid while something that may still be accepted is under way, unless nobody
        # takes that: the reader of one call may itself wait for another.
        demand = 0 if self._is_held and not self._stalled else self._demand
        return self.payer.due(credit=self._credit, demand=demand, flush=not self._calls)

    @property
    def _is_held(self) -> bool:
        return self._demand > self.payer.signed and self._stated > self.payer.tally.owed

    async def provide(self, need: int) -> None:
        """Makes sure that something more can be paid; see `Capacity.provide`."""
        await self.capacity.provide(need)

    # The two tasks

    async def _sign(self, stream: PayStream) -> None:
        while True:
            try:
                async with asyncio.timeout(STALL_S if self._is_held else None):
                    await self._wake.wait()
            except TimeoutError:
                self._stalled = True
            self._wake.clear()
            if (deposit := self.capacity.news()) is not None:
                await stream.write(payment_pb2.PayRequest(deposit=deposit))
            while (due := self._due()) is not None:
                saved = await self._purse.store.save(self.payer.intend(due))
                update = self.payer.sign(saved)
                await stream.write(payment_pb2.PayRequest(update=update_proto(update)))
            self._stalled = False
            while self._reports:
                call = self._reports.pop(0)
                counted = self.payer.end(call.call_id)
                await stream.write(
                    payment_pb2.PayRequest(
                        report=payment_pb2.Report(
                            call_id=call.call_id,
                            received=counts_of(counted.received),
                            accepted=counts_of(counted.accepted),
                        )
                    )
                )

    async def _read(self, stream: PayStream) -> None:
        async for message in stream:
            if message.HasField("statement"):
                self._take_statement(message.statement)
            elif message.HasField("acknowledgement"):
                call = self._calls.get(message.acknowledgement.call_id)
                if call is not None:
                    call.acknowledged(message.acknowledgement.messages)
            elif message.HasField("settlement"):
                settlement = message.settlement
                if settlement.call_id not in self._settling:
                    raise CountsDiffer("The node settled a call that was not reported.")
                self._settling.discard(settlement.call_id)
                self.payer.settle(settlement.call_id, read_counts(settlement.settled))
                self.nudge()
            self._changed.set()
        raise SessionEnded("The node ended the payment stream.")

    def _take_statement(self, statement: payment_pb2.Statement) -> None:
        # What is under way left on the credit of its time, which a write-off may have ended since;
        # the exact check comes with each settlement.
        self._most_credit = max(self._most_credit, statement.credit)
        tolerance = 2 * self._most_credit + self.offer.sheet.unit_charge
        if statement.owed > self.payer.tally.owed + tolerance:
            raise CountsDiffer(
                f"The node says {statement.owed} base units are owed; we count {self.payer.tally.owed}."
            )
        if statement.paid > self.payer.signed:
            raise CountsDiffer("The node says more is paid than was signed.")
        self._credit = statement.credit
        self._demand = statement.demand
        self._stated = statement.owed
        self.capacity.heard(statement.deposit)
        self._paid = max(self._paid, statement.paid)
        if self._is_held:
            self._wake.set()  # to watch the time
        self.nudge()

    async def _guard(self, work: Callable[[PayStream], Awaitable[None]], stream: PayStream) -> None:
        try:
            await work(stream)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as failure:
            error: BttError = SessionEnded("The payment stream broke.")
            if isinstance(failure, grpc.aio.AioRpcError):
                told = to_error(self._ending.told(failure))
                error = error if isinstance(told, RemoteError) else told
            if work == self._sign:
                # A write on a stream that broke does not know why; the reader of the same stream hears it.
                await asyncio.wait(self._tasks[:1], timeout=REASON_S)
            self.fail(error)
        except BttError as error:
            self.fail(error)
        except Exception as error:
            # Whoever waits for this task must not wait for ever.
            self.fail(InternalError(f"The payment session failed here ({error!r})."))
            raise

    def fail(self, error: BttError) -> None:
        """Ends the session: running calls are cancelled and raise this error."""
        if self.error is None:
            self.error = error
            for call in list(self._calls.values()):
                call.cancel()
            self._changed.set()
            self._wake.set()

    # Ending

    async def settle(self) -> None:
        """Waits until the running calls have ended, all that is accepted is paid, and the node says so.

        Raises:
            SessionEnded: The node did not, long after the last call had ended.
            BttError: The session ended before.
        """
        until = None
        while True:
            if self.error is not None:
                raise self.error
            if not (
                self._calls or self._settling or self._due() is not None or self._paid < self.payer.signed
            ):
                return
            if self._calls:
                until = None
            elif until is None:
                until = asyncio.get_running_loop().time() + SETTLE_S
            self._changed.clear()
            try:
                async with asyncio.timeout_at(until):
                    await self._changed.wait()
            except TimeoutError:
                raise SessionEnded(f"The node has not settled for {SETTLE_S:.0f} seconds.") from None

    async def close(self, *, close_channel: bool) -> SessionReceipt:
        """Pays what is due, takes the node's signed statement, and ends the session.

        Args:
            close_channel: Have the payee close the channel on the ledger too.

        Raises:
            BttError: The session ended before, or the node or the ledger refused. What was
                signed stays in the books; `open` takes it up again.
        """
        try:
            await self.settle()
            call_id = secrets.token_bytes(16)
            reply = await self._stub.Close(
                payment_pb2.CloseRequest(
                    token=self.token,
                    close_channel=close_channel,
                    call_id=call_id,
                    signature=self.proof(call_id),
                ),
                timeout=60,
            )
            receipt = read_receipt(
                reply, self.payer, self.offer, self._purse.ledger if close_channel else None
            )
            self._purse.store.save_books(self.payer.channel_id, self.payer.signed, self.payer.tally)
            state = CLOSED if close_channel else self._purse.store.get(self.payer.channel_id).state
            self._purse.store.set_state(self.payer.channel_id, state, receipt.statement)
            if not close_channel:
                self._purse.store.keep(self.payer.channel_id, self._purse.clock())
        except grpc.aio.AioRpcError as failure:
            raise to_error(failure) from failure
        else:
            return receipt
        finally:
            await self._discard()

    async def abandon(self) -> None:
        """Ends the session without a word to the node, as a lost connection would."""
        self.fail(SessionEnded("The session was closed here."))
        await self._discard()

    async def _discard(self) -> None:
        if self._discarded:
            return  # the books may be another session's by now
        self._discarded = True
        self.fail(SessionEnded("The session is closed."))
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self.channel.close()
        await self._control.close()
        try:
            # What was accepted stays owed, though the session that counted it is lost.
            self._purse.store.save_books(self.payer.channel_id, self.payer.signed, self.payer.tally)
        finally:
            self._opened.claim.release()
