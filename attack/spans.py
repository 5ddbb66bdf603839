"""DAGER's span check (Petrov et al., NeurIPS 2024): a token is in a batch if its input lies in the gradient's span.

A linear layer's gradient is a sum of outer products with its inputs, so its row space is spanned by the inputs of the
batch. At the first layer the inputs of all tokens of the vocabulary are public.
"""

import numpy as np
from numpy.typing import NDArray

from shelora.lora.shards import Float64

LEAST_SHARE = 1e-5
"""Singular values below this share of the largest are taken for noise."""


def rank_by_gap(values: Float64, most: int) -> int:
    """The rank of a noisy matrix: where its singular values, in falling order, fall most in proportion."""
    head = values[: most + 1]
    if len(head) < 2:
        return 1
    gaps = np.log(head[:-1] / np.maximum(head[1:], 1e-30))
    gaps = np.where(head[:-1] > LEAST_SHARE * head[0], gaps, 0)
    return int(np.argmax(gaps)) + 1


def basis(rows: Float64, rank: int) -> Float64:
    """Orthonormal columns [n, rank] that span the leading row space of [rows, n]."""
    leading: Float64 = np.linalg.svd(rows, full_matrices=False)[2][:rank].T
    return leading


def residuals(span: Float64, candidates: Float64, without: Float64 | None = None) -> Float64:
    """How far each candidate [count, n] lies outside the span, 0 to 1.

    Args: without: orthonormal columns [n, k] that are taken out of the candidates first; the span has none of them.
    """
    inside = ((candidates @ span) ** 2).sum(axis=1)
    sizes = np.einsum("ij,ij->i", candidates, candidates)
    if without is not None:
        sizes = sizes - ((candidates @ without) ** 2).sum(axis=1)
    distances: Float64 = np.sqrt(np.clip(1 - inside / np.maximum(sizes, 1e-24), 0, None))
    return distances


def best(distances: Float64, count: int) -> set[int]:
    """The `count` candidates nearest to the span."""
    nearest: NDArray[np.intp] = np.argsort(distances)[:count]
    return set(nearest.tolist())
