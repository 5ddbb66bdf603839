import contextlib
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.ckks import (
    INSECURE_TOY,
    STANDARD,
    BlockReader,
    BlockShape,
    FullBlock,
    SeededBlock,
    decode_block,
    encode_block,
    iterate_ciphertexts,
    read_ciphertext,
    validate_block,
)
from shelora.ckks.packing import pack_bits
from shelora.ckks.wire import HEADER_BYTES
from shelora.errors import DomainError, Reason

KEY = bytes(range(16))
SHAPES = {
    "seeded": BlockShape(parameters=INSECURE_TOY, key_id=KEY, rows=2, chunks=3, seeded=True),
    "full": BlockShape(parameters=INSECURE_TOY, key_id=KEY, rows=2, chunks=3, seeded=False),
}
DEGREE = INSECURE_TOY.poly_degree


def make_block(shape, seed=0):
    rng = np.random.default_rng(seed)
    grid = (shape.rows, shape.chunks)
    c0, c1 = rng.integers(
        0, shape.parameters.modulus, (2, *grid, shape.parameters.poly_degree), dtype=np.uint64
    )
    if shape.seeded:
        return SeededBlock(shape, c0, rng.integers(0, 256, (*grid, 64), dtype=np.uint8))
    return FullBlock(shape, c0, c1)


def refusal(data, shape):
    """The reason every reader gives; all of them must agree."""
    reasons = set()
    for read in (decode_block, validate_block, lambda d, s: list(iterate_ciphertexts(d, s))):
        with pytest.raises(DomainError) as error:
            read(data, shape)
        reasons.add(error.value.reason)
    assert len(reasons) == 1
    return reasons.pop()


def patched(data, offset, content):
    return data[:offset] + content + data[offset + len(content) :]


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def test_a_block_survives_encoding(shape):
    block = make_block(shape)
    data = encode_block(block)
    assert len(data) == shape.encoded_bytes
    decoded = decode_block(memoryview(data), shape)
    assert (decoded.c0 == block.c0).all()
    tail = "seeds" if shape.seeded else "c1"
    assert (getattr(decoded, tail) == getattr(block, tail)).all()
    validate_block(data, shape)


def test_ciphertexts_are_read_one_at_a_time(shape):
    block = make_block(shape)
    data = encode_block(block)
    tails = block.seeds if shape.seeded else block.c1
    for index, (first, tail) in enumerate(iterate_ciphertexts(data, shape)):
        row, chunk = divmod(index, shape.chunks)
        assert (first == block.c0[row, chunk]).all()
        assert (tail == tails[row, chunk]).all()
        again = read_ciphertext(data, shape, row, chunk)
        assert (again[0] == first).all()
        assert (again[1] == tail).all()
    assert index == shape.rows * shape.chunks - 1


@pytest.mark.parametrize("position", [(-1, 0), (2, 0), (0, 3), (0, -1)])
def test_a_position_outside_the_block_is_refused(position):
    shape = SHAPES["seeded"]
    with pytest.raises(DomainError) as error:
        BlockReader(encode_block(make_block(shape)), shape).seeded_ciphertext(*position)
    assert error.value.reason is Reason.INVALID_ARGUMENT


def test_a_reader_of_one_kind_does_not_give_the_other():
    for name, method in (("seeded", "full_ciphertext"), ("full", "seeded_ciphertext")):
        reader = BlockReader(encode_block(make_block(SHAPES[name])), SHAPES[name])
        with pytest.raises(DomainError) as error:
            getattr(reader, method)(0, 0)
        assert error.value.reason is Reason.CIPHERTEXT_MALFORMED


@pytest.mark.parametrize(("rows", "chunks"), [(0, 0), (0, 3), (2, 0)])
def test_an_empty_block_is_a_header(rows, chunks):
    shape = BlockShape(parameters=INSECURE_TOY, key_id=KEY, rows=rows, chunks=chunks, seeded=True)
    data = encode_block(make_block(shape))
    assert len(data) == HEADER_BYTES == shape.encoded_bytes
    assert decode_block(data, shape).c0.shape == (rows, chunks, DEGREE)
    validate_block(data, shape)


def test_a_standard_ciphertext_costs_as_documented():
    fresh = BlockShape(parameters=STANDARD, key_id=KEY, rows=1, chunks=1, seeded=True)
    total = replace(fresh, seeded=False)
    assert fresh.encoded_bytes - HEADER_BYTES == 2048 * 53 // 8 + 64
    assert total.encoded_bytes - HEADER_BYTES == 2 * 2048 * 53 // 8


@pytest.mark.parametrize(
    ("offset", "content", "reason"),
    [
        (0, b"SLCX", Reason.CIPHERTEXT_MALFORMED),
        (4, struct.pack("<H", 2), Reason.CIPHERTEXT_MALFORMED),
        (6, struct.pack("<H", 3), Reason.CIPHERTEXT_MALFORMED),
        (8, struct.pack("<I", 128), Reason.CIPHERTEXT_FOREIGN_PARAMETERS),
        (12, struct.pack("<I", 27), Reason.CIPHERTEXT_WRONG_SCALE),
        (16, struct.pack("<Q", 97), Reason.CIPHERTEXT_FOREIGN_PARAMETERS),
        (24, bytes(32), Reason.CIPHERTEXT_FOREIGN_PARAMETERS),
        (56, bytes(16), Reason.CIPHERTEXT_FOREIGN_KEY),
        (72, struct.pack("<I", 2**32 - 1), Reason.CIPHERTEXT_WRONG_SHAPE),
        (76, struct.pack("<I", 2**32 - 1), Reason.CIPHERTEXT_WRONG_SHAPE),
    ],
)
def test_a_header_field_that_differs_is_refused_with_its_reason(shape, offset, content, reason):
    data = encode_block(make_block(shape))
    assert refusal(patched(data, offset, content), shape) is reason


def test_the_other_kind_is_refused(shape):
    other = replace(shape, seeded=not shape.seeded)
    assert refusal(encode_block(make_block(other)), shape) is Reason.CIPHERTEXT_MALFORMED


def test_header_fields_are_judged_in_the_documented_order():
    data = encode_block(make_block(SHAPES["seeded"]))
    changes = [
        (72, bytes(4), Reason.CIPHERTEXT_WRONG_SHAPE),
        (12, bytes(4), Reason.CIPHERTEXT_WRONG_SCALE),
        (56, bytes(16), Reason.CIPHERTEXT_FOREIGN_KEY),
        (24, bytes(32), Reason.CIPHERTEXT_FOREIGN_PARAMETERS),
        (0, bytes(4), Reason.CIPHERTEXT_MALFORMED),
    ]
    data = data[:-1]  # also truncated, which is judged after the header
    for offset, content, reason in changes:
        data = patched(data, offset, content)
        assert refusal(data, SHAPES["seeded"]) is reason


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 7, -8, -1])
def test_a_truncated_block_is_refused(shape, length):
    data = encode_block(make_block(shape))
    assert refusal(data[:length], shape) is Reason.CIPHERTEXT_TRUNCATED


@pytest.mark.parametrize("extra", [b"\0", bytes(8), bytes(1000)])
def test_a_block_that_goes_on_is_refused(shape, extra):
    assert refusal(encode_block(make_block(shape)) + extra, shape) is Reason.CIPHERTEXT_MALFORMED


@pytest.mark.parametrize("residue", [INSECURE_TOY.modulus, 2**53 - 1])
@pytest.mark.parametrize("record", [0, 5])
@pytest.mark.parametrize("polynomial", [0, 1])
def test_a_coefficient_at_or_above_the_modulus_is_refused(residue, record, polynomial):
    shape = SHAPES["full"]
    words = np.frombuffer(encode_block(make_block(shape)), "<u8", offset=HEADER_BYTES).copy()
    bad = np.zeros((1, DEGREE), dtype=np.uint64)
    bad[0, 17] = residue
    start = (2 * record + polynomial) * shape.packed_words
    words[start : start + shape.packed_words] = pack_bits(bad, 53)[0]
    data = encode_block(make_block(shape))[:HEADER_BYTES] + words.tobytes()
    assert refusal(data, shape) is Reason.CIPHERTEXT_COEFFICIENT_RANGE
    with pytest.raises(DomainError):
        read_ciphertext(data, shape, *divmod(record, shape.chunks))


def test_streaming_refuses_only_the_ciphertext_that_is_out_of_range():
    shape = SHAPES["seeded"]
    data = bytearray(encode_block(make_block(shape)))
    data[-64 - 8 : -64] = b"\xff" * 8  # the last residue of the last ciphertext
    read_ciphertext(bytes(data), shape, 0, 0)
    with pytest.raises(DomainError) as error:
        read_ciphertext(bytes(data), shape, 1, 2)
    assert error.value.reason is Reason.CIPHERTEXT_COEFFICIENT_RANGE


@pytest.mark.parametrize(
    "change",
    [
        {"c0": np.zeros((2, 3, DEGREE), dtype=np.int64)},
        {"c0": np.zeros((3, 2, DEGREE), dtype=np.uint64)},
        {"seeds": np.zeros((2, 3, 63), dtype=np.uint8)},
    ],
)
def test_a_block_is_not_built_from_arrays_of_another_shape(change):
    with pytest.raises(DomainError) as error:
        replace(make_block(SHAPES["seeded"]), **change)
    assert error.value.reason is Reason.CIPHERTEXT_WRONG_SHAPE


def test_a_block_is_not_built_with_a_coefficient_out_of_range():
    block = make_block(SHAPES["full"])
    for name in ("c0", "c1"):
        values = getattr(block, name).copy()
        values[1, 2, 3] = INSECURE_TOY.modulus
        with pytest.raises(DomainError) as error:
            replace(block, **{name: values})
        assert error.value.reason is Reason.CIPHERTEXT_COEFFICIENT_RANGE


@pytest.mark.parametrize("change", [{"key_id": b"short"}, {"rows": -1}, {"chunks": 2**32}])
def test_a_shape_out_of_range_is_refused(change):
    with pytest.raises(DomainError) as error:
        replace(SHAPES["seeded"], **change)
    assert error.value.reason is Reason.INVALID_ARGUMENT


def test_a_huge_expected_shape_allocates_nothing_before_the_length_is_checked():
    shape = BlockShape(parameters=STANDARD, key_id=KEY, rows=2**32 - 1, chunks=2**32 - 1, seeded=False)
    header = encode_block(make_block(replace(shape, rows=0, chunks=0)))
    data = patched(header, 72, struct.pack("<II", shape.rows, shape.chunks))
    with pytest.raises(DomainError) as error:
        validate_block(data, shape)
    assert error.value.reason is Reason.CIPHERTEXT_TRUNCATED


@given(data=st.binary(max_size=4000))
def test_random_bytes_are_refused(data):
    for shape in SHAPES.values():
        refusal(data, shape)


@given(body=st.binary(max_size=4000), keep=st.integers(0, HEADER_BYTES))
def test_random_bytes_after_a_true_header_are_refused(body, keep):
    for shape in SHAPES.values():
        data = encode_block(make_block(shape))[:keep] + body
        if len(data) != shape.encoded_bytes:
            refusal(data, shape)


@given(name=st.sampled_from(sorted(SHAPES)), flips=st.sets(st.integers(0, 10**6), min_size=1, max_size=3))
def test_a_flipped_bit_is_refused_or_is_another_valid_block(name, flips):
    shape = SHAPES[name]
    data = bytearray(encode_block(make_block(shape)))
    for flip in {flip % (8 * len(data)) for flip in flips}:
        data[flip // 8] ^= 1 << flip % 8
    with contextlib.suppress(DomainError):
        assert encode_block(decode_block(bytes(data), shape)) == bytes(data)  # one encoding a block
