"""Keeps a note, or shows the one that is kept: `python dapp.py [NOTE]`."""

from __future__ import annotations

import asyncio
import sys

from note_pocket.v1 import note_pocket_pb2 as pb
from note_pocket.v1.note_pocket_pb2_grpc import PocketServiceStub

from btt.sdk import Budget, Client


async def main(*words: str) -> None:
    async with Client.connect(budget=Budget("1 BTT")) as btt:
        service = btt.service(PocketServiceStub, budget="0.2 BTT")
        async with service as pocket:
            if words:
                await pocket.Keep(pb.KeepRequest(note=" ".join(words).encode()))
            else:
                print((await pocket.Look(pb.LookRequest())).note.decode())
        print(f"spent {service.spent}")


asyncio.run(main(*sys.argv[1:]))
