import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.errors import DomainError, Reason
from shelora.transport.pieces import PIECE_BYTES, Assembler, Digest, collect, cut

LIMIT_BYTES = 1 << 20
blobs = st.binary(max_size=2048)


def refusal(action):
    with pytest.raises(DomainError) as caught:
        action()
    return caught.value.reason


def split(data, cuts):
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(blobs, st.lists(st.integers(0, 10_000), max_size=8))
def test_pieces_of_any_size_make_up_the_blob(data, cuts):
    assembler = Assembler(Digest.of(data), LIMIT_BYTES)
    for piece in split(data, cuts):
        assembler.add(piece)
    assert assembler.received_bytes == len(data)
    assert assembler.finish() == data


@given(blobs.filter(bool), st.data())
def test_a_blob_with_one_changed_byte_is_refused(data, draw):
    position = draw.draw(st.integers(0, len(data) - 1))
    changed = bytearray(data)
    changed[position] ^= draw.draw(st.integers(1, 255))
    assembler = Assembler(Digest.of(data), LIMIT_BYTES)
    assembler.add(bytes(changed))
    assert refusal(assembler.finish) is Reason.DIGEST_MISMATCH


@given(blobs.filter(bool), st.data())
def test_a_blob_that_ends_early_is_refused(data, draw):
    kept = draw.draw(st.integers(0, len(data) - 1))
    assembler = Assembler(Digest.of(data), LIMIT_BYTES)
    assembler.add(data[:kept])
    assert refusal(assembler.finish) is Reason.TRANSFER_TRUNCATED


@given(blobs, st.binary(min_size=1, max_size=64))
def test_bytes_beyond_the_announcement_are_refused_and_not_kept(data, extra):
    assembler = Assembler(Digest.of(data), LIMIT_BYTES)
    assembler.add(data)
    assert refusal(lambda: assembler.add(extra)) is Reason.TRANSFER_TOO_LARGE
    assert assembler.received_bytes == len(data)


def test_an_announcement_above_the_limit_is_refused_before_any_byte():
    assert refusal(lambda: Assembler(Digest.of(b"12345"), 4)) is Reason.TRANSFER_TOO_LARGE
    assert Assembler(Digest.of(b"1234"), 4).received_bytes == 0


@given(st.integers(0, 3 * PIECE_BYTES), st.integers(0, 3 * PIECE_BYTES))
def test_a_cut_blob_resumes_from_any_byte(total_bytes, offset):
    data = bytes(total_bytes)
    offset = min(offset, total_bytes)
    pieces = list(cut(data, offset))
    assert b"".join(pieces) == data[offset:]
    assert all(0 < len(piece) <= PIECE_BYTES for piece in pieces)


@pytest.mark.parametrize("offset", [-1, 6])
def test_an_offset_outside_of_the_blob_is_refused_at_once(offset):
    assert refusal(lambda: cut(b"12345", offset)) is Reason.TRANSFER_OFFSET


def test_a_view_is_cut_by_bytes_whatever_its_elements():
    view = memoryview(bytes(16)).cast("d")
    assert b"".join(cut(view)) == bytes(16)
    assert Digest.of(view) == Digest.of(bytes(16))


@pytest.mark.parametrize(("sha256", "total_bytes"), [(b"", 0), (bytes(31), 1), (bytes(32), -1)])
def test_a_malformed_digest_is_refused(sha256, total_bytes):
    assert refusal(lambda: Digest(sha256, total_bytes)) is Reason.INVALID_ARGUMENT


def test_a_digest_is_the_sha256_and_the_size():
    assert Digest.of(b"abc") == Digest(hashlib.sha256(b"abc").digest(), 3)


async def test_collecting_stops_reading_at_the_first_piece_too_many():
    read = []

    async def endless():
        while True:
            read.append(1)
            yield bytes(10)

    with pytest.raises(DomainError) as caught:
        await collect(endless(), Digest(bytes(32), 25), LIMIT_BYTES)
    assert caught.value.reason is Reason.TRANSFER_TOO_LARGE
    assert len(read) == 3


async def test_collecting_returns_the_blob():
    async def pieces():
        for piece in (b"ab", b"", b"c"):
            yield piece

    assert await collect(pieces(), Digest.of(b"abc"), LIMIT_BYTES) == b"abc"
