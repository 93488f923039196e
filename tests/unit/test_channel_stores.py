"""Both sides' books hold every count after each save, though a save writes only what changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from btt.node.payments.store import ChannelRecord, PayeeStore
from btt.sdk.channel import Checked, Line, Payer, Price, PriceSheet, SignedUpdate, Tally
from btt.sdk.errors import StorageError
from btt.sdk.keys import PrivateKey
from btt.sdk.money import Rate, Unit
from btt.sdk.payment.store import OPEN, PayerStore, StoredChannel

CHANNEL, KEY = b"C" * 32, PrivateKey(b"\x01" * 32)
LINES = [Line(name, Unit.BYTE) for name in ("a", "b", "c")]
SHEET = PriceSheet(bytes(32), {line: Price(Rate(1, 1, Unit.BYTE), 10) for line in LINES})
SEGMENTS = [segment for segment, _ in SHEET.segments()]
CALL = bytes(16)


class PayeeSide:
    def __init__(self, folder: Path) -> None:
        self.store = PayeeStore(folder / "payments.db")
        self.db = self.store._db
        self.tally = Tally()
        for segment, rate in SHEET.segments():
            self.tally.price(segment, rate)

    async def begin(self) -> None:
        record = ChannelRecord(CHANNEL, KEY.address, b"", 1000, 2**50, 0, None, 0, "open", None, 0)
        await self.store.add_channel(record)

    def count(self, index: int) -> None:
        self.tally.add(SEGMENTS[index], 1)

    async def save(self) -> None:
        update = SignedUpdate(self.tally.owed, bytes(65))
        await self.store.save(Checked(CHANNEL, update), self.tally, 0)
        self.tally.saved()  # as Payee.accept does

    async def save_books(self) -> None:
        await self.store.save_books(CHANNEL, self.tally, 0)

    async def stored(self) -> Tally:
        found = await self.store.channel(CHANNEL)
        assert found is not None
        return found[1]


class PayerSide:
    def __init__(self, folder: Path) -> None:
        self.store = PayerStore(folder)
        self.db = self.store._db
        self.payer = Payer(
            ledger_id=bytes(32), channel_id=CHANNEL, key=KEY, deposit=1000, signed=0, tally=Tally()
        )
        self.tally = self.payer.tally
        self.payer.pin(SHEET)
        self.payer.begin(CALL)

    async def begin(self) -> None:
        channel = StoredChannel(CHANNEL, bytes(32), KEY.address, b"", b"", 1000, 2**50, 0, "", 0, 1000, OPEN)
        self.store.add_channel(channel, 1000)

    def count(self, index: int) -> None:
        self.payer.received(CALL, SEGMENTS[index], 1)
        self.payer.accepted(CALL, SEGMENTS[index], 1)

    async def save(self) -> None:
        self.payer.sign(await self.store.save(self.payer.intend(self.tally.owed)))

    async def save_books(self) -> None:
        self.store.save_books(CHANNEL, self.payer.signed, self.tally)

    async def stored(self) -> Tally:
        return self.store.tally(CHANNEL)


@pytest.fixture(params=[PayeeSide, PayerSide])
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PayeeSide | PayerSide]:
    made: PayeeSide | PayerSide = request.param(tmp_path)
    with closing(made.store):
        yield made


@contextmanager
def broken(side: PayeeSide | PayerSide) -> Iterator[None]:
    side.db.execute(
        "CREATE TEMP TRIGGER broken AFTER UPDATE OF units ON counts BEGIN SELECT raise(ABORT, 'no room'); END"
    )
    with pytest.raises(StorageError, match="no room"):
        yield
    side.db.execute("DROP TRIGGER broken")


async def test_a_save_writes_the_counts_that_changed_and_no_others(side: PayeeSide | PayerSide) -> None:
    await side.begin()
    for index, written in ((0, len(SEGMENTS)), (1, 1), (1, 1), (2, 1)):
        side.count(index)
        said: set[str] = set()  # a statement is heard again for each trigger that it sets off
        side.db.set_trace_callback(said.add)
        await side.save()
        side.db.set_trace_callback(None)
        assert sum(line.startswith("INSERT INTO counts") for line in said) == written
        assert list(await side.stored()) == list(side.tally)


async def test_what_a_failed_save_held_is_written_by_the_next(side: PayeeSide | PayerSide) -> None:
    await side.begin()
    await side.save_books()
    for save in (side.save, side.save_books):
        side.count(0)
        with broken(side):
            await save()
        side.count(1)
        await side.save()
        assert list(await side.stored()) == list(side.tally)
