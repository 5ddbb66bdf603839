"""The use cases behind the RPCs: who may do what, in which order, on which records."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, TypeAlias

import structlog

from coordinator import checks, transitions
from coordinator.aggregation import AggregationPool, lacks
from coordinator.assignments import Assignment, MakePlan, Train, Vote, assignment_for
from coordinator.changes import Changes
from coordinator.convening import Convening
from coordinator.liveness import USUAL, Liveness
from coordinator.metrics import REFUSALS_TOTAL, UPDATES_TOTAL, await_evaluations, tell_evaluation
from coordinator.records import (
    Dropped,
    Evaluation,
    FederationRecord,
    Member,
    Phase,
    RoundRecord,
    Sighting,
    StoredDigest,
    Update,
)
from coordinator.screening import require_believable
from coordinator.store import CommitOutcome, Store
from coordinator.votes import most_bytes, opened_ballot, takes_ballots
from services.shell.sharing import Shared
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.lora.screening import update_norm
from shelora.rounds import RoundKind, RoundState
from shelora.transport.pieces import Digest, collect
from shelora.v1 import committee_pb2, common_pb2

MAX_PLAN_BYTES: Final = 64 * 2**20
"""Largest sealed plan: four bytes a column, so sixteen million columns."""

_OUTCOMES: Final = {
    CommitOutcome.COMMITTED: "committed",
    CommitOutcome.REPEATED: "repeated",
    CommitOutcome.REWRITTEN: "rewritten",
    CommitOutcome.NOT_COLLECTING: "late",
}

FEW_SHARDS: Final = 64
"""Digests of a commit that are converted in less time than its round is read."""

WATCHED_FEDERATIONS: Final = 64
"""Federations whose state is kept at hand for watching agents."""

_Look: TypeAlias = tuple[FederationRecord, RoundRecord | None]
_LookKey: TypeAlias = tuple[str, tuple[int, int], int]
"""Federation, version of its state, time in units of `watch_poll_s`."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Limits:
    """How much a coordinator takes on. Those who come at the same moment may pass a limit by their number."""

    max_federations: int = 1000
    """Federations, ended ones included until their state expires."""
    max_members: int = 20_000
    """Members of one federation."""
    result_life_s: int = 7 * 86_400
    """Seconds that aggregation keeps the result of a federation that has ended, at least."""


@dataclass(frozen=True)
class Handlers:
    """The coordinator's use cases.

    Attributes:
        store: State.
        changes: Wake-ups.
        aggregation: Asked what has arrived of an update before it is committed.
        clock_ms: Unix milliseconds.
        new_instance: Eight random hex digits.
        watch_poll_s: Longest time between two looks of a watching agent's stream.
        limits: How much it takes on.
        liveness: How often members beat.
        looks: What watching agents see, read from the store once a change for all of them.
    """

    store: Store
    changes: Changes
    aggregation: AggregationPool
    clock_ms: Callable[[], int]
    new_instance: Callable[[], str]
    watch_poll_s: float = 5.0
    limits: Limits = Limits()
    liveness: Liveness = USUAL
    looks: Shared[_LookKey, _Look] = field(default_factory=lambda: Shared(WATCHED_FEDERATIONS))
    root: bytes = b""
    """Certificate of the authority in DER, whose clients' statements are believed; those of nobody without."""

    @cached_property
    def convening(self) -> Convening:
        """The use cases of committees."""
        return Convening(self.store, self.changes, self.clock_ms, self.root)

    async def create(self, spec: FederationSpec) -> FederationRecord:
        """Creates a federation, or finds it created.

        Raises: FEDERATION_EXISTS for another specification, LIMIT_REACHED.
        """
        await self._require_room(spec)
        record = FederationRecord(
            federation_id=spec.name, instance=self.new_instance(), spec=spec, created_ms=self.clock_ms()
        )
        if await self.store.federations.write("create_federation", record, None):
            _log.info("federation_created", federation_id=spec.name)
            return record
        found = (await self.store.federations.read(spec.name)).record
        if found.spec != spec:
            raise DomainError(
                Reason.FEDERATION_EXISTS,
                f"federation {spec.name} exists with another specification: choose another name",
            )
        return found

    async def _require_room(self, spec: FederationSpec) -> None:
        if spec.round.clients > self.limits.max_members:
            raise _limit(
                f"round.clients = {spec.round.clients} can never join: this coordinator takes "
                f"{self.limits.max_members} members a federation (max_members)"
            )
        names = await self.store.federations.ids()
        if len(names) >= self.limits.max_federations and spec.name not in names:
            raise _limit(
                f"this coordinator holds {len(names)} federations, the most it takes (max_federations): wait until "
                "ended ones expire, or raise it"
            )

    async def start(self, federation_id: str) -> FederationRecord:
        """Lets a federation begin. Raises FEDERATION_UNKNOWN, FEDERATION_CLOSED."""
        return await self.store.federations.transact("start_federation", federation_id, transitions.started)

    async def rotate(self, federation_id: str, from_epoch: int) -> FederationRecord:
        """Has a federation leave an epoch. Raises FEDERATION_UNKNOWN, FEDERATION_CLOSED, INVALID_ARGUMENT."""
        return await self.store.federations.transact(
            "ask_rotation", federation_id, lambda r: transitions.rotation_asked(r, from_epoch)
        )

    async def stop(self, federation_id: str) -> FederationRecord:
        """Has a federation end with its newest result. Raises FEDERATION_UNKNOWN."""
        record = await self.store.federations.transact("ask_stop", federation_id, transitions.stop_asked)
        _log.info("stop_asked", federation_id=federation_id, trained=record.trained)
        return record

    async def extend(self, federation_id: str, rounds: int) -> FederationRecord:
        """Has a federation train so many rounds in all.

        Raises: FEDERATION_UNKNOWN, INVALID_ARGUMENT, FEDERATION_CLOSED.
        """
        before = (await self.store.federations.read(federation_id)).record
        if before.phase is Phase.FINISHED and transitions.extended(before, rounds) != before:
            await self._require_result(before)
        record = await self.store.federations.transact(
            "extend_federation", federation_id, lambda r: transitions.extended(r, rounds)
        )
        _log.info("federation_extended", federation_id=federation_id, rounds=record.rounds)
        return record

    async def _require_result(self, record: FederationRecord) -> None:
        """Raises: FEDERATION_CLOSED unless aggregation still keeps the result that a finished federation ended with."""
        found = await self.store.rounds.read(record, record.result_sequence)
        if found is None or self.clock_ms() > found.record.round.ended_ms + 1000 * self.limits.result_life_s:
            raise DomainError(
                Reason.FEDERATION_CLOSED,
                f"federation {record.federation_id} finished so long ago that its last result is stored no longer "
                "(result_ttl_days): create another one; agents keep the adapter",
            )

    async def delete(self, federation_id: str) -> None:
        """Has everything of a federation deleted. Raises FEDERATION_UNKNOWN."""
        await self.store.federations.transact("ask_deletion", federation_id, transitions.deletion_asked)
        _log.info("deletion_asked", federation_id=federation_id)

    async def federations(self) -> list[FederationRecord]:
        """All federations, by name. One that expires meanwhile is left out."""
        records = []
        for federation_id in await self.store.federations.ids():
            with suppress(DomainError):
                records.append((await self.store.federations.read(federation_id)).record)
        return records

    async def join(
        self,
        federation_id: str,
        member: Member,
        matrices: Sequence[common_pb2.Matrix],
        tensors: Sequence[common_pb2.Tensor],
    ) -> FederationRecord:
        """Makes a client a member. Raises INVALID_ARGUMENT, MODEL_MISMATCH, FEDERATION_CLOSED, LIMIT_REACHED."""
        record = (await self.store.federations.read(federation_id)).record
        model = await asyncio.to_thread(checks.model, record.spec, matrices, tensors, record.model)
        transitions.required_model(record, model)
        checks.require_rank(record.spec, model, member.rank)
        if not await self.store.members.has(federation_id, member.client_id):
            count = await self.store.members.count(federation_id)
            if count >= self.limits.max_members:
                raise _limit(
                    f"the federation has {count} members, the most this coordinator takes (max_members)"
                )
        await self._touch(
            federation_id, member.client_id
        )  # before it is a member, so that it is never one unseen
        if not record.sequence:
            await self.store.members.put_shapes(federation_id, member.client_id, model)
        await self.store.members.put(federation_id, member.model_copy(update={"shapes": model.digest}))
        _log.info("client_joined", federation_id=federation_id, client_id=member.client_id, rank=member.rank)
        return record

    async def heartbeat(self, federation_id: str, client_id: str, seen: Sighting, session: str = "") -> float:
        """Keeps what a member says of itself. Returns seconds until it is to do so again.

        Raises: CLIENT_UNKNOWN, CLIENT_REPLACED.
        """
        members = await self.store.presence.see(federation_id, client_id, seen, session)
        if not members:
            await self._require_member(federation_id, client_id)
        if members < 0:
            _log.warning("copy_refused", federation_id=federation_id, client_id=client_id)
            raise DomainError(
                Reason.CLIENT_REPLACED,
                f"another process with the identity of {client_id} takes part since: two copies of a client count as "
                "one. Stop one of them, and enrol it under a name of its own",
            )
        return self.liveness.interval_s(members)

    async def give_up(self, federation_id: str, assignment_id: str, said: Dropped) -> None:
        """Takes an assignment from a client that cannot do it; nothing if it has another one by now.

        Raises: CLIENT_UNKNOWN.
        """
        client_id = said.client_id
        await self._require_member(federation_id, client_id)
        federation, round_ = await self._look(federation_id)
        assignment = assignment_for(federation, round_, client_id, committed=False)
        if assignment.assignment_id != assignment_id:
            return
        match assignment.work:
            case Vote(record) | Train(record):
                if await self.store.updates.commit_of(federation, record.sequence, client_id) is None:
                    await self.store.updates.put_refusal(federation, record.sequence, said)
            case MakePlan(negotiation):
                number = negotiation.plan_number
                await self.store.federations.transact(
                    "give_up_lead",
                    federation_id,
                    lambda r: transitions.without_leader(r, client_id, number),
                )
        _log.warning(
            "assignment_given_up",
            federation_id=federation_id,
            client_id=client_id,
            reason=said.reason,
            why=said.why,
        )

    async def watch(
        self, federation_id: str, client_id: str, session: str = ""
    ) -> AsyncGenerator[tuple[FederationRecord, Assignment], None]:
        """Assignments as they change, each with the record it was derived from.

        Ends after the last assignment of the federation, or when the process drains. Raises CLIENT_UNKNOWN.
        """
        member = await self._require_member(federation_id, client_id)
        if session:
            await self.store.presence.begin_session(federation_id, client_id, session)
        await self._touch(federation_id, client_id)
        await_evaluations(federation_id)  # they come to where their client watches
        last, commit = "", _OwnCommit()
        with self.changes.subscribed(federation_id, client_id) as signal:
            while not self.changes.closed:
                federation, assignment = await self._assignment(federation_id, client_id, commit)
                if not federation.fits(member):  # joining again tells it how its model differs
                    raise _not_joined()
                if assignment.assignment_id != last:
                    yield federation, assignment
                last = assignment.assignment_id
                if assignment.last:
                    return
                if await signal.wait(self.watch_poll_s):
                    commit.sequence = 0

    async def _assignment(
        self, federation_id: str, client_id: str, commit: "_OwnCommit"
    ) -> tuple[FederationRecord, Assignment]:
        period = self.clock_ms() // int(1000 * self.watch_poll_s)  # also without a change they look again
        key = (federation_id, self.changes.version(federation_id), period)
        federation, round_ = await self.looks.get(key, lambda: self._look(federation_id))
        if round_ is None or round_.round.state is not RoundState.COLLECTING:
            return federation, assignment_for(federation, round_, client_id, committed=False)
        if commit.sequence != round_.sequence:
            found = await self.store.updates.commit_of(federation, round_.sequence, client_id)
            commit.sequence, commit.committed = round_.sequence, found is not None
        return federation, assignment_for(federation, round_, client_id, committed=commit.committed)

    async def _look(self, federation_id: str) -> _Look:
        """A federation, and the round in progress if its record exists."""
        federation = (await self.store.federations.read(federation_id)).record
        ticket = federation.ticket
        found = await self.store.rounds.read(federation, ticket.sequence) if ticket else None
        return federation, found.record if found else None

    async def require_shards(self, federation_id: str, round_id: str, count: int) -> None:
        """Holds the number of a commit's digests against its round, if there are many, before any is converted.

        Raises: ROUND_UNKNOWN, INVALID_ARGUMENT.
        """
        if count > FEW_SHARDS:
            federation = (await self.store.federations.read(federation_id)).record
            _require_count((await self._round(federation, round_id)).shard_count, count)

    async def commit(
        self,
        federation_id: str,
        round_id: str,
        update: Update,
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
        update: Update,
        dealt: committee_pb2.DealtShares | None,
    ) -> tuple[CommitOutcome, int]:
        federation = (await self.store.federations.read(federation_id)).record
        await self._touch(federation_id, update.client_id)
        record = await self._round(federation, round_id)
        checks.require(
            record.round.convenes == (dealt is not None),
            "dealt must be set in a round with a committee, and only there",
        )
        kept = None
        if dealt is not None:
            content = dealt.SerializeToString(deterministic=True)
            update = update.model_copy(update={"dealing": hashlib.sha256(content).hexdigest()})
        earlier = await self.store.updates.commit_of(federation, record.sequence, update.client_id)
        if earlier is None:
            if record.round.state is not RoundState.COLLECTING:
                return CommitOutcome.NOT_COLLECTING, 0
            update = await self._checked(federation, record, update)
            if dealt is not None:
                shards = [bytes.fromhex(shard.sha256) for shard in update.shards]
                kept = self.convening.dealt(federation, record, update.client_id, shards, dealt)
            # Last of all: a sealed update stays as it is, also if it is refused after all.
            await self.aggregation.seal(record.round.round_id, update)
        return await self.store.updates.commit(federation, record.sequence, update, kept)

    async def cast_ballot(
        self, federation_id: str, round_id: str, update: Update, pieces: AsyncIterator[bytes]
    ) -> int:
        """Counts a ballot once. `update` stands for it. Returns the count of the first receipt.

        Raises: ROUND_UNKNOWN, UPDATE_REWRITTEN, ROUND_NOT_COLLECTING, NOT_IN_COHORT, INVALID_ARGUMENT,
        BALLOT_REFUSED, DIGEST_MISMATCH, TRANSFER_*.
        """
        return await _counted(self._cast(federation_id, round_id, update, pieces))

    async def _cast(
        self, federation_id: str, round_id: str, update: Update, pieces: AsyncIterator[bytes]
    ) -> tuple[CommitOutcome, int]:
        federation = (await self.store.federations.read(federation_id)).record
        await self._touch(federation_id, update.client_id)
        record = await self._round(federation, round_id)
        update = update.model_copy(update={"layout_digest": record.layout_digest})
        if await self.store.updates.commit_of(federation, record.sequence, update.client_id) is None:
            ballot = await self._ballot(federation, record, update, pieces)
            await self.store.updates.put_ballot(federation, record.sequence, update.client_id, ballot)
        return await self.store.updates.commit(federation, record.sequence, update)

    async def _ballot(
        self,
        federation: FederationRecord,
        record: RoundRecord,
        update: Update,
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
        member = await self.store.members.find(federation.federation_id, update.client_id)
        await asyncio.to_thread(opened_ballot, data, federation, member.budget if member else 0.0)
        return data

    async def _checked(self, federation: FederationRecord, record: RoundRecord, update: Update) -> Update:
        """The update with its norm. A refusal by policy is kept for the operator."""
        checks.require(not takes_ballots(federation, record), "this vote takes ballots: call CastBallot")
        _require_in_cohort(record, update.client_id)
        if update.layout_digest != record.layout_digest:
            raise DomainError(Reason.LAYOUT_MISMATCH, "the update was made for another layout")
        _require_count(record.shard_count, len(update.shards))
        layout = await self.store.rounds.layout(federation.federation_id, record.layout_digest)
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
        member = await self.store.members.find(federation.federation_id, update.client_id)
        if member is not None:
            checks.require(
                update.rank <= member.rank,
                f"rank must be at most {member.rank}, the rank that this client joined with",
            )
        try:
            require_believable(federation.spec.screening, update, member)
        except DomainError as error:
            refusal = Dropped(client_id=update.client_id, reason=error.reason, why=error.message)
            await self.store.updates.put_refusal(federation, record.sequence, refusal)
            raise
        return update

    async def publish_plan(
        self,
        federation_id: str,
        client_id: str,
        number: int,
        digest: Digest,
        matrices: Sequence[common_pb2.Matrix],
        pieces: AsyncIterator[bytes],
    ) -> None:
        """Takes the leader's sealed plan. Raises NOT_LEADER, INVALID_ARGUMENT, DIGEST_MISMATCH, TRANSFER_*."""
        stored = StoredDigest(sha256=digest.sha256.hex(), total_bytes=digest.total_bytes)
        before = (await self.store.federations.read(federation_id)).record
        counted = checks.plan(before, client_id, number, matrices)

        def published(record: FederationRecord) -> FederationRecord:
            return transitions.with_plan(record, client_id, number, stored, counted)

        if published(before) == before:  # refuses before a byte is read
            return
        sealed = await collect(pieces, digest, MAX_PLAN_BYTES)
        await self.store.plans.put(federation_id, stored.sha256, sealed)
        await self.store.federations.transact("publish_plan", federation_id, published)
        _log.info("plan_published", federation_id=federation_id, client_id=client_id, plan_number=number)

    async def plan(self, federation_id: str, number: int) -> bytes:
        """A sealed plan that is in use. Raises PLAN_UNKNOWN."""
        federation = (await self.store.federations.read(federation_id)).record
        plan = next((plan for plan in federation.plans if plan.number == number), None)
        if plan is None:
            raise DomainError(Reason.PLAN_UNKNOWN, f"plan {number} is not in use")
        return await self.store.plans.read(federation_id, plan.digest.sha256)

    async def reject_plan(
        self, federation_id: str, client_id: str, number: int, sha256: str, why: str
    ) -> None:
        """Notes that a member refuses a plan; the driver discards it if too many do.

        Raises: CLIENT_UNKNOWN, PLAN_UNKNOWN.
        """
        await self._require_member(federation_id, client_id)
        federation = (await self.store.federations.read(federation_id)).record
        if transitions.require_in_force(federation, number, sha256):
            objection = Dropped(client_id=client_id, reason=Reason.PLAN_REFUSED, why=why, gave_up=True)
            await self.store.plans.put_objection(federation, number, objection)
        _log.warning(
            "plan_rejected", federation_id=federation_id, client_id=client_id, plan_number=number, why=why
        )

    async def report_evaluation(self, federation_id: str, round_id: str, evaluation: Evaluation) -> None:
        """Keeps what a member measured. Raises CLIENT_UNKNOWN, ROUND_UNKNOWN."""
        await self._require_member(federation_id, evaluation.client_id)
        await self._touch(federation_id, evaluation.client_id)
        federation = (await self.store.federations.read(federation_id)).record
        record = await self._round(federation, round_id)
        await self.store.rounds.put_evaluation(federation, record.sequence, evaluation)
        right = evaluation.correct_count
        tell_evaluation(federation_id, right, evaluation.example_count - right)

    async def _round(self, federation: FederationRecord, round_id: str) -> RoundRecord:
        sequence = federation.sequence_of(round_id)
        found = await self.store.rounds.read(federation, sequence) if sequence else None
        if found is None:
            raise DomainError(Reason.ROUND_UNKNOWN, "the federation has no such round (any more)")
        return found.record

    async def _require_member(self, federation_id: str, client_id: str) -> Member:
        member = await self.store.members.find(federation_id, client_id)
        if member is None:
            await self.store.federations.read(federation_id)  # FEDERATION_UNKNOWN says more
            raise _not_joined()
        return member

    async def _touch(self, federation_id: str, client_id: str) -> None:
        await self.store.presence.touch(federation_id, client_id, self.clock_ms())


@dataclass
class _OwnCommit:
    """Whether a watching member has committed to a round; asked again after a change, not at every look."""

    sequence: int = 0
    """Round of which it is known; 0 for none."""
    committed: bool = False


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


def _not_joined() -> DomainError:
    return DomainError(Reason.CLIENT_UNKNOWN, "this client has not joined the federation: join first")


def _limit(message: str) -> DomainError:
    return DomainError(Reason.LIMIT_REACHED, message)


def _rewritten() -> DomainError:
    return DomainError(Reason.UPDATE_REWRITTEN, "this client has committed another update to this round")


def _not_collecting() -> DomainError:
    return DomainError(Reason.ROUND_NOT_COLLECTING, "the round does not collect updates (any more)")
