"""The file of a grant: whole, private, and what it says it is."""

from __future__ import annotations

import json
import stat
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from btt.sdk import Budget, Client, SyncClient
from btt.sdk.client import Wallet
from btt.sdk.errors import ConfigError
from btt.sdk.identity import NodeAddress
from btt.sdk.keys import PrivateKey
from btt.sdk.ledger import LedgerAddress
from btt.sdk.payment.grants import Grant
from btt.sdk.payment.store import PayerStore
from btt.sdk.signing import EARLY_CLOSE, ChannelCommit, service_reference

KEY, NODE, OTHER = (PrivateKey(n.to_bytes(32, "big")) for n in (7, 8, 9))


@pytest.fixture
def grant(tmp_path: Path) -> Grant:
    commit = ChannelCommit(
        payer=OTHER.address, payee=NODE.address, k1=KEY.public, k2=NODE.public, amount=5, expires_ms=10**12,
        challenge_ms=1000, flags=EARLY_CLOSE, fee=0, nonce=bytes(16),
        service_ref=service_reference(NODE.address),
    )  # fmt: skip
    return Grant(
        folder=tmp_path / "player.grant.books",
        ledger=LedgerAddress(OTHER.address, "127.0.0.1", 1, bytes(32)),
        node=NodeAddress(NODE.address, "127.0.0.1", 2),
        commit=commit,
        key=KEY,
    )


@pytest.fixture
def path(grant: Grant, tmp_path: Path) -> Path:
    grant.write(tmp_path / "player.grant")
    return tmp_path / "player.grant"


def test_what_was_written_is_read_by_its_owner_alone(grant: Grant, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = Grant.open(path)
    assert (found.key.secret, replace(found, key=KEY)) == (KEY.secret, grant)
    assert (int(found.amount), found.expires_ms) == (5, 10**12)
    assert Grant.open(str(path), folder=path.parent).folder == path.parent
    assert KEY.secret.hex() not in repr(found)
    assert OTHER.secret.hex() not in path.read_text()


def test_a_file_is_never_written_over(grant: Grant, path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        grant.write(path)
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == [path.name], "nothing is left beside it"


@pytest.mark.parametrize(
    "change",
    [
        {"btt_grant": 2},
        {"btt_grant": None},
        {"more": 1},
        {"channel_key": OTHER.secret.hex()},
        {"channel_key": "00" * 32},
        {"channel_key": 7},
        {"node": f"btt://{OTHER.address}@127.0.0.1:2"},
        {"node": "127.0.0.1:2"},
        {"ledger": "btt-ledger://"},
        {"commit": "00"},
        {"commit": "film"},
        {"app_grant": "ff"},
    ],
)
def test_what_does_not_fit_together_is_no_grant(path: Path, change: dict[str, object]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match="is no grant"):
        Grant.open(path)


@pytest.mark.parametrize("data", [b"", b"film", b"[]", b"[" * 10_000, b"{}" + b" " * 20_000, b"\xff"])
def test_other_files_are_no_grants(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "film").write_bytes(data)
    with pytest.raises(ConfigError, match="is no grant"):
        Grant.open(tmp_path / "film")
    with pytest.raises(ConfigError, match="There is no grant"):
        Grant.open(tmp_path / "other")


def test_its_books_begin_once(grant: Grant) -> None:
    store = PayerStore(grant.folder)
    for signed in (0, 3):
        grant.begin_books(store)
        store.learn_signed(grant.channel_id, 3)
        assert [one.signed for one in store.channels()] == [max(signed, 3)]
    store.close()


@pytest.mark.parametrize("kind", [Client, SyncClient])
def test_a_grant_stands_for_wallet_node_and_ledger(
    kind: type[Client | SyncClient], path: Path, grant: Grant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("BTT_NODES", "BTT_LEDGER", "BTT_WALLET", "BTT_GRANT"):
        monkeypatch.delenv(name, raising=False)
    assert kind.connect(grant=path).ledger_id == grant.ledger.ledger_id
    wallet = Wallet(tmp_path / "wallet", OTHER)
    for beside in ({"wallet": wallet}, {"nodes": str(grant.node)}, {"ledger": str(grant.ledger)}):
        with pytest.raises(ConfigError, match="A grant names"):
            kind.connect(grant=path, **beside)
    monkeypatch.setenv("BTT_GRANT", str(path))
    # What the user has set for other programs is not meant for one with a grant.
    monkeypatch.setenv("BTT_NODES", "btt://nonsense")
    client = kind.connect(budget=Budget("1 BTT"))
    assert (client if isinstance(client, Client) else client._client).providers[0].address == grant.node
    with pytest.raises(ConfigError, match="No ledger"):
        kind.connect(str(grant.node), budget=Budget("1 BTT"), wallet=wallet)
    monkeypatch.setenv("BTT_LEDGER", str(grant.ledger))
    with pytest.raises(ConfigError, match="No budget"):
        kind.connect(str(grant.node), wallet=wallet)


def test_programs_that_share_a_grant_may_begin_its_books_at_once(
    grant: Grant, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(PayerStore(grant.folder)) as one, closing(PayerStore(grant.folder)) as two:
        grant.begin_books(one)
        one.learn_signed(grant.channel_id, 3)
        with monkeypatch.context() as patch:  # it looked before the other one had written
            patch.setattr(PayerStore, "find", lambda *_: None)
            grant.begin_books(two)
        assert two.get(grant.channel_id).signed == 3
