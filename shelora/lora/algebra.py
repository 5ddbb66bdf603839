"""Aggregation of products without forming them, and the way back to low-rank factors.

ΔW = Σ w_i s_i B_i A_i = Q M with M = Σ R_i A_i, R_i = Qᵀ (w_i s_i B_i): `q` rows in place of `out_features`
(docs/protocol.md, "Aggregation").
"""

import numpy as np

from shelora.errors import DomainError, Reason
from shelora.lora.shards import FactoredUpdate, Float32, Float64, LoraFactors

NEGLIGIBLE = 2.0**-46
"""Relative size below which a singular value or an entry of R is rounding noise of float64."""


class DirectionSketch:
    """Collects an orthonormal basis of the columns of a stream of matrices, in memory bounded by `limit`.

    Exact while the columns seen number at most `limit`; past that it keeps the leading directions, merging as it goes
    (Brand, "Fast low-rank modifications of the thin SVD", 2006).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._columns: Float64 | None = None

    def add(self, block: Float64) -> None:
        """Adds the columns of block [out, r]."""
        merged = block if self._columns is None else np.hstack([self._columns, block])
        self._columns = _leading(merged, self._limit) if merged.shape[1] > 2 * self._limit else merged

    def basis(self) -> Float64:
        """Q [out, q], q at most the limit, the number of columns seen and out."""
        if self._columns is None:
            raise ValueError("no block was added")
        exact = self._columns.shape[1] <= self._limit
        columns = self._columns if exact else _leading(self._columns, self._limit)
        return np.linalg.qr(columns)[0]


def _leading(columns: Float64, limit: int) -> Float64:
    """U S of the best rank-`limit` approximation."""
    left, values, _ = np.linalg.svd(columns, full_matrices=False)
    leading: Float64 = left[:, :limit] * values[:limit]
    return leading


def coordinates(basis: Float64, block: Float64) -> Float64:
    """R_i = Qᵀ block, with rounding noise set to zero so that no ciphertext is multiplied by it. [q, r]."""
    product: Float64 = basis.T @ block
    product[np.abs(product) <= NEGLIGIBLE * np.linalg.norm(block, axis=0)] = 0
    return product


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
    if update.M.size and not np.isfinite(update.M).all():
        raise DomainError(Reason.VALUE_NOT_FINITE, "the aggregated update holds NaN or infinity")
    left, values, right = np.linalg.svd(update.M, full_matrices=False)
    largest = values[0] if values.size else 0.0
    used = min(rank, int(np.count_nonzero(values > NEGLIGIBLE * largest)))
    root = np.sqrt(values[:used] / scaling)
    B = np.zeros((update.Q.shape[0], rank), dtype=np.float32)
    A = np.zeros((rank, update.M.shape[1]), dtype=np.float32)
    if fill_A is not None:
        A[used:] = fill_A[used:rank]
    B[:, :used] = (update.Q @ left[:, :used]) * root
    A[:used] = root[:, None] * right[:used]
    return LoraFactors(B, A)
