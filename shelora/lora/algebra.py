"""Aggregation of products without forming them, and the way back to low-rank factors.

ΔW = Σ w_i s_i B_i A_i = Q M with M = Σ R_i A_i, R_i = Qᵀ (w_i s_i B_i): `q` rows in place of `out_features`
(docs/protocol.md, "Aggregation").
"""

from functools import lru_cache

import numpy as np

from shelora.errors import DomainError, Reason
from shelora.lora.shards import FactoredUpdate, Float32, Float64, LoraFactors

NEGLIGIBLE = 2.0**-46
"""Relative size below which a singular value or an entry of R is rounding noise of float64."""
WELL_CONDITIONED = 2.0**10
"""Condition number of unit columns up to which their Gram matrix gives a basis."""


class DirectionSketch:
    """Collects an orthonormal basis of the columns of a stream of matrices, in memory bounded by `limit`.

    Exact while the columns seen number at most `limit`; past that it keeps the leading directions, merging as it goes
    (Brand, "Fast low-rank modifications of the thin SVD", 2006).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._blocks: list[Float64] = []
        self._width = 0
        self._merged = False

    def add(self, block: Float64) -> None:
        """Adds the columns of block [out, r]."""
        self._blocks.append(block)
        self._width += block.shape[1]
        if self._width > 2 * self._limit:
            self._blocks = [_leading(np.hstack(self._blocks), self._limit)]
            self._width = self._blocks[0].shape[1]
            self._merged = True

    @property
    def exact(self) -> bool:
        """Whether all columns seen are within the limit."""
        return self._width <= self._limit and not self._merged

    def directions(self) -> tuple[Float64, Float64 | None]:
        """Q [out, q], q at most the limit, the number of columns seen and out; and their coordinates.

        Coordinates R [q, columns seen] with Q R all columns seen, in their order; None if they passed the limit.
        Empties the sketch.
        """
        if not self._blocks:
            raise ValueError("no block was added")
        columns = np.hstack(self._blocks)
        self._blocks = []
        if self._width > self._limit:
            return canonical_basis(_leading(columns, self._limit))[0], None
        Q, R = canonical_basis(columns)
        return Q, R if self.exact else None


def _leading(columns: Float64, limit: int) -> Float64:
    """U S of the best rank-`limit` approximation."""
    left, values, _ = np.linalg.svd(columns, full_matrices=False)
    leading: Float64 = left[:, :limit] * values[:limit]
    return leading


def canonical_basis(columns: Float64) -> tuple[Float64, Float64]:
    """Q [out, q] of orthonormal columns and R [q, count] with Q R = columns; Q depends on their span alone.

    In a basis taken from the columns in their order R is triangular, and the last row of M = R A* is a row of the last
    client's A, which all who decrypt M would see. Here Q is what Gram and Schmidt make of P G, with P the projection
    onto the span and G a fixed matrix without structure: every row of M is a sum over all clients, and Q and M say
    what ΔW says, as the span is that of its columns too (unless A* loses rank).

    Well-conditioned columns go by their Gram matrix (Q = columns T with a small T), a fraction of the work of singular
    values; Q is then orthonormal to about WELL_CONDITIONED^2 * 2^-53, below the float32 it travels in.
    """
    factor = _gram_factor(columns)
    if factor is None:
        left, values, right = np.linalg.svd(columns, full_matrices=False)
        used = values > NEGLIGIBLE * values.max(initial=0)
        basis, R = left[:, used], values[used, None] * right[used]
        rotation = _rotation(basis.T @ _unstructured(*basis.shape))
        return basis @ rotation, rotation.T @ R
    triangular, inverse = factor
    rotation = _rotation(inverse.T @ (columns.T @ _unstructured(*columns.shape)))
    return columns @ (inverse @ rotation), rotation.T @ triangular


def _gram_factor(columns: Float64) -> tuple[Float64, Float64] | None:
    """The triangular R of columns = Q R and its inverse, by Cholesky; None if the columns are ill-conditioned."""
    gram = columns.T @ columns
    norms = np.sqrt(np.diagonal(gram))
    if columns.shape[0] < columns.shape[1] or not norms.all():
        return None
    try:
        unit = np.linalg.cholesky(gram / np.outer(norms, norms)).T
    except np.linalg.LinAlgError:
        return None
    inverse = np.linalg.inv(unit)
    if np.linalg.norm(unit) * np.linalg.norm(inverse) > WELL_CONDITIONED:
        return None
    return unit * norms, inverse / norms[:, None]


def _rotation(projected: Float64) -> Float64:
    """The orthogonal U with `projected` = U T and a positive diagonal in T: unique, so that Q U is canonical."""
    U, T = np.linalg.qr(projected)
    return U * np.where(np.diagonal(T) < 0, -1.0, 1.0)


@lru_cache(maxsize=64)
def _unstructured(rows: int, columns: int) -> Float64:
    """G: the same on every machine, nothing secret."""
    return np.random.default_rng([rows, columns]).standard_normal((rows, columns))


def coordinates(basis: Float64, block: Float64) -> Float64:
    """R_i = Qᵀ block, with rounding noise set to zero so that no ciphertext is multiplied by it. [q, r]."""
    return _denoised(basis.T @ block, np.linalg.norm(block, axis=0))


def _denoised(R: Float64, norms: Float64) -> Float64:
    """R [q, r] without what is rounding noise beside the norms [r] of the columns it stands for."""
    return np.where(np.abs(R) > NEGLIGIBLE * norms, R, 0)


def reparameterize(
    update: FactoredUpdate, rank: int, scaling: float, fill_A: Float32 | None = None
) -> LoraFactors:
    """Best rank-`rank` factors of an aggregated update (Eckart-Young; SHE-LoRA, section on reparameterization).

    Args:
        update: ΔW = Q M with Q [out, q], M [q, in].
        rank: Rank of the client.
        scaling: LoRA scaling s (alpha / rank) of the client.
        fill_A: [at least rank, in] rows for directions the update does not use; their columns of B are zero, so the
            product is unchanged and they can be trained. Zero rows by default.

    Returns: B [out, rank], A [rank, in] such that s B A is the truncated SVD of ΔW, both factors of equal norm.
    """
    left, values, right = _components(update)
    used = min(rank, len(values))
    root = np.sqrt(values[:used] / scaling)
    B = np.zeros((update.Q.shape[0], rank), dtype=np.float32)
    A = np.zeros((rank, update.M.shape[1]), dtype=np.float32)
    if fill_A is not None:
        A[used:] = fill_A[used:rank]
    B[:, :used] = (update.Q @ left[:, :used]) * root
    A[:used] = root[:, None] * right[:used]
    return LoraFactors(B, A)


def remainder(update: FactoredUpdate, rank: int) -> LoraFactors:
    """What `reparameterize` leaves out: B [out, q], A [q, in] with B A = ΔW - (its best rank-`rank` approximation).

    q is what ΔW has beyond that rank, possibly 0. No scaling: it is not trained, and added as it is.
    """
    left, values, right = _components(update)
    root = np.sqrt(values[rank:])
    B = ((update.Q @ left[:, rank:]) * root).astype(np.float32)
    return LoraFactors(B, (root[:, None] * right[rank:]).astype(np.float32))


def _components(update: FactoredUpdate) -> tuple[Float64, Float64, Float64]:
    """Singular vectors and values of M, without those that are rounding. Raises: VALUE_NOT_FINITE."""
    if update.M.size and not np.isfinite(update.M).all():
        raise DomainError(Reason.VALUE_NOT_FINITE, "the aggregated update holds NaN or infinity")
    left, values, right = np.linalg.svd(update.M, full_matrices=False)
    used = int(np.count_nonzero(values > NEGLIGIBLE * values.max(initial=0)))
    return left[:, :used], values[:used], right[:used]
