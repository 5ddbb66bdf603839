"""Use cases of a round's cohort: updates and ballots are checked and counted."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from coordinator import checks
from coordinator.aggregation import AggregationPool, lacks
from coordinator.convening import Convening
from coordinator.handlers.lookup import Lookup
from coordinator.metrics import REFUSALS_TOTAL, UPDATES_TOTAL
from coordinator.records import Dropped, FederationRecord, RoundRecord, UpdateRecord
from coordinator.screening import require_believable
from coordinator.store import CommitOutcome
from coordinator.votes import most_bytes, opened_ballot, takes_ballots
from shelora.errors import DomainError, Reason
from shelora.lora.screening import update_norm
from shelora.rounds import RoundKind, RoundState
from shelora.transport.pieces import Digest, collect
from shelora.v1 import committee_pb2

_OUTCOMES: Final = {
    CommitOutcome.COMMITTED: "committed",
    CommitOutcome.REPEATED: "repeated",
    CommitOutcome.REWRITTEN: "rewritten",
    CommitOutcome.NOT_COLLECTING: "late",
}

FEW_SHARDS: Final = 64
"""Digests of a commit that are converted in less time than its round is read."""


@dataclass(frozen=True)
class UpdateHandlers:
    """Commits.

    Attributes:
        lookup: Records.
        aggregation: Asked what has arrived of an update before it is committed.
        committees: Checks what is dealt to a committee.
    """

    lookup: Lookup
    aggregation: AggregationPool
    committees: Convening

    async def require_shards(self, federation_id: str, round_id: str, count: int) -> None:
        """Holds the number of a commit's digests against its round, if there are many, before any is converted.

        Raises: ROUND_UNKNOWN, INVALID_ARGUMENT.
        """
        if count > FEW_SHARDS:
            federation = await self.lookup.federation(federation_id)
            _require_count((await self.lookup.round(federation, round_id)).shard_count, count)

    async def commit(
        self,
        federation_id: str,
        round_id: str,
        update: UpdateRecord,
        dealt: committee_pb2.DealtShares | None = None,
    ) -> int:
        """Counts an update once. Returns the update count of the first receipt.

        Raises: ROUND_UNKNOWN, UPDATE_REWRITTEN, ROUND_NOT_COLLECTING, NOT_IN_COHORT, LAYOUT_MISMATCH,
        INVALID_ARGUMENT, SHARD_MISSING, EXAMPLES_MISMATCH, NORM_TOO_LARGE, DEALING_REFUSED, SIGNATURE_REFUSED.
        """
        return await _counted(self._commit(federation_id, round_id, update, dealt))

    async def _commit(
        self,
        federation_id: str,
        round_id: str,
        update: UpdateRecord,
        dealt: committee_pb2.DealtShares | None,
    ) -> tuple[CommitOutcome, int]:
        federation = await self.lookup.federation(federation_id)
        await self.lookup.touch(federation_id, update.client_id)
        record = await self.lookup.round(federation, round_id)
        checks.require(
            record.round.convenes == (dealt is not None),
            "dealt must be set in a round with a committee, and only there",
        )
        kept = None
        if dealt is not None:
            content = dealt.SerializeToString(deterministic=True)
            update = update.model_copy(update={"dealing": hashlib.sha256(content).hexdigest()})
        earlier = await self.lookup.store.updates.commit_of(federation, record.sequence, update.client_id)
        if earlier is None:
            if record.round.state is not RoundState.COLLECTING:
                return CommitOutcome.NOT_COLLECTING, 0
            update = await self._checked(federation, record, update)
            if dealt is not None:
                shards = [bytes.fromhex(shard.sha256) for shard in update.shards]
                kept = self.committees.dealt(federation, record, update.client_id, shards, dealt)
            # Last of all: a sealed update stays as it is, also if it is refused after all.
            await self.aggregation.seal(record.round.round_id, update)
        return await self.lookup.store.updates.commit(federation, record.sequence, update, kept)

    async def cast_ballot(
        self, federation_id: str, round_id: str, update: UpdateRecord, pieces: AsyncIterator[bytes]
    ) -> int:
        """Counts a ballot once. `update` stands for it. Returns the count of the first receipt.

        Raises: ROUND_UNKNOWN, UPDATE_REWRITTEN, ROUND_NOT_COLLECTING, NOT_IN_COHORT, INVALID_ARGUMENT,
        BALLOT_REFUSED, DIGEST_MISMATCH, TRANSFER_*.
        """
        return await _counted(self._cast(federation_id, round_id, update, pieces))

    async def _cast(
        self, federation_id: str, round_id: str, update: UpdateRecord, pieces: AsyncIterator[bytes]
    ) -> tuple[CommitOutcome, int]:
        federation = await self.lookup.federation(federation_id)
        await self.lookup.touch(federation_id, update.client_id)
        record = await self.lookup.round(federation, round_id)
        update = update.model_copy(update={"layout_digest": record.layout_digest})
        if await self.lookup.store.updates.commit_of(federation, record.sequence, update.client_id) is None:
            ballot = await self._ballot(federation, record, update, pieces)
            await self.lookup.store.updates.put_ballot(federation, record.sequence, update.client_id, ballot)
        return await self.lookup.store.updates.commit(federation, record.sequence, update)

    async def _ballot(
        self,
        federation: FederationRecord,
        record: RoundRecord,
        update: UpdateRecord,
        pieces: AsyncIterator[bytes],
    ) -> bytes:
        """The checked ballot of a member of the cohort of a collecting vote."""
        checks.require(takes_ballots(federation, record), "this round takes no ballots")
        if record.round.state is not RoundState.COLLECTING:
            raise _not_collecting()
        _require_in_cohort(record, update.client_id)
        (announced,) = update.shards
        digest = Digest(bytes.fromhex(announced.sha256), announced.total_bytes)
        data = await collect(pieces, digest, most_bytes(federation))
        member = await self.lookup.store.members.find(federation.federation_id, update.client_id)
        await asyncio.to_thread(opened_ballot, data, federation, member.budget if member else 0.0)
        return data

    async def _checked(
        self, federation: FederationRecord, record: RoundRecord, update: UpdateRecord
    ) -> UpdateRecord:
        """The update with its norm. A refusal by policy is kept for the operator."""
        checks.require(not takes_ballots(federation, record), "this vote takes ballots: call CastBallot")
        _require_in_cohort(record, update.client_id)
        if update.layout_digest != record.layout_digest:
            raise DomainError(Reason.LAYOUT_MISMATCH, "the update was made for another layout")
        _require_count(record.shard_count, len(update.shards))
        layout = await self.lookup.store.rounds.layout(federation.federation_id, record.layout_digest)
        checks.require(
            update.rank <= layout.max_rank, f"rank must be at most {layout.max_rank} in this round"
        )
        stored = await self.aggregation.stored(record.round.round_id, update.client_id)
        if lacks(stored, update.shards):
            raise DomainError(
                Reason.SHARD_MISSING, "not all shards of the update are stored: send them first"
            )
        if record.round.kind is RoundKind.VOTE:
            return update
        norm = update_norm(update.scaling, [shard.squared_norm for shard in stored.values()])
        update = update.model_copy(update={"norm": norm})
        member = await self.lookup.store.members.find(federation.federation_id, update.client_id)
        if member is not None:
            checks.require(
                update.rank <= member.rank,
                f"rank must be at most {member.rank}, the rank that this client joined with",
            )
        try:
            require_believable(federation.spec.screening, update, member)
        except DomainError as error:
            refusal = Dropped(client_id=update.client_id, reason=error.reason, why=error.message)
            await self.lookup.store.updates.put_refusal(federation, record.sequence, refusal)
            raise
        return update


async def _counted(commit: Coroutine[Any, Any, tuple[CommitOutcome, int]]) -> int:
    """The update count of a commit's receipt, measured. Raises UPDATE_REWRITTEN, ROUND_NOT_COLLECTING."""
    try:
        outcome, count = await commit
    except DomainError as error:
        UPDATES_TOTAL.labels("refused").inc()
        REFUSALS_TOTAL.labels(error.reason).inc()
        raise
    UPDATES_TOTAL.labels(_OUTCOMES[outcome]).inc()
    if outcome is CommitOutcome.REWRITTEN:
        raise _rewritten()
    if outcome is CommitOutcome.NOT_COLLECTING:
        raise _not_collecting()
    return count


def _require_count(shard_count: int, count: int) -> None:
    """Raises INVALID_ARGUMENT unless there is a digest for every shard of the round."""
    checks.require(count == shard_count, f"shards must hold {shard_count} digests")


def _require_in_cohort(record: RoundRecord, client_id: str) -> None:
    if client_id not in record.round.cohort or client_id in record.dropped_ids:
        raise DomainError(Reason.NOT_IN_COHORT, "this client was not asked for an update in this round")


def _rewritten() -> DomainError:
    return DomainError(Reason.UPDATE_REWRITTEN, "this client has committed another update to this round")


def _not_collecting() -> DomainError:
    return DomainError(Reason.ROUND_NOT_COLLECTING, "the round does not collect updates (any more)")
