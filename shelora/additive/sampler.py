"""Random numbers for secrets and noise: AES-256 in counter mode, and a discrete Gaussian by an exact table.

The Gaussian is sampled by inversion: 63 random bits are looked up in the cumulative distribution, which is computed
with 60 decimal digits. Its statistical distance from the ideal one is below 2^-55 a sample (docs/additive.md).
Nothing here is constant-time.
"""

import secrets
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

SEED_BYTES: Final = 32
TAIL_DEVIATIONS: Final = 9.2
"""Where the table ends: the mass beyond is below 2^-63."""

_DIGITS: Final = 60
_PRECISION_BITS: Final = 63
_GUESS_BITS: Final = 12


class Csprng:
    """A stream of random words from a seed of 32 bytes. It has no `repr` of its state and cannot be copied."""

    def __init__(self, seed: bytes) -> None:
        """Takes a secret seed of 32 bytes that nothing else uses; `fresh` draws one."""
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed has {SEED_BYTES} bytes")
        self._stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def fresh(cls) -> "Csprng":
        """Seeded by the operating system."""
        return cls(secrets.token_bytes(SEED_BYTES))

    def bytes(self, count: int) -> bytes:
        """The next bytes of the stream."""
        return self._stream.update(bytes(count))

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """The next 64-bit words of the stream."""
        return np.frombuffer(self.bytes(8 * count), dtype="<u8")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a random stream is not pickled or copied: both copies would give the same numbers")


class Gaussian:
    """The discrete Gaussian over the integers with P(x) proportional to exp(-x^2 / (2 deviation^2))."""

    def __init__(self, deviation: float) -> None:
        self.bound = int(np.ceil(TAIL_DEVIATIONS * deviation))
        """Largest magnitude of a sample."""
        self.table = _cumulative(deviation, self.bound)
        """P(X <= x) * 2^63 for x from -bound to bound - 1."""
        # Most words are decided by their uppermost bits, the others are searched for.
        starts = np.arange(1 << _GUESS_BITS, dtype=np.uint64) << np.uint64(_PRECISION_BITS - _GUESS_BITS)
        self._guess = np.searchsorted(self.table, starts, side="right").astype(np.int32)
        self._decided = self._guess == np.append(self._guess[1:], len(self.table))

    def sample(self, rng: Csprng, count: int) -> npt.NDArray[np.int32]:
        """Independent samples, [count]."""
        words = rng.words(count) >> np.uint64(1)
        upper = (words >> np.uint64(_PRECISION_BITS - _GUESS_BITS)).astype(np.intp)
        index = self._guess[upper]
        open_ = np.flatnonzero(~self._decided[upper])
        index[open_] = np.searchsorted(self.table, words[open_], side="right")
        return index - np.int32(self.bound)


@lru_cache(maxsize=8)
def gaussian(deviation: float) -> Gaussian:
    """The sampler of that deviation; tables are made once."""
    return Gaussian(deviation)


def _cumulative(deviation: float, bound: int) -> npt.NDArray[np.uint64]:
    with localcontext() as context:
        context.prec = _DIGITS
        double_variance = 2 * Decimal(repr(deviation)) ** 2
        weights = [(-Decimal(x * x) / double_variance).exp() for x in range(-bound, bound + 1)]
        total, below, table = sum(weights), Decimal(0), []
        for weight in weights[:-1]:
            below += weight
            table.append(int(below / total * 2**_PRECISION_BITS))
    return np.array(table, dtype=np.uint64)
