"""Additive parameter sets: one ring, a power of two as its modulus, one Gaussian, the bits that travel.

A `AdditiveParameters` is checked when it is built and never changes; holding one is proof that it is sound.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Final

from shelora.errors import DomainError, Reason

MAX_MODULUS_BITS_128: Final = MappingProxyType({1024: 27})
"""Largest log2(q) by ring degree for 128-bit classical security; only degrees that an estimate was made for.

HomomorphicEncryption.org security standard (2018), table 1, for secrets drawn like the errors with a deviation of 3.2.
Ours have twice that deviation, and need it: see `MIN_DEVIATION`.
"""

MIN_DEVIATION: Final = 6.4
"""Smallest deviation of secrets and errors that is secure when their sum over two honest clients is known.

By the reduction from Hint-MLWE (Kim, Lee, Seo, Song, CRYPTO 2023, eprint 2023/623) such a client's secret is at least
as hard to find as one of deviation 6.4 / 2 = 3.2 of which nothing is known: the standard's own.
"""

VALUE_LIMIT: Final = 1.0
"""Largest magnitude of a value; callers normalise to it."""

MAX_CONTRIBUTORS: Final = 1 << 14
"""Largest number of clients in a sum; the sum of their secrets stays far within the committee's field (65521)."""

GUARD: Final = 15 / 16
"""Share of the range that honest sums use; garbage leaves it in one coefficient of sixteen."""

TAIL: Final = 12.0
"""Deviations of noise that a sum has room for; honest noise exceeds them once in 10^32 coefficients."""

LOW_BITS: Final = 16
"""Bits of the lower plane on the wire; see `codec`."""

_HIGH_BITS: Final = (0, 2, 4, 6, 8)


@dataclass(frozen=True, kw_only=True)
class AdditiveParameters:
    """A checked parameter set; equal numbers mean summands of one kind, whatever the name.

    Raises: DomainError(INVALID_ARGUMENT): the numbers do not form a usable or, if `secure`, a safe set.
    """

    name: str
    degree: int
    """N of Z_q[X]/(X^N + 1), a power of two from 64; values in one chunk."""
    modulus_bits: int
    """log2 q, 20 to 31."""
    deviation: float
    """Standard deviation sigma of the discrete Gaussian of secrets and errors."""
    kept_bits: int
    """Upper bits of a coefficient that travel: 16, 18, 20, 22 or 24."""
    secure: bool
    """True: at least 128-bit secure, enforced. False: for tests only."""

    def __post_init__(self) -> None:
        ring = self.degree >= 64 and self.degree.bit_count() == 1
        _require(ring, "degree must be a power of two from 64")
        _require(20 <= self.modulus_bits <= 31, "modulus_bits must be 20 to 31")
        _require(0.5 <= self.deviation <= 16, "deviation must be 0.5 to 16")
        _require(self.kept_bits - LOW_BITS in _HIGH_BITS, "kept_bits must be 16, 18, 20, 22 or 24")
        _require(self.kept_bits <= self.modulus_bits, "kept_bits are more than the modulus has")
        self._check_security()

    @property
    def modulus(self) -> int:
        """The modulus q, a power of two."""
        return 1 << self.modulus_bits

    @property
    def dropped_bits(self) -> int:
        """Lower bits of a coefficient that do not travel."""
        return self.modulus_bits - self.kept_bits

    @property
    def high_bits(self) -> int:
        """Bits of the upper planes on the wire: 0, 2, 4, 6 or 8."""
        return self.kept_bits - LOW_BITS

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over the canonical literal, 32 bytes. The name is a label and not part of it."""
        literal = (
            f"shelora.additive.parameters.v1;degree={self.degree};modulus_bits={self.modulus_bits};"
            f"deviation={self.deviation!r};kept_bits={self.kept_bits};secure={int(self.secure)}"
        )
        return hashlib.sha256(literal.encode("ascii")).digest()

    def chunks(self, values: int) -> int:
        """Ring elements needed for so many values; the last one is padded with zeros."""
        return -(-values // self.degree)

    def noise_bound(self, contributors: int) -> float:
        """Largest noise of a coefficient of an honest sum, in units of q: errors, dropped bits, rounding."""
        dropped = (4.0**self.dropped_bits - 1) / 12
        variance = contributors * (self.deviation**2 + dropped + 1 / 12)
        return TAIL * math.sqrt(variance) + contributors / 2

    def scale(self, most_contributors: int) -> int:
        """What a value of 1 becomes: the largest integer at which a sum of `most_contributors` stays within the guard.

        Raises: DomainError(INVALID_ARGUMENT): not 1 to MAX_CONTRIBUTORS.
        """
        counted = 1 <= most_contributors <= MAX_CONTRIBUTORS
        _require(counted, f"a sum has 1 to {MAX_CONTRIBUTORS} contributors")
        room = self.modulus / 2 * GUARD - self.noise_bound(most_contributors)
        return math.floor(room / most_contributors)

    def _check_security(self) -> None:
        narrow = self.modulus_bits <= MAX_MODULUS_BITS_128.get(self.degree, 0)
        safe = narrow and self.deviation >= MIN_DEVIATION
        _require(safe or not self.secure, "modulus too wide or deviation too small for 128-bit security")


def _require(condition: bool, message: str) -> None:  # noqa: FBT001 - reads as the condition it states
    if not condition:
        raise DomainError(Reason.INVALID_ARGUMENT, f"additive parameters: {message}")


STANDARD: Final = AdditiveParameters(
    name="standard", degree=1024, modulus_bits=27, deviation=6.4, kept_bits=24, secure=True
)
"""3 bytes a value."""

BALANCED: Final = AdditiveParameters(
    name="balanced", degree=1024, modulus_bits=27, deviation=6.4, kept_bits=22, secure=True
)
"""2.75 bytes a value, at which the sketches of an update are no larger than its factors in float32."""

COMPACT: Final = AdditiveParameters(
    name="compact", degree=1024, modulus_bits=27, deviation=6.4, kept_bits=18, secure=True
)
"""2.25 bytes a value."""

SMALL: Final = AdditiveParameters(
    name="small", degree=1024, modulus_bits=27, deviation=6.4, kept_bits=16, secure=True
)
"""2 bytes a value."""

DEFAULT: Final = BALANCED
"""What rounds of complete protection are under."""

INSECURE_TOY: Final = AdditiveParameters(
    name="insecure-toy", degree=64, modulus_bits=27, deviation=6.4, kept_bits=24, secure=False
)
"""For tests only: the numbers of STANDARD on a ring that anyone can break."""

PROFILES: Final = MappingProxyType({p.name: p for p in (STANDARD, BALANCED, COMPACT, SMALL, INSECURE_TOY)})
"""Every parameter set a policy can name."""


def profile(name: str) -> AdditiveParameters:
    """The parameter set called `name`.

    Raises: DomainError(INVALID_ARGUMENT): no such profile; the message names the known ones.
    """
    if name not in PROFILES:
        known = ", ".join(sorted(PROFILES))
        raise DomainError(Reason.INVALID_ARGUMENT, f"unknown additive profile; known are {known}")
    return PROFILES[name]
