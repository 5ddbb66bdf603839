"""Residues as a stream of bits: `bits`-wide little-endian integers, back to back, in 64-bit words.

Residues below a 53-bit prime in 64-bit words waste a sixth of every ciphertext. Both directions are a
gather and a shift with index tables fixed by (count, bits), so numpy does the work without a Python loop
per value; rows go through in passes small enough to stay in the processor's cache.
"""

from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

UInt64Array: TypeAlias = npt.NDArray[np.uint64]
IndexArray: TypeAlias = npt.NDArray[np.intp]

WORD_BITS: Final = 64

_PASS_VALUES: Final = 1 << 14
"""Values a pass: 128 KiB of them with as much scratch, inside a 1 MiB second-level cache."""


class _UnpackPlan(NamedTuple):
    """Value k is (words[word[k]] >> shift[k] | words[next_word[k]] << carry[k]) & mask."""

    word: IndexArray
    shift: UInt64Array
    next_word: IndexArray
    carry: UInt64Array
    mask: np.uint64


class _PackPlan(NamedTuple):
    """Word w is values[first[w]] >> down[w] | values[second[w]] << up[w] | values[third[w]] << far_up[w]."""

    first: IndexArray
    down: UInt64Array
    second: IndexArray
    up: UInt64Array
    third: IndexArray
    far_up: UInt64Array


def packed_words(count: int, bits: int) -> int:
    """Words that hold `count` values; `count` is a multiple of 64, so that no bit is left over."""
    return count * bits // WORD_BITS


def pack_bits(values: UInt64Array, bits: int) -> UInt64Array:
    """Packs values [rows, count], each below 2^bits, into words [rows, count * bits / 64].

    Needs 32 < bits < 64 and count a multiple of 64. A larger value would spill into its neighbours: callers
    check the range first.
    """
    rows, count = values.shape
    packed = np.empty((rows, packed_words(count, bits)), dtype=np.uint64)
    plan = _pack_plan(count, bits)
    step = _rows_per_pass(count)
    for start in range(0, rows, step):
        part = values[start : start + step]
        word = np.take(part, plan.first, axis=1) >> plan.down
        word |= np.take(part, plan.second, axis=1) << plan.up
        word |= np.take(part, plan.third, axis=1) << plan.far_up
        packed[start : start + step] = word
    return packed


def unpack_bits(words: UInt64Array, count: int, bits: int) -> UInt64Array:
    """The inverse of `pack_bits`: words [rows, count * bits / 64] to values [rows, count] below 2^bits."""
    rows = words.shape[0]
    values = np.empty((rows, count), dtype=np.uint64)
    plan = _unpack_plan(count, bits)
    step = _rows_per_pass(count)
    for start in range(0, rows, step):
        part = words[start : start + step]
        value = np.take(part, plan.word, axis=1) >> plan.shift
        value |= np.take(part, plan.next_word, axis=1) << plan.carry
        np.bitwise_and(value, plan.mask, out=values[start : start + step])
    return values


def _rows_per_pass(count: int) -> int:
    return max(1, _PASS_VALUES // count)


@lru_cache(maxsize=8)
def _unpack_plan(count: int, bits: int) -> _UnpackPlan:
    # A carry of 64 shifts everything out (numpy defines it as zero); bits of a clipped neighbour are masked.
    position = np.arange(count) * bits
    word, shift = np.divmod(position, WORD_BITS)
    next_word = np.minimum(word + 1, packed_words(count, bits) - 1)
    mask = np.uint64((1 << bits) - 1)
    return _UnpackPlan(word, _as_shift(shift), next_word, _as_shift(WORD_BITS - shift), mask)


@lru_cache(maxsize=8)
def _pack_plan(count: int, bits: int) -> _PackPlan:
    # Above 32 bits a word touches at most three values. The last word ends with the last value, so the
    # clipped neighbours there are shifted by 64 or more, hence to zero.
    first, down = np.divmod(np.arange(packed_words(count, bits)) * WORD_BITS, bits)
    up = bits - down
    second = np.minimum(first + 1, count - 1)
    third = np.minimum(first + 2, count - 1)
    return _PackPlan(first, _as_shift(down), second, _as_shift(up), third, _as_shift(up + bits))


def _as_shift(bits: IndexArray) -> UInt64Array:
    return np.minimum(bits, WORD_BITS).astype(np.uint64)
