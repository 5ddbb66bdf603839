"""The life of a round: a frozen value, a table of transitions, and the rule that closes it.

A round is one attempt. A vote adds up sensitivity scores, a training round adds up updates; both live the same life.
Time is an argument: nothing here reads a clock.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from shelora.errors import DomainError, Reason


class RoundKind(StrEnum):
    """What a round adds up."""

    VOTE = "VOTE"
    TRAIN = "TRAIN"


class RoundState(StrEnum):
    """Where a round is; PUBLISHED and ABANDONED are ends."""

    SELECTING = "SELECTING"
    COLLECTING = "COLLECTING"
    AGGREGATING = "AGGREGATING"
    PUBLISHED = "PUBLISHED"
    ABANDONED = "ABANDONED"


class Event(StrEnum):
    """What can happen to a round."""

    OPEN = "OPEN"
    CLOSE = "CLOSE"
    PUBLISH = "PUBLISH"
    ABANDON = "ABANDON"


ENDED: Final = frozenset({RoundState.PUBLISHED, RoundState.ABANDONED})

TRANSITIONS: Final[Mapping[tuple[RoundState, Event], RoundState]] = MappingProxyType(
    {
        (RoundState.SELECTING, Event.OPEN): RoundState.COLLECTING,
        (RoundState.COLLECTING, Event.CLOSE): RoundState.AGGREGATING,
        (RoundState.AGGREGATING, Event.PUBLISH): RoundState.PUBLISHED,
        (RoundState.SELECTING, Event.ABANDON): RoundState.ABANDONED,
        (RoundState.COLLECTING, Event.ABANDON): RoundState.ABANDONED,
        (RoundState.AGGREGATING, Event.ABANDON): RoundState.ABANDONED,
    }
)
"""The whole state machine: what is not in the table is refused."""


@dataclass(frozen=True, slots=True)
class Round:
    """One attempt at a round. Equal values are the same round in the same state."""

    round_id: str
    kind: RoundKind
    number: int
    """Number among training rounds from 1; 0 for a vote."""
    attempt: int
    """From 1."""
    min_updates: int
    """Updates below which it is abandoned, at least 2."""
    deadline_s: int
    """Seconds it collects updates."""
    cohort: tuple[str, ...]
    """Clients asked for an update, sorted; fixed from the start."""
    target_updates: int = 0
    """Updates at which it closes without waiting for the rest of the cohort; 0 for all of them."""
    state: RoundState = RoundState.SELECTING
    reason: Reason | None = None
    """Why it was abandoned."""
    opened_ms: int = 0
    """Unix milliseconds at which collecting began; 0 before."""
    ended_ms: int = 0
    """Unix milliseconds at which it was published or abandoned; 0 before."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def deadline_ms(self) -> int:
        """Unix milliseconds at which collecting ends; 0 before it begins."""
        return self.opened_ms + 1000 * self.deadline_s if self.opened_ms else 0

    def advance(self, event: Event, now_ms: int, reason: Reason | None = None) -> "Round":
        """The round after an event.

        Args: now_ms: Unix milliseconds; reason: why, for ABANDON and only for it.
        Raises: INVALID_TRANSITION: the table has no such step from this state.
        """
        state = TRANSITIONS.get((self.state, event))
        if state is None:
            raise DomainError(
                Reason.INVALID_TRANSITION, f"{event} is not possible for a round that is {self.state}"
            )
        if (event is Event.ABANDON) != (reason is not None):
            raise DomainError(
                Reason.INVALID_TRANSITION, "a round is abandoned for a reason, and only then has one"
            )
        return replace(
            self,
            state=state,
            reason=reason,
            opened_ms=now_ms if event is Event.OPEN else self.opened_ms,
            ended_ms=now_ms if state in ENDED else 0,
        )


def select_cohort(round_id: str, clients: Iterable[str], limit: int) -> tuple[str, ...]:
    """At most `limit` of the clients, sorted; all of them if `limit` is 0.

    Which ones is decided by hashes of the round and their names: another draw every round, the same on every replica,
    and each client is as likely as the next.
    """
    drawn = sorted(clients, key=lambda name: hashlib.sha256(f"{round_id}\x1f{name}".encode()).digest())
    return tuple(sorted(drawn[: limit or None]))


def should_close(round_: Round, update_count: int, now_ms: int, absent: int = 0) -> Event | None:
    """What a collecting round is due for, if anything.

    Args: update_count: updates that count; absent: clients of the cohort that are not waited for.

    CLOSE once the target is reached or the whole cohort committed, or at the deadline with at least `min_updates`;
    ABANDON (for TOO_FEW_UPDATES) at the deadline with fewer. None for a round that is not collecting.
    """
    if round_.state is not RoundState.COLLECTING:
        return None
    enough = update_count >= round_.min_updates
    present = len(round_.cohort) - absent
    if enough and update_count >= min(round_.target_updates or present, present):
        return Event.CLOSE
    if now_ms < round_.deadline_ms:
        return None
    return Event.CLOSE if enough else Event.ABANDON
