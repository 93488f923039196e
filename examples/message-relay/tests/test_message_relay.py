"""The relay on a real node inside this process, with two dApps that pay for what they say and hear."""

from __future__ import annotations

import asyncio

from message_relay.plugin import Plugin
from message_relay.v1 import message_relay_pb2 as pb
from message_relay.v1 import message_relay_pb2_grpc as rpc

from btt.sdk.testing import Devnet


async def test_both_pay_for_what_they_said_and_heard() -> None:
    config = {"rate": "1 base units / byte"}
    async with Devnet(
        in_process=True, plugins={"message-relay": Plugin}, services={"message-relay": config}
    ) as net:
        async with await net.client("1 BTT") as ann, await net.client("1 BTT") as bob:
            ours, theirs = (client.service(rpc.RelayServiceStub, budget="0.5 BTT") for client in (ann, bob))
            there, heard = asyncio.Event(), asyncio.Event()

            async def spoken():  # type: ignore[no-untyped-def]
                yield pb.JoinRequest(room="lobby")
                await there.wait()
                yield pb.JoinRequest(text=b"hello")
                yield pb.JoinRequest(text=b"world!")
                await heard.wait()

            async def silent():  # type: ignore[no-untyped-def]
                yield pb.JoinRequest(room="lobby")
                await heard.wait()

            async def speak() -> None:
                async with ours as relay:
                    assert [m.text async for m in relay.Join(spoken())] == [b""]

            async def listen() -> list[bytes]:
                got = []
                async with theirs as relay:
                    async for message in relay.Join(silent()):
                        there.set()
                        got.append(message.text)
                        if len(got) == 3:
                            heard.set()
                return got

            async with asyncio.TaskGroup() as group:
                group.create_task(speak())
                listening = group.create_task(listen())
            assert listening.result() == [b"", b"hello", b"world!"]
        assert ann.receipts[0].paid == ours.spent == 11
        assert bob.receipts[0].paid == theirs.spent == 11
