"""Tokens of a batch by DAGER's span check, from factors or from products; causal models, first round (B = 0).

With B = 0 the gradient of A is zero and A stays what it was at the first step, so text is in B: its rows of the
gradient are combinations of A x_t over the inputs x_t. With more steps A moves too, along the inputs themselves.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from attack import adam
from attack.public import Public
from attack.spans import basis, best, residuals
from shelora.lora.shards import Float64

LEAST_DISTANCE: Final = 1e-12
"""Nearer ones count as that near: rounding may leave nothing."""


def by_B(public: Public, B: Float64, A: Float64, tokens: int, *, steps: int, bits: int = 32) -> Float64:
    """Distances of all tokens of the vocabulary [V] from the span of the gradient of B.

    Args: B: [out, rank], not normalized; A: what it was trained with [rank, n]; tokens: distinct inputs of the batch;
        bits: in which B travelled.
    """
    scales = np.ones(len(A))
    if steps == 1:
        floor = adam.step_of(bits)
        B, _, scales = adam.evened(adam.gradient(B, public.scene.learning_rate, floor), floor)
    span = basis(B, min(tokens, len(A) - 1))
    return residuals(span, public.first_inputs @ (A.T * scales))


def by_A(public: Public, moved: Float64, tokens: int, start: Float64) -> Float64:
    """Distances of all tokens from the row space of how A moved [rows, n], beside the A [rank, n] of the start."""
    within = np.linalg.qr(start.T)[0]
    outside = moved - (moved @ within) @ within.T
    return residuals(basis(outside, min(tokens, len(outside))), public.first_inputs, within)


def in_all(distances: Sequence[Float64], count: int) -> set[int]:
    """The `count` tokens that are nearest to the spans of several matrices together: by the product of distances.

    For one client's update: the matrices of a layer have the same inputs, so each span holds all of them.
    """
    return best(np.log(np.maximum(distances, LEAST_DISTANCE)).sum(axis=0), count)


def in_any(distances: Sequence[Float64], count: int) -> set[int]:
    """The `count` tokens that are nearest to some span: by the least place that a token has in any matrix.

    For sums, which are cut to a rank: what one matrix has lost another one may have kept.
    """
    return best(np.min([np.argsort(np.argsort(d)) + d for d in distances], axis=0), count)
