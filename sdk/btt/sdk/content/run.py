"""One run on the wire: written with one copy, and read in place.

A generated message copies the megabyte when it is made or parsed, and again when it is serialised
or its field is read; on the hot path of a fetch that is more than the write to disk costs. What a
usual sender sends is read where it lies; anything else goes through the generated parser, so that
both always agree on what a message says.
"""

from __future__ import annotations

from typing import NamedTuple

from google.protobuf.message import DecodeError

from btt.proto.content.v1 import content_pb2

_RUN, _DATA = 1 << 3, 2 << 3 | 2
"""Tags of FetchResponse.run (varint) and FetchResponse.data (bytes)."""
_MAX_RUN = 2**32 - 1


class Run(NamedTuple):
    """A FetchResponse."""

    run: int
    """Its number in the file; -1 for what is no FetchResponse."""
    data: memoryview
    """Its bytes."""

    @classmethod
    def parse(cls, message: bytes) -> Run:
        """Reads a serialised FetchResponse; what is none becomes an empty run -1."""
        return _in_place(message) or _parsed(message)


def serialise(run: int, data: bytes) -> bytes:
    """Returns the same bytes as the generated FetchResponse.

    Args:
        run: Its number in the file, 32 bits.
        data: Its bytes, at least one.
    """
    head = content_pb2.FetchResponse(run=run).SerializeToString()
    return b"".join((head, bytes([_DATA]), _as_varint(len(data)), data))


def _as_varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _in_place(message: bytes) -> Run | None:
    """Reads both fields in their order, to the end of the message, or gives up."""
    try:
        run, at = _varint(message, 1) if message[0] == _RUN else (0, 0)
        if message[at] != _DATA:
            return None
        length, at = _varint(message, at + 1)
    except IndexError:
        return None
    if at + length != len(message) or run > _MAX_RUN:
        return None
    return Run(run, memoryview(message)[at:])


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Returns a varint of at most five bytes, and where it ends."""
    value = 0
    for shift in range(0, 35, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError


def _parsed(message: bytes) -> Run:
    try:
        parsed = content_pb2.FetchResponse.FromString(message)
    except DecodeError:
        return Run(-1, memoryview(b""))
    return Run(parsed.run, memoryview(parsed.data))
