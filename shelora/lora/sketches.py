"""Three sketches of a matrix's update that add up, and the sum of the updates from their sums. Pure numpy.

    P = ΔW Ω [out, k],  N = Ψ ΔW [l, in],  Z = Φ₂ ΔW Χ₂ [s - l, s - k]        Φ = [Ψ; Φ₂], Χ = [Ω, Χ₂]
    ΔW ≈ Q (Φ Q)⁺ C (Vᵀ Χ)⁺ Vᵀ,  C = Φ ΔW Χ      Q, V: orthonormal bases of P and of Nᵀ

All are linear in ΔW, so servers that only add give every agent the sketches of Σ w_i ΔW_i, whatever the ranks.
The formula is Tropp, Yurtsever, Udell and Cevher, "Streaming low-rank matrix approximation with an application to
scientific simulation", SIAM J. Sci. Comput. 41 (2019), equations 2.7 to 2.10: exact up to rounding once k and l reach
the rank of ΔW, and else close to its best approximation. The core C costs little, as its size does not grow with the
matrix, and spares l many rows: without it (P (Ψ P)⁺ N, Nakatsukasa, arXiv 2009.11392) the same error of the cut takes
a half more values (`python -m bench.sketches`). Nearest work in federated LoRA: FedASK (arXiv 2507.09990), two passes.

Ω is the first k columns of Χ, and Ψ the first l rows of Φ. So the first l rows of C are N Χ, and the first k columns
Φ P: only its last corner Z travels. Φ and Χ are integers of a keyed stream times a power of two
(`Obfuscation.sketch`): every agent must have the same to the bit. What follows from the sums, QR and singular values,
may differ between machines in the last bits and only leads to factors of one agent.
"""

import math
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from shelora.errors import DomainError, Reason
from shelora.lora.layout import Matrix, SumTerms
from shelora.lora.shards import FactoredUpdate, Float64, LoraFactors

RANK_FACTOR: Final = 1.25
"""k and l over the largest rank, but for OVERSAMPLING."""
OVERSAMPLING: Final = 1
"""Added to that: a small rank needs proportionally more."""
HEADROOM: Final = 5.0
"""A value may be that many deviations of the last round's longest row of P, or column of N, before it is clipped."""
GROWTH_BITS: Final = 5
"""A bound is never below the first round's over 2^5: after a round that hardly moved, the next one may move far more
than HEADROOM leaves room for. Real first rounds stay below it by about 2^7."""
MAX_EXPONENT: Final = 256
"""Bounds are quarter powers of two, 2^(e / 4) for e of that magnitude at most."""
_ROOTS: Final = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429, 2.0)
"""2^(j / 4): literals, so that every machine has the same to the bit."""
SPREAD: Final = 8.0
"""Deviations of an entry of a sketch that the first round's bound has room for."""
USUAL_SCALING: Final = 4.0
"""Scaling s = alpha / rank that the first round's bound has room for."""
AGREEMENT: Final = 0.1
"""How far the mean of the clients' exponents may be from an integer: noise, not another exponent."""
DEAD: Final = 1e-7
"""Singular value, over the largest, below which a component is dead: it is not restored."""
_EXACT: Final = 1e-10
"""Singular value of a sketch, over the largest, below which it is rounding of float64."""
_VARIANCE: Final = 21845
"""Of the entries of `Obfuscation.sketch`."""
_NOISE_MARGIN: Final = 2.0
"""Singular values of a sketch below that many times the expected norm of its noise are taken for noise."""


class DrawsSketches(Protocol):
    """What `shelora.obfuscation.Obfuscation` does."""

    def sketch(self, side: str, matrix: str, number: int, shape: tuple[int, int]) -> NDArray[np.int16]:
        """Integers, the same for all agents."""


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """P [out, k], N [l, in] and Z [s - l, s - k] of one matrix."""

    P: Float64
    N: Float64
    Z: Float64


@dataclass(frozen=True, slots=True)
class Exponents:
    """What bounds the values of one matrix's P and N: `bound_of` each."""

    P: int
    """Of Z too: its entries are sums over those of P, with squared weights that sum to about 1."""
    N: int


@dataclass(slots=True)
class Clipping:
    """How many values were beyond their bound and cut to it."""

    clipped: int = 0
    values: int = 0
    matrices: set[str] = field(default_factory=set)
    """Those with any."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Sketcher:
    """Χ [in, s] and Φ [s, out] of one matrix in one round, scaled so that sketches have about ΔW's norm."""

    chi: Float64
    phi: Float64
    columns: int
    """k: those of Χ that are Ω."""
    rows: int
    """l: those of Φ that are Ψ."""

    @classmethod
    def draw(cls, source: DrawsSketches, terms: SumTerms, matrix: Matrix, number: int) -> "Sketcher":
        """Args: number: of the training round; every round looks in other directions."""
        chi = source.sketch("columns", matrix.name, number, (matrix.in_features, terms.core))
        phi = source.sketch("rows", matrix.name, number, (terms.core, matrix.out_features))
        return cls(
            chi=_scaled(chi, matrix.in_features),
            phi=_scaled(phi, matrix.out_features),
            columns=terms.columns(matrix),
            rows=terms.rows(matrix),
        )

    def sketch(self, B: Float64, A: Float64) -> Sketch:
        """The sketches of B A, B [out, r] and A [r, in]; the product is never formed."""
        left, right = self.phi @ B, A @ self.chi
        corner = left[self.rows :] @ right[:, self.columns :]
        return Sketch(B @ right[:, : self.columns], left[: self.rows] @ A, corner)

    def recovered(self, sketch: Sketch, noise_P: float = 0.0, noise_N: float = 0.0) -> FactoredUpdate:
        """ΔW = Q M from its sketches, with Q [out, q] of orthonormal columns, q at most k.

        Args: noise_P, noise_N: Standard deviations of the noise in an entry of P and of N. What cannot be told from
            noise is left out.
        """
        Q, V = _basis(sketch.P, noise_P), _basis(sketch.N.T, noise_N)
        core = np.linalg.pinv(self.phi @ Q) @ self._core(sketch) @ np.linalg.pinv(V.T @ self.chi)
        return FactoredUpdate(Q, core @ V.T)

    def _core(self, sketch: Sketch) -> Float64:
        """Φ ΔW Χ [s, s]: what follows from N and P, and the corner that was sent."""
        below = np.hstack([self.phi[self.rows :] @ sketch.P, sketch.Z])
        return np.vstack([sketch.N @ self.chi, below])


def _basis(sketch: Float64, noise: float) -> Float64:
    """Orthonormal columns [n, q] that span a sketch [n, k] up to its noise, of that deviation an entry."""
    basis, triangular = np.linalg.qr(sketch)
    left, values, _ = np.linalg.svd(triangular)
    floor = _NOISE_MARGIN * noise * sum(map(math.sqrt, sketch.shape))
    used = values > max(floor, _EXACT * values.max(initial=0))
    directions: Float64 = basis @ left[:, : len(values)][:, used]
    return directions


def _scaled(integers: NDArray[np.int16], dimension: int) -> Float64:
    """Integers times the power of two that brings vectors of that dimension to a norm of 1/2 to 1."""
    exponent = ((_VARIANCE * dimension - 1).bit_length() + 1) // 2
    return np.multiply(integers, 2.0**-exponent, dtype=np.float64)


def sketch_sizes(max_rank: int) -> tuple[int, int]:
    """K and l for a cohort whose largest rank is that: 1.25 times it, rounded up, and one more."""
    columns = math.ceil(RANK_FACTOR * max_rank) + OVERSAMPLING
    return columns, columns


def bound_of(exponent: int) -> float:
    """2^(exponent / 4), the same on every machine."""
    whole, quarters = divmod(exponent, 4)
    return math.ldexp(_ROOTS[quarters], whole)


def exponent_above(deviation: float) -> int:
    """The smallest e, within ±MAX_EXPONENT, with 2^(e / 4) above that times HEADROOM. Exact: no logarithm."""
    return _exponent_of(HEADROOM * deviation)


def first_exponents(matrix: Matrix, max_rank: int, largest_move: float) -> Exponents:
    """Bounds before there is a result to go by: what a round of Adam can move at most.

    B begins at zero and A within 1/sqrt(in); an entry of either moves by at most h = `largest_move`, the learning rate
    times the local steps (Kingma and Ba, ICLR 2015, section 2.1). So |B| <= h and |A| <= 1/sqrt(in) + h: a row of s B A
    has at most the norm s r h (1 + h sqrt(in)), a column s r h (1/sqrt(in) + h) sqrt(out). An entry of a sketch sums a
    row or column up with independent random factors, of norm 1 together at most: its deviation is the norm over
    sqrt(in) or sqrt(out), and it is beyond SPREAD deviations once in 10^13.
    """
    row = USUAL_SCALING * max_rank * largest_move * (1 + largest_move * math.sqrt(matrix.in_features))
    column = USUAL_SCALING * max_rank * largest_move * (1 / math.sqrt(matrix.in_features) + largest_move)
    return Exponents(
        _exponent_of(row * min(1, SPREAD / math.sqrt(matrix.in_features))),
        _exponent_of(column * min(math.sqrt(matrix.out_features), SPREAD)),
    )


@dataclass(frozen=True, slots=True)
class ExponentRange:
    """What a round's exponents may be, whatever the results before it were.

    One member can send what it likes within the bounds of a round, and so raise those of the next one, HEADROOM times a
    round; it could go on until nothing is left of the others' values but noise. So no bound is above what all rounds so
    far can have moved, and no agent takes a sum for one that is under others (`unpacked`).
    """

    first: Exponents
    """Of a first round."""
    least: Exponents
    most: Exponents

    @classmethod
    def of(cls, matrix: Matrix, max_rank: int, largest_move: float, number: int) -> "ExponentRange":
        """Args: number: of the round, from 1; the others as of `first_exponents`."""
        first = first_exponents(matrix, max_rank, largest_move)
        growth = 4 * GROWTH_BITS
        least = Exponents(first.P - growth, first.N - growth)
        return cls(first, least, first_exponents(matrix, max_rank, max(1, number) * largest_move))

    def exponents(self, last: Exponents | None) -> Exponents:
        """Those of a round. Args: last: `next_exponents` of the last result; None before there is one."""
        if last is None:
            return self.first
        return Exponents(
            min(max(last.P, self.least.P), self.most.P), min(max(last.N, self.least.N), self.most.N)
        )

    def holds(self, found: Exponents) -> bool:
        """Whether a round's may be these."""
        return self.least.P <= found.P <= self.most.P and self.least.N <= found.N <= self.most.N


def _exponent_of(bound: float) -> int:
    mantissa, exponent = math.frexp(bound)  # the mantissa is at least 1/2
    quarters = next((j for j, root in enumerate(_ROOTS) if root / 2 > mantissa), len(_ROOTS) - 1)
    return max(-MAX_EXPONENT, min(MAX_EXPONENT, 4 * (exponent - 1) + quarters))


def next_exponents(mean: Sketch, before: Exponents) -> Exponents:
    """Bounds after a round whose mean sketches were these: what every agent computes from the same opened sums.

    The entries of a row of P are one row of ΔW times independent directions. Its deviation says what the next round's
    directions may give better than its largest entry, which varies more from draw to draw.

    A round that moved nothing leaves the bounds as they were.
    """
    longest_P, longest_N = largest_deviation(mean.P.T), largest_deviation(mean.N)
    return Exponents(
        exponent_above(longest_P) if longest_P else before.P,
        exponent_above(longest_N) if longest_N else before.N,
    )


def largest_deviation(directions: Float64) -> float:
    """The largest root mean square of a column of [k, n]. Added up row by row, so that it is the same to the bit."""
    squares = np.zeros(directions.shape[1])
    for row in directions:
        squares += row * row
    return math.sqrt(float(squares.max(initial=0)) / len(directions))


def packed(name: str, sketch: Sketch, exponents: Exponents, clipping: Clipping) -> Float64:
    """The values of one matrix in a shard: P, N, Z, all over their bounds and cut to them, and the exponents.

    Raises: VALUE_NOT_FINITE, naming the matrix.
    """
    bounded = ((sketch.P, exponents.P), (sketch.N, exponents.N), (sketch.Z, exponents.P))
    sizes = [values.size for values, _ in bounded]
    packed_values = np.empty(sum(sizes) + 2)
    packed_values[-2:] = np.array([exponents.P, exponents.N]) / MAX_EXPONENT
    parts = np.split(packed_values[:-2], np.cumsum(sizes)[:-1])
    for part, (values, exponent) in zip(parts, bounded, strict=True):
        np.multiply(values, 1 / bound_of(exponent), out=part.reshape(values.shape))
        _clip(name, part, clipping)
    return packed_values


def _clip(name: str, values: Float64, clipping: Clipping) -> None:
    """Cuts values to ±1 in place, and counts those that were beyond."""
    largest = max(values.max(initial=0), -values.min(initial=0))
    if not np.isfinite(largest):
        raise DomainError(Reason.VALUE_NOT_FINITE, f"the update of {name} holds NaN or infinity")
    clipping.values += values.size
    if largest > 1:
        clipping.clipped += int(np.count_nonzero(np.abs(values) > 1))
        clipping.matrices.add(name)
        np.clip(values, -1, 1, out=values)


def unpacked(
    matrix: Matrix, terms: SumTerms, values: Float64, possible: ExponentRange
) -> tuple[Sketch, Exponents]:
    """The mean sketches and the bounds they were sent under, from the mean of the packed values.

    Raises: SUM_UNREADABLE: the clients did not agree on the bounds, so their sum means nothing, or on such as no honest
        client sends under.
    """
    exponents = Exponents(*(_agreed(matrix.name, float(value)) for value in values[-2:] * MAX_EXPONENT))
    if not possible.holds(exponents):
        raise DomainError(
            Reason.SUM_UNREADABLE,
            f"{matrix.name} was sent under bounds that no round so far can have led to: some client lies",
        )
    sketch = parted(matrix, terms, values)
    bound_P, bound_N = bound_of(exponents.P), bound_of(exponents.N)
    return Sketch(sketch.P * bound_P, sketch.N * bound_N, sketch.Z * bound_P), exponents


def parted(matrix: Matrix, terms: SumTerms, values: Float64) -> Sketch:
    """The sketches in the packed values of one matrix, as they are."""
    columns, rows = terms.columns(matrix), terms.rows(matrix)
    split = matrix.out_features * columns
    P, N, Z = np.split(values[:-2], [split, split + rows * matrix.in_features])
    return Sketch(
        P.reshape(matrix.out_features, columns),
        N.reshape(rows, matrix.in_features),
        Z.reshape(terms.corner(matrix)),
    )


def flat(sketch: Sketch) -> Float64:
    """P, N, Z as they are and zeros in place of exponents: what `parted` reads."""
    return np.concatenate([sketch.P.ravel(), sketch.N.ravel(), sketch.Z.ravel(), np.zeros(2)])


def _agreed(name: str, mean: float) -> int:
    nearest = round(mean)
    if abs(mean - nearest) > AGREEMENT or abs(nearest) > MAX_EXPONENT:
        raise DomainError(
            Reason.SUM_UNREADABLE,
            f"the clients sent {name} under different bounds: some of them did not apply the last result",
        )
    return nearest


def best_cut(update: FactoredUpdate, rank: int) -> FactoredUpdate:
    """The best approximation of that rank (Eckart-Young), without dead components."""
    left, values, right = np.linalg.svd(update.M, full_matrices=False)
    used = min(rank, int(np.count_nonzero(values > DEAD * values.max(initial=0))))
    return FactoredUpdate(update.Q @ left[:, :used], values[:used, None] * right[:used])


def joined(own: LoraFactors, scaling: float, frozen: LoraFactors | None) -> tuple[Float64, Float64]:
    """B [out, r] and A [r, in] of everything that a client's model adds to a matrix: s B A, and its frozen part."""
    B, A = scaling * own.B.astype(np.float64), own.A.astype(np.float64)
    if frozen is None:
        return B, A
    return np.hstack([B, frozen.B.astype(np.float64)]), np.vstack([A, frozen.A.astype(np.float64)])
