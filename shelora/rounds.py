"""The life of a round: a frozen value, a table of transitions, and the rule that closes it.

A round is one attempt. A vote adds up sensitivity scores, a training round adds up updates; both live the same life.
Time is an argument: nothing here reads a clock.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final, TypeAlias

from shelora.errors import DomainError, Reason


class RoundKind(StrEnum):
    """What a round adds up."""

    VOTE = "VOTE"
    TRAIN = "TRAIN"


class RoundState(StrEnum):
    """Where a round is; PUBLISHED and ABANDONED are ends."""

    SELECTING = "SELECTING"
    KEYING = "KEYING"
    """The committee's members post their keys, and everyone trains. Only with a committee, as CERTIFYING."""
    COLLECTING = "COLLECTING"
    CERTIFYING = "CERTIFYING"
    """The committee checks shares and agrees on one set of updates."""
    AGGREGATING = "AGGREGATING"
    PUBLISHED = "PUBLISHED"
    ABANDONED = "ABANDONED"


class Event(StrEnum):
    """What can happen to a round."""

    OPEN = "OPEN"
    """Agents may train."""
    SEAT = "SEAT"
    """The committee is complete."""
    CLOSE = "CLOSE"
    """No further update counts."""
    CERTIFY = "CERTIFY"
    """The committee has certified one set of updates."""
    PUBLISH = "PUBLISH"
    ABANDON = "ABANDON"


LEAST_GRACE_MS: Final = 60_000
"""A round that most have committed to waits at least so long for the others."""

LONGEST_S: Final = 7 * 86_400
"""A round collects for a week at most: state expires after it has not changed for longer."""

ENDED: Final = frozenset({RoundState.PUBLISHED, RoundState.ABANDONED})

Transitions: TypeAlias = Mapping[tuple[RoundState, Event], RoundState]


def _with_abandonment(*path: tuple[RoundState, Event, RoundState]) -> Transitions:
    """The table of a path: each of its states may also be abandoned."""
    steps = {(origin, event): target for origin, event, target in path}
    steps |= {(origin, Event.ABANDON): RoundState.ABANDONED for origin, _, _ in path}
    return MappingProxyType(steps)


TRANSITIONS: Final = _with_abandonment(
    (RoundState.SELECTING, Event.OPEN, RoundState.COLLECTING),
    (RoundState.COLLECTING, Event.CLOSE, RoundState.AGGREGATING),
    (RoundState.AGGREGATING, Event.PUBLISH, RoundState.PUBLISHED),
)
"""The whole state machine of a round without a committee: what is not in the table is refused."""

COMMITTEE_TRANSITIONS: Final = _with_abandonment(
    (RoundState.SELECTING, Event.OPEN, RoundState.KEYING),
    (RoundState.KEYING, Event.SEAT, RoundState.COLLECTING),
    (RoundState.COLLECTING, Event.CLOSE, RoundState.CERTIFYING),
    (RoundState.CERTIFYING, Event.CERTIFY, RoundState.AGGREGATING),
    (RoundState.AGGREGATING, Event.PUBLISH, RoundState.PUBLISHED),
)
"""The same of a round whose sum a committee of its clients opens."""


@dataclass(frozen=True, slots=True, kw_only=True)
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
    draw: int = 0
    """With a committee, which batches are trained on, from 1: attempts at one draw repeat the same update, and members
    certify one set of it. 0 without a committee."""
    state: RoundState = RoundState.SELECTING
    reason: Reason | None = None
    """Why it was abandoned."""
    opened_ms: int = 0
    """Unix milliseconds at which collecting began; 0 before."""
    ended_ms: int = 0
    """Unix milliseconds at which it was published or abandoned; 0 before."""
    closed: bool = False
    """Whether it stopped collecting with enough updates."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def convenes(self) -> bool:
        """Whether a committee of the cohort opens the sum."""
        return self.draw > 0

    @property
    def spent(self) -> bool:
        """Whether members may have signed a set of this draw: its updates are never summed in another one."""
        return self.convenes and self.closed

    @property
    def deadline_ms(self) -> int:
        """Unix milliseconds at which collecting ends; 0 before it begins."""
        return self.opened_ms + 1000 * self.deadline_s if self.opened_ms else 0

    def advance(self, event: Event, now_ms: int, reason: Reason | None = None) -> "Round":
        """The round after an event.

        Args: now_ms: Unix milliseconds; reason: why, for ABANDON and only for it.
        Raises: INVALID_TRANSITION: the table has no such step from this state.
        """
        table = COMMITTEE_TRANSITIONS if self.convenes else TRANSITIONS
        state = table.get((self.state, event))
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
            closed=self.closed or event is Event.CLOSE,
        )


def federation_of(round_id: str) -> str:
    """What a round's identifier begins with: its federation's name and instance."""
    return round_id.rpartition(".")[0]


def select_cohort(round_id: str, clients: Iterable[str], limit: int) -> tuple[str, ...]:
    """At most `limit` of the clients, sorted; all of them if `limit` is 0.

    Which ones is decided by hashes of the round and their names: another draw every round, the same on every replica,
    and each client is as likely as the next.
    """
    drawn = sorted(clients, key=lambda name: hashlib.sha256(f"{round_id}\x1f{name}".encode()).digest())
    return tuple(sorted(drawn[: limit or None]))


@dataclass(frozen=True, slots=True)
class Turnout:
    """How far a collecting round has come."""

    updates: int
    """Updates that count."""
    _: KW_ONLY
    absent: int = 0
    """Clients of the cohort whose update cannot come (any more)."""
    unawaited: int = 0
    """Clients of the cohort that may still commit, but are not waited for."""
    sending: int = 0
    """Clients of the cohort that are seen sending their update; need not be known before the deadline."""


def should_close(
    round_: Round, turnout: Turnout, now_ms: int, grace_ends_ms: int | None = None, grace: float = 0.0
) -> Event | None:
    """What a collecting round is due for, if anything.

    Args:
        round_: The round.
        turnout: How far it has come.
        now_ms: Unix milliseconds.
        grace_ends_ms: Until when it waits for the last, Unix milliseconds; None: until its deadline.
        grace: How many times its deadline it waits beyond it for updates that are on their way, if it needs them.

    CLOSE, with at least `min_updates`, once the target is reached or everyone who is waited for has committed, or at
    the end of the grace or the deadline. ABANDON with fewer at the deadline, unless enough are on their way, or once
    that many cannot come any more. None for a round that is not collecting.
    """
    if round_.state is not RoundState.COLLECTING:
        return None
    present = len(round_.cohort) - turnout.absent
    if turnout.updates < round_.min_updates:
        hopeless = present < round_.min_updates
        coming = turnout.updates + turnout.sending >= round_.min_updates
        ends_ms = round_.opened_ms + 1000 * longest_s(round_.deadline_s, grace if coming else 0.0)
        return Event.ABANDON if hopeless or now_ms >= ends_ms else None
    awaited = present - turnout.unawaited
    complete = turnout.updates >= min(round_.target_updates or awaited, awaited)
    ends_ms = min(round_.deadline_ms, grace_ends_ms or round_.deadline_ms)
    return Event.CLOSE if complete or now_ms >= ends_ms else None


def longest_s(deadline_s: int, grace: float) -> int:
    """Seconds that a round collects at most: beyond its deadline while updates that it needs are on their way.

    Args: grace: as a multiple of the deadline; all of it is a week at most, unless the deadline is longer.
    """
    return max(deadline_s, min(int((1 + grace) * deadline_s), LONGEST_S))


def grace_ends_ms(round_: Round, most_ms: int, grace: float) -> int | None:
    """When a round ends that most have committed to by `most_ms`, Unix milliseconds; None: at its deadline.

    Args: grace: as a multiple of the time that most took; 0 for none.
    """
    if not (grace and most_ms):
        return None
    return most_ms + max(LEAST_GRACE_MS, int(grace * (most_ms - round_.opened_ms)))
