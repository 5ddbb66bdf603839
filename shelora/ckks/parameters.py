"""CKKS parameter sets: one ring, one prime, one scale for values and one for weights.

The scheme here is used at depth one: a ciphertext of values meets plaintext weights and is summed. That
needs no key switching, so the whole modulus is one prime and the ring stays small (docs/adr).
A `CkksParameters` is checked when it is built and never changes; holding one is proof that it is sound.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Final

from shelora.errors import DomainError, Reason

MAX_MODULUS_BITS_128: Final = MappingProxyType(
    {1024: 26, 2048: 53, 4096: 106, 8192: 214, 16384: 430, 32768: 868}
)
"""Largest log2(q) by ring degree for 128-bit classical security with uniform ternary secrets, error deviation 3.19.

Bossuat et al., "Security Guidelines for Implementing Homomorphic Encryption" (2024, eprint 2024/463), table 5.2. It is
below the HomomorphicEncryption.org security standard (2018), table 1, at every degree; that one SEAL enforces (TC128).
"""

MIN_POLY_DEGREE: Final = 64
"""The wire format packs coefficients in groups of 64, so that records are whole 64-bit words."""

MIN_MODULUS_BITS: Final = 33
MAX_MODULUS_BITS: Final = 60
"""SEAL's limit for one prime; it also leaves room to add three residues in 64 bits."""

VALUE_LIMIT: Final = 1.0
"""Largest magnitude of an encrypted value; callers normalise to it."""

SUM_LIMIT: Final = 0.5
"""Largest magnitude of an accumulated slot: sum |weights| + |clear value|; far beyond it coefficients wrap."""

_MILLER_RABIN_BASES: Final = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
"""Witnesses that decide primality without error below 3.3e24 (Sorenson and Webster, 2015)."""


@dataclass(frozen=True, kw_only=True)
class CkksParameters:
    """A checked parameter set; equal numbers mean interchangeable ciphertexts, whatever the name.

    Raises: DomainError(INVALID_ARGUMENT): the numbers do not form a usable or, if `secure`, a safe set.
    """

    name: str
    poly_degree: int
    """Ring degree N of Z_q[X]/(X^N + 1), a power of two."""
    modulus: int
    """The prime q, congruent to 1 modulo 2N."""
    scale_bits: int
    """log2 of the scale of a fresh ciphertext."""
    weight_scale_bits: int
    """log2 of the scale of a plaintext weight."""
    secure: bool
    """True: at least 128-bit secure, enforced. False: for tests only."""

    def __post_init__(self) -> None:
        self._check_ring()
        self._check_scales()
        self._check_security()

    @property
    def slots(self) -> int:
        """Real values one ciphertext carries, N: two in each of its N / 2 complex numbers."""
        return self.poly_degree

    @property
    def coefficient_bits(self) -> int:
        return self.modulus.bit_length()

    @property
    def product_scale_bits(self) -> int:
        return self.scale_bits + self.weight_scale_bits

    @property
    def scale(self) -> float:
        return 2.0**self.scale_bits

    @property
    def weight_scale(self) -> float:
        return 2.0**self.weight_scale_bits

    @property
    def product_scale(self) -> float:
        """Scale of an accumulated ciphertext: value times weight."""
        return 2.0**self.product_scale_bits

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over the canonical literal, 32 bytes. The name is a label and not part of it."""
        literal = (
            f"shelora.ckks.parameters.v1;poly_degree={self.poly_degree};modulus={self.modulus:#x};"
            f"scale_bits={self.scale_bits};weight_scale_bits={self.weight_scale_bits};secure={int(self.secure)}"
        )
        return hashlib.sha256(literal.encode("ascii")).digest()

    def chunks(self, total_slots: int) -> int:
        """Ciphertexts needed for `total_slots` values; the last one is padded with zeros."""
        return -(-total_slots // self.slots)

    def _check_ring(self) -> None:
        degree, bits = self.poly_degree, self.coefficient_bits
        power_of_two = degree >= MIN_POLY_DEGREE and degree.bit_count() == 1
        _require(power_of_two, "poly_degree must be a power of two from 64")
        _require(MIN_MODULUS_BITS <= bits <= MAX_MODULUS_BITS, "modulus must have 33 to 60 bits")
        _require(self.modulus % (2 * degree) == 1, "modulus must be 1 modulo 2 * poly_degree")
        _require(_is_prime(self.modulus), "modulus must be prime")

    def _check_scales(self) -> None:
        _require(min(self.scale_bits, self.weight_scale_bits) > 0, "scales must be above one")
        # SEAL refuses a scale as wide as the modulus.
        _require(self.product_scale_bits < self.coefficient_bits, "the scales together are as wide as q")
        # A pair of slots up to SUM_LIMIT is a complex number up to sqrt(1/2), and so are the coefficients, times
        # the product scale. They wrap at q / 2; a quarter of that room is kept for noise, which is smaller by
        # many orders of magnitude (bounds.py): sqrt(1/2) * 2^bits <= 3/4 * q / 2.
        room = 32 * 4**self.product_scale_bits <= 9 * self.modulus**2
        _require(room, "the product scale leaves no room for noise")

    def _check_security(self) -> None:
        limit = MAX_MODULUS_BITS_128.get(self.poly_degree, 0)
        safe = self.coefficient_bits <= limit
        _require(safe or not self.secure, "modulus is too wide for 128-bit security")


def _require(condition: bool, message: str) -> None:  # noqa: FBT001 - reads as the condition it states
    if not condition:
        raise DomainError(Reason.INVALID_ARGUMENT, f"CKKS parameters: {message}")


def _is_prime(n: int) -> bool:
    """Deterministic Miller-Rabin for odd n above 37 and below 2^64."""
    twos = ((n - 1) & (1 - n)).bit_length() - 1
    odd = (n - 1) >> twos
    return n % 2 == 1 and all(_passes(n, base, odd, twos) for base in _MILLER_RABIN_BASES)


def _passes(n: int, base: int, odd: int, twos: int) -> bool:
    x = pow(base, odd, n)
    return x in (1, n - 1) or any((x := x * x % n) == n - 1 for _ in range(twos - 1))


STANDARD: Final = CkksParameters(
    name="standard",
    poly_degree=2048,
    modulus=0x1FFFFFFFFE1001,  # the largest 53-bit prime that is 1 modulo 4096
    scale_bits=26,
    weight_scale_bits=26,
    secure=True,
)
"""The default: 128-bit secure, 6.6 bytes a value up and 13.3 down, 2048 values a ciphertext."""

LARGE: Final = CkksParameters(
    name="large",
    poly_degree=4096,
    modulus=0xFFFFFFFFFFFC001,  # the largest 60-bit prime that is 1 modulo 8192
    scale_bits=30,
    weight_scale_bits=29,
    secure=True,
)
"""Six more bits of precision, for wide cohorts: 7.5 bytes a value up and 15 down, 4096 values a ciphertext."""

INSECURE_TOY: Final = CkksParameters(
    name="insecure-toy",
    poly_degree=64,
    modulus=0x1FFFFFFFFFFE01,
    scale_bits=26,
    weight_scale_bits=26,
    secure=False,
)
"""For tests only: the scales of STANDARD on a ring that anyone can break."""

PROFILES: Final = MappingProxyType({p.name: p for p in (STANDARD, LARGE, INSECURE_TOY)})
"""Every parameter set a policy can name."""


def profile(name: str) -> CkksParameters:
    """The parameter set called `name`.

    Raises: DomainError(INVALID_ARGUMENT): no such profile; the message names the known ones.
    """
    if name not in PROFILES:
        known = ", ".join(sorted(PROFILES))
        raise DomainError(Reason.INVALID_ARGUMENT, f"unknown CKKS profile; known are {known}")
    return PROFILES[name]
