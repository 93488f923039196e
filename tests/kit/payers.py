"""Payers that speak the protocol by hand, from networks of their own: for what our client would not do."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from btt.node import folder as node_folder
from btt.node.runtime import Node
from btt.proto.payment.v1 import payment_pb2, payment_pb2_grpc
from btt.sdk.identity import tls_name
from btt.sdk.keys import PrivateKey
from btt.sdk.money import BTT
from btt.sdk.payment.calls import CALL_KEY, PROOF_KEY, TOKEN_KEY
from btt.sdk.payment.wire import sign_call
from btt.sdk.rpc import to_error
from btt.sdk.signing import (
    APP_UNKNOWN,
    EARLY_CLOSE,
    ChannelCommit,
    ChannelUpdate,
    SessionOpen,
    service_reference,
    sign,
)
from btt.sdk.tls import pinned_channel
from kit.probe import PRICES, Probe, pb, rpc

UNIT = 1000
"""A message of the probe: 1000 rows, of one base unit each."""


class ProbePlugin:
    name = "probe"

    def __init__(self, context):
        self.probe = Probe()

    async def start(self):
        pass

    def register(self, server):
        rpc.add_ProbeServiceServicer_to_server(self.probe, server)

    def prices(self):
        return PRICES

    async def stop(self):
        pass


def probe_node(economy, path: Path, *, payments: dict, bans: dict) -> Node:
    """A whole node that serves the probe; one that is in this place already is started again."""
    config = {
        "node": {"listen": "127.0.0.1:0"},
        "ledger": {"address": str(economy.running.address)},
        "payments": {"min_challenge": "1s", "min_lifetime": "10s", "close_margin": "1s", **payments},
        "bans": bans,
        "services": {"probe": {"enabled": True}},
    }
    again = (path / node_folder.CONFIG).exists()
    folder = node_folder.NodeFolder.open(path) if again else node_folder.init(path, config=config)
    return Node(folder, plugins={"probe": lambda: ProbePlugin}, clock=economy.clock, grace_s=0)


class Relay:
    """Carries TCP connections to a node, out of some loopback /24; `silence` makes it a dead network."""

    def __init__(self, port: int, host: str) -> None:
        self._target, self._host = port, host
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.port = 0

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def silence(self) -> None:
        """Nothing passes any more, and nobody is told: no packet, no reset."""
        self._flowing.clear()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(
            "127.0.0.1", self._target, local_addr=(self._host, 0)
        )
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._copy(reader, far_writer))
                group.create_task(self._copy(far_reader, writer))
        except* (OSError, EOFError):
            pass
        finally:
            for end in (writer, far_writer):
                end.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
        raise EOFError


@asynccontextmanager
async def dial(certificate: bytes, node, port: int) -> AsyncIterator[grpc.aio.Channel]:
    """A connection of its own to a node, or to a relay before it."""
    async with pinned_channel(
        "127.0.0.1", port, certificate, tls_name(node), own_connection=secrets.token_hex(8)
    ) as channel:
        yield channel


@dataclass
class RawPayer:
    """An identity with a funded channel, and whatever it wants to do with it."""

    economy: object
    offer: object
    channel: grpc.aio.Channel
    account: PrivateKey = field(default_factory=PrivateKey.generate)
    key: PrivateKey = field(default_factory=PrivateKey.generate)
    paid: int = 0
    got: int = 0
    token: bytes = b""
    credit: int = 0

    @property
    def stub(self) -> payment_pb2_grpc.PaymentServiceStub:
        return payment_pb2_grpc.PaymentServiceStub(self.channel)

    async def fund(self, deposit: int = BTT // 10) -> RawPayer:
        """Gets money, agrees with the node, and locks it."""
        ledger = self.economy.ledger
        await ledger.transfer(self.economy.faucet, self.account.public.address, deposit)
        key = PrivateKey.generate()
        commit = ChannelCommit(
            payer=self.account.public.address,
            payee=self.offer.payee,
            k1=key.public,
            k2=self.offer.payee_key,
            amount=deposit,
            expires_ms=self.economy.clock() + 24 * 3600_000,
            challenge_ms=max(1000, self.offer.terms.min_challenge_ms),
            flags=EARLY_CLOSE,
            fee=0,
            nonce=secrets.token_bytes(16),
            service_ref=service_reference(self.offer.node),
        )
        try:
            reply = await self.stub.AgreeRefund(payment_pb2.AgreeRefundRequest(commit=commit.encode()))
        except grpc.aio.AioRpcError as failure:
            raise to_error(failure) from failure
        await ledger.open_channel(commit, self.account, reply.signature)
        self.key, self.id, self.paid = key, commit.channel_id(self.offer.ledger_id), 0
        return self

    async def open(self, *, key: PrivateKey | None = None) -> None:
        """Opens a session that states that nothing was accepted."""
        try:
            begin = await self.stub.Begin(payment_pb2.BeginRequest())
            body = SessionOpen(
                node=self.offer.node,
                channel=self.id,
                offer_digest=self.offer.digest,
                app=APP_UNKNOWN,
                client_nonce=secrets.token_bytes(16),
                server_nonce=begin.server_nonce,
                valid_until_ms=self.economy.clock() + 60_000,
            )
            reply = await self.stub.Open(
                payment_pb2.OpenRequest(
                    open=body.encode(), signature=sign(key or self.key, body, self.offer.ledger_id)
                )
            )
        except grpc.aio.AioRpcError as failure:
            raise to_error(failure) from failure
        self.token, self.credit = reply.token, reply.credit

    def ticket(self, key: PrivateKey | None = None) -> tuple[tuple[str, bytes], ...]:
        call_id = secrets.token_bytes(16)
        proof = sign_call(key or self.key, self.token, call_id, self.offer.ledger_id)
        return (TOKEN_KEY, self.token), (CALL_KEY, call_id), (PROOF_KEY, proof)

    def update(self, cumulative: int, key: PrivateKey | None = None) -> payment_pb2.PayRequest:
        update = ChannelUpdate(channel=self.id, cumulative=cumulative)
        signature = sign(key or self.key, update, self.offer.ledger_id)
        return payment_pb2.PayRequest(update=payment_pb2.Update(cumulative=cumulative, signature=signature))

    async def attach(self):
        """Opens the payment stream, and waits until the node has taken it."""
        stream = self.stub.Pay()
        _, (_, call_id), (_, signature) = self.ticket()
        attach = payment_pb2.Attach(token=self.token, call_id=call_id, signature=signature)
        await stream.write(payment_pb2.PayRequest(attach=attach))
        # The report of a call that never was is answered once the session is attached.
        await stream.write(payment_pb2.PayRequest(report=payment_pb2.Report(call_id=secrets.token_bytes(16))))
        assert await stream.read() is not grpc.aio.EOF
        return stream

    def rows(self, messages: int):
        return rpc.ProbeServiceStub(self.channel).Query(
            pb.Ask(messages=messages, size=1000, max_rows=1000 * messages), metadata=self.ticket()
        )

    def bytes(self, messages: int, size: int = 1 << 20):
        return rpc.ProbeServiceStub(self.channel).Many(
            pb.Ask(messages=messages, size=size), metadata=self.ticket()
        )

    async def grab(self, *, pays: int = 0, waits: bool = False) -> Exception | None:
        """Takes rows; pays `pays` base units of what is asked for, and not one more.

        Args:
            pays: Where its honesty ends.
            waits: Sits until the node has had enough of it; otherwise it vanishes as soon as
                the node asks for more.

        Returns:
            How the node ended the call; None if the payer left.
        """
        await self.open()
        stream = await self.attach()
        call = self.rows(pays // 1000 + 20)
        arrived = asyncio.Event()

        async def take() -> None:
            async for message in call:
                self.got += message.rows
                arrived.set()

        async def pay() -> None:
            while (message := await stream.read()) is not grpc.aio.EOF:
                demand = message.statement.demand
                if self.paid < demand <= pays:
                    self.paid = demand
                    await stream.write(self.update(demand))
                elif demand > pays and not waits:
                    while self.got < self.paid:  # it was sent, over another connection
                        arrived.clear()
                        await arrived.wait()
                    return

        taking, paying = asyncio.create_task(take()), asyncio.create_task(pay())
        try:
            await asyncio.wait([taking] if waits else [taking, paying], return_when=asyncio.FIRST_COMPLETED)
            failure = taking.exception() if taking.done() else None
            return to_error(failure) if isinstance(failure, grpc.aio.AioRpcError) else failure
        finally:
            call.cancel()
            stream.cancel()
            await asyncio.wait([taking, paying])
            for task in (taking, paying):
                task.cancelled() or task.exception()
