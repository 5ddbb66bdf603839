"""Differential privacy of a client in the sums of `complete`: what it changes is cut to a norm, and noise is added.

What a client sends in a round, all its shards one after another, is a vector of integers

    m = round(r / u) · t  +  t · (c + g)          u: natural value of a unit; t: integers a unit

    r   what the round started from, under this round's sketches: every client has it, and it follows from results
    c   trunc(f · (x - r) / u), x what the client trained; the factor f brings it to |c| <= clip units
    g   discrete Gaussian noise of deviation s units, in every value

Cut towards zero no value grows, so |c| stays below the clip in integers, and is compared with it before anything is
sent. If a client had no data, or others, c is all that changes: by at most `clip` units in L2 norm if it is taken away
(zero-out), by twice as much if it is replaced. The sum over the contributors has the noise of each of them. As each m
stays within what one client may send, whatever the noise (the sampler has a bound), sums overflow no more than without.

Docs: docs/privacy.md. Paper: Kairouz, Liu, Steinke, arXiv 2102.06387; accounting in `shelora.accounting`.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shelora.accounting import LARGEST_MULTIPLIER, LEAST_DEVIATION, MOST_CLIENTS, MULTIPLIER_UNIT
from shelora.additive.parameters import AdditiveParameters
from shelora.errors import DomainError, Reason

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

TAIL: Final = 13.5
"""Deviations of one client's noise that a value has room for: the sampler's bound, and more."""
_LARGEST_DEVIATION: Final = 4096
_ROUNDED: Final = 1 - 2.0**-30
"""Of the factor: norms in float64 are right to 2^-40."""


@dataclass(frozen=True, kw_only=True)
class ClientNoise:
    """How sums hide a client.

    Raises: DomainError(INVALID_ARGUMENT), naming the field.
    """

    bound: float
    """Largest magnitude of a value of what rounds start from."""
    clip: float
    """L2 norm of what one client may change, in values of sketches and tensors as they are."""
    multiplier: float
    """Deviation of the noise of `honest` clients together, over the clip."""
    honest: int
    """Clients whose noise is counted on."""

    def __post_init__(self) -> None:
        _require(0 < self.bound <= 1e6, "bound must be above 0, at most 10^6")
        _require(0 < self.clip <= 1e6, "clip must be above 0, at most 10^6")
        least, most = MULTIPLIER_UNIT, LARGEST_MULTIPLIER
        _require(least <= self.multiplier <= most, f"multiplier must be {least:g} to {most:g}")
        _require(1 <= self.honest <= MOST_CLIENTS, f"honest must be 1 to {MOST_CLIENTS}")

    @property
    def deviation(self) -> float:
        """Of one client's noise, in values as they are."""
        return self.multiplier * self.clip / math.sqrt(self.honest)

    def grid(self, parameters: AdditiveParameters, most_contributors: int) -> "Grid":
        """The integers of a round with that many clients at most: as fine as there is room for.

        Raises: DomainError(INVALID_ARGUMENT): there is no room for the noise beside the values, or for the clip.
        """
        scale = parameters.scale(most_contributors)
        deviation, step = _LARGEST_DEVIATION, 0
        while not step and deviation >= LEAST_DEVIATION:
            needed = deviation * ((self.bound + self.clip) / self.deviation + TAIL) + 1
            step = math.floor(scale / needed)
            deviation = deviation if step else deviation // 2
        _require(
            step > 0,
            f"the noise is too small beside the values for sums of {most_contributors} clients: raise clip, or lower "
            "protection.tensor_bound",
        )
        multiplier = Fraction(self.multiplier)
        clip = math.isqrt(math.floor(deviation**2 * self.honest / multiplier**2))
        _require(clip > 0, "the noise is too large for the clip: lower it, or count on more honest clients")
        return Grid(deviation=deviation, clip=clip, step=step, scale=scale, unit=self.deviation / deviation)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The integers of a round."""

    deviation: int
    """Of one client's noise, units."""
    clip: int
    """Largest L2 norm of what one client changes, units: at most deviation * sqrt(honest) / multiplier."""
    step: int
    """Integers a unit."""
    scale: int
    """The integer that an encryption has for a value of 1."""
    unit: float
    """Value of a unit."""

    @property
    def span(self) -> float:
        """What an encryption's value of 1 stands for."""
        return self.scale * self.unit / self.step

    def factor(self, norm: float) -> float:
        """The factor on a change of that norm, finite, that brings it to the clip."""
        most = self.clip * self.unit
        return _ROUNDED * (min(1.0, most / norm) if norm else 1.0)

    def change(self, difference: Float64, factor: float) -> Int64:
        """What a client changes, in units, cut towards zero."""
        units: Int64 = np.trunc(difference * (factor / self.unit)).astype(np.int64)
        return units

    def values(self, reference: Float64, bound: float, change: Int64, noise: Int64) -> Float64:
        """What is encrypted, within [-1, 1]: `scale` times it are integers, exactly."""
        start = np.rint(np.clip(reference, -bound, bound) * (self.step / self.unit))
        values: Float64 = (start + self.step * (change + noise)) / self.scale
        return values

    def mean_deviation(self, contributors: int) -> float:
        """Of the noise in a value of the mean of so many honest clients, in values as they are."""
        return self.deviation * self.unit / math.sqrt(contributors)


class Allowance:
    """What a client may still change in a round, by squared norms in units: exact, over all shards."""

    def __init__(self, grid: Grid) -> None:
        self._left = grid.clip**2

    def take(self, change: Int64) -> None:
        """Raises: DomainError(INTERNAL): it would be above the clip; nothing of it must leave."""
        self._left -= sum(int(np.dot(part, part)) for part in _parts(change))
        if self._left < 0:
            raise DomainError(Reason.INTERNAL, "a change is above its clip: the update is not sent")


def _parts(change: Int64) -> list[Int64]:
    """Runs whose squares add up within 64 bits: entries are below 2^31."""
    largest = int(np.abs(change).max(initial=0))
    length = max(1, (2**63 - 1) // max(1, largest**2))
    return [change[first : first + length] for first in range(0, len(change), length)]


def limited(mean: Float64, reference: Float64, noise: ClientNoise, deviation: float) -> tuple[Float64, bool]:
    """A mean no farther from where the round started than honest clients and their noise can take it.

    A cheat may send what it likes. Nobody's own update is asked: the result stays a function of what all know.

    Args: deviation: of the noise in a value of the mean.
    Returns: The mean, and whether it was cut.
    """
    change = mean - reference
    norm = float(np.linalg.norm(change))
    most = noise.clip + deviation * (math.sqrt(len(mean)) + _NOISE_DEVIATIONS)
    if norm <= most:
        return mean, False
    return reference + change * (most / norm), True


_NOISE_DEVIATIONS: Final = 12.0
"""The norm of noise is beyond its mean by that many deviations once in 10^32."""


def _require(condition: bool, message: str) -> None:  # noqa: FBT001 - reads as the condition it states
    if not condition:
        raise DomainError(Reason.INVALID_ARGUMENT, f"client privacy: {message}")
