"""Two sketches of a matrix's update that add up, and the sum of the updates from their sums. Pure numpy.

    P = ΔW Ω [out, k],  N = Ψ ΔW [l, in],     ΔW ≈ P (Ψ P)⁺ N

Both are linear in ΔW, so servers that only add give every agent the sketches of Σ w_i ΔW_i, whatever the ranks.
The formula is the generalised Nyström approximation (Nakatsukasa, "Fast and stable randomized low-rank matrix
approximation", arXiv 2009.11392; Tropp, Yurtsever, Udell and Cevher, SIAM J. Matrix Anal. Appl. 2017): exact up to
rounding once k reaches the rank of ΔW, and else close to its best rank-k approximation. Nearest work in federated LoRA:
FedASK (arXiv 2507.09990), two passes.

Ω and Ψ are integers of a keyed stream times a power of two (`Obfuscation.sketch`): every agent must have the same to
the bit. What follows from the sums, QR and singular values, may differ between machines in the last bits and only
leads to factors of one agent.
"""

import math
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from shelora.errors import DomainError, Reason
from shelora.lora.layout import Matrix, SumTerms
from shelora.lora.shards import FactoredUpdate, Float64, LoraFactors

RANK_FACTOR: Final = 1.5
"""k over the largest rank, and l over k."""
HEADROOM: Final = 4.0
"""A value may be that many times the largest of the last round's mean before it is clipped."""
GROWTH_BITS: Final = 4
"""A bound is never below the first round's over 2^4: after a round that hardly moved, the next one may move far more
than HEADROOM times as much. Real first rounds stay below it by about 2^7."""
MAX_EXPONENT: Final = 64
"""Bounds are powers of two, 2^-64 to 2^64."""
USUAL_SCALING: Final = 4.0
"""Scaling s = alpha / rank that the first round's bound has room for."""
AGREEMENT: Final = 0.1
"""How far the mean of the clients' exponents may be from an integer: noise, not another exponent."""
DEAD: Final = 1e-7
"""Singular value, over the largest, below which a component is dead: it is not restored."""
_EXACT: Final = 1e-10
"""Singular value of Ψ P, over the largest, below which it is rounding of float64."""
_VARIANCE: Final = 21845
"""Of the entries of `Obfuscation.sketch`."""
_NOISE_MARGIN: Final = 2.0
"""Singular values of Ψ P below that many times the expected norm of the noise are taken for noise."""


class DrawsSketches(Protocol):
    """What `shelora.obfuscation.Obfuscation` does."""

    def sketch(self, side: str, matrix: str, number: int, shape: tuple[int, int]) -> NDArray[np.int16]:
        """Integers, the same for all agents."""


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """P [out, k] and N [l, in] of one matrix."""

    P: Float64
    N: Float64


@dataclass(frozen=True, slots=True)
class Exponents:
    """Powers of two that bound the values of one matrix's P and N."""

    P: int
    N: int


@dataclass(slots=True)
class Clipping:
    """How many values were beyond their bound and cut to it."""

    clipped: int = 0
    values: int = 0
    matrices: set[str] = field(default_factory=set)
    """Those with any."""


@dataclass(frozen=True, slots=True, eq=False)
class Sketcher:
    """Ω [in, k] and Ψ [l, out] of one matrix in one round, scaled so that sketches have about ΔW's norm."""

    omega: Float64
    psi: Float64

    @classmethod
    def draw(cls, source: DrawsSketches, terms: SumTerms, matrix: Matrix, number: int) -> "Sketcher":
        """Args: number: of the training round; every round looks in other directions."""
        omega = (matrix.in_features, terms.columns(matrix))
        psi = (terms.rows(matrix), matrix.out_features)
        return cls(
            _scaled(source.sketch("columns", matrix.name, number, omega), matrix.in_features),
            _scaled(source.sketch("rows", matrix.name, number, psi), matrix.out_features),
        )

    def sketch(self, B: Float64, A: Float64) -> Sketch:
        """The sketches of B A, B [out, r] and A [r, in]; the product is never formed."""
        return Sketch(B @ (A @ self.omega), (self.psi @ B) @ A)

    def recovered(self, sketch: Sketch, noise: float = 0.0) -> FactoredUpdate:
        """ΔW = Q M from its sketches, with Q [out, q] of orthonormal columns, q at most k.

        Args: noise: Standard deviation of the noise in an entry of P. What cannot be told from noise is left out.
        """
        P, N = sketch.P, sketch.N
        left, values, right = np.linalg.svd(self.psi @ P, full_matrices=False)
        floor = _NOISE_MARGIN * noise * (math.sqrt(P.shape[1]) + math.sqrt(len(self.psi)))
        used = values > max(floor, _EXACT * values.max(initial=0))
        basis, triangular = np.linalg.qr(P @ (right[used].T / values[used]))
        return FactoredUpdate(basis, triangular @ (left[:, used].T @ N))


def _scaled(integers: NDArray[np.int16], dimension: int) -> Float64:
    """Integers times the power of two that brings vectors of that dimension to a norm of 1/2 to 1."""
    exponent = ((_VARIANCE * dimension - 1).bit_length() + 1) // 2
    return np.ldexp(integers.astype(np.float64), -exponent)


def sketch_sizes(max_rank: int) -> tuple[int, int]:
    """K and l for a cohort whose largest rank is that: 1.5 times it and 1.5 times k, rounded up."""
    columns = math.ceil(RANK_FACTOR * max_rank)
    return columns, math.ceil(RANK_FACTOR * columns)


def exponent_above(largest: float) -> int:
    """The smallest e, within ±MAX_EXPONENT, with 2^e above `largest` times HEADROOM. Exact: no logarithm."""
    return max(-MAX_EXPONENT, min(MAX_EXPONENT, math.frexp(HEADROOM * largest)[1]))


def first_exponents(matrix: Matrix, max_rank: int, largest_move: float) -> Exponents:
    """Bounds before there is a result to go by: what a round of Adam can move at most.

    B begins at zero and A within 1/sqrt(in); an entry of either moves by at most h = `largest_move`, the learning rate
    times the local steps (Kingma and Ba, ICLR 2015, section 2.1). So |B| <= h and |A| <= 1/sqrt(in) + h: a row of s B A
    has at most the norm s r h (1 + h sqrt(in)), a column s r h (1/sqrt(in) + h) sqrt(out). An entry of a sketch is
    about as large as the row or column that it sums up.
    """
    row = USUAL_SCALING * max_rank * largest_move * (1 + largest_move * math.sqrt(matrix.in_features))
    column = USUAL_SCALING * max_rank * largest_move * (1 / math.sqrt(matrix.in_features) + largest_move)
    return Exponents(_exponent_of(row), _exponent_of(column * math.sqrt(matrix.out_features)))


def round_exponents(last: Exponents | None, first: Exponents) -> Exponents:
    """The bounds of a round. Args: last: `next_exponents` of the last result; first: those of a first round."""
    if last is None:
        return first
    return Exponents(max(last.P, first.P - GROWTH_BITS), max(last.N, first.N - GROWTH_BITS))


def _exponent_of(bound: float) -> int:
    return max(-MAX_EXPONENT, min(MAX_EXPONENT, math.frexp(bound)[1]))


def next_exponents(mean: Sketch, before: Exponents) -> Exponents:
    """Bounds after a round whose mean sketches were these: what every agent computes from the same opened sums.

    A round that moved nothing leaves the bounds as they were.
    """
    largest_P, largest_N = float(np.abs(mean.P).max()), float(np.abs(mean.N).max())
    return Exponents(
        exponent_above(largest_P) if largest_P else before.P,
        exponent_above(largest_N) if largest_N else before.N,
    )


def packed(name: str, sketch: Sketch, exponents: Exponents, clipping: Clipping) -> Float64:
    """The values of one matrix in a shard: P, N, both over their bounds and cut to them, and the exponents.

    Raises: VALUE_NOT_FINITE, naming the matrix.
    """
    parts = []
    for values, exponent in ((sketch.P, exponents.P), (sketch.N, exponents.N)):
        if not np.isfinite(values).all():
            raise DomainError(Reason.VALUE_NOT_FINITE, f"the update of {name} holds NaN or infinity")
        scaled = np.ldexp(values, -exponent).reshape(-1)
        beyond = int(np.count_nonzero(np.abs(scaled) > 1))
        clipping.clipped += beyond
        clipping.values += scaled.size
        if beyond:
            clipping.matrices.add(name)
        parts.append(np.clip(scaled, -1, 1))
    parts.append(np.array([exponents.P, exponents.N]) / MAX_EXPONENT)
    return np.concatenate(parts)


def unpacked(matrix: Matrix, terms: SumTerms, values: Float64) -> tuple[Sketch, Exponents]:
    """The mean sketches and the bounds they were sent under, from the mean of the packed values.

    Raises: SUM_UNREADABLE: the clients did not agree on the bounds, so their sum means nothing.
    """
    split = matrix.out_features * terms.columns(matrix)
    exponents = Exponents(*(_agreed(matrix.name, float(value)) for value in values[-2:] * MAX_EXPONENT))
    P = np.ldexp(values[:split], exponents.P).reshape(matrix.out_features, -1)
    N = np.ldexp(values[split:-2], exponents.N).reshape(-1, matrix.in_features)
    return Sketch(P, N), exponents


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
