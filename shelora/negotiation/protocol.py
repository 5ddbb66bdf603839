"""What a client brings to a vote, whichever protocol counts it.

A protocol says how a client votes and how what the servers made of all votes becomes a plan: its rules are in
`shelora.negotiation.sealed` and `.ope`, what each party does with them in `client_agent.negotiators` and
`coordinator.votes`.
"""

from dataclasses import dataclass
from typing import Final

from shelora.errors import DomainError, Reason

MAX_VOTE_WEIGHT: Final = 64.0
"""Most that a vote may weigh, whatever a federation allows: the noise of a sealed vote grows in proportion."""


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
