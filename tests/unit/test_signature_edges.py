"""Signatures at the edges of the arithmetic, through both libraries, against a textbook verifier.

In the manner of the Wycheproof vectors: for a chosen r, s and digest the key is computed for which they
are valid, so that every rare branch of a verifier is met by a signature that is right, or barely wrong.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from btt.sdk.keys import PublicKey, use_backend

P = 2**256 - 2**32 - 977
N = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
G = (
    0x79BE667EF9DCBBAC55A06295CE870B07029BFCDB2DCE28D959F2815B16F81798,
    0x483ADA7726A3C4655DA4FBFC0E1108A8FD17B448A68554199C47D08FFB10D4B8,
)
Point = tuple[int, int] | None
"""Affine; None is the point at infinity."""


def add(a: Point, b: Point) -> Point:
    if a is None or b is None:
        return a or b
    if a[0] == b[0]:
        if (a[1] + b[1]) % P == 0:
            return None
        slope = 3 * a[0] * a[0] * pow(2 * a[1], -1, P)
    else:
        slope = (b[1] - a[1]) * pow(b[0] - a[0], -1, P)
    x = (slope * slope - a[0] - b[0]) % P
    return x, (slope * (a[0] - x) - a[1]) % P


def times(k: int, point: Point) -> Point:
    found: Point = None
    while k:
        if k & 1:
            found = add(found, point)
        point, k = add(point, point), k >> 1
    return found


def textbook(key: Point, digest: bytes, r: int, s: int) -> bool:
    if not (0 < r < N and 0 < s < N):
        return False
    z, inverse = int.from_bytes(digest, "big"), pow(s, -1, N)
    found = add(times(z * inverse % N, G), times(r * inverse % N, key))
    return found is not None and found[0] % N == r


def key_for(point: Point, digest: bytes, r: int, s: int) -> Point:
    """The key for which (r, s) is a signature whose nonce point is `point`."""
    z, inverse = int.from_bytes(digest, "big"), pow(r, -1, N)
    return add(times(s * inverse % N, point), times(-z * inverse % N, G))


def lift(x: int) -> Point:
    y = pow(x**3 + 7, (P + 1) // 4, P)
    return (x, y) if y * y % P == (x**3 + 7) % P else None


def number(value: int) -> bytes:
    return value.to_bytes(32, "big")


HALF = N // 2
SOME = random.Random(1).randbytes(32)


def cases() -> Iterator[tuple[str, Point, bytes, int, int]]:
    """Name, key, digest, r, s."""
    digests = {
        "zero": bytes(32),
        "the order": number(N),
        "one above it": number(N + 1),
        "all ones": b"\xff" * 32,
    }
    for name, digest in {**digests, "some": SOME}.items():
        nonce = times(7, G)
        assert nonce is not None
        for label, s in {"1": 1, "2": 2, "half": HALF, "above half": HALF + 1, "order - 1": N - 1}.items():
            yield (
                f"digest {name}, s {label}",
                key_for(nonce, digest, nonce[0] % N, s),
                digest,
                nonce[0] % N,
                s,
            )
    # The nonce point's x is above the order, so r is small: x = r + N.
    high = next(x for x in range(N + 1, P) if lift(x))
    yield "x above the order", key_for(lift(high), SOME, high - N, 5), SOME, high - N, 5
    yield "x above the order, not reduced", key_for(lift(high), SOME, high - N, 5), SOME, high, 5
    # r + N = P or more names no x: the sum must not wrap around.
    low = next(x for x in range(P - N, P) if lift(x))
    yield "r is the field's prime less the order", key_for(lift(low), SOME, low, 5), SOME, low, 5
    small = next(x for x in range(1, 100) if lift(x))
    yield "the smallest r", key_for(lift(small), SOME, small, 3), SOME, small, 3
    z, r = int.from_bytes(SOME, "big"), (times(9, G) or (0, 0))[0] % N
    # Both halves of the sum cancel out: the nonce point would be infinity.
    yield "infinity", times(-z * pow(r, -1, N) % N, G), SOME, r, 5
    # Both halves are the same point: adding must double.
    half = pow(2, -1, N)
    s = 11
    same = number(s * 9 * half % N)
    yield "a doubling", key_for(times(9, G), same, r, s), same, r, s
    for name, bad_r, bad_s in (
        ("r 0", 0, 5), ("s 0", r, 0), ("both 0", 0, 0), ("r the order", N, 5), ("s the order", r, N),
        ("r all ones", 2**256 - 1, 5), ("s all ones", r, 2**256 - 1), ("r the prime", P, 5),
    ):  # fmt: skip
        yield name, key_for(times(9, G), SOME, r, 5), SOME, bad_r, bad_s


CASES = list(cases())


@pytest.mark.parametrize("backend", ["coincurve", "cryptography"])
def test_every_edge_is_decided_as_in_the_textbook(backend: str) -> None:
    decided: dict[bool, int] = {True: 0, False: 0}
    with use_backend(backend):
        for name, point, digest, r, s in CASES:
            assert point is not None, name
            key = PublicKey(bytes([2 + point[1] % 2]) + number(point[0]))
            # Ours is stricter in one thing: s is in the lower half, so that a signature has one form.
            valid = textbook(point, digest, r, s) and s <= HALF
            for v in (0, 1):
                assert key.verify(digest, number(r) + number(s) + bytes([v])) is valid, name
            assert not key.verify(digest, number(r) + number(s) + b"\2"), name
            # One bit of anything else, and it is wrong.
            for place in (0, 31):
                other = bytearray(digest)
                other[place] ^= 1
                assert not key.verify(bytes(other), number(r) + number(s) + b"\0"), name
            decided[valid] += 1
    assert decided[True] >= 18
    assert decided[False] >= 15


def test_the_vectors_reach_the_branches_they_name() -> None:
    found = {name: textbook(point, digest, r, s) for name, point, digest, r, s in CASES}
    assert found["x above the order"]
    assert found["a doubling"]
    assert not found["infinity"]
    assert not found["x above the order, not reduced"]
    assert found["digest zero, s order - 1"]
    assert found["the smallest r"]
