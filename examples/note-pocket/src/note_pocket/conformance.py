"""What `btt plugin check note-pocket` tries, in a pocket for a few notes."""

from __future__ import annotations

from btt.sdk.testing.conformance import Case
from note_pocket.plugin import Plugin
from note_pocket.v1 import note_pocket_pb2 as pb
from note_pocket.v1 import note_pocket_pb2_grpc as rpc

CASE = Case(
    plugin=Plugin,
    config={"keep_rate": "2 BTT / MiB", "look_rate": "0.002 BTT / call"},
    stubs=[rpc.PocketServiceStub],
    requests={"Keep": [pb.KeepRequest(note=bytes(1000))], "Look": [pb.LookRequest()]},
    quota="16 KiB",
)
