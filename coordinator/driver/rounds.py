"""Steps of a round: opening it, aggregating its updates, publishing the result."""

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Final

import structlog

from coordinator import transitions
from coordinator.aggregation import AggregationPool, contributions, lacks
from coordinator.decisions import (
    Aggregate,
    OpenRound,
    PublishOpened,
    WriteRound,
    abandon,
    contributors,
    known_means,
    median_train_loss,
    revoked_since,
)
from coordinator.driver.policy import DriverPolicy
from coordinator.driver.writing import Writer
from coordinator.metrics import tell_means
from coordinator.openings import opening_of
from coordinator.records import Commit, Dropped, FederationRecord, RoundRecord, ShardResult, StoredDigest
from coordinator.screening import misfits, outliers
from coordinator.store import Store, Versioned
from coordinator.votes import takes_ballots, votes_of
from shelora.errors import DomainError, Reason
from shelora.rounds import Event, RoundKind, longest_s
from shelora.transport.channel import is_transient

MAX_TTL_S: Final = 30 * 86_400
"""Most that aggregation accepts."""

_log = structlog.get_logger(__name__)


class RoundSteps:
    """Takes decisions about a round. Each leads to one write of its record, or to none if it was overtaken.

    Args:
        store: State.
        writer: Of records.
        aggregation: Aggregation replicas.
        revoked: Revoked clients of a federation, with the time up to which their certificates are, Unix milliseconds.
        clock_ms: Unix milliseconds.
        policy: Times and bounds.
    """

    def __init__(
        self,
        *,
        store: Store,
        writer: Writer,
        aggregation: AggregationPool,
        revoked: Callable[[str], Mapping[str, int]],
        clock_ms: Callable[[], int],
        policy: DriverPolicy,
    ) -> None:
        self._store = store
        self._writer = writer
        self._aggregation = aggregation
        self._revoked = revoked
        self._clock_ms = clock_ms
        self._policy = policy

    async def take(
        self,
        decision: OpenRound | WriteRound | Aggregate | PublishOpened,
        federation: FederationRecord,
        round_: Versioned[RoundRecord] | None,
    ) -> None:
        """Does what was decided, on the revision it was decided on."""
        if round_ is None:  # decisions about a round are made on a round
            raise DomainError(Reason.INTERNAL, "a decision about no round")
        if isinstance(decision, OpenRound):
            write = await self._or_abandoned(decision.record, self._open_round(federation, decision.record))
        elif isinstance(decision, Aggregate):
            write = await self._or_abandoned(decision.record, self.aggregate(federation, decision.record))
        elif isinstance(decision, PublishOpened):
            write = await self._publish_opened(federation, decision.record)
        else:
            write = await self._screened(federation, round_.record, decision)
        if write is None:  # overtaken: decide anew
            return
        await self._writer.round(write.name, federation, write.record, round_.revision)

    async def _screened(
        self, federation: FederationRecord, before: RoundRecord, write: WriteRound
    ) -> WriteRound:
        """The write; a set is not proposed to a committee with updates of another base model: no other set follows."""
        if before.proposed or not write.record.proposed:
            return write
        strangers = misfits(
            contributors(before, await self._store.updates.commits(federation, before.sequence))
        )
        return _without(before, strangers) if strangers else write

    async def _or_abandoned(
        self, record: RoundRecord, work: Coroutine[Any, Any, WriteRound | None]
    ) -> WriteRound | None:
        """The write that the work leads to; abandons the round if it failed for a reason that does not pass.

        WORKER_FAILED passes by its status, but here it has been tried everywhere for as long as is sensible.
        """
        try:
            return await work
        except DomainError as error:
            if is_transient(error) and error.reason is not Reason.WORKER_FAILED:
                raise
            _log.warning(
                "round_failed", round_id=record.round.round_id, reason=error.reason, why=error.message
            )
            return abandon(record, error.reason, self._clock_ms())

    async def _open_round(self, federation: FederationRecord, record: RoundRecord) -> WriteRound:
        if not takes_ballots(federation, record):
            layout = await self._store.rounds.layout(federation.federation_id, record.layout_digest)
            rules = federation.spec.round
            attempts = 1 + 2 * rules.max_attempts  # its own, and those of two rounds that may begin from it
            ttl_s = longest_s(rules.deadline_s, rules.grace) * attempts + self._policy.result_ttl_s
            members = await self._store.members.all(federation.federation_id)
            ranks = {
                name: min(members[name].rank, layout.max_rank)
                for name in record.round.cohort
                if name in members
            }
            await self._aggregation.open_round(
                record.round.round_id, layout.layout(), min(ttl_s, MAX_TTL_S), ranks
            )
        now_ms = self._clock_ms()
        opened = record.round.advance(Event.OPEN, now_ms)
        return WriteRound("open_round", record.model_copy(update={"round": opened, "step_ms": now_ms}))

    async def aggregate(self, federation: FederationRecord, record: RoundRecord) -> WriteRound | None:
        """Aggregates what is left to aggregate; leads to publication, or to fewer contributors.

        None if a contributor was revoked meanwhile: nothing is published that holds its update.
        """
        commits = contributors(record, await self._store.updates.commits(federation, record.sequence))
        if not record.round.convenes and (strangers := misfits(commits)):
            return _without(record, strangers)
        settled = {Reason.CERTIFICATE_REVOKED, Reason.MODEL_MISMATCH}
        screened = any(drop.reason not in settled for drop in record.dropped)
        if record.round.kind is RoundKind.TRAIN and not screened and not record.round.convenes:
            found = outliers(federation.spec.screening, commits)
            if found:
                return _without(record, found)
        if len(commits) < record.round.min_updates:
            why = record.dropped[-1].reason if record.dropped else Reason.SHARD_MISSING
            return abandon(record, why, self._clock_ms())
        write = await self._aggregated(federation, record, commits)
        return None if revoked_since(record, self._revoked(federation.federation_id)) else write

    async def _aggregated(
        self, federation: FederationRecord, record: RoundRecord, commits: list[Commit]
    ) -> WriteRound | None:
        """Leads to publication; None if the answers of a committee are waited for."""
        if takes_ballots(federation, record):
            return await self._rank(federation, record, commits)
        try:
            shards = await self._aggregate_shards(federation, record, commits)
        except DomainError as error:
            if error.reason is not Reason.SHARD_MISSING:
                raise
            if record.round.convenes:  # the certified set cannot change
                return abandon(record, error.reason, self._clock_ms())
            return await self._drop(record, commits)
        if record.round.convenes:
            return None
        if record.round.kind is RoundKind.TRAIN:
            tell_means(federation.federation_id, train_loss=median_train_loss(commits), accuracy=None)
        return self._published(record, len(commits), [shards[i] for i in range(record.shard_count)])

    async def _rank(
        self, federation: FederationRecord, record: RoundRecord, commits: list[Commit]
    ) -> WriteRound:
        """Ranks the ballots of a vote; leads to its publication."""
        members = await self._store.members.all(federation.federation_id)
        tiers = transitions.budgets(federation.admitted(members))
        counted = await votes_of(federation).count(self._store, federation, record, commits, tiers)
        if counted.missing:
            return _without(record, _lost(counted.missing))
        record = record.model_copy(update={"ranked": counted.ranked})
        return self._published(record, len(commits), [])

    async def _aggregate_shards(
        self, federation: FederationRecord, record: RoundRecord, commits: list[Commit]
    ) -> dict[int, ShardResult]:
        """All shards, those done before included; several at once."""
        shards = await self._store.rounds.shards(federation, record)
        slots = asyncio.Semaphore(self._policy.concurrency)

        async def aggregate(index: int) -> None:
            async with slots:
                parts = contributions(record.round.kind, index, commits, federation.spec.screening)
                shards[index] = await self._aggregation.aggregate(record.round.round_id, index, parts)
                await self._store.rounds.put_shard(federation, record, index, shards[index])

        await _all(*(aggregate(index) for index in range(record.shard_count) if index not in shards))
        return shards

    async def _publish_opened(self, federation: FederationRecord, record: RoundRecord) -> WriteRound | None:
        """Puts down what opens the sum; leads to publication. None if a contributor was revoked meanwhile."""
        commits = contributors(record, await self._store.updates.commits(federation, record.sequence))
        shards = await self._store.rounds.shards(federation, record)
        if len(shards) != record.shard_count:  # they have expired: aggregate again
            return None
        opening = await opening_of(self._store, federation, record)
        digest = StoredDigest(sha256=hashlib.sha256(opening).hexdigest(), total_bytes=len(opening))
        await self._store.committees.put_opening(federation.federation_id, digest.sha256, opening)
        record = record.model_copy(update={"opening": digest})
        if revoked_since(record, self._revoked(federation.federation_id)):
            return None
        if federation.strategy.shows_factors:
            tell_means(federation.federation_id, train_loss=median_train_loss(commits), accuracy=None)
        elif federation.result_sequence:  # its reports are there: who has committed began from it
            reports = await self._store.rounds.evaluations(federation, federation.result_sequence)
            tell_means(federation.federation_id, **known_means(reports))
        return self._published(record, len(commits), [shards[i] for i in range(record.shard_count)])

    async def _drop(self, record: RoundRecord, commits: list[Commit]) -> WriteRound:
        """Leaves out the clients whose committed shards aggregation does not have (any more)."""
        round_id = record.round.round_id
        missing = [
            update.client_id
            for update in (commit.update for commit in commits)
            if lacks(await self._aggregation.stored(round_id, update.client_id), update.shards)
        ]
        if not missing:
            return abandon(record, Reason.SHARD_MISSING, self._clock_ms())
        return _without(record, _lost(missing))

    def _published(
        self, record: RoundRecord, contributor_count: int, shards: list[ShardResult]
    ) -> WriteRound:
        now_ms = self._clock_ms()
        published = record.model_copy(
            update={
                "round": record.round.advance(Event.PUBLISH, now_ms),
                "contributor_count": contributor_count,
                "results": tuple(shard.digest for shard in shards),
                "aggregate_cpu_s": sum(shard.cpu_s for shard in shards),
                "aggregate_wall_s": (now_ms - record.closed_ms) / 1000,
            }
        )
        return WriteRound("publish_round", published)


def _without(record: RoundRecord, left_out: Sequence[Dropped]) -> WriteRound:
    """Leaves updates out of a round's aggregate."""
    reasons = {drop.client_id: drop.reason for drop in left_out}
    _log.warning("updates_dropped", round_id=record.round.round_id, reasons=reasons)
    dropped = (*record.dropped, *left_out)
    return WriteRound("drop_contributor", record.model_copy(update={"dropped": dropped}))


def _lost(client_ids: Iterable[str]) -> list[Dropped]:
    """Updates that are not stored any more."""
    why = "the update was lost from the store after it was committed: nothing to do"
    return [Dropped(client_id=name, reason=Reason.SHARD_MISSING, why=why) for name in client_ids]


async def _all(*works: Coroutine[Any, Any, None]) -> None:
    """Runs several things at once. The first that fails cancels the others, and its error is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
