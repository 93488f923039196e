"""The SHA-256 Merkle tree of BEP 52: what makes one run verifiable without the rest of the file.

Leaves are the hashes of 16 KiB blocks. A tree is filled up to a power of two with zero
hashes at the leaves; higher up, a missing subtree is the root of a tree of zero leaves.
"""

from __future__ import annotations

import hashlib

LEAF = 16 * 1024
"""Bytes under one leaf (BEP 52)."""

HASH = 32
"""Bytes of one node."""

ZERO = bytes(HASH)
"""The hash of a leaf that lies wholly behind the end of the file."""


def _zero_roots() -> tuple[bytes, ...]:
    roots = [ZERO]
    for _ in range(63):
        roots.append(hashlib.sha256(roots[-1] * 2).digest())
    return tuple(roots)


ZERO_ROOTS = _zero_roots()
"""`ZERO_ROOTS[h]` is the root of 2**h zero leaves."""


def leaves(data: bytes | bytearray | memoryview) -> list[bytes]:
    """Hashes the blocks of one run or small file.

    Args:
        data: The bytes; the last block may be short.

    Returns:
        One 32-byte hash for each started 16 KiB, unpadded.
    """
    view = memoryview(data)
    sha256 = hashlib.sha256  # a local name: this is the hot path of every fetch
    return [sha256(view[at : at + LEAF]).digest() for at in range(0, len(view), LEAF)]


def root(nodes: list[bytes], *, height: int = 0, width: int = 0) -> bytes:
    """Folds the nodes of one level into their root.

    Args:
        nodes: At least one 32-byte node.
        height: Levels between these nodes and the leaves; it names the padding. 0: these are leaves.
        width: Nodes on this level after padding, a power of two; 0: the smallest that holds all.

    Returns:
        The 32-byte root.

    Raises:
        ValueError: If there is no node, or the width is no power of two that holds all.
    """
    count = len(nodes)
    if not count:
        raise ValueError("a tree has at least one node")
    if not width:
        width = 1 << (count - 1).bit_length()
    elif width < count or width & (width - 1):
        raise ValueError(f"{count} nodes do not fill {width}")
    sha256 = hashlib.sha256
    while width > 1:
        # Only a level of odd length meets the padding, so a wide, mostly empty tree stays cheap.
        if len(nodes) % 2:
            nodes = [*nodes, ZERO_ROOTS[height]]
        nodes = [sha256(nodes[at] + nodes[at + 1]).digest() for at in range(0, len(nodes), 2)]
        width //= 2
        height += 1
    return nodes[0]
