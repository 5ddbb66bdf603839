"""What the checks of the members mean: who contributes, whose dealing is left out, which members are set aside.

A check that refuses a dealing is a member's word against a dealer's. More than T such words include an honest one. With
fewer, either side may lie: the dealer is left out, unless the member refuses several whom nobody else refuses; then the
member is set aside while a quorum remains. So one hostile member can evict at most one honest client a round, and
coordinators can do no more than deny service with this rule: it decides who is summed, never what is opened.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shelora.committee.context import RoundContext
from shelora.committee.statements import parsed
from shelora.errors import DomainError, Reason
from shelora.v1 import committee_pb2 as pb

TOLERATED: Final = 1
"""Refusals of its own that a member may have before it is set aside."""


@dataclass(frozen=True)
class Checked:
    """A Check as a value."""

    position: int
    held: frozenset[str]
    refused: frozenset[str]

    @classmethod
    def read(cls, context: RoundContext, content: bytes) -> "Checked":
        """Raises: DomainError(INVALID_ARGUMENT), naming the field."""
        message = parsed(pb.Check, content)
        if not 1 <= message.position <= context.rule.size:
            raise DomainError(Reason.INVALID_ARGUMENT, f"check: position must be 1 to {context.rule.size}")
        held, refused = (frozenset(context.names(bits)) for bits in (message.held, message.refused))
        if held & refused:
            raise DomainError(Reason.INVALID_ARGUMENT, "check: a dealer is both held and refused")
        return cls(message.position, held, refused)


@dataclass(frozen=True)
class Verdict:
    """Who is in, and who is not."""

    contributors: tuple[str, ...]
    """Sorted: dealers of whom every member that is not set aside holds a share."""
    left_out: Mapping[str, tuple[int, ...]]
    """Dealers that are not, with the positions of the members that hold no share of them."""
    set_aside: tuple[int, ...]
    """Positions of members that cannot certify the set."""


def judge(context: RoundContext, dealers: frozenset[str], checks: Mapping[int, Checked]) -> Verdict:
    """The verdict on dealers, from the checks by position.

    Raises: DomainError(QUORUM_MISSING): fewer members than a quorum have checked.
    """
    quorum = context.rule.quorum
    if len(checks) < quorum:
        raise DomainError(
            Reason.QUORUM_MISSING, f"{len(checks)} members of the committee checked and {quorum} must"
        )
    missing = {position: dealers - check.held for position, check in checks.items()}
    out = {dealer for dealer in dealers if _count(missing, dealer) > context.rule.threshold}
    aside: set[int] = set()
    by_refusals = sorted(missing, key=lambda position: (-len(missing[position] - out), position))
    for position in by_refusals:
        if len(missing[position] - out) > TOLERATED and len(checks) - len(aside) > quorum:
            aside.add(position)
    for position in missing.keys() - aside:
        out |= missing[position]
    left_out = {d: tuple(sorted(p for p in missing if d in missing[p])) for d in sorted(out)}
    return Verdict(tuple(sorted(dealers - out)), left_out, tuple(sorted(aside)))


def _count(missing: Mapping[int, frozenset[str]], dealer: str) -> int:
    return sum(dealer in refused for refused in missing.values())
