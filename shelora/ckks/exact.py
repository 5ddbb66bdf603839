"""Sums of products modulo the prime, in exact float64 matrix products, for weights that are constant over blocks.

A plaintext of weights that are constant over aligned blocks of slots is p(X) = p'(X^(N / n)) with a small n: slots
lie in bit-reversed order (seal.py), so that a block of 2^a pairs is a residue class of SEAL's slots, and a vector
with period P belongs to the subring of degree n = 2 P. Hence

- its n coefficients come from P weights by a small cosine transform, and are rounded to the weight scale;
- its N residues are n different ones, by a small number-theoretic transform;
- the sum over rows j of w[t, j] c[j] is, for the N / n residues of each class, a matrix product modulo q.

All three are products of matrices of floats. Integers are split in limbs so narrow that every sum stays below
2^53, where float64 is exact. Results equal SEAL's residue by residue (tested), at a fraction of the time: SEAL
transforms every weight vector at the full N, twice.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from shelora.ckks.packing import UInt64Array
from shelora.ckks.parameters import CkksParameters
from shelora.ckks.seal import FloatArray, reversed_bits, seal_context

IntArray: TypeAlias = npt.NDArray[np.intp]

MAX_DEGREE: Final = 256
"""Above it the small transforms cost what SEAL's full ones do."""

_PASS_VALUES: Final = 1 << 14
"""Residues a pass: with their limbs and partial sums they stay in the processor's cache."""

_MANTISSA_BITS: Final = 53
_GENERATOR: Final = 3
"""Slot k of SEAL's encoder is the value at the root to the power 3^k."""


def largest_degree(parameters: CkksParameters) -> int:
    """Degree of the largest subring that is worth its own transforms."""
    return min(MAX_DEGREE, parameters.poly_degree // 8)


@dataclass(frozen=True, eq=False, kw_only=True)
class SmallRing:
    """The subring of degree n for one parameter set, and how its residues lie among the N; see `small_ring`."""

    parameters: CkksParameters
    degree: int
    cosines: FloatArray
    """[blocks, n]: weights of blocks to coefficients."""
    powers: FloatArray
    """[limbs, n, n]: coefficients to residues; limbs of `width` bits, lowest first."""
    width: int
    positions: IntArray
    """[n, N / n]: where each residue stands among the N."""

    def residues(self, weights: FloatArray) -> UInt64Array:
        """Residues [rows, n] of weights [rows, blocks]."""
        coefficients = np.rint(weights @ self.cosines * self.parameters.weight_scale)
        limbs = [(coefficients @ limb).astype(np.int64) for limb in self.powers]
        modulus = np.int64(self.parameters.modulus)
        return _joined(
            [(limb % modulus).view(np.uint64) for limb in limbs], self.width, self.parameters.modulus
        )


class ExactSum:
    """Sums [rows] of one chunk: pairs of residue polynomials modulo q."""

    def __init__(self, ring: SmallRing, rows: int) -> None:
        self._ring = ring
        self._modulus = ring.parameters.modulus
        degree, count = ring.positions.shape
        self._sums = np.zeros((degree, rows, 2 * count), dtype=np.uint64)

    def add(self, weights: FloatArray, ciphertexts: UInt64Array) -> None:
        """Adds sum_j weights[:, j] c[j]. Args: weights: [rows, rows_in, blocks]. ciphertexts: [rows_in, 2, N]."""
        rows, rows_in, blocks = weights.shape
        residues = self._ring.residues(weights.reshape(rows * rows_in, blocks)).reshape(rows, rows_in, -1)
        step = max(1, _PASS_VALUES // self._sums[0].size)
        for first in range(0, len(self._sums), step):
            part = slice(first, first + step)
            values = ciphertexts[:, :, self._ring.positions[part]].transpose(2, 0, 1, 3)
            right = values.reshape(len(values), rows_in, -1)
            product = self._product(residues[:, :, part].transpose(2, 0, 1), right)
            self._sums[part] = _reduced(self._sums[part] + product, self._modulus)

    def result(self) -> UInt64Array:
        """[rows, 2, N]."""
        degree, rows, _ = self._sums.shape
        result = np.empty((rows, 2, self._ring.parameters.poly_degree), dtype=np.uint64)
        result[:, :, self._ring.positions] = self._sums.reshape(degree, rows, 2, -1).transpose(1, 2, 0, 3)
        return result

    def _product(self, left: UInt64Array, right: UInt64Array) -> UInt64Array:
        """Matrix products [n, rows, columns] modulo q of [n, rows, inner] and [n, inner, columns]."""
        bits = self._ring.parameters.coefficient_bits
        width = _limb_width(bits, left.shape[2])
        lefts, rights = _limbs(left, bits, width), _limbs(right, bits, width)
        count = len(lefts)
        parts = []
        for total in range(2 * count - 1):
            pairs = [(i, total - i) for i in range(count) if 0 <= total - i < count]
            one = np.concatenate([lefts[i] for i, _ in pairs], axis=2)
            two = np.concatenate([rights[k] for _, k in pairs], axis=1)
            parts.append((one @ two).astype(np.uint64))
        return _joined(parts, width, self._modulus)


@lru_cache(maxsize=32)
def small_ring(parameters: CkksParameters, degree: int) -> SmallRing:
    """The subring of that degree n, a power of two from 2 to N."""
    roots = [pow(root, parameters.poly_degree // degree, parameters.modulus) for root in _roots(parameters)]
    distinct = sorted(set(roots))
    order = np.argsort(np.searchsorted(distinct, roots), kind="stable")
    powers = np.array(
        [[pow(root, exponent, parameters.modulus) for root in distinct] for exponent in range(degree)],
        dtype=np.uint64,
    )
    # Coefficients are at most 2^(weight_scale_bits - 1), a little slack included, and n of them meet in a sum.
    width = _MANTISSA_BITS - parameters.weight_scale_bits - (degree.bit_length() - 1)
    return SmallRing(
        parameters=parameters,
        degree=degree,
        cosines=_cosines(degree),
        powers=np.stack(_limbs(powers, parameters.coefficient_bits, width)),
        width=width,
        positions=order.reshape(degree, -1),
    )


def _roots(parameters: CkksParameters) -> list[int]:
    """The roots of X^N + 1 at which SEAL's residues are values, in its order."""
    monomial = np.zeros(parameters.poly_degree, dtype=np.uint64)
    monomial[1] = 1
    roots: list[int] = seal_context(parameters).to_ntt(monomial).tolist()
    return roots


def _cosines(degree: int) -> FloatArray:
    """Coefficient i of the real polynomial that is 1 in block b and 0 in the others: 2/n cos(pi i 3^k / n)."""
    blocks = degree // 2
    exponents = np.array([pow(_GENERATOR, int(k), 2 * degree) for k in reversed_bits(blocks)])
    angles = np.outer(exponents, np.arange(degree)) % (2 * degree)
    return 2 / degree * np.cos(np.pi / degree * angles)


def _limb_width(bits: int, terms: int) -> int:
    """Widest limbs for which `terms` products, once for each pair of limbs of a sum, stay below 2^53 and below q."""
    count = 2
    while True:
        width = -(-bits // count)
        if 2 * width + (terms * count).bit_length() < min(_MANTISSA_BITS, bits):
            return width
        count += 1


def _limbs(values: UInt64Array, bits: int, width: int) -> list[FloatArray]:
    mask = np.uint64((1 << width) - 1)
    return [(values >> np.uint64(shift) & mask).astype(np.float64) for shift in range(0, bits, width)]


def _joined(parts: list[UInt64Array], width: int, modulus: int) -> UInt64Array:
    """Sum of parts[i] 2^(width i) modulo q, each part below q."""
    total = parts[-1]
    for part in reversed(parts[:-1]):
        total = _reduced(_shifted(total, width, modulus) + part, modulus)
    return total


def _shifted(values: UInt64Array, width: int, modulus: int) -> UInt64Array:
    """Values 2^width modulo q. The quotient is guessed in float64, at most one off; integers wrap and come back."""
    quotient = (values.astype(np.float64) * (2.0**width / modulus)).astype(np.uint64)
    remainder = (values << np.uint64(width)) - quotient * np.uint64(modulus)
    negative = remainder >> np.uint64(63)
    return _reduced(remainder + negative * np.uint64(modulus), modulus)


def _reduced(values: UInt64Array, modulus: int) -> UInt64Array:
    """Values below 2 q, modulo q: a difference that wraps is larger than the value."""
    reduced: UInt64Array = np.minimum(values, values - np.uint64(modulus))
    return reduced
