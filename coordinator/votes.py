"""The coordinator's half of a negotiation: where votes go, and what becomes of them. One object a protocol.

`protection.negotiation` names it; docs/negotiation.md says who learns what. Agents' half: `client_agent.negotiators`.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final, Protocol

from coordinator.records import (
    Commit,
    FederationRecord,
    Negotiation,
    PlanRecord,
    RankedList,
    RoundRecord,
    StoredDigest,
    UpdateRecord,
)
from coordinator.store import Store
from shelora.negotiation.ballots import Ballot, Tally, ballot_bytes, most_polled
from shelora.negotiation.ranking import tier_ends, total_columns
from shelora.rounds import RoundKind


@dataclass(frozen=True)
class Counted:
    """The outcome of counting ballots."""

    missing: tuple[str, ...] = ()
    """Clients whose committed ballot is not stored; nothing is ranked then."""
    ranked: RankedList | None = None
    """None if no member affords encryption."""


class Votes(Protocol):
    """The coordinator's half of a negotiation protocol. Stateless."""

    @property
    def by_ballots(self) -> bool:
        """Whether votes are ballots that come here. If not, they are updates that aggregation adds up."""

    def outcome(
        self,
        federation: FederationRecord,
        ended: RoundRecord,
        voters: Sequence[str],
        tiers: tuple[float, ...],
        now_ms: int,
    ) -> Mapping[str, Any]:
        """The fields of a federation's record that a published vote changes: a negotiation begins, or a plan is there.

        Args: voters: who committed, in order; tiers: budgets of the members, none if nobody affords encryption.
        """

    async def count(
        self,
        store: Store,
        federation: FederationRecord,
        record: RoundRecord,
        commits: Sequence[Commit],
        tiers: tuple[float, ...],
    ) -> Counted:
        """Counts ballots and keeps the ranked list. Only if votes are ballots."""

    async def drop(self, store: Store, federation: FederationRecord, sequence: int) -> None:
        """Deletes what is kept here of a vote."""


class SealedVotes:
    """Encrypted votes, added up by aggregation; an agent ranks the sums."""

    by_ballots: Final = False

    def outcome(
        self,
        federation: FederationRecord,
        ended: RoundRecord,
        voters: Sequence[str],
        tiers: tuple[float, ...],
        now_ms: int,
    ) -> Mapping[str, Any]:
        """As of `Votes`: one of the voters makes the plan."""
        if not tiers:
            return {"negotiation": None}
        negotiation = Negotiation(
            votes_sequence=ended.sequence,
            votes_layout=ended.layout_digest,
            tiers=tiers,
            candidates=tuple(voters),
            deadline_ms=now_ms + 1000 * federation.spec.round.deadline_s,
        )
        return {"negotiation": negotiation}

    async def count(self, *_: object) -> Counted:
        """Nothing comes here."""
        return Counted()

    async def drop(self, *_: object) -> None:
        """Nothing is kept here."""


class BallotVotes:
    """Ballots of secret labels, ranked here as published, or better (`refine`)."""

    by_ballots: Final = True

    def __init__(self, *, refine: bool) -> None:
        self._refine = refine

    def outcome(
        self,
        federation: FederationRecord,
        ended: RoundRecord,
        voters: Sequence[str],  # noqa: ARG002 - nobody leads
        tiers: tuple[float, ...],  # noqa: ARG002 - those of the ranked list count
        now_ms: int,
    ) -> Mapping[str, Any]:
        """As of `Votes`: the ranked list is in force; no agent makes the plan, and none makes another one."""
        ranked = ended.ranked
        if ranked is None:
            return {}
        number = federation.plan_count + 1
        negotiation = Negotiation(
            votes_sequence=ended.sequence,
            votes_layout=ended.layout_digest,
            tiers=ranked.tiers,
            candidates=(),
            deadline_ms=now_ms,
            plan_number=number,
        )
        plan = PlanRecord(
            number=number, digest=ranked.digest, negotiation=negotiation, tier_columns=ranked.tier_columns
        )
        return {"plan": plan, "plan_count": number}

    async def count(
        self,
        store: Store,
        federation: FederationRecord,
        record: RoundRecord,
        commits: Sequence[Commit],
        tiers: tuple[float, ...],
    ) -> Counted:
        """As of `Votes`, of a bounded sample of the voters."""
        tally, missing = Tally([m.in_features for m in federation.matrices]), []
        for update in _sampled(federation, record, [commit.update for commit in commits]):
            data = await store.updates.ballot(federation, record.sequence, update.client_id)
            if data is None or not _is_of(data, update):  # lost, or replaced while it was being committed
                missing.append(update.client_id)
            else:
                tally.add(await asyncio.to_thread(opened_ballot, data, federation))
        if missing:
            return Counted(missing=tuple(missing))
        ranked, encoded = await asyncio.to_thread(_ranked_list, tally, federation, tiers, refine=self._refine)
        if ranked is not None:
            await store.plans.put(federation.federation_id, ranked.digest.sha256, encoded)
        return Counted(ranked=ranked)

    async def drop(self, store: Store, federation: FederationRecord, sequence: int) -> None:
        """As of `Votes`."""
        await store.updates.drop_ballots(federation, sequence)


_PROTOCOLS: Final[Mapping[str, Votes]] = {
    "sealed": SealedVotes(),
    "ope": BallotVotes(refine=False),
    "ope-refined": BallotVotes(refine=True),
}


def votes_of(federation: FederationRecord) -> Votes:
    """The negotiation of a federation."""
    return _PROTOCOLS[federation.spec.protection.negotiation]


def takes_ballots(federation: FederationRecord, record: RoundRecord) -> bool:
    """Whether a round is a vote whose ballots come here, and not to aggregation."""
    return votes_of(federation).by_ballots and record.round.kind is RoundKind.VOTE


def most_bytes(federation: FederationRecord) -> int:
    """Size of a ballot that names every column."""
    return ballot_bytes(total_columns(federation.matrices))


def opened_ballot(data: bytes, federation: FederationRecord, budget: float = 1.0) -> Ballot:
    """Raises BALLOT_REFUSED."""
    total = total_columns(federation.matrices)
    return Ballot.decode(data, total, tier_ends([budget], total)[0])


def _is_of(data: bytes, update: UpdateRecord) -> bool:
    """Whether this is the ballot that was committed."""
    return [sha256(data).hexdigest()] == [digest.sha256 for digest in update.shards]


def _sampled(
    federation: FederationRecord, record: RoundRecord, updates: Sequence[UpdateRecord]
) -> Sequence[UpdateRecord]:
    """Those whose ballots are ranked, in order: all of them, or as many as there is room for, drawn by the vote."""

    def draw(update: UpdateRecord) -> bytes:
        return sha256(f"{record.round.round_id}/{update.client_id}".encode()).digest()

    most = most_polled(total_columns(federation.matrices))
    drawn = {update.client_id for update in sorted(updates, key=draw)[:most]}
    return [update for update in updates if update.client_id in drawn]


def _ranked_list(
    tally: Tally, federation: FederationRecord, tiers: tuple[float, ...], *, refine: bool
) -> tuple[RankedList | None, bytes]:
    """What is kept of the ranking, and its encoded form; None if no member affords encryption."""
    if not tiers:
        return None, b""
    matrices = federation.matrices
    ranking = tally.rank(tiers, federation.spec.protection.common_weight, refine=refine)
    encoded = ranking.encode()
    digest = StoredDigest(sha256=sha256(encoded).hexdigest(), total_bytes=len(encoded))
    columns = tuple(m.tier_columns for m in ranking.matrices_with_counts(matrices))
    return RankedList(digest=digest, tiers=tiers, tier_columns=columns), encoded
