import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.ckks.packing import pack_bits, packed_words, unpack_bits


@given(
    bits=st.integers(33, 60),
    groups=st.integers(1, 5),
    rows=st.integers(0, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpacking_undoes_packing(bits, groups, rows, seed):
    values = np.random.default_rng(seed).integers(0, 1 << bits, (rows, 64 * groups), dtype=np.uint64)
    packed = pack_bits(values, bits)
    assert packed.shape == (rows, packed_words(64 * groups, bits))
    assert (unpack_bits(packed, 64 * groups, bits) == values).all()


@given(bits=st.integers(33, 60), seed=st.integers(0, 2**32 - 1))
def test_packing_is_little_endian_and_without_gaps(bits, seed):
    values = np.random.default_rng(seed).integers(0, 1 << bits, (1, 64), dtype=np.uint64)
    stream = sum(int(value) << (index * bits) for index, value in enumerate(values[0]))
    assert pack_bits(values, bits).astype("<u8").tobytes() == stream.to_bytes(8 * bits, "little")


@pytest.mark.parametrize("bits", [53, 60])
def test_every_value_full_of_ones_survives_its_neighbours(bits):
    ones = np.full((40, 2048), (1 << bits) - 1, dtype=np.uint64)
    assert (pack_bits(ones, bits) == np.uint64(2**64 - 1)).all()
    assert (unpack_bits(pack_bits(ones, bits), 2048, bits) == ones).all()
