"""Resume tokens: what they say comes back, and nothing that anybody hands over does harm."""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64decode, urlsafe_b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btt.sdk.content.resuming import MOST_CHARS, MOST_FIRST, MOST_NODES, ResumeToken
from btt.sdk.errors import InvalidRequest
from btt.sdk.identity import NodeAddress
from btt.sdk.keys import Address
from btt.sdk.money import Rate, Unit

NODE = NodeAddress(Address(bytes(20)), "::1", 7800)
RATE = Rate.parse("1 BTT / GiB")
TOKEN = ResumeToken(bytes(range(32)), (2, 0), RATE, (NODE, NodeAddress(Address(b"x" * 20), "a.example", 1)))


def forged(payload: bytes) -> str:
    """A token with a right check over whatever somebody wants."""
    body = payload + hashlib.sha256(payload).digest()[:4]
    return "btt-resume1." + urlsafe_b64encode(body).decode().rstrip("=")


def payload(token: ResumeToken) -> bytes:
    text = str(token).partition(".")[2]
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))[:-4]


def test_a_token_is_one_short_printable_word_and_comes_back() -> None:
    assert ResumeToken.parse(f" {TOKEN}\n") == TOKEN
    one = str(ResumeToken(bytes(32), (), RATE, (NODE,)))
    assert one.isascii()
    assert one.isprintable()
    assert len(one.split()) == 1
    assert len(one) < 170


@given(st.integers(0, 100_000), st.integers(1, 255))
def test_a_damaged_token_is_refused(at: int, change: int) -> None:
    text = bytearray(str(TOKEN).encode())
    text[at % len(text)] ^= change
    with pytest.raises(InvalidRequest):
        ResumeToken.parse(text.decode("latin-1"))
    with pytest.raises(InvalidRequest):
        ResumeToken.parse(str(TOKEN)[: at % len(text)])


def test_another_version_says_so() -> None:
    with pytest.raises(InvalidRequest, match="another version"):
        ResumeToken.parse(str(TOKEN).replace("btt-resume1", "btt-resume2"))


@pytest.mark.parametrize(
    "made",
    [
        b"",
        payload(TOKEN)[:40],
        payload(TOKEN).replace(b"btt://", b"btt:/ "),
        bytes(32) + bytes(8) + bytes(8) + bytes(2) + str(NODE).encode(),  # per 0 bytes
        bytes(32) + b"\xff" * 8 + (1).to_bytes(8, "big") + bytes(2) + str(NODE).encode(),  # above the supply
        payload(TOKEN)[:48] + b"\xff\xff" + str(NODE).encode(),  # 65,535 files that are not there
        bytes(32) + bytes(8) + (1).to_bytes(8, "big") + bytes(2) + b"127.0.0.1:80",  # a node without identity
        bytes(32) + bytes(8) + (1).to_bytes(8, "big") + bytes(2) + ",".join([str(NODE)] * 17).encode(),
        bytes(32) + bytes(8) + (1).to_bytes(8, "big") + bytes(2) + b"btt://T\x1b[2J@h:1",
        payload(TOKEN) + b",",
        payload(TOKEN).replace(b"a.example", b"a\x1b[2J"),
        bytes(32)
        + bytes(8)
        + (1).to_bytes(8, "big")
        + (257).to_bytes(2, "big")
        + bytes(4 * 257)
        + str(NODE).encode(),
    ],
)
def test_a_hostile_token_is_refused(made: bytes) -> None:
    with pytest.raises(InvalidRequest) as said:
        ResumeToken.parse(forged(made))
    assert "\x1b" not in str(said.value)
    with pytest.raises(InvalidRequest):
        ResumeToken.parse("btt-resume1." + "A" * MOST_CHARS)


def test_as_many_nodes_as_may_be_named_fit_in() -> None:
    far = NodeAddress(Address(b"y" * 20), "n" * 253, 65535)
    token = ResumeToken(
        bytes(32), tuple(range(MOST_FIRST)), Rate(1, 2**63 - 1, Unit.BYTE), (far,) * MOST_NODES
    )
    assert ResumeToken.parse(str(token)) == token
