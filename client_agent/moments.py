"""What AdamW has estimated of gradients, kept from one round to the next. Pure numpy.

A result is cut anew to a client's rank, so its factors are written in other directions than those that were trained.
The estimates follow them, as LDAdam's follow a subspace that changes (Robert, Safaryan, Modoranu and Alistarh, ICLR
2025, arXiv 2410.16103, section 3). With G the gradient of the whole matrix, the gradient of B is G Aᵀ, and that of A
is Bᵀ G. For new rows A' = R A + E, where E is outside of what the rows of A span:

    mean of G A'ᵀ     m' = m Rᵀ                         that of G Eᵀ is not known: 0
    mean square       v' = m'² + (v - m²) (R ∘ R)ᵀ + σ² |E|²

taking entries for independent. σ² is v over the squared norm of A: what lies in new directions is as uncertain as what
lay in the old ones. For A the same with Bᵀ in place of A. Whole tensors keep theirs.

Bounds of sums and results (`shelora.lora.sketches`, `client_agent.plausibility`) take it that a value moves by about a
learning rate a step. As v' >= m'², a step that only goes on is no longer than that. But after many steps a mean square
is slow to follow gradients that suddenly grow: one of 1 000 steps lets a value move by three rates a step. So estimates
count as REMEMBERED steps at most, whatever they rest on. A value whose gradient jumps then moves by 1.12 rates a step,
over any number of steps; without what was kept, by 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from shelora.lora.shards import Float32, Float64, LoraFactors

REMEMBERED: Final = 10
"""Steps that kept estimates count as: about as many as AdamW's mean looks back, 1 / (1 - 0.9)."""
_CONDITION: Final = 1e-4
"""Directions of a factor below that share of its longest are not followed."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Estimates:
    """A number for each trainable value."""

    factors: Mapping[str, LoraFactors] = field(default_factory=dict)
    """By matrix name."""
    tensors: Mapping[str, Float32] = field(default_factory=dict)
    """By tensor name."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Moments:
    """AdamW's estimates, without the bias of its beginning."""

    steps: int = 0
    """How many steps they count as; 0: there are none."""
    mean: Estimates = field(default_factory=Estimates)
    """Of gradients."""
    square: Estimates = field(default_factory=Estimates)
    """Of their squares."""


NONE: Final = Moments()


def followed(moments: Moments, old: Mapping[str, LoraFactors], new: Mapping[str, LoraFactors]) -> Moments:
    """The estimates for the factors of a result.

    Args:
        moments: Of the factors that were trained.
        old: These factors, by matrix name.
        new: The result's, of the same shapes.
    """
    means: dict[str, LoraFactors] = {}
    squares: dict[str, LoraFactors] = {}
    for name, m in moments.mean.factors.items():
        v = moments.square.factors[name]
        mean_B, square_B = _turned(m.B, v.B, old[name].A, new[name].A)
        mean_A, square_A = _turned(m.A.T, v.A.T, old[name].B.T, new[name].B.T)
        means[name], squares[name] = LoraFactors(mean_B, mean_A.T), LoraFactors(square_B, square_A.T)
    return Moments(
        steps=moments.steps,
        mean=Estimates(factors=means, tensors=moments.mean.tensors),
        square=Estimates(factors=squares, tensors=moments.square.tensors),
    )


def _turned(mean: Float32, square: Float32, old: Float32, new: Float32) -> tuple[Float32, Float32]:
    """Mean and mean square [n, r] of G newᵀ, from those of G oldᵀ; old and new are [r, columns of G]."""
    m, v = mean.astype(np.float64), square.astype(np.float64)
    before, after = old.astype(np.float64), new.astype(np.float64)
    R = after @ np.linalg.pinv(before, rcond=_CONDITION)
    outside = np.sum((after - R @ before) ** 2, axis=1)
    turned: Float64 = m @ R.T
    spread = np.maximum(v - m**2, 0) @ (R**2).T
    if length := float(np.sum(before**2)):
        spread += np.outer(v.sum(axis=1) / length, outside)
    return turned.astype(np.float32), (turned**2 + spread).astype(np.float32)
