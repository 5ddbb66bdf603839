"""Tokens of a batch by DAGER's span check, from factors or from products; causal models, first round (B = 0).

With B = 0 the gradient of A is zero and A stays what it was at the first step, so text is in B: its rows of the
gradient are combinations of A x_t over the inputs x_t. With more steps A moves too, along the inputs themselves.
"""

import numpy as np

from attack import adam
from attack.public import Public
from attack.spans import basis, best, residuals
from shelora.lora.shards import Float64


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


def guessed(distances: list[Float64], count: int) -> set[int]:
    """The `count` tokens that are nearest over several matrices: by the least place that a token has in any of them."""
    places = np.min([np.argsort(np.argsort(d)) + d for d in distances], axis=0)
    return best(places, count)
