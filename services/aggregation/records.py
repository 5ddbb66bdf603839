"""What the aggregation service is asked and what it remembers, as checked values."""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from shelora.errors import DomainError, Reason
from shelora.lora.kind import Contribution
from shelora.lora.shards import MIN_CONTRIBUTORS
from shelora.transport.pieces import SHA256_BYTES, Digest

MAX_ID: Final = 128
"""Characters of a round's or client's identifier."""

WEIGHT_SUM_TOLERANCE: Final = 1e-9
"""Rounding of at most some thousand float64 weights stays far below it."""


def invalid(message: str) -> DomainError:
    """An INVALID_ARGUMENT error."""
    return DomainError(Reason.INVALID_ARGUMENT, message)


def checked_id(field: str, value: str) -> str:
    """`value`, if it has 1 to 128 characters. Raises INVALID_ARGUMENT naming `field`."""
    if not 1 <= len(value) <= MAX_ID:
        raise invalid(f"{field} must have 1 to {MAX_ID} characters")
    return value


@dataclass(frozen=True, slots=True)
class ShardSlot:
    """The place of one shard of one client's update."""

    round_id: str
    client_id: str
    shard: int

    def __post_init__(self) -> None:
        checked_id("round_id", self.round_id)
        checked_id("client_id", self.client_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """An upload in progress."""

    slot: ShardSlot
    digest: Digest
    """What was announced."""
    token: str
    """32 hex digits that every call of uploads of this content shares; another content gets another token."""
    received_bytes: int
    """Bytes stored when it was begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardProgress:
    """What has arrived of one shard."""

    shard: int
    digest: Digest
    received_bytes: int
    complete: bool
    squared_norm: float = 0.0
    """Its part of the update's squared norm (`shelora.lora.screening`), once complete."""


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A result shard in the store."""

    digest: Digest
    cpu_s: float
    """CPU seconds of the worker that computed it."""


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A partial sum in the store."""

    data: bytes
    cpu_s: float
    """CPU seconds of the worker that made it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedContribution:
    """One client's part in an aggregate, and the content it must be made of."""

    client_id: str
    sha256: bytes
    weight: float
    scaling: float

    def __post_init__(self) -> None:
        checked_id("client_id", self.client_id)
        if len(self.sha256) != SHA256_BYTES:
            raise invalid(f"a contribution's sha256 must be {SHA256_BYTES} bytes")
        if not 0 < self.weight <= 1:
            raise invalid("a contribution's weight must be greater than 0 and at most 1")
        if not (math.isfinite(self.scaling) and self.scaling > 0):
            raise invalid("a contribution's scaling must be finite and greater than 0")

    @property
    def contribution(self) -> Contribution:
        """The part that the mathematics needs."""
        return Contribution(self.client_id, self.weight, self.scaling)


@dataclass(frozen=True)
class AggregationRequest:
    """A checked request to aggregate one shard.

    Raises: INVALID_ARGUMENT, TOO_FEW_CONTRIBUTORS.
    """

    round_id: str
    shard: int
    contributions: tuple[CommittedContribution, ...]

    def __post_init__(self) -> None:
        checked_id("round_id", self.round_id)
        ids = [c.client_id for c in self.contributions]
        if len(ids) < MIN_CONTRIBUTORS:
            message = f"{len(ids)} contributions; an aggregate needs at least {MIN_CONTRIBUTORS}"
            raise DomainError(Reason.TOO_FEW_CONTRIBUTORS, message)
        if ids != sorted(set(ids)):
            raise invalid("contributions must be in order of client_id, each client once")
        if abs(math.fsum(c.weight for c in self.contributions) - 1) > WEIGHT_SUM_TOLERANCE:
            raise invalid("the weights must sum to 1")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical form: two requests with one digest are the same request."""
        return hashlib.sha256(self.to_line()).digest()

    def to_line(self) -> bytes:
        """The canonical form: one line of JSON. Floats are written so that they read back to the bit."""
        parts = [[c.client_id, c.sha256.hex(), c.weight, c.scaling] for c in self.contributions]
        form = {"format": 1, "round_id": self.round_id, "shard": self.shard, "contributions": parts}
        return json.dumps(form, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "AggregationRequest":
        """Reads what `to_line` wrote. Raises: INVALID_ARGUMENT, TOO_FEW_CONTRIBUTORS."""
        try:
            form = json.loads(line)
            parts = (
                CommittedContribution(client_id=c, sha256=bytes.fromhex(s), weight=w, scaling=a)
                for c, s, w, a in form["contributions"]
            )
            return cls(form["round_id"], int(form["shard"]), tuple(parts))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise invalid("not a request to aggregate") from error
