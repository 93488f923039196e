"""What `btt plugin check message-relay` tries: one caller that enters, speaks and leaves."""

from __future__ import annotations

from btt.sdk.testing.conformance import Case
from message_relay.plugin import Plugin
from message_relay.v1 import message_relay_pb2 as pb
from message_relay.v1 import message_relay_pb2_grpc as rpc

CASE = Case(
    plugin=Plugin,
    config={"rate": "2 BTT / MiB"},
    stubs=[rpc.RelayServiceStub],
    requests={"Join": [pb.JoinRequest(room="lobby"), pb.JoinRequest(text=b"is anybody there?")]},
)
