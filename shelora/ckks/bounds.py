"""How far a decrypted slot may lie from the exact result.

Notation: N the ring degree, D the value scale, W the weight scale, T the number of products in a sum, w and v
the T weights and values that meet in the slot, u a root of X^N + 1, that is exp(i a) with a an odd multiple of
pi / N. A slot is the real or the imaginary part of a polynomial at some u, divided by its scale. What follows is
said of the real part and its cosines; for the imaginary part and its sines it is the same.

Fresh noise. SEAL draws each coefficient of e from a centred binomial: 21 fair bits minus 21 fair bits, variance
21 / 2. The real part of e(u) is sum_k e_k cos(a k), a sum of independent bounded terms whose squared cosines add
up to N / 2. A fair bit minus a fair bit is sub-Gaussian with its own variance, so the sum is too:

    variance of the noise in a slot:  N / 2 * 21 / 2                                                     (1)

Encoding. A plaintext of weights w has one real number for a pair of slots. It satisfies m(X) = m(1 / X), so
coefficient k is minus coefficient N - k and so is its rounding error, at most 1/2: the error at u is real and
mixes no slot with its partner. Taking roundings as uniform, which is sub-Gaussian with its own variance 1 / 12,
the N / 2 independent ones count 2 cos(a k) each:

    variance of the rounding in a slot:  N / 12 of a weight, N / 24 of a value                           (2)

The N coefficients of values, of which a pair fills a complex number, are rounded independently of one another.

That is a heuristic. It fails for structured plaintexts, such as one whose slots differ by less than about N / W:
all coefficients but the first then round to zero. Without it the error is still below

    1/2 * sum_k |cos(a k)|  <=  N / pi + 1                                                               (3)

A scalar is encoded by one rounding, so 1/2 takes the place of (3), with no heuristic.

Sum. A product is (w + r)(v + n), with r the rounding of the weight and n the noise of the value, encoding
included. Over the sum, with x the exact result:

    slot - x  =  sum (w + r) n  +  sum r v  +  clear rounding  +  float64                                 (4)

Given the weights the first part is sub-Gaussian, its deviation at most (|w|_2 + sqrt(T) max r) times that of n.
A sub-Gaussian of deviation s exceeds t s with probability at most 2 exp(-t^2 / 2); the first two parts share
the failure probability evenly.
"""

import math
from typing import Final

from shelora.ckks.parameters import SUM_LIMIT, CkksParameters

FAILURE_BITS: Final = 40
"""Default: a bound fails for one slot with probability at most 2^-40, so once in 10^12 slots."""

_NOISE_VARIANCE: Final = 21 / 2
"""Of one coefficient: SEAL's `sample_poly_cbd`, 21 bits minus 21 bits (deviation 3.24)."""

_ROUNDING_VARIANCE: Final = 1 / 12

_FLOAT_UNIT: Final = 2.0**-50
"""Error of SEAL's float64 transforms and conversions, in units of N: eight times one rounding per butterfly."""


def slot_error_bound(
    parameters: CkksParameters, *, worst_case_rounding: bool = False, failure_bits: int = FAILURE_BITS
) -> float:
    """Bound on |decrypted - value| for a slot of a fresh ciphertext, |value| <= 1.

    Args:
        parameters: of the ciphertext.
        worst_case_rounding: use (3) in place of the heuristic (2).
        failure_bits: the bound holds for a slot with probability at least 1 - 2^-failure_bits.
    """
    spread = _deviations(failure_bits) * _fresh_deviation(parameters, worst_case_rounding=worst_case_rounding)
    fixed = _worst_rounding(parameters) if worst_case_rounding else 0.0
    return (spread + fixed) / parameters.scale + parameters.poly_degree * _FLOAT_UNIT


def accumulated_error_bound(
    parameters: CkksParameters,
    *,
    terms: int,
    scalar: bool,
    weight_l2: float = SUM_LIMIT,
    value_l1: float | None = None,
    value_l2: float | None = None,
    worst_case_rounding: bool = False,
    failure_bits: int = FAILURE_BITS,
) -> float:
    """Bound on |decrypted - exact| for one slot of an accumulated block, equation (4).

    Args:
        parameters: of the block.
        terms: number T of products in the slot: ciphertext rows over all blocks.
        scalar: True if every chunk that holds the slot has one weight (one segment, or equal weights).
        weight_l2: 2-norm of the slot's T weights; by default the largest the sum limit allows.
        value_l1: sum of the slot's T magnitudes; by default T.
        value_l2: 2-norm of the slot's T values; by default sqrt(T).
        worst_case_rounding: use (3) in place of the heuristic (2) for encoded vectors.
        failure_bits: the bound holds for a slot with probability at least 1 - 2^-failure_bits.
    """
    value_l1 = float(terms) if value_l1 is None else value_l1
    value_l2 = math.sqrt(terms) if value_l2 is None else value_l2
    weight_rounding = (0.5 if scalar else _worst_rounding(parameters)) / parameters.weight_scale
    noise_weight = weight_l2 + math.sqrt(terms) * weight_rounding
    noise = (
        noise_weight
        * _deviations(failure_bits)
        * _fresh_deviation(parameters, worst_case_rounding=worst_case_rounding)
    )
    if worst_case_rounding:
        noise += (SUM_LIMIT + terms * weight_rounding) * _worst_rounding(parameters)
    rounding = weight_rounding * value_l1
    if not (scalar or worst_case_rounding):
        typical = _deviations(failure_bits) * _rounding_deviation(parameters) / parameters.weight_scale
        rounding = min(rounding, typical * value_l2)
    return noise / parameters.scale + rounding + _clear_error(parameters)


def _deviations(failure_bits: int) -> float:
    """The t for which 2 exp(-t^2 / 2) = 2^-(failure_bits + 1)."""
    return math.sqrt(2 * math.log(2) * (failure_bits + 2))


def _fresh_deviation(parameters: CkksParameters, *, worst_case_rounding: bool) -> float:
    """Standard deviation of a fresh slot in units of 1 / scale: (1), and (2) unless rounding is bounded apart."""
    noise = parameters.poly_degree / 2 * _NOISE_VARIANCE
    return math.sqrt(noise if worst_case_rounding else noise + _rounding_deviation(parameters) ** 2)


def _rounding_deviation(parameters: CkksParameters) -> float:
    """Equation (2), in coefficient units."""
    return math.sqrt(parameters.poly_degree * _ROUNDING_VARIANCE)


def _worst_rounding(parameters: CkksParameters) -> float:
    """Equation (3), in coefficient units."""
    return parameters.poly_degree / math.pi + 1


def _clear_error(parameters: CkksParameters) -> float:
    """Clear values are encoded at half the product scale, so their rounding counts twice; and float64."""
    return 2 * _worst_rounding(parameters) / parameters.product_scale + parameters.poly_degree * _FLOAT_UNIT
