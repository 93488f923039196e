"""The tree of BEP 52, against a plain recursive definition of it."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btt.sdk.content import merkle


def plain_root(leaves: list[bytes]) -> bytes:
    if len(leaves) == 1:
        return leaves[0]
    half = len(leaves) // 2
    return hashlib.sha256(plain_root(leaves[:half]) + plain_root(leaves[half:])).digest()


nodes = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=70)


@given(nodes)
def test_root_is_that_of_the_leaves_padded_with_zeros(leaves: list[bytes]) -> None:
    width = 1
    while width < len(leaves):
        width *= 2
    assert merkle.root(leaves) == plain_root(leaves + [bytes(32)] * (width - len(leaves)))


@given(nodes, st.integers(0, 3))
def test_a_wider_tree_is_filled_with_zero_leaves(leaves: list[bytes], wider: int) -> None:
    width = 128 << wider
    assert merkle.root(leaves, width=width) == plain_root(leaves + [bytes(32)] * (width - len(leaves)))


@given(nodes, st.integers(0, 4))
def test_upper_levels_are_filled_with_roots_of_zero_leaves(upper: list[bytes], height: int) -> None:
    zero = plain_root([bytes(32)] * (1 << height))
    width = 1 << (len(upper) - 1).bit_length()
    assert merkle.root(upper, height=height) == plain_root(upper + [zero] * (width - len(upper)))


@pytest.mark.parametrize("size", [1, 16383, 16384, 16385, 40000, 1 << 20])
def test_leaves_are_hashes_of_16_kib_blocks(size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    expected = [hashlib.sha256(data[i : i + 16384]).digest() for i in range(0, size, 16384)]
    assert merkle.leaves(data) == expected
    assert merkle.leaves(memoryview(bytearray(data))) == expected


def test_impossible_trees_are_refused() -> None:
    with pytest.raises(ValueError):
        merkle.root([])
    with pytest.raises(ValueError):
        merkle.root([bytes(32)] * 3, width=2)
    with pytest.raises(ValueError):
        merkle.root([bytes(32)] * 3, width=6)


def test_the_list_given_is_not_changed() -> None:
    leaves = [bytes([i]) * 32 for i in range(5)]
    before = list(leaves)
    merkle.root(leaves)
    assert leaves == before
