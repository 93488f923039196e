"""SyncClient has what Client has: the same names, parameters and kinds, so that neither grows alone."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from btt.sdk import Budget
from btt.sdk.client import Client, Wallet
from btt.sdk.content.client import ContentClient
from btt.sdk.content.stream import ContentStream
from btt.sdk.content.transfer import Transfer
from btt.sdk.keys import PrivateKey
from btt.sdk.payment.verdicts import Verdicts
from btt.sdk.service import Service
from btt.sdk.sync import SyncClient, SyncContent, SyncContentStream, SyncService, SyncTransfer, SyncVerdicts

FOR_THE_SDK = {
    Client: {"node", "ledger", "session", "purse", "books", "providers", "clock"},
    Transfer: {"destination", "work"},
    ContentStream: {"open"},
    Verdicts: {"entered", "expect", "finish", "watch"},
}
"""What other parts of the SDK use of a class, and no dApp needs."""
OF_ITS_OWN = {SyncClient: {"background"}}
PAIRS = [
    (Client, SyncClient),
    (ContentClient, SyncContent),
    (Transfer, SyncTransfer),
    (ContentStream, SyncContentStream),
    (Service, SyncService),
    (Verdicts, SyncVerdicts),
]


def members(cls: type) -> dict[str, object]:
    return {name: value for name, value in vars(cls).items() if not name.startswith("_")}


def parameters(value: object) -> list[tuple[str, object, object]]:
    function = value.__func__ if isinstance(value, classmethod) else value
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda cls: cls.__name__)
def test_every_method_is_there_with_the_same_parameters(ours: type, theirs: type) -> None:
    there = {name: value for name, value in members(theirs).items() if name not in OF_ITS_OWN.get(theirs, ())}
    for name, value in members(ours).items():
        if name in FOR_THE_SDK.get(ours, ()):
            continue
        assert name in there, f"{theirs.__name__} lacks {name}"
        assert isinstance(value, property) == isinstance(there[name], property), name
        if not isinstance(value, property):
            assert parameters(value) == parameters(there[name]), name
            assert not inspect.iscoroutinefunction(there[name]), name
            assert not inspect.isasyncgenfunction(there[name]), name
    attributes = {name for name, value in there.items() if isinstance(value, property)}
    extra = there.keys() - members(ours).keys() - attributes
    assert not extra, f"{theirs.__name__} has what {ours.__name__} has not: {extra}"


def test_every_attribute_is_there(tmp_path: Path) -> None:
    wallet = Wallet(tmp_path, PrivateKey.generate())
    node, ledger = (
        f"btt://{wallet.account.public.address}@h:1",
        f"btt-ledger://{wallet.account.public.address}@h:1/",
    )
    client = Client.connect(node, ledger=ledger + "00" * 32, wallet=wallet, budget=Budget("1 BTT"))
    sync = SyncClient(client)
    for name in vars(client):
        if not name.startswith("_") and name not in FOR_THE_SDK[Client]:
            assert hasattr(sync, name), f"SyncClient lacks {name}"
    for theirs, names in ((SyncTransfer, ("receipt", "token", "torrent")), (SyncContentStream, ("size",))):
        assert all(hasattr(theirs, name) for name in names)
