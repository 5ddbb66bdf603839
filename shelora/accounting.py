"""What sums with noise tell of one client: epsilon of noise, and the noise for an epsilon. Closed form, exact orders.

A sum of values of L2 sensitivity C with Gaussian noise of deviation zC has, of order α, Rényi divergence α / (2 z²);
divergences of several sums add up (Mironov, "Rényi differential privacy", CSF 2017). The sum of the discrete Gaussians
of n clients is as good up to a correction,

    sqrt(2 D_α / α)  <=  1/z + τ sqrt(d)        τ = 10 Σ_{k<n} exp(-2 π² s² k / (k + 1))

with d values and noise of deviation s units a client (Kairouz, Liu, Steinke, "The distributed discrete Gaussian
mechanism for federated learning with secure aggregation", ICML 2021, arXiv 2102.06387, theorem 1 and proposition 14).
An epsilon at delta is the least over the orders of (Canonne, Kamath, Steinke, NeurIPS 2020, proposition 12)

    ε  <=  D_α + log((α - 1) / α) - (log δ + log α) / (α - 1)

This is what Opacus' accountant computes at a sampling rate of 1, and tests hold it to that. It stands here because
servers and the operator's command line need it, and Opacus needs torch.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

MULTIPLIER_UNIT: Final = 2.0**-10
"""Noise is found to multiples of it, upwards, so that every machine finds the same."""
LARGEST_MULTIPLIER: Final = 2.0**12
LEAST_DEVIATION: Final = 4
"""Least deviation of one client's noise, in units of its grid."""
MOST_CLIENTS: Final = 2**14
MOST_VALUES: Final = 2**42
_ORDERS: Final = tuple(1 + math.pow(2, k / 32) for k in range(-10 * 32, 24 * 32))
"""The best of these is within 10^-4 of the best there is."""


def correction(deviation: int, clients: int) -> float:
    """τ: by how much the sum of so many discrete Gaussians may be worse than one of their joint variance."""
    return 10 * math.fsum(math.exp(-2 * math.pi**2 * deviation**2 * k / (k + 1)) for k in range(1, clients))


_CORRECTION: Final = correction(LEAST_DEVIATION, MOST_CLIENTS) * math.sqrt(MOST_VALUES)
"""τ sqrt(d) at its largest, below 10^-61."""


def epsilon_of(multipliers: Iterable[float], delta: float) -> float:
    """Epsilon of sums with these noise multipliers together, at that delta; 0 of none.

    Args: multipliers: deviation of the noise in a sum over its sensitivity, a sum each.
    """
    divergence = math.fsum((1 / z + _CORRECTION) ** 2 / 2 for z in multipliers)
    return _epsilon(divergence, delta) if divergence else 0.0


@lru_cache(maxsize=64)
def multiplier_for(epsilon: float, delta: float, sums: int) -> float:
    """The least multiple of MULTIPLIER_UNIT with which that many sums cost at most epsilon.

    Raises: ValueError: none does, up to LARGEST_MULTIPLIER.
    """

    def cost(units: int) -> float:
        return _epsilon(sums * (1 / (units * MULTIPLIER_UNIT) + _CORRECTION) ** 2 / 2, delta)

    low, high = 0, int(LARGEST_MULTIPLIER / MULTIPLIER_UNIT)
    if cost(high) > epsilon:
        raise ValueError(epsilon)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) <= epsilon else (middle, high)
    return high * MULTIPLIER_UNIT


def _epsilon(divergence: float, delta: float) -> float:
    """Args: divergence: that of order α over α."""
    least = min(
        divergence * order + math.log((order - 1) / order) - (math.log(delta) + math.log(order)) / (order - 1)
        for order in _ORDERS
    )
    return max(least, 0.0)
