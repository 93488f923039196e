"""Keeps one note for each payer: in the quota before it is on disk, on disk before it is paid."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc.aio

from btt.sdk.errors import QuotaFull
from btt.sdk.plugin import Line, Meter, Price, Quota, ServiceContext, Unit, check_keys, read_rate
from btt.sdk.rpc import abort
from note_pocket.v1 import note_pocket_pb2 as pb
from note_pocket.v1 import note_pocket_pb2_grpc as rpc

SERVICE = "note_pocket.v1.PocketService"
LARGEST = 65536


class Notes:
    """Files named by their owner; each is set aside in the quota under the same name."""

    def __init__(self, folder: Path, quota: Quota) -> None:
        self._folder = folder
        self._quota = quota
        self._writing = asyncio.Lock()

    async def recover(self) -> None:
        """Gives back what was set aside for notes that a crash kept from the disk."""
        for name, size in (await self._quota.reservations()).items():
            path = self._folder / name
            if not path.exists():
                await self._quota.release(name)
            elif path.stat().st_size != size:
                await self._quota.reserve(name, path.stat().st_size)

    async def keep(self, owner: str, note: bytes) -> None:
        """Returns once the note is on disk.

        Raises:
            QuotaFull: The operator keeps no more.
        """
        async with self._writing:
            old = len(self.look(owner))
            if len(note) > old:
                await self._quota.reserve(owner, len(note))
            await asyncio.to_thread(self._write, owner, note)
            if not note:
                await self._quota.release(owner)
            elif len(note) < old:
                await self._quota.reserve(owner, len(note))

    def look(self, owner: str) -> bytes:
        """Returns a note; empty if there is none."""
        path = self._folder / owner
        return path.read_bytes() if path.exists() else b""

    def _write(self, owner: str, note: bytes) -> None:
        path = self._folder / owner
        if not note:
            path.unlink(missing_ok=True)
            return
        unfinished = path.with_name(f"{owner}.new")
        with unfinished.open("wb") as file:
            file.write(note)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


class Plugin:
    """Sells the keeping of notes."""

    name = "note-pocket"

    def __init__(self, context: ServiceContext) -> None:
        check_keys(context.config, known=("keep_rate", "look_rate"))
        self._keep = read_rate(context.config, "keep_rate", default="1 BTT / MiB", unit=Unit.BYTE)
        self._look = read_rate(context.config, "look_rate", default="0.001 BTT / call", unit=Unit.CALL)
        self._notes = Notes(context.data_dir, context.quota)
        self._meter = context.meter

    async def start(self) -> None:
        """Makes the quota say what is on disk."""
        await self._notes.recover()

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to the node."""
        rpc.add_PocketServiceServicer_to_server(PocketServicer(self._notes, self._meter), server)

    def prices(self) -> Mapping[Line, Price]:
        """Says what a byte and a look cost."""
        return {
            Line(SERVICE, Unit.BYTE): Price(self._keep, verify_units=LARGEST),
            Line(SERVICE, Unit.CALL): Price(self._look, verify_units=1),
        }

    async def stop(self) -> None:
        """Has nothing to close: a note is on disk before its call ends."""


class PocketServicer(rpc.PocketServiceServicer):
    """Keeps and shows; the node counts and is paid."""

    def __init__(self, notes: Notes, meter: Meter) -> None:
        self._notes = notes
        self._meter = meter

    @property
    def _owner(self) -> str:
        call = self._meter.call()
        assert call is not None, "its methods are paid"
        return str(call.payer)

    async def Keep(self, request: pb.KeepRequest, context: Any) -> pb.KeepResponse:
        """Keeps a note."""
        try:
            await self._notes.keep(self._owner, request.note)
        except QuotaFull as full:
            await abort(context, full)
        return pb.KeepResponse()

    async def Look(self, request: pb.LookRequest, context: Any) -> pb.LookResponse:
        """Shows the note."""
        return pb.LookResponse(note=self._notes.look(self._owner))
