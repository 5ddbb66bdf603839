"""What a method decides: what clients begin with, which factors they train, and what comes of what they trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from compare.state import Held, World


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a round leaves."""

    held: Sequence[Held]
    """By client."""
    models: Sequence[Held]
    """What the method would hand out: one model, or one a client where nothing is shared."""
    up: float
    """Bytes that a client sends, mean over clients."""
    down: float
    """Bytes that a client fetches, mean over clients."""
    server_s: float = 0.0
    """CPU seconds of the servers."""


class Method(Protocol):
    """A method in one run. Begins, then takes rounds in order."""

    pooled: bool
    """Whether one client trains on everybody's data, in batches as large as all clients' together."""

    def begin(self, world: World) -> Sequence[Held]:
        """What clients begin with."""

    def trains(self, number: int) -> tuple[bool, bool]:
        """Whether A and B are trained in a round, counted from 1."""

    def combine(self, trained: Sequence[Held], number: int) -> Outcome:
        """The end of a round."""
