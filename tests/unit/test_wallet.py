"""The wallet file: what it keeps, who can read it, and what a hostile or broken one can do."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btt.sdk.errors import BttError, ConfigError, InvalidRequest, StorageError
from btt.sdk.keys import PrivateKey
from btt.sdk.wallet import Keystore, derive_channel_key
from btt.sdk.wallet.mnemonic import account_key, check_words, new_words

WORDS = "abandon " * 11 + "about"
ADDRESS = "TUEZSdKsoDHQMeZwihtdoBiN46zxhGWYdH"  # the first TRON account of these words in every wallet


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("wallet") / "wallet.json"
    Keystore.create(path, "pass", words=WORDS)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_wallet_opens_with_its_password_alone(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "wallet.json"
    made = Keystore.create(path, "pass")
    opened = Keystore.open(path, "pass")
    assert opened.words == made.words
    assert opened.address == made.address == opened.key(0).address
    assert opened.key(1) != opened.key(0)
    assert [file.name for file in path.parent.iterdir()] == ["wallet.json"]
    for wrong in ("", "Pass", "pass "):
        with pytest.raises(ConfigError, match="password"):
            Keystore.open(path, wrong)


def test_the_password_may_be_empty_and_is_the_same_in_every_unicode_form(tmp_path: Path) -> None:
    Keystore.create(tmp_path / "empty", "")
    Keystore.open(tmp_path / "empty", "")
    Keystore.create(tmp_path / "accent", "caf\u00e9")
    Keystore.open(tmp_path / "accent", "cafe\u0301")


def test_a_password_that_is_no_text_is_said(tmp_path: Path) -> None:
    latin = os.fsdecode(b"caf\xe9")  # as the environment gives it
    with pytest.raises(ConfigError, match="not valid text"):
        Keystore.create(tmp_path / "wallet", latin)
    assert list(tmp_path.iterdir()) == []


def test_words_restore_the_accounts_of_other_wallets(tmp_path: Path) -> None:
    restored = Keystore.create(tmp_path / "wallet", "", words=f"  {WORDS.upper()}\n")
    assert str(restored.address) == ADDRESS
    assert restored.words == WORDS
    assert restored.key(0).secret.hex() == "b5a4cea271ff424d7c31dc12a3e43e401df7a40d7412a15750f3f0b6b5449a28"


def test_new_words_are_twelve_and_differ() -> None:
    first, second = new_words(), new_words()
    assert first != second
    assert len(first.split()) == 12
    assert check_words(first) == first


@pytest.mark.parametrize(
    "words", ["", "abandon", "abandon " * 12, WORDS + " about", WORDS.replace("out", "ove"), "x y"]
)
def test_wrong_words_are_refused_and_not_repeated(words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Keystore.create(tmp_path / "wallet", "", words=words)
    assert "abandon" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("index", [-1, 2**31])
def test_an_account_number_outside_the_path_is_refused(index: int) -> None:
    with pytest.raises(ConfigError):
        account_key(WORDS, index)


@pytest.mark.skipif(os.name != "posix", reason="file modes are a POSIX matter")
def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Keystore.create(tmp_path / "new" / "wallet", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "wallet").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_the_file_and_the_repr_do_not_show_the_secret(tmp_path: Path) -> None:
    made = Keystore.create(tmp_path / "wallet", "pass", words=WORDS)
    for text in ((tmp_path / "wallet").read_text(), repr(made), str(made)):
        assert "abandon" not in text
        assert made.key().secret.hex() not in text


def test_an_existing_file_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "wallet"
    path.write_text("other")
    with pytest.raises(ConfigError, match="exists"):
        Keystore.create(path, "")
    # Also when another process makes it between the look and the write.
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(ConfigError, match="exists"):
        Keystore.create(path, "")
    assert path.read_text() == "other"
    assert [file.name for file in tmp_path.iterdir()] == ["wallet"]


@pytest.mark.parametrize("step", ["os.fsync", "os.link", "btt.sdk.private_file.sync"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(step, full)
    with pytest.raises(StorageError, match="No space left"):
        Keystore.create(tmp_path / "wallet", "")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, link = os.fsync, os.link

    def traced_fsync(descriptor: int) -> None:
        steps.append("fsync")
        fsync(descriptor)

    def traced_link(source: Path, target: Path) -> None:
        steps.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "link", traced_link)
    Keystore.create(tmp_path / "wallet", "")
    assert steps == ["fsync", "link", "fsync"]


def test_a_missing_wallet_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="btt wallet create"):
        Keystore.open(tmp_path / "none", "")
    with pytest.raises(StorageError):
        Keystore.open(tmp_path, "")


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 2**40},
        {"n": 2**30, "r": 8},
        {"r": 2**40},
        {"p": 2**20},
        {"n": 10**30},
        {"n": 0},
        {"n": 1},
        {"n": 3},
        {"n": -2},
        {"n": True},
        {"n": "32768"},
        {"n": 2.0},
        {"n": 2**17, "r": 1},
        {"r": 0},
        {"p": None},
        {"salt": ""},
        {"salt": "zz"},
        {"salt": 5},
        {"nonce": "00"},
        {"ciphertext": None},
        {"ciphertext": ""},
        {"kdf": "none"},
        {"kdf": []},
        {"cipher": "none"},
        {"btt_wallet": 2},
        {"btt_wallet": None},
        {"more": 1},
    ],
    ids=str,
)
def test_hostile_files_are_refused_before_any_work(
    written: dict[str, Any], changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    derive = hashlib.scrypt

    def bounded(*args: Any, n: int, r: int, p: int, **rest: Any) -> Any:
        assert 128 * n * r <= 256 * 2**20
        assert p <= 4
        return derive(*args, n=n, r=r, p=p, **rest)

    monkeypatch.setattr(hashlib, "scrypt", bounded)
    path = tmp_path / "wallet"
    path.write_text(json.dumps({**written, **changes}))
    with pytest.raises(ConfigError):
        Keystore.open(path, "pass")


@pytest.mark.parametrize("name", ["n", "salt", "nonce", "ciphertext", "p"])
def test_everything_in_the_file_is_authenticated(written: dict[str, Any], name: str, tmp_path: Path) -> None:
    old = written[name]
    changed = old * 2 if isinstance(old, int) else ("1" if old[0] == "0" else "0") + old[1:]
    path = tmp_path / "wallet"
    path.write_text(json.dumps({**written, name: changed}))
    with pytest.raises(ConfigError, match="altered"):
        Keystore.open(path, "pass")


@settings(max_examples=50)
@given(st.binary(max_size=300))
def test_noise_is_no_wallet(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "wallet"
    path.write_bytes(noise)
    with pytest.raises(ConfigError):
        Keystore.open(path, "")


@pytest.mark.parametrize("text", ["[" * 60_000, "9" * 60_000, " " * 70_000 + "{}", "[]", "{}", "null", "1"])
def test_strange_json_is_no_wallet(text: str, tmp_path: Path) -> None:
    path = tmp_path / "wallet"
    path.write_text(text)
    with pytest.raises(BttError, match="not a wallet"):
        Keystore.open(path, "")


def test_a_file_far_larger_than_a_wallet_is_not_read(written: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "wallet"
    path.write_text(json.dumps(written) + " " * 70_000)
    with pytest.raises(ConfigError, match="not a wallet"):
        Keystore.open(path, "pass")


def test_channel_keys_follow_from_the_account_and_the_nonce() -> None:
    account, other = account_key(WORDS, 0), account_key(WORDS, 1)
    made = derive_channel_key(account, bytes(16))
    assert made == derive_channel_key(PrivateKey(account.secret), bytes(16))
    assert (
        len({made, derive_channel_key(account, b"\1" * 16), derive_channel_key(other, bytes(16)), account})
        == 4
    )


@pytest.mark.parametrize("nonce", [b"", bytes(15), bytes(17), "x" * 16])
def test_a_channel_nonce_is_16_bytes(nonce: bytes) -> None:
    with pytest.raises(InvalidRequest):
        derive_channel_key(PrivateKey.generate(), nonce)
