"""Bayesian optimisation of two weights on the simplex: the published search of (a, b, c = 1 - a - b).

A Gaussian process with a Matérn-5/2 kernel stands for the objective, and the next trial is where the expected
improvement is largest (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, algorithm 2.1; Jones,
Schonlau and Welch, 1998). The authors call scikit-optimize's `gp_minimize` with 50 calls; two dimensions do not need
that much behind a coordinator. Deterministic: two coordinators find the same.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Final

import numpy as np

from shelora.lora.shards import Float64

TRIALS: Final = 50
"""Values of the objective that are computed, as published."""
_FIRST: Final = 10
"""Trials at random before the process has anything to go by, as published."""
_GRID: Final = 24
"""Steps of each weight among the candidates."""
_LENGTH: Final = 0.25
"""Length scale of the kernel: the objective is constant by steps, and flat over small changes of the weights."""
_NOISE: Final = 1e-6
_SEED: Final = 14
"""Of the first trials. Any will do; the same everywhere."""

Weights = tuple[float, float]
"""A and b, at least 0 and at most 1 together; c is the rest."""


def best_weights(objective: Callable[[Weights], float]) -> Weights:
    """The best weights of TRIALS."""
    candidates = np.array(
        [(a / _GRID, b / _GRID) for a in range(_GRID + 1) for b in range(_GRID + 1 - a)], dtype=np.float64
    )
    order = np.random.default_rng(_SEED).permutation(len(candidates))
    tried = order[:_FIRST].tolist()
    values = [objective(_weights(candidates[i])) for i in tried]
    while len(tried) < TRIALS:
        promise = _expected_improvement(candidates[tried], np.array(values), candidates)
        promise[tried] = -1
        tried.append(int(promise.argmax()))
        values.append(objective(_weights(candidates[tried[-1]])))
    return _weights(candidates[tried[int(np.argmax(values))]])


def _weights(point: Float64) -> Weights:
    a, b = point.tolist()
    return a, b


def _expected_improvement(known: Float64, values: Float64, points: Float64) -> Float64:
    """At each point, how much more than the best value is to be expected there."""
    spread = values.std() or 1.0
    scaled = (values - values.mean()) / spread
    factor = np.linalg.cholesky(_kernel(known, known) + _NOISE * np.eye(len(known)))
    between = np.linalg.solve(factor, _kernel(known, points))
    mean = between.T @ np.linalg.solve(factor, scaled)
    deviation = np.sqrt(np.maximum(1 - (between**2).sum(axis=0), 1e-12))
    normal = NormalDist()
    gain = (mean - scaled.max()) / deviation
    return np.array(
        [
            s * (g * normal.cdf(g) + normal.pdf(g))
            for g, s in zip(gain.tolist(), deviation.tolist(), strict=True)
        ]
    )


def _kernel(first: Float64, second: Float64) -> Float64:
    distance = np.linalg.norm(first[:, None] - second[None], axis=2) * math.sqrt(5) / _LENGTH
    kernel: Float64 = (1 + distance + distance**2 / 3) * np.exp(-distance)
    return kernel
