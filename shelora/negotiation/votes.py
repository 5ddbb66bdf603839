"""Sealed votes: every client's sensitivity scores, summed under encryption.

A vote is the client's score of every column of every matrix, normalized to sum to one, so that each client has one
vote whatever the size of its activations. Votes are averaged as whole tensors by the engine that averages
classification heads; servers see ciphertexts only.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from shelora.errors import DomainError, Reason
from shelora.lora.layout import Layout, Matrix, Tensor, build_layout
from shelora.lora.shards import Float32, Float64

VOTE_BOUND = 256.0
"""Largest vote for one column, in multiples of an even vote. Columns beyond are at the top of any plan all the same;
the bound keeps the ciphertext noise below 10^-3 of an even vote."""


def vote_bound(matrices: Sequence[Matrix]) -> float:
    """Largest value of a vote: VOTE_BOUND times one over the number of columns, at most 1."""
    return min(1.0, VOTE_BOUND / sum(m.in_features for m in matrices))


def vote_layout(matrices: Sequence[Matrix], parameters: str, key_id: bytes) -> Layout:
    """Layout of a vote: one encrypted tensor [in_features] a matrix."""
    bound = vote_bound(matrices)
    return build_layout(
        parameters=parameters,
        key_id=key_id,
        matrices=(),
        tensors=[Tensor(m.name, (m.in_features,), bound) for m in matrices],
        tiers=(),
        encrypt_tensors=True,
        max_rank=1,
        max_directions=1,
    )


def cast_votes(matrices: Sequence[Matrix], scores: Mapping[str, Float64]) -> dict[str, Float32]:
    """Normalizes scores [in_features] a matrix to a vote: non-negative, of sum one before the bound is applied.

    Raises: SHAPE_MISMATCH, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE (negative scores), naming the matrix.
    """
    for matrix in matrices:
        _check_scores(matrix, scores.get(matrix.name))
    largest = max(float(scores[m.name].max()) for m in matrices)
    if largest == 0:
        even = 1 / sum(m.in_features for m in matrices)
        return {m.name: np.full(m.in_features, even, dtype=np.float32) for m in matrices}
    relative = {m.name: scores[m.name] / largest for m in matrices}  # so that no sum overflows
    total = sum(float(r.sum()) for r in relative.values())
    bound = np.float32(vote_bound(matrices))
    return {name: np.minimum((r / total).astype(np.float32), bound) for name, r in relative.items()}


def summed_scores(matrices: Sequence[Matrix], tensors: Mapping[str, Float32]) -> dict[str, Float64]:
    """Decrypted votes by matrix; noise below zero becomes zero."""
    return {m.name: np.maximum(tensors[m.name].astype(np.float64), 0) for m in matrices}


def _check_scores(matrix: Matrix, scores: Float64 | None) -> None:
    if scores is None or scores.shape != (matrix.in_features,):
        raise DomainError(Reason.SHAPE_MISMATCH, f"{matrix.name} needs {matrix.in_features} scores")
    if not np.isfinite(scores).all():
        raise DomainError(Reason.VALUE_NOT_FINITE, f"the scores of {matrix.name} hold NaN or infinity")
    if scores.min() < 0:
        raise DomainError(Reason.VALUE_OUT_OF_RANGE, f"the scores of {matrix.name} hold negative values")
