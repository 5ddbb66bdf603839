"""Assignments as they change, for every member that watches."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from coordinator.assignments import Assignment, assignment_for
from coordinator.changes import Changes
from coordinator.handlers.lookup import Current, Lookup, not_joined
from coordinator.metrics import await_evaluations
from coordinator.records import FederationRecord
from services.common.single_flight import SingleFlight
from shelora.rounds import RoundState

WATCHED_FEDERATIONS: Final = 64
"""Federations whose state is kept at hand for watching agents."""

_Key: TypeAlias = tuple[str, tuple[int, int], int]
"""Federation, version of its state, time in units of `poll_s`."""


@dataclass
class OwnCommit:
    """Whether a watching member has committed to a round; asked again after a change, not at every look."""

    sequence: int = 0
    """Round of which it is known; 0 for none."""
    committed: bool = False


@dataclass(frozen=True, kw_only=True)
class Watching:
    """Streams of assignments.

    Attributes:
        lookup: Records.
        changes: Wake-ups.
        poll_s: Longest time between two looks of a watching agent's stream.
        looks: What watching agents see, read from the store once a change for all of them.
    """

    lookup: Lookup
    changes: Changes
    poll_s: float
    looks: SingleFlight[_Key, Current] = field(default_factory=lambda: SingleFlight(WATCHED_FEDERATIONS))

    async def watch(
        self, federation_id: str, client_id: str, session: str = ""
    ) -> AsyncGenerator[tuple[FederationRecord, Assignment], None]:
        """Assignments as they change, each with the record it was derived from.

        Ends after the last assignment of the federation, or when the process drains. Raises CLIENT_UNKNOWN.
        """
        member = await self.lookup.member(federation_id, client_id)
        if session:
            await self.lookup.store.presence.begin_session(federation_id, client_id, session)
        await self.lookup.touch(federation_id, client_id)
        await_evaluations(federation_id)  # they come to where their client watches
        last, commit = "", OwnCommit()
        with self.changes.subscribed(federation_id, client_id) as signal:
            while not self.changes.closed:
                federation, assignment = await self.assignment(federation_id, client_id, commit)
                if not federation.fits(member):  # joining again tells it how its model differs
                    raise not_joined()
                if assignment.assignment_id != last:
                    yield federation, assignment
                last = assignment.assignment_id
                if assignment.last:
                    return
                if await signal.wait(self.poll_s):
                    commit.sequence = 0

    async def assignment(
        self, federation_id: str, client_id: str, commit: OwnCommit
    ) -> tuple[FederationRecord, Assignment]:
        """What a client is asked to do now. Raises FEDERATION_UNKNOWN."""
        period = self.lookup.clock_ms() // int(1000 * self.poll_s)  # also without a change they look again
        key = (federation_id, self.changes.version(federation_id), period)
        federation, round_ = await self.looks.get(key, lambda: self.lookup.current(federation_id))
        if round_ is None or round_.round.state is not RoundState.COLLECTING:
            return federation, assignment_for(federation, round_, client_id, committed=False)
        if commit.sequence != round_.sequence:
            found = await self.lookup.store.updates.commit_of(federation, round_.sequence, client_id)
            commit.sequence, commit.committed = round_.sequence, found is not None
        return federation, assignment_for(federation, round_, client_id, committed=commit.committed)
