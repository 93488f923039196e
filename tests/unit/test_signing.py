"""What gets signed: pinned bytes, one body per message, and no message that passes for another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btt.proto.common.v1.document_pb2 import SignedDocument
from btt.sdk.errors import InvalidRequest, SignatureInvalid
from btt.sdk.keys import Address, PrivateKey, PublicKey, use_backend
from btt.sdk.money import SUPPLY, Amount
from btt.sdk.signing import (
    EARLY_CLOSE,
    MESSAGES,
    ChannelClose,
    ChannelCommit,
    ChannelRefund,
    ChannelUpdate,
    Message,
    Receipt,
    Updates,
    document_digest,
    open_document,
    service_reference,
    sign,
    sign_document,
    verify,
)
from btt.sdk.signing.layout import message, tag
from btt.sdk.wallet import derive_channel_key

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "signing.json").read_text())
LEDGER, OTHER_LEDGER = bytes.fromhex(VECTORS["ledger_id"]), bytes(32)
KEY = PrivateKey(sha256(b"signing").digest())
POINTS = [PrivateKey(bytes(31) + bytes([number])).public for number in range(1, 6)]

# The layouts again, by hand, as the design states them: name and kind of each field in order.
LAYOUTS: dict[str, list[tuple[str, str]]] = {
    "ChannelCommit": [
        ("payer", "address"), ("payee", "address"), ("k1", "point"), ("k2", "point"), ("amount", "money"),
        ("expires_ms", "u64"), ("challenge_ms", "u32"), ("flags", "flags"), ("fee", "money"),
        ("nonce", "b16"), ("service_ref", "b32"),
    ],
    "ChannelRefund": [("channel", "b32"), ("not_before_ms", "u64")],
    "ChannelUpdate": [("channel", "b32"), ("cumulative", "money")],
    "ChannelClose": [("channel", "b32"), ("capture", "money")],
    "Transfer": [
        ("sender", "address"), ("recipient", "address"), ("amount", "money"), ("request_id", "b16"),
        ("valid_until_ms", "u64"), ("memo", "b32"),
    ],
    "Query": [("subject", "b32"), ("nonce", "b16"), ("valid_until_ms", "u64")],
    "SessionOpen": [
        ("node", "address"), ("channel", "b32"), ("offer_digest", "b32"), ("app", "address"),
        ("client_nonce", "b16"), ("server_nonce", "b16"), ("valid_until_ms", "u64"),
    ],
    "SessionCall": [("session", "b32"), ("call_id", "b16")],
    "Receipt": [
        ("request_digest", "b32"), ("seq", "u64"), ("entry_hash", "b32"), ("time_ms", "u64"), ("code", "u16"),
        ("epoch", "u32"), ("operator_key_id", "address"),
    ],
    "TopUp": [("channel", "b32"), ("amount", "money"), ("request_id", "b16"), ("valid_until_ms", "u64")],
    "CloseRequest": [("channel", "b32"), ("request_id", "b16"), ("valid_until_ms", "u64")],
    "ChannelFinalize": [("channel", "b32")],
    "ChannelExtension": [("channel", "b32"), ("deadline_ms", "u64")],
    "KeyRotation": [("epoch", "u32"), ("next_key", "point")],
    "LedgerRecovery": [
        ("epoch", "u32"), ("next_key", "point"), ("ended_seq", "u64"), ("ended_hash", "b32"),
        ("reached_seq", "u64"),
    ],
}  # fmt: skip
WIDTHS = {
    "address": 20,
    "point": 33,
    "b16": 16,
    "b32": 32,
    "u16": 2,
    "u32": 4,
    "flags": 4,
    "u64": 8,
    "money": 8,
}
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "address": st.binary(min_size=20, max_size=20).map(Address),
    "point": st.sampled_from(POINTS),
    "b16": st.binary(min_size=16, max_size=16),
    "b32": st.binary(min_size=32, max_size=32),
    "u16": st.integers(0, 2**16 - 1),
    "u32": st.integers(0, 2**32 - 1),
    "flags": st.sampled_from([0, EARLY_CLOSE]),
    "u64": st.integers(0, 2**63 - 1),
    "money": st.integers(0, SUPPLY),
}
BY_NAME = {kind.__name__: kind for kind in MESSAGES}


def messages_of(name: str) -> st.SearchStrategy[Message]:
    return st.builds(BY_NAME[name], **{field: VALUES[kind] for field, kind in LAYOUTS[name]})


ANY_MESSAGE = st.sampled_from(sorted(LAYOUTS)).flatmap(messages_of)


@pytest.fixture(params=["coincurve", "cryptography"])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_backend(request.param):
        yield


def test_every_message_has_a_layout_and_a_vector() -> None:
    assert set(BY_NAME) == set(LAYOUTS) == {vector["type"] for vector in VECTORS["messages"]}


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("vector", VECTORS["messages"], ids=lambda vector: vector["type"])
def test_signed_bytes_are_pinned(vector: dict[str, Any]) -> None:
    kind, key = BY_NAME[vector["type"]], PrivateKey(bytes.fromhex(vector["secret"]))
    body = bytes.fromhex(vector["body"])
    decoded = kind.decode(body)
    assert decoded.encode() == body
    assert decoded.preimage(LEDGER).hex() == vector["preimage"]
    assert decoded.digest(LEDGER).hex() == vector["digest"]
    assert key.public.data.hex() == vector["public_key"]
    assert str(key.address) == vector["address"]
    assert sign(key, decoded, LEDGER).hex() == vector["signature"]
    verify(
        PublicKey(bytes.fromhex(vector["public_key"])), decoded, LEDGER, bytes.fromhex(vector["signature"])
    )


@pytest.mark.parametrize("vector", VECTORS["messages"], ids=lambda vector: vector["type"])
def test_vectors_follow_the_layout_of_the_design(vector: dict[str, Any]) -> None:
    parts = []
    for name, kind in LAYOUTS[vector["type"]]:
        value = vector["fields"][name]
        bytes_kind = kind in ("address", "point", "b16", "b32")
        parts.append(bytes.fromhex(value) if bytes_kind else int(value).to_bytes(WIDTHS[kind], "big"))
        assert len(parts[-1]) == WIDTHS[kind]
    body = b"".join(parts)
    assert body.hex() == vector["body"]
    name_tag = f"btt/v1/secp256k1/{vector['type']}".encode()
    preimage = b"\0" + bytes([len(name_tag)]) + name_tag + LEDGER + body
    assert preimage.hex() == vector["preimage"]
    assert sha256(preimage).hexdigest() == vector["digest"]


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("vector", VECTORS["documents"])
def test_documents_are_pinned(vector: dict[str, str]) -> None:
    payload, key = bytes.fromhex(vector["payload"]), PrivateKey(bytes.fromhex(vector["secret"]))
    assert document_digest(vector["name"], LEDGER, payload).hex() == vector["digest"]
    document = sign_document(key, vector["name"], LEDGER, payload)
    assert document.signature.hex() == vector["signature"]
    assert open_document(document, vector["name"], LEDGER, key.public) == payload


@pytest.mark.parametrize("vector", VECTORS["channel_keys"])
def test_channel_keys_are_pinned(vector: dict[str, str]) -> None:
    account = PrivateKey(bytes.fromhex(vector["account"]))
    assert derive_channel_key(account, bytes.fromhex(vector["nonce"])).secret.hex() == vector["secret"]


@given(ANY_MESSAGE)
def test_a_message_decodes_to_itself(value: Message) -> None:
    kind = type(value)
    body = value.encode()
    assert len(body) == kind.SIZE == sum(WIDTHS[part] for _, part in LAYOUTS[kind.__name__])
    assert kind.decode(body) == value


@given(ANY_MESSAGE, st.data())
def test_every_accepted_body_is_the_only_one_of_its_message(value: Message, data: st.DataObject) -> None:
    body = bytearray(value.encode())
    place = data.draw(st.integers(0, len(body) - 1))
    body[place] ^= data.draw(st.integers(1, 255))
    try:
        changed = type(value).decode(bytes(body))
    except InvalidRequest:
        return
    assert changed.encode() == bytes(body)
    assert changed != value
    assert changed.digest(LEDGER) != value.digest(LEDGER)


@given(ANY_MESSAGE, st.binary(min_size=1, max_size=40))
def test_short_and_long_bodies_are_refused(value: Message, extra: bytes) -> None:
    body = value.encode()
    for wrong in (b"", body[:-1], body[1:], body[: -len(extra)], body + extra, body + b"\0"):
        with pytest.raises(InvalidRequest):
            type(value).decode(wrong)


@given(st.sampled_from(MESSAGES), st.binary(max_size=200))
def test_noise_is_refused_or_decoded_but_never_anything_else(kind: type[Message], noise: bytes) -> None:
    with suppress(InvalidRequest):
        assert kind.decode(noise).encode() == noise


def test_no_signature_passes_for_another_type_or_ledger() -> None:
    """All types at all ledgers, also where two types have bodies of the same bytes."""
    body = bytes(40)
    alike = [ChannelRefund.decode(body), ChannelUpdate.decode(body), ChannelClose.decode(body)]
    found = [BY_NAME[vector["type"]].decode(bytes.fromhex(vector["body"])) for vector in VECTORS["messages"]]
    cases = [(value, ledger) for value in [*alike, *found] for ledger in (LEDGER, OTHER_LEDGER, b"\1" * 32)]
    signatures = [sign(KEY, value, ledger) for value, ledger in cases]
    for index, (value, ledger) in enumerate(cases):
        accepted = [
            other
            for other, signature in enumerate(signatures)
            if KEY.public.verify(value.digest(ledger), signature)
        ]
        assert accepted == [index]


def test_verify_names_what_is_wrong() -> None:
    update = ChannelUpdate(channel=bytes(32), cumulative=5)
    signature = sign(KEY, update, LEDGER)
    verify(KEY.public, update, LEDGER, signature)
    for public, value, ledger, bytes_ in (
        (POINTS[0], update, LEDGER, signature),
        (KEY.public, ChannelUpdate(channel=bytes(32), cumulative=6), LEDGER, signature),
        (KEY.public, update, OTHER_LEDGER, signature),
        (KEY.public, update, LEDGER, b""),
    ):
        with pytest.raises(SignatureInvalid, match="ChannelUpdate"):
            verify(public, value, ledger, bytes_)


@pytest.mark.parametrize("ledger", [b"", bytes(31), bytes(33)])
def test_a_ledger_id_is_32_bytes(ledger: bytes) -> None:
    with pytest.raises(InvalidRequest):
        ChannelUpdate(channel=bytes(32), cumulative=5).digest(ledger)
    with pytest.raises(InvalidRequest):
        document_digest("Offer", ledger, b"")


OUT_OF_RANGE: dict[str, list[Any]] = {
    "address": [bytes(20), b"", None, "T"],
    "point": [POINTS[0].data, None],
    "b16": [b"", bytes(15), bytes(17), bytearray(16), "x" * 16],
    "b32": [b"", bytes(31), bytes(33), bytearray(32), "x" * 32],
    "u16": [-1, 2**16, True, 1.0, b"\0"],
    "u32": [-1, 2**32, True, 1.0],
    "flags": [-1, 2, 3, 2**31, 2**32, True],
    "u64": [-1, 2**63, 2**64, True, 1.0],
    "money": [-1, SUPPLY + 1, 2**63, True, 0.5],
}


@pytest.mark.parametrize("vector", VECTORS["messages"][1:], ids=lambda vector: vector["type"])
def test_no_field_holds_what_its_width_or_range_does_not(vector: dict[str, Any]) -> None:
    name = vector["type"]
    good = BY_NAME[name].decode(bytes.fromhex(vector["body"]))
    fields = {field: getattr(good, field) for field, _ in LAYOUTS[name]}
    for field, kind in LAYOUTS[name]:
        for wrong in OUT_OF_RANGE[kind]:
            with pytest.raises(InvalidRequest, match=f"{name}.{field}"):
                BY_NAME[name](**{**fields, field: wrong})


@pytest.mark.parametrize("number", [SUPPLY + 1, 2**63, 2**64 - 1])
def test_an_amount_above_the_supply_does_not_decode(number: int) -> None:
    with pytest.raises(InvalidRequest):
        ChannelUpdate.decode(bytes(32) + number.to_bytes(8, "big"))


def test_a_time_that_no_database_holds_does_not_decode() -> None:
    assert ChannelRefund.decode(bytes(32) + (2**63 - 1).to_bytes(8, "big")).not_before_ms == 2**63 - 1
    with pytest.raises(InvalidRequest):
        ChannelRefund.decode(bytes(32) + (2**63).to_bytes(8, "big"))


@pytest.mark.parametrize("flags", [2, 3, 2**31])
def test_unknown_flags_do_not_decode(flags: int) -> None:
    body = bytes.fromhex(VECTORS["messages"][0]["body"])
    with pytest.raises(InvalidRequest, match="flags"):
        ChannelCommit.decode(body[:126] + flags.to_bytes(4, "big") + body[130:])


@pytest.mark.parametrize("offset", [40, 73])
@pytest.mark.parametrize("point", [bytes(33), b"\2" + b"\xff" * 32, b"\4" + POINTS[0].data[1:]])
def test_channel_keys_are_points(offset: int, point: bytes) -> None:
    body = bytes.fromhex(VECTORS["messages"][0]["body"])
    with pytest.raises(InvalidRequest):
        ChannelCommit.decode(body[:offset] + point + body[offset + 33 :])


def test_decoded_values_are_typed() -> None:
    commit = ChannelCommit.decode(bytes.fromhex(VECTORS["messages"][0]["body"]))
    assert isinstance(commit.payer, Address)
    assert isinstance(commit.k1, PublicKey)
    assert type(commit.amount) is Amount
    receipts = [vector for vector in VECTORS["messages"] if vector["type"] == "Receipt"]
    receipt = Receipt.decode(bytes.fromhex(receipts[0]["body"]))
    assert isinstance(receipt.operator_key_id, Address)


def test_the_channel_id_is_the_digest_of_the_unsigned_commit() -> None:
    commit = ChannelCommit.decode(bytes.fromhex(VECTORS["messages"][0]["body"]))
    assert commit.channel_id(LEDGER).hex() == VECTORS["messages"][0]["digest"]
    assert commit.channel_id(OTHER_LEDGER) != commit.channel_id(LEDGER)


def test_a_service_reference_is_a_padded_address() -> None:
    assert service_reference(Address(b"\1" * 20)) == bytes(12) + b"\1" * 20


def test_messages_cannot_be_changed() -> None:
    update = ChannelUpdate(channel=bytes(32), cumulative=5)
    with pytest.raises(AttributeError):
        update.cumulative = 6  # type: ignore[misc]


def test_a_field_without_a_kind_is_a_mistake_at_import() -> None:
    class Loose(Message):
        TAG: ClassVar[bytes] = tag("Loose")
        name: str

    with pytest.raises(TypeError, match="no kind"):
        message(Loose)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "é", "x" * 65])
def test_tags_have_plain_names(name: str) -> None:
    with pytest.raises(ValueError):
        tag(name)


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_a_document_is_for_its_type_ledger_payload_and_key(payload: bytes, other: bytes) -> None:
    document = sign_document(KEY, "Offer", LEDGER, payload)
    assert open_document(document, "Offer", LEDGER, KEY.public) == payload
    changed = [SignedDocument(payload=payload, signature=document.signature[:-1])]
    if other != payload:
        changed.append(SignedDocument(payload=other, signature=document.signature))
    for wrong in changed:
        with pytest.raises(SignatureInvalid):
            open_document(wrong, "Offer", LEDGER, KEY.public)
    for name, ledger, public in (
        ("AppGrant", LEDGER, KEY.public),
        ("Offer", OTHER_LEDGER, KEY.public),
        ("Offer", LEDGER, POINTS[0]),
    ):
        with pytest.raises(SignatureInvalid):
            open_document(document, name, ledger, public)


@pytest.mark.parametrize("kind", MESSAGES)
def test_no_document_takes_the_name_of_a_money_message(kind: type[Message]) -> None:
    with pytest.raises(ValueError, match="money message"):
        document_digest(kind.__name__, LEDGER, bytes(kind.SIZE))


@given(cumulative=st.integers(0, SUPPLY), channel=st.binary(min_size=32, max_size=32))
def test_the_updates_of_a_channel_are_channel_updates(cumulative: int, channel: bytes) -> None:
    update = ChannelUpdate(channel=channel, cumulative=cumulative)
    assert Updates(LEDGER, channel).digest(cumulative) == update.digest(LEDGER)


def test_updates_sign_and_verify_for_one_ledger_channel_and_amount() -> None:
    updates, channel = Updates(LEDGER, bytes(32)), ChannelUpdate(channel=bytes(32), cumulative=7)
    signature = updates.sign(KEY, 7)
    assert signature == sign(KEY, channel, LEDGER)
    updates.verify(KEY.public, 7, signature)
    for other, key, cumulative in (
        (updates, KEY.public, 8),
        (updates, POINTS[0], 7),
        (Updates(OTHER_LEDGER, bytes(32)), KEY.public, 7),
        (Updates(LEDGER, bytes(31) + b"\1"), KEY.public, 7),
    ):
        with pytest.raises(SignatureInvalid):
            other.verify(key, cumulative, signature)


@pytest.mark.parametrize("cumulative", [-1, SUPPLY + 1, True, False, 1.0, "1", None])
def test_updates_are_of_money_only(cumulative: Any) -> None:
    with pytest.raises(InvalidRequest):
        Updates(LEDGER, bytes(32)).sign(KEY, cumulative)


@pytest.mark.parametrize(("ledger", "channel"), [(bytes(31), bytes(32)), (bytes(32), bytes(33))])
def test_updates_are_of_a_channel_on_a_ledger(ledger: bytes, channel: bytes) -> None:
    with pytest.raises(InvalidRequest):
        Updates(ledger, channel)
