"""What the checks of the members mean: who contributes, whose dealing is left out, which members are set aside.

A member that holds no share of a dealer is a word against that dealer's. More than T such words include an honest one,
so the dealer is left out. With fewer, either side may lie. Then the one with the most words against it goes: the dealer
that most members lack, or the member that lacks most dealers, the dealer if they are equal; members only while a quorum
remains. So one hostile member evicts at most one honest client a round, and hostile dealers that cheat two members are
out themselves. This decides who is summed, never what is opened.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shelora.committee.context import RoundContext
from shelora.committee.rules import CommitteeRule
from shelora.committee.statements import parsed
from shelora.errors import DomainError, Reason
from shelora.v1 import committee_pb2 as pb

Bools: TypeAlias = npt.NDArray[np.bool_]


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
    rule, names, positions = context.rule, sorted(dealers), sorted(checks)
    if len(positions) < rule.quorum:
        raise DomainError(
            Reason.QUORUM_MISSING, f"{len(positions)} members of the committee checked and {rule.quorum} must"
        )
    lacking = np.array([[name not in checks[p].held for name in names] for p in positions], dtype=np.bool_)
    out, aside = _settled(lacking.reshape(len(positions), len(names)), rule)
    return Verdict(
        contributors=tuple(name for name, left in zip(names, out, strict=True) if not left),
        left_out={
            name: tuple(p for p, lacks in zip(positions, lacking[:, i], strict=True) if lacks)
            for i, name in enumerate(names)
            if out[i]
        },
        set_aside=tuple(p for p, left in zip(positions, aside, strict=True) if left),
    )


def _settled(lacking: Bools, rule: CommitteeRule) -> tuple[Bools, Bools]:
    """Which dealers are out [dealers] and which members aside [members], so that the others lack none of the others.

    Args: lacking: [members, dealers].
    """
    members = len(lacking)
    out = lacking.sum(axis=0) > rule.threshold
    aside = np.zeros(members, dtype=np.bool_)
    while (open_ := lacking & ~out & ~aside[:, None]).any():
        by_member, by_dealer = open_.sum(axis=1), open_.sum(axis=0)
        if members - aside.sum() <= rule.quorum:
            out |= open_.any(axis=0)
        elif by_member.max() > by_dealer.max():
            aside[by_member.argmax()] = True
        else:
            out[by_dealer.argmax()] = True
    return out, aside
