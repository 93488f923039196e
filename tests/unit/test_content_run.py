"""A run read in place says what the generated parser says; lengths on the wire are those of the message."""

from __future__ import annotations

import random

from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from btt.proto.content.v1 import content_pb2
from btt.sdk.content.run import Run, serialise
from btt.sdk.content.torrent import RUN
from btt.sdk.payment.options import method_charge

FETCH = "/btt.proto.content.v1.ContentService/Fetch"
runs = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 300))


def _generated(wire: bytes) -> tuple[int, bytes]:
    try:
        message = content_pb2.FetchResponse.FromString(wire)
    except DecodeError:
        return -1, b""
    return message.run, message.data


@given(runs, st.binary(max_size=300))
def test_what_a_sender_sends_is_read_and_counted_as_it_was_meant(run: int, data: bytes) -> None:
    message = content_pb2.FetchResponse(run=run, data=data)
    wire = message.SerializeToString()
    parsed = Run.parse(wire)
    assert (parsed.run, bytes(parsed.data)) == (run, data)
    charge = method_charge(FETCH)
    assert charge.units_sent(message, wire) == charge.units(message) == charge.units(parsed)


@given(st.integers(0, 2**32 - 1), st.binary(min_size=1, max_size=70_000))
def test_a_run_is_written_as_the_generated_message_is(run: int, data: bytes) -> None:
    assert serialise(run, data) == content_pb2.FetchResponse(run=run, data=data).SerializeToString()


def test_a_run_of_full_size_is_written_so_too() -> None:
    data = random.Random(1).randbytes(RUN)
    assert serialise(1023, data) == content_pb2.FetchResponse(run=1023, data=data).SerializeToString()


@given(
    st.lists(st.sampled_from([b"\x08", b"\x12", b"\x00", b"\x01", b"\x02", b"\x80", b"\xff", b"\x1a", b"a"]))
)
def test_any_bytes_mean_the_same_to_both_parsers(parts: list[bytes]) -> None:
    wire = b"".join(parts)
    parsed = Run.parse(wire)
    assert (parsed.run, bytes(parsed.data)) == _generated(wire)


def test_a_repeated_field_counts_once_and_unknown_fields_do_not() -> None:
    first = content_pb2.FetchResponse(run=1, data=b"first").SerializeToString()
    wire = first + content_pb2.FetchResponse(run=2, data=b"second!").SerializeToString() + b"\x1a\x01x"
    assert Run.parse(wire) == (2, b"second!")


def test_no_message_is_an_empty_run_that_nobody_asked_for() -> None:
    assert Run.parse(b"\x12\x05abc") == (-1, b"")
