"""How large a committee is, how many of it may collude or be lost, and who sits on it.

With m members of whom T collude with the servers: any T shares tell nothing of a secret; T + l shares give the l
secrets of a polynomial back; and floor((m + T) / 2) + 1 signatures make a certificate, because two such quorums share
more than T members, hence an honest one, who signs one set only.
"""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from shelora.errors import DomainError, Reason

MAX_MEMBERS: Final = 64
SMALLEST_COHORT: Final = 2
SHARES_AT_ONCE: Final = 64
"""Most dealers whose shares a member is shown in one message, 1.7 KB each."""


def _require(condition: bool, message: str) -> None:  # noqa: FBT001 - reads as the condition it states
    if not condition:
        raise DomainError(Reason.INVALID_ARGUMENT, f"committee: {message}")


@dataclass(frozen=True)
class CommitteeRule:
    """The numbers (m, T, l) of a committee.

    Raises: DomainError(INVALID_ARGUMENT): no committee works with them.
    """

    size: int
    """m, 2 to 64."""
    threshold: int
    """T: so many members together learn nothing, at least 1."""
    packing: int
    """l: secrets a polynomial carries, a power of two."""

    def __post_init__(self) -> None:
        _require(2 <= self.size <= MAX_MEMBERS, f"a committee has 2 to {MAX_MEMBERS} members")
        _require(1 <= self.threshold < self.size, "threshold must be 1 to size - 1")
        _require(self.packing >= 1 and self.packing.bit_count() == 1, "packing must be a power of two")
        _require(self.needed <= self.quorum <= self.size, "a quorum could not open what it certifies")

    @property
    def needed(self) -> int:
        """Answers that open a sum, T + l."""
        return self.threshold + self.packing

    @property
    def quorum(self) -> int:
        """Signatures that certify a set: any two quorums share more than T members."""
        return (self.size + self.threshold) // 2 + 1


_BY_COHORT: Final = (
    (256, CommitteeRule(64, 21, 16)),
    (32, CommitteeRule(16, 5, 4)),
    (7, CommitteeRule(7, 2, 2)),
    (5, CommitteeRule(5, 2, 1)),
    (4, CommitteeRule(4, 1, 1)),
    (3, CommitteeRule(3, 1, 1)),
    (2, CommitteeRule(2, 1, 1)),
)
"""Smallest cohort of a rule, largest first. docs/committee.md says what each tolerates."""


def committee_rule(cohort_size: int) -> CommitteeRule:
    """The default committee of a cohort of that size.

    Raises: DomainError(INVALID_ARGUMENT): fewer than two clients; the sum of one is its update.
    """
    for smallest, rule in _BY_COHORT:
        if cohort_size >= smallest:
            return rule
    raise DomainError(Reason.INVALID_ARGUMENT, "a committee needs a cohort of at least two clients")


def ordered(key: bytes, subject: bytes, cohort: Sequence[str], size: int) -> tuple[str, ...]:
    """The `size` clients with the smallest HMAC-SHA256 under a key that servers do not have, in that order."""

    def tag(name: str) -> bytes:
        return hmac.digest(key, subject + b"/" + name.encode(), sha256)

    return tuple(sorted(cohort, key=tag)[:size])
