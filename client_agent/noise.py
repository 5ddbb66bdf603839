"""Randomness that nobody can predict, for differential privacy: anyone who knows the noise can subtract it.

A stream of AES-256 in counter mode under a fresh key of the operating system gives the bits. Neither torch's nor
numpy's generators are used: their seeds are short, and past draws reveal future ones.
"""

import math
import secrets
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from shelora.lora.shards import Float64

_KEY_BYTES: Final = 32
_COUNTER: Final = bytes(16)
"""A key is used for one stream."""
_SUMMANDS: Final = 4


class Randomness:
    """A stream of random numbers. Not thread-safe.

    Args: key: 32 bytes that fix the stream, for tests; None draws them from the operating system.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._stream = Cipher(AES(key or secrets.token_bytes(_KEY_BYTES)), CTR(_COUNTER)).encryptor()

    def seed(self) -> int:
        """A seed for another generator, in [0, 2^63)."""
        return int.from_bytes(self._stream.update(bytes(8)), "big") >> 1

    def uniform(self, count: int) -> Float64:
        """Multiples of 2^-53 in [0, 1), [count]."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")
        return np.asarray((words >> np.uint64(11)) * 2.0**-53, dtype=np.float64)

    def normal(self, count: int) -> Float64:
        """Standard normal values, [count]: each the sum of four of them, halved.

        The set of floating-point values that one draw by a formula can take gives away what it was added to (Mironov,
        CCS 2012); with four, finding them is out of reach (Holohan and Braghin, "Secure random sampling in
        differential privacy", 2021). Opacus does the same in its secure mode. A tail of some 2^-53 is cut off.
        """
        drawn = self._box_muller(_SUMMANDS * count).reshape(_SUMMANDS, count)
        return np.asarray(drawn.sum(axis=0) / math.sqrt(_SUMMANDS), dtype=np.float64)

    def _box_muller(self, count: int) -> Float64:
        half = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log(1.0 - self.uniform(half)))
        angle = 2.0 * math.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
