"""The pocket on a real node inside this process, with two payers and a small quota."""

from __future__ import annotations

from pathlib import Path

import pytest
from note_pocket.plugin import Notes, Plugin
from note_pocket.v1 import note_pocket_pb2 as pb
from note_pocket.v1 import note_pocket_pb2_grpc as rpc

from btt.sdk.errors import QuotaFull
from btt.sdk.testing import Devnet


async def test_each_payer_has_one_note_within_the_quota() -> None:
    config = {"keep_rate": "1 base units / byte", "look_rate": "5 base units / call", "quota": "100 B"}
    async with Devnet(
        in_process=True, plugins={"note-pocket": Plugin}, services={"note-pocket": config}
    ) as net:
        async with await net.client("1 BTT") as ann, await net.client("1 BTT") as bob:
            ours, theirs = (client.service(rpc.PocketServiceStub, budget="0.5 BTT") for client in (ann, bob))
            async with ours as mine, theirs as other:
                await mine.Keep(pb.KeepRequest(note=bytes(90)))
                with pytest.raises(QuotaFull, match="has 10 bytes left of the 100"):
                    await other.Keep(pb.KeepRequest(note=bytes(11)))
                await mine.Keep(pb.KeepRequest(note=b"short"))
                await other.Keep(pb.KeepRequest(note=bytes(95)))
                assert (await mine.Look(pb.LookRequest())).note == b"short"
                assert (await other.Look(pb.LookRequest())).note == bytes(95)
                await other.Keep(pb.KeepRequest())
                assert (await other.Look(pb.LookRequest())).note == b""
        assert ann.receipts[0].paid == 90 + 5 + 5
        assert bob.receipts[0].paid == 95 + 5 + 5, "what was refused is free"


class _Kept(dict[str, int]):
    async def reservations(self) -> dict[str, int]:
        return dict(self)

    async def reserve(self, name: str, amount: int) -> None:
        self[name] = amount

    async def release(self, name: str) -> bool:
        return bool(self.pop(name, 0))


async def test_after_a_crash_the_quota_says_what_is_on_disk(tmp_path: Path) -> None:
    quota = _Kept(ann=90, bob=90, cid=5)
    (tmp_path / "bob").write_bytes(bytes(40))
    (tmp_path / "cid").write_bytes(bytes(5))
    await Notes(tmp_path, quota).recover()  # type: ignore[arg-type]
    assert quota == {"bob": 40, "cid": 5}
