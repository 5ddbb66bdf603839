"""The discrete Gaussian that hides a client in a sum: integers, by inversion with 127 bits.

    P(x) proportional to exp(-x² / (2 s²))         |x| <= 13.2 s

The cumulative distribution is a table of integers, computed with 80 decimal digits. A sample compares 127 random bits
with it: the upper 63 decide, but for once in 10^13 samples, where the lower 64 are looked at, too. The statistical
distance from the ideal distribution is below 2^-105 a sample: table entries are cut to 127 bits (2^17 of them at most),
and the tail beyond 13.2 s has a mass below 2^-128. No floating-point number is near a sample. Nothing here is
constant-time; the comparison is on random bits alone, not on data.
"""

from bisect import bisect_right
from decimal import Decimal, localcontext
from functools import lru_cache
from math import ceil
from typing import Final

import numpy as np
import numpy.typing as npt

from shelora.additive.sampler import Csprng

TAIL_DEVIATIONS: Final = 13.2
LARGEST_DEVIATION: Final = 4096
_DIGITS: Final = 80
_UPPER_BITS: Final = 63
_LOWER_BITS: Final = 64
_GUESS_BITS: Final = 16


class NoiseSampler:
    """Independent samples of the discrete Gaussian of an integer deviation s, 1 to LARGEST_DEVIATION."""

    def __init__(self, deviation: int) -> None:
        if not 1 <= deviation <= LARGEST_DEVIATION:
            raise ValueError(f"deviation must be 1 to {LARGEST_DEVIATION}")
        self.bound = ceil(TAIL_DEVIATIONS * deviation)
        """Largest magnitude of a sample."""
        self.table = _cumulative(deviation, self.bound)
        """P(X <= x) * 2^127, rounded down, for x from -bound to bound - 1."""
        self._upper = np.array([entry >> _LOWER_BITS for entry in self.table], dtype=np.uint64)
        starts = np.arange(1 << _GUESS_BITS, dtype=np.uint64) << np.uint64(_UPPER_BITS - _GUESS_BITS)
        self._guess = np.searchsorted(self._upper, starts, side="left").astype(np.int64)
        self._decided = self._guess == np.append(self._guess[1:], len(self.table))

    def sample(self, rng: Csprng, count: int) -> npt.NDArray[np.int64]:
        """Samples, [count]. Takes 8 bytes of the stream for each, and 8 more where the upper bits do not decide."""
        words = rng.words(count) >> np.uint64(1)
        start = (words >> np.uint64(_UPPER_BITS - _GUESS_BITS)).astype(np.intp)
        index = self._guess[start]
        open_ = np.flatnonzero(~self._decided[start])
        found = np.searchsorted(self._upper, words[open_], side="right")
        index[open_] = found
        equal = open_[(found > 0) & (self._upper[np.maximum(found - 1, 0)] == words[open_])]
        for place in equal:
            whole = int(words[place]) << _LOWER_BITS | int(rng.words(1)[0])
            index[place] = bisect_right(self.table, whole)
        return index - self.bound


@lru_cache(maxsize=4)
def noise_sampler(deviation: int) -> NoiseSampler:
    """The sampler of that deviation; its table is made once."""
    return NoiseSampler(deviation)


def _cumulative(deviation: int, bound: int) -> list[int]:
    """By w(x + 1) = w(x) r^(2 x + 1), r = exp(-1 / (2 s²)): 10^5 products lose 6 of the 80 digits."""
    with localcontext() as context:
        context.prec = _DIGITS
        ratio = (-1 / (2 * Decimal(deviation) ** 2)).exp()
        weights, factor = [Decimal(1)], ratio
        for _ in range(bound):
            weights.append(weights[-1] * factor)
            factor *= ratio * ratio
        total = 2 * sum(weights) - 1
        below, table = Decimal(0), []
        for x in range(-bound, bound):
            below += weights[abs(x)]
            table.append(int(below / total * 2 ** (_UPPER_BITS + _LOWER_BITS)))
    return table
