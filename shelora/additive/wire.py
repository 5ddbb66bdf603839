"""The wire format of a shard: a header that says everything, then planes of coefficients (codec.py).

    header, 52 bytes, little-endian
        magic 4s "SLAS" | version u16 | kind u16 (1 summand, 2 sum) | parameters digest 32s | shard u32 |
        values u32 | contributors u32 (1 for a summand)
    planes of the coefficients that hold values, rounded up to 64, and at least N

The rest of the last ring element does not travel: a sum is one of coefficients, each of which opens by itself. A shard
has at least one whole element, so that garbage in it does not pass the guard.

A shard has one valid encoding. Its reader names the shape it expects, and every header field must equal it before
anything is allocated. Which round a shard is of is not in it: the dealing of its client signs its digest.
"""

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from shelora.additive.codec import PLANE_UNIT, encoded_bytes
from shelora.additive.parameters import MAX_CONTRIBUTORS, AdditiveParameters
from shelora.errors import DomainError, Reason

HEADER_BYTES: Final = 52
MAGIC: Final = b"SLAS"
VERSION: Final = 2
MAX_SHARDS: Final = 1 << 24
MAX_VALUES: Final = 1 << 30

_HEADER: Final = struct.Struct("<4sHH32sIII")
_KIND_SUMMAND: Final = 1
_KIND_SUM: Final = 2


class _Header(NamedTuple):
    magic: bytes
    version: int
    kind: int
    digest: bytes
    shard: int
    values: int
    contributors: int


@dataclass(frozen=True)
class ShardShape:
    """What a shard must be: its reader builds this from its own knowledge, never from the bytes.

    Raises: DomainError(INVALID_ARGUMENT): a number out of range.
    """

    parameters: AdditiveParameters
    shard: int
    """Index of the shard in its layout, below 2^24."""
    values: int
    """Values in it, 1 to 2^30."""

    def __post_init__(self) -> None:
        if not (0 <= self.shard < MAX_SHARDS and 1 <= self.values <= MAX_VALUES):
            raise DomainError(Reason.INVALID_ARGUMENT, "a shard has an index below 2^24 and 1 to 2^30 values")

    @property
    def chunks(self) -> int:
        """Ring elements of the shard."""
        return self.parameters.chunks(self.values)

    @property
    def coefficients(self) -> int:
        """Those that travel: values with their padding, a multiple of 64."""
        return max(self.parameters.degree, -(-self.values // PLANE_UNIT) * PLANE_UNIT)

    @property
    def encoded_bytes(self) -> int:
        """Exact length of a summand, and of a sum."""
        return HEADER_BYTES + encoded_bytes(self.parameters, self.coefficients)


def summand_header(shape: ShardShape) -> bytes:
    """Header of one client's shard."""
    return _HEADER.pack(*_header(shape, _KIND_SUMMAND, 1))


def sum_header(shape: ShardShape, contributors: int) -> bytes:
    """Header of the sum of so many shards."""
    return _HEADER.pack(*_header(shape, _KIND_SUM, contributors))


def summand_planes(data: bytes | memoryview, expected: ShardShape) -> memoryview:
    """The planes of one client's shard.

    Raises: DomainError, for the first of these that fails:
        CIPHERTEXT_TRUNCATED: shorter than a header;
        CIPHERTEXT_MALFORMED: magic, version or kind;
        CIPHERTEXT_FOREIGN_PARAMETERS: digest of the parameters;
        CIPHERTEXT_WRONG_SHAPE: shard, values or contributors;
        CIPHERTEXT_TRUNCATED or CIPHERTEXT_MALFORMED: too short or too long in all.
    """
    return _planes(data, expected, _KIND_SUMMAND, 1)


def sum_planes(data: bytes | memoryview, expected: ShardShape, contributors: int) -> memoryview:
    """The planes of a sum over exactly so many shards. Raises: as `summand_planes`."""
    return _planes(data, expected, _KIND_SUM, contributors)


def partial_planes(data: bytes | memoryview, expected: ShardShape) -> tuple[memoryview, int]:
    """The planes of a sum, and over how many shards it says it is, 2 or more. Raises: as `summand_planes`."""
    view = memoryview(data).cast("B")
    if len(view) < HEADER_BYTES:
        raise DomainError(Reason.CIPHERTEXT_TRUNCATED, "the shard is shorter than its header")
    contributors = _Header._make(_HEADER.unpack_from(view)).contributors
    if not 2 <= contributors <= MAX_CONTRIBUTORS:
        raise DomainError(
            Reason.CIPHERTEXT_WRONG_SHAPE, "shard header: contributors is not a number of a sum"
        )
    return _planes(view, expected, _KIND_SUM, contributors), contributors


def _header(shape: ShardShape, kind: int, contributors: int) -> _Header:
    if not 1 <= contributors <= MAX_CONTRIBUTORS:
        raise DomainError(Reason.INVALID_ARGUMENT, f"a sum has 1 to {MAX_CONTRIBUTORS} contributors")
    digest = shape.parameters.digest
    return _Header(MAGIC, VERSION, kind, digest, shape.shard, shape.values, contributors)


_CHECKS: Final = (
    (("magic", "version", "kind"), Reason.CIPHERTEXT_MALFORMED),
    (("digest",), Reason.CIPHERTEXT_FOREIGN_PARAMETERS),
    (("shard", "values", "contributors"), Reason.CIPHERTEXT_WRONG_SHAPE),
)
"""Header fields in the order they are compared, and what a difference means."""


def _planes(data: bytes | memoryview, expected: ShardShape, kind: int, contributors: int) -> memoryview:
    view = memoryview(data).cast("B")
    if len(view) < HEADER_BYTES:
        raise DomainError(Reason.CIPHERTEXT_TRUNCATED, "the shard is shorter than its header")
    found, wanted = _Header._make(_HEADER.unpack_from(view)), _header(expected, kind, contributors)
    for names, reason in _CHECKS:
        for name in names:
            if getattr(found, name) != getattr(wanted, name):
                raise DomainError(reason, f"shard header: {name} is not the expected one")
    _check_length(len(view), expected.encoded_bytes)
    return view[HEADER_BYTES:]


def _check_length(length: int, expected: int) -> None:
    if length < expected:
        raise DomainError(Reason.CIPHERTEXT_TRUNCATED, f"the shard has {length} of {expected} bytes")
    if length > expected:
        raise DomainError(Reason.CIPHERTEXT_MALFORMED, f"the shard has {length - expected} bytes too many")
