"""A budget of a wallet is never overspent, whoever reserves in it, and whichever channel pays."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from btt.sdk.budget import Budget
from btt.sdk.errors import BudgetExceeded, InvalidRequest, StorageError
from btt.sdk.keys import Address
from btt.sdk.money import Amount
from btt.sdk.payment.store import PayerStore, StoredChannel
from btt.sdk.payment.transfers import alone

GRANTED = 100


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PayerStore]:
    made = PayerStore(tmp_path)
    yield made
    made.close()


def channel(number: int, *, deposit: int, budget: str = "films", state: str = "open") -> StoredChannel:
    return StoredChannel(
        channel_id=bytes([number]) * 32, ledger_id=bytes(32), node=Address(bytes(20)), commit=b"",
        refund_signature=bytes(65), deposit=deposit, expires_ms=0, signed=0, budget=budget, base=0,
        cap=deposit, state=state,
    )  # fmt: skip


PROCESS = """
import sys
from pathlib import Path
from btt.sdk.errors import BudgetExceeded
from btt.sdk.payment.store import PayerStore
from test_payment_budget import GRANTED, channel
store = PayerStore(Path(sys.argv[1]))
print("here", flush=True)
sys.stdin.readline()
for number in range(10):
    try:
        store.add_channel(channel(int(sys.argv[2]) + number, deposit=15), GRANTED)
        print("reserved")
    except BudgetExceeded:
        print("refused")
store.close()
"""


def test_processes_that_reserve_at_once_never_get_more_than_the_budget(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), str(first)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
        )
        for first in (1, 101)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [line for process in processes for line in process.communicate(timeout=60)[0].split()]
    assert [process.returncode for process in processes] == [0, 0]
    assert (said.count("reserved"), len(said)) == (GRANTED // 15, 20)


def test_a_channel_that_is_there_pays_for_no_more_than_the_budget(store: PayerStore) -> None:
    store.add_channel(channel(1, deposit=80, budget="before"), 80)
    store.add_channel(channel(2, deposit=70), GRANTED)
    taken = store.adopt(bytes([1]) * 32, "films", GRANTED)
    assert taken.cap - taken.base == 30, "70 of the 100 are locked elsewhere"
    again = store.adopt(bytes([1]) * 32, "films", GRANTED)
    assert again.cap == taken.cap, "what was given is not given again"
    with pytest.raises(BudgetExceeded):
        store.add_channel(channel(3, deposit=1), GRANTED)
    assert store.left("before", 80) == 80


def test_a_channel_covers_no_more_than_it_holds(store: PayerStore) -> None:
    store.add_channel(channel(1, deposit=20, budget="before"), 20)
    assert store.adopt(bytes([1]) * 32, "films", GRANTED).cap == 20


def test_what_was_spent_stays_spent_when_another_budget_takes_the_channel_over(store: PayerStore) -> None:
    store.add_channel(channel(1, deposit=80), GRANTED)
    store.learn_signed(bytes([1]) * 32, 40)
    assert store.left("films", GRANTED) == 20
    store.adopt(bytes([1]) * 32, "after", GRANTED)
    assert store.left("films", GRANTED) == 60
    assert store.left("after", GRANTED) == 60
    store.learn_signed(bytes([1]) * 32, 50)
    store.set_state(bytes([1]) * 32, "closed")
    assert (store.left("films", GRANTED), store.left("after", GRANTED)) == (60, 90)


def test_a_budget_that_was_lowered_allows_no_more_on_the_channel_it_has(store: PayerStore) -> None:
    one, two = bytes([1]) * 32, bytes([2]) * 32
    store.add_channel(channel(1, deposit=80), GRANTED)
    store.add_channel(channel(2, deposit=20), GRANTED)
    store.learn_signed(one, 10)
    assert store.adopt(one, "films", 50).cap == 30, "20 of the 50 are locked elsewhere"
    assert store.adopt(one, "films", 5, used=25).cap == 25, "what is owed or set aside stays payable"
    assert store.adopt(one, "films", 5).cap == 10, "what is signed is spent"
    assert store.adopt(two, "films", 5).cap == 0
    assert store.left("films", 5) == 0
    with pytest.raises(BudgetExceeded, match="0 BTT of the budget"):
        store.add_channel(channel(3, deposit=1), 5)
    assert store.adopt(one, "films", GRANTED).cap == 80, "raised again, it reaches again"


def test_a_lowered_budget_binds_those_within_it(store: PayerStore) -> None:
    store.declare(Budget(Amount(GRANTED), "films", within=Budget(Amount(GRANTED), "app")))
    store.add_channel(channel(1, deposit=80), GRANTED)
    store.declare(Budget(Amount(GRANTED), "films", within=Budget(Amount(7), "app")))
    assert store.adopt(bytes([1]) * 32, "films", GRANTED).cap == 7


def test_what_a_hostile_price_asks_for_is_not_covered(store: PayerStore) -> None:
    with pytest.raises(BudgetExceeded):
        store.check("films", GRANTED, 10**30)


def test_a_budget_without_a_name_is_fresh_and_one_with_an_empty_name_is_none() -> None:
    assert Budget("1 BTT").name != Budget("1 BTT").name
    with pytest.raises(InvalidRequest, match="name"):
        Budget("1 BTT", name="")


def test_books_whose_folder_cannot_be_used_are_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"):
        PayerStore(tmp_path / "file")
    with closing(PayerStore(tmp_path / "folder")) as store:
        store.folder.joinpath("claims").rmdir()
        with pytest.raises(StorageError, match="No such file"):
            store.claim(bytes(32))
        with pytest.raises(StorageError, match="No such file"), alone(store):
            pass
