"""The use cases behind the RPCs: who may do what, in which order, on which records.

There is one part for each kind of caller.
"""

from collections.abc import Callable
from dataclasses import dataclass

from coordinator.aggregation import AggregationPool
from coordinator.changes import Changes
from coordinator.convening import Convening
from coordinator.handlers.federations import FederationHandlers
from coordinator.handlers.limits import Limits
from coordinator.handlers.lookup import Lookup
from coordinator.handlers.members import MemberHandlers
from coordinator.handlers.plans import PlanHandlers
from coordinator.handlers.updates import UpdateHandlers
from coordinator.handlers.watching import Watching
from coordinator.liveness import USUAL, Liveness
from coordinator.openings import Openings
from coordinator.statements import Statements
from coordinator.store import Store

__all__ = ["Handlers", "Limits", "handlers_on"]


@dataclass(frozen=True, kw_only=True)
class Handlers:
    """The coordinator's use cases.

    Attributes:
        lookup: Records.
        federations: The operator's.
        members: Those of clients that join.
        watching: Assignments for them.
        updates: Commits of a round's cohort.
        plans: Plans of negotiations.
        committees: Those of a round's committee.
    """

    lookup: Lookup
    federations: FederationHandlers
    members: MemberHandlers
    watching: Watching
    updates: UpdateHandlers
    plans: PlanHandlers
    committees: Convening


def handlers_on(
    store: Store,
    changes: Changes,
    *,
    aggregation: AggregationPool,
    clock_ms: Callable[[], int],
    new_instance: Callable[[], str],
    watch_poll_s: float = 5.0,
    limits: Limits | None = None,
    liveness: Liveness = USUAL,
    root: bytes = b"",
) -> Handlers:
    """The use cases on a store.

    Args:
        store: State.
        changes: Wake-ups.
        aggregation: Asked what has arrived of an update before it is committed.
        clock_ms: Unix milliseconds.
        new_instance: Eight random hex digits.
        watch_poll_s: Longest time between two looks of a watching agent's stream.
        limits: How much it takes on.
        liveness: How often members beat.
        root: Certificate of the authority in DER, whose clients' statements are believed; those of nobody without.
    """
    lookup, limits = Lookup(store, clock_ms), limits or Limits()
    statements = Statements(store=store, clock_ms=clock_ms, root=root)
    committees = Convening(store=store, changes=changes, statements=statements, openings=Openings(store))
    return Handlers(
        lookup=lookup,
        federations=FederationHandlers(lookup, new_instance, limits),
        members=MemberHandlers(lookup, limits, liveness),
        watching=Watching(lookup=lookup, changes=changes, poll_s=watch_poll_s),
        updates=UpdateHandlers(lookup, aggregation, committees),
        plans=PlanHandlers(lookup),
        committees=committees,
    )
