"""What every negotiation protocol gives agents, and which one a federation uses.

A protocol says how a client votes and how what the servers made of all votes becomes a plan. Between the two lie the
servers: under `sealed` aggregation adds up encrypted votes and an agent ranks the sums; under `ope` the coordinator
ranks labels. docs/negotiation.md says who learns what.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol, TypeVar

from shelora.errors import DomainError, Reason
from shelora.lora.shards import Float64
from shelora.negotiation.plan import Plan

MAX_VOTE_WEIGHT: Final = 64.0
"""Most that a vote may weigh, whatever a federation allows: the noise of a sealed vote grows in proportion."""

_Vote_co = TypeVar("_Vote_co", covariant=True)
_Outcome_contra = TypeVar("_Outcome_contra", contravariant=True)


class Ranker(StrEnum):
    """Who puts the columns in order."""

    AGENT = "AGENT"
    COORDINATOR = "COORDINATOR"


@dataclass(frozen=True, slots=True)
class Stake:
    """What a client brings to a vote beside its scores."""

    budget: float = 1.0
    """Share of columns it encrypts, 0 to 1."""
    weight: float = 1.0
    """Votes it has, 1 to `largest`: more than one while plans cover too little of what it finds sensitive."""
    largest: float = 1.0
    """Most votes a client may have in this federation, 1 to MAX_VOTE_WEIGHT."""

    def __post_init__(self) -> None:
        if not (0 <= self.budget <= 1 and 1 <= self.weight <= self.largest <= MAX_VOTE_WEIGHT):
            raise DomainError(Reason.INVALID_ARGUMENT, "a stake is out of range")


class Negotiator(Protocol[_Vote_co, _Outcome_contra]):
    """An agent's side of a protocol, for one vote."""

    @property
    def ranker(self) -> Ranker:
        """Who ranks."""

    def cast(self, scores: Mapping[str, Float64], stake: Stake) -> _Vote_co:
        """The vote that leaves the agent. Raises SHAPE_MISMATCH, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE."""

    def plan(self, outcome: _Outcome_contra, tiers: Sequence[float]) -> Plan:
        """The plan that follows from what servers made of all votes; the same for every agent."""
