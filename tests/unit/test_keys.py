"""Keys, signatures and addresses, the same through both libraries."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btt.sdk.errors import InvalidRequest
from btt.sdk.keys import ORDER, Address, PrivateKey, PublicKey, _backend, use_backend
from btt.sdk.keys._backend import BackendName

BACKENDS: list[BackendName] = ["coincurve", "cryptography"]
SECRETS = st.integers(1, ORDER - 1).map(lambda number: number.to_bytes(32, "big"))
DIGESTS = st.binary(min_size=32, max_size=32).filter(lambda digest: int.from_bytes(digest, "big") < ORDER)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[BackendName]:
    with use_backend(request.param):
        yield request.param


def key(number: int) -> PrivateKey:
    return PrivateKey(number.to_bytes(32, "big"))


# Widely published results for secp256k1 with RFC 6979 and SHA-256.
@pytest.mark.parametrize(
    ("number", "text", "r", "s"),
    [
        (
            1,
            b"Satoshi Nakamoto",
            "934b1ea10a4b3c1757e2b0c017d0b6143ce3c9a7e6a4a49860d7a6ab210ee3d8",
            "2442ce9d2b916064108014783e923ec36b49743e2ffa1c4496f01a512aafd9e5",
        ),
        (
            1,
            b"All those moments will be lost in time, like tears in rain. Time to die...",
            "8600dbd41e348fe5c9465ab92d23e3db8b98b873beecd930736488696438cb6b",
            "547fe64427496db33bf66019dacbf0039c04199abb0122918601db38a72cfc21",
        ),
        (
            ORDER - 1,
            b"Satoshi Nakamoto",
            "fd567d121db66e382991534ada77a6bd3106f0a1098c231e47993447cd6af2d0",
            "6b39cd0eb1bc8603e159ef5c20a5c8ad685a45b06ce9bebed3f153d10d93bed5",
        ),
    ],
)
def test_nonces_are_those_of_rfc_6979(number: int, text: bytes, r: str, s: str) -> None:
    assert key(number).sign(sha256(text).digest())[:64].hex() == r + s


@given(SECRETS, DIGESTS)
def test_both_libraries_make_and_accept_the_same_bytes(secret: bytes, digest: bytes) -> None:
    made = []
    for name in BACKENDS:
        with use_backend(name):
            made.append(PrivateKey(secret))
    first, second = made
    assert first.public.data == second.public.data
    assert first.address == second.address
    signature = first.sign(digest)
    assert signature == second.sign(digest)
    assert first.public.verify(digest, signature)
    assert second.public.verify(digest, signature)


def test_v_is_the_parity_that_recovers_the_key() -> None:
    import coincurve

    for number in range(1, 20):
        digest = sha256(bytes([number])).digest()
        recovered = coincurve.PublicKey.from_signature_and_message(key(number).sign(digest), digest, None)
        assert recovered.format() == key(number).public.data


def test_signatures_with_short_numbers_verify() -> None:
    """A leading zero byte in r or s is where an encoding of the numbers goes wrong."""
    signer = PrivateKey(sha256(b"short").digest())
    digests = [sha256(number.to_bytes(4, "big")).digest() for number in (263, 348, 184, 255)]
    for digest in digests:
        signature = signer.sign(digest)
        assert 0 in (signature[0], signature[32])
        assert signer.public.verify(digest, signature)


def test_a_signature_is_for_one_key_and_one_digest() -> None:
    digest = sha256(b"x").digest()
    signature = key(7).sign(digest)
    assert key(7).public.verify(digest, signature)
    assert not key(8).public.verify(digest, signature)
    assert not key(7).public.verify(sha256(b"y").digest(), signature)


def test_only_strict_signatures_are_accepted() -> None:
    digest, public = sha256(b"x").digest(), key(7).public
    signature = key(7).sign(digest)
    r, s, v = signature[:32], signature[32:64], signature[64:]
    high = (ORDER - int.from_bytes(s, "big")).to_bytes(32, "big")
    order = ORDER.to_bytes(32, "big")
    refused = {
        "high s": r + high + v,
        "high s, other v": r + high + bytes([1 - v[0]]),
        "no v": r + s,
        "short": signature[:-2],
        "long": signature + b"\0",
        "empty": b"",
        "v 2": r + s + b"\2",
        "v 27": r + s + b"\x1b",
        "r 0": bytes(32) + s + v,
        "s 0": r + bytes(32) + v,
        "r = order": order + s + v,
        "r above the order": b"\xff" * 32 + s + v,
        "s = order": r + order + v,
    }
    assert [name for name, changed in refused.items() if public.verify(digest, changed)] == []
    assert not public.verify(digest[:-1], signature)
    assert not public.verify(digest + b"\0", signature)


@pytest.mark.parametrize("digest", [b"", bytes(31), bytes(33), bytearray(32), "x" * 32])
def test_only_digests_are_signed(digest: bytes) -> None:
    with pytest.raises(InvalidRequest):
        key(1).sign(digest)


@pytest.mark.parametrize(
    "secret", [b"", bytes(32), bytes(31), b"\1" * 33, ORDER.to_bytes(32, "big"), b"\xff" * 32, "x" * 32]
)
def test_only_numbers_below_the_order_are_secrets(secret: bytes) -> None:
    with pytest.raises(InvalidRequest):
        PrivateKey(secret)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(33),
        b"\2" + b"\xff" * 32,  # x above the field
        b"\2" + (5).to_bytes(32, "big"),  # x of no point
        b"\4" + key(1).public.data[1:],
        b"\6" + key(1).public.data[1:],
        b"\0" + key(1).public.data[1:],
        key(1).public.data[1:],
        key(1).public.data + b"\0",
        bytearray(key(1).public.data),
        b"\4" + key(1).public._handle.coordinates(),
    ],
)
def test_only_compressed_points_are_public_keys(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        PublicKey(data)


def test_generated_keys_differ() -> None:
    assert PrivateKey.generate() != PrivateKey.generate()


def test_no_text_form_or_pickle_shows_a_secret() -> None:
    secret = PrivateKey(sha256(b"secret").digest())
    for text in (repr(secret), str(secret), f"{secret!r}"):
        assert secret.secret.hex() not in text
        assert repr(secret.secret) not in text
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        copy.deepcopy(secret)


def test_public_keys_are_values() -> None:
    public = key(5).public
    assert public == PublicKey(public.data)
    assert hash(public) == hash(PublicKey(public.data))
    assert public != key(6).public
    assert public != public.data
    restored = pickle.loads(pickle.dumps(public))
    assert restored == public
    assert restored.verify(bytes(32), key(5).sign(bytes(32)))
    with pytest.raises(AttributeError):
        public.data = b""  # type: ignore[misc]


def test_addresses_are_those_of_tron() -> None:
    assert str(key(1).address) == "TMVQGm1qAQYVdetCeGRRkTWYYrLXuHK2HC"
    assert key(1).address.data.hex() == "7e5f4552091a69125d5dfcb7b8c2659029395bdf"
    contract = Address.parse("TR7NHqjeKQxGTCi8q8ZY4pL8otSzgjLj6t")
    assert contract.data.hex() == "a614f803b6fd780986a42c78ec9c7f77e6ded13c"
    assert key(1).public.address == key(1).address


def test_an_address_is_computed_once() -> None:
    public = key(9).public
    assert public.address is public.address


@given(st.binary(min_size=20, max_size=20))
def test_a_shown_address_reads_back(data: bytes) -> None:
    text = str(Address(data))
    assert text[0] == "T"
    assert len(text) == 34
    assert Address.parse(text) == Address(data)


@given(st.binary(min_size=20, max_size=20), st.integers(0, 33), st.sampled_from("123ABCxyzT0OIl"))
def test_a_mistyped_letter_is_noticed(data: bytes, place: int, letter: str) -> None:
    text = str(Address(data))
    changed = text[:place] + letter + text[place + 1 :]
    if changed == text:
        assert Address.parse(changed) == Address(data)
        return
    with pytest.raises(InvalidRequest):
        Address.parse(changed)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "T",
        "TMVQGm1qAQYVdetCeGRRkTWYYrLXuHK2H",
        "TMVQGm1qAQYVdetCeGRRkTWYYrLXuHK2HCC",
        " TMVQGm1qAQYVdetCeGRRkTWYYrLXuHK2HC",
        "1TMVQGm1qAQYVdetCeGRRkTWYYrLXuHK2HC",  # a leading zero: one address has one text
        "1" * 34,
        "z" * 34,
        "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa",  # Bitcoin's, with a right checksum
        "417e5f4552091a69125d5dfcb7b8c2659029395bdf",
    ],
)
def test_other_text_is_no_address(text: str) -> None:
    with pytest.raises(InvalidRequest):
        Address.parse(text)


@pytest.mark.parametrize("data", [b"", bytes(19), bytes(21), "x" * 20, bytearray(20)])
def test_an_address_is_twenty_bytes(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        Address(data)


def test_addresses_are_values_in_an_order() -> None:
    low, high = Address(bytes(20)), Address(b"\1" * 20)
    assert sorted([high, low]) == [low, high]
    assert {low: 1}[Address(bytes(20))] == 1
    assert pickle.loads(pickle.dumps(high)) == high
    with pytest.raises(AttributeError):
        low.data = high.data  # type: ignore[misc]


def test_a_key_keeps_the_library_it_was_made_with(backend: BackendName) -> None:
    made = key(3)
    for name in BACKENDS:
        with use_backend(name):
            assert made.public.verify(bytes(32), key(3).sign(bytes(32)))
    assert _backend.current().__name__.endswith(backend)  # type: ignore[attr-defined]


def test_without_coincurve_the_fallback_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "btt.sdk.keys._coincurve", None)
    monkeypatch.setattr(_backend, "_current", None)
    signer = key(3)
    assert type(signer._handle).__module__ == "btt.sdk.keys._cryptography"
    assert signer.public.verify(bytes(32), signer.sign(bytes(32)))
