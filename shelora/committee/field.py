"""Arithmetic modulo the prime 65521, the largest below 2^16: a value is a uint16 on the wire."""

from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from shelora.additive.sampler import Csprng

PRIME: Final = 65521

Int64Array: TypeAlias = npt.NDArray[np.int64]


def uniform(rng: Csprng, *shape: int) -> Int64Array:
    """Uniform values below the prime, by rejection."""
    count = int(np.prod(shape))
    values = np.empty(0, dtype=np.int64)
    while len(values) < count:
        drawn = np.frombuffer(rng.bytes(2 * (count - len(values)) + 16), dtype="<u2").astype(np.int64)
        values = np.concatenate([values, drawn[drawn < PRIME]])
    return values[:count].reshape(shape)


def signed(values: Int64Array) -> Int64Array:
    """The representatives from -32760 to 32760."""
    return np.where(values > PRIME // 2, values - PRIME, values)


@lru_cache(maxsize=256)
def interpolation(known: tuple[int, ...], wanted: tuple[int, ...]) -> Int64Array:
    """Matrix [wanted, known] that takes a polynomial's values at `known` to its values at `wanted`, modulo the prime.

    The polynomial has a degree below the number of known points, which are different modulo the prime.
    """
    x = np.array(known, dtype=np.int64)
    rows = [[_basis(x, index, point) for index in range(len(known))] for point in wanted]
    matrix = np.array(rows, dtype=np.int64).reshape(len(wanted), len(known))
    matrix.flags.writeable = False
    return matrix


def _basis(x: Int64Array, index: int, point: int) -> int:
    others = np.delete(x, index)
    numerator = denominator = 1
    for other in others.tolist():
        numerator = numerator * (point - other) % PRIME
        denominator = denominator * (int(x[index]) - other) % PRIME
    return numerator * pow(denominator, -1, PRIME) % PRIME


def solve(matrix: Int64Array, right: Int64Array) -> Int64Array | None:
    """One solution x of matrix x = right modulo the prime, with zeros where it is free; None if there is none."""
    rows = np.concatenate([matrix, right[:, None]], axis=1) % PRIME
    height, width = matrix.shape
    pivots: list[int] = []
    for column in range(width):
        row = len(pivots)
        candidates = np.flatnonzero(rows[row:, column])
        if not len(candidates):
            continue
        swap = row + int(candidates[0])
        rows[[row, swap]] = rows[[swap, row]]
        rows[row] = rows[row] * pow(int(rows[row, column]), -1, PRIME) % PRIME
        factors = rows[:, column].copy()
        factors[row] = 0
        rows = (rows - factors[:, None] * rows[row]) % PRIME
        pivots.append(column)
        if len(pivots) == height:
            break
    if rows[len(pivots) :, width].any():
        return None
    solution = np.zeros(width, dtype=np.int64)
    solution[pivots] = rows[: len(pivots), width]
    return solution


def encode_values(values: Int64Array) -> bytes:
    """Values below the prime as uint16, little-endian."""
    return values.astype("<u2").tobytes()


def decode_values(data: bytes, count: int) -> Int64Array | None:
    """What `encode_values` wrote; None if it is not `count` values below the prime."""
    if len(data) != 2 * count:
        return None
    values = np.frombuffer(data, dtype="<u2").astype(np.int64)
    return values if not count or int(values.max()) < PRIME else None
