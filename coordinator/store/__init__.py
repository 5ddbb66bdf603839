"""Where the coordinator's records live: on Redis (or Valkey), a part for each kind of record.

Records that several writers share (federations, rounds) are written by compare-and-set on a revision. Everything
expires: a federation's record and what belongs to it live for `retention` after the last change, a sighting and a
lease for seconds. Every method raises STORE_UNAVAILABLE if Redis does not answer, STORE_FULL if it has no room; all of
them may be repeated. Where a method takes a `FederationRecord`, that is one read before: its instance names the keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from coordinator.keys import Keys
from coordinator.store.committees import CommitteeStore, StateOutcome, order_digest
from coordinator.store.database import PASSING_MS, Database, Versioned
from coordinator.store.disposal import Disposal
from coordinator.store.federations import MAX_CONFLICTS, FederationStore
from coordinator.store.leases import LeaseStore
from coordinator.store.members import MemberStore
from coordinator.store.plans import PlanStore
from coordinator.store.presence import PresenceStore
from coordinator.store.rounds import RoundStore
from coordinator.store.updates import CommitOutcome, UpdateStore
from services.common.redis_client import RedisClient

__all__ = [
    "MAX_CONFLICTS",
    "PASSING_MS",
    "CommitOutcome",
    "StateOutcome",
    "Store",
    "Versioned",
    "order_digest",
    "redis_store",
]


@dataclass(frozen=True, kw_only=True)
class Store:
    """The coordinator's state.

    Attributes:
        federations: Their records.
        rounds: Their records, layouts, aggregated shards and evaluations.
        updates: What a round's cohort has committed: updates and ballots; and whose were refused.
        committees: What a round's committee states and receives, until the round is over; what opens its sum.
        members: Who has joined, with which model.
        presence: When each was last heard of.
        plans: Sealed plans, and who rejects them.
        leases: Who drives a federation.
        disposal: Deletes all of a federation.
    """

    federations: FederationStore
    rounds: RoundStore
    updates: UpdateStore
    committees: CommitteeStore
    members: MemberStore
    presence: PresenceStore
    plans: PlanStore
    leases: LeaseStore
    disposal: Disposal


def redis_store(
    redis: RedisClient,
    clock_ms: Callable[[], int],
    retention: timedelta = timedelta(days=30),
    sighting: timedelta = timedelta(hours=1),
    timeout_s: float = 30.0,
    keys: Keys | None = None,
) -> Store:
    """The store on Redis.

    Args:
        redis: Client that returns bytes.
        clock_ms: Unix milliseconds, for the index of federations.
        retention: Life of everything after the last change of its federation.
        sighting: Life of a sighting.
        timeout_s: Seconds after which an operation fails with STORE_UNAVAILABLE.
        keys: Names of the keys.
    """
    database = Database(
        redis, clock_ms=clock_ms, retention_ms=_ms(retention), timeout_s=timeout_s, keys=keys or Keys()
    )
    rounds, members = RoundStore(database), MemberStore(database)
    return Store(
        federations=FederationStore(database),
        rounds=rounds,
        updates=UpdateStore(database),
        committees=CommitteeStore(database),
        members=members,
        presence=PresenceStore(database, _ms(sighting)),
        plans=PlanStore(database),
        leases=LeaseStore(database),
        disposal=Disposal(database, rounds, members),
    )


def _ms(duration: timedelta) -> int:
    return int(duration / timedelta(milliseconds=1))
