"""Damage as transfers, disks and enemies do it: to valid messages, so that it gets past the first check."""

from collections.abc import Sequence

from hypothesis import strategies as st

EXTREMES = (
    b"\xff" * 4,
    b"\xff\xff\xff\x7f",
    b"\x7f\xff\xff\xff",
    b"\xff" * 8,
    b"\xff\xff\xff\xff\x07",  # protobuf: 2^31 - 1
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # protobuf: 2^64 - 1
    b"\x84\xff\xff\xff\xff",  # ASN.1: a length of 2^32 - 1
    b"\x00\x00\xc0\x7f",  # NaN as float32
    b"[" * 1200,
    b"9" * 5000,
    b"null",
    b"{}",
    b'"\\ud800"',
    b"1e999",
    b"NaN",
    b"-",
    b"2001-99-99",
    b" 0x_",
    b" &a [*a]",
    b"\xff\xfe",
    b"\0",
)
"""Lengths that promise too much, and what parsers of text stumble over."""


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """A valid message after one to four accidents."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        near, anywhere = st.integers(0, min(len(data), 200)), st.integers(0, len(data))
        place, length = draw(near | anywhere), draw(st.integers(1, 60))
        match draw(st.sampled_from(("flip", "cut", "end", "insert", "extreme", "repeat", "splice"))):
            case "flip" if place < len(data):
                data[place] ^= draw(st.integers(1, 255))
            case "cut":
                del data[place : place + length]
            case "end":
                del data[place:]
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=12))
            case "extreme":
                extreme = draw(st.sampled_from(EXTREMES))
                data[place : place + draw(st.sampled_from((0, len(extreme))))] = extreme
            case "repeat":
                data[place:place] = data[place : place + length]
            case "splice":
                data[place:] = draw(st.sampled_from(seeds))[place:]
    return bytes(data)
