"""Records to messages: a federation for operators, an assignment for agents."""

from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from coordinator.aggregation import digest_to_proto
from coordinator.assignments import (
    Assignment,
    Finish,
    Halt,
    MakePlan,
    Serve,
    ServeStep,
    Train,
    Vote,
    Wait,
)
from coordinator.committees import context_of
from coordinator.openings import certificate_of
from coordinator.records import (
    Commit,
    EarlyStopping,
    EvaluationRecord,
    FederationRecord,
    MemberRecord,
    Negotiation,
    PlanRecord,
    RoundRecord,
    Sighting,
    Statement,
)
from coordinator.store import Store
from coordinator.votes import votes_of
from services.common.single_flight import SingleFlight
from shelora.errors import DomainError, Reason
from shelora.messages import layout_to_proto, matrix_to_proto
from shelora.protocol import Stage
from shelora.rounds import RoundState
from shelora.v1 import common_pb2
from shelora.v1 import coordinator_pb2 as pb

NEVER_SEEN_MS: Final = 2**63 - 1
HISTORY_BYTES: Final = 2**20
"""Size at which a page of history is full. The round that fills it, members and the current round come on top: each
about 100 bytes a client and report, so that a federation of 10 000 agents stays within a message."""
GONE_MS: Final = 60_000
"""Silence after which what a member last said of itself is not shown any more, if its federation has ended."""
_MISFIT: Final = (Reason.MODEL_MISMATCH.value, "its model is not that of more than half of those who joined")
KEPT_ASSIGNMENTS: Final = 64
"""Rendered assignments kept for the next agent: an identifier names the work by all that fixes it."""

_Summary: TypeAlias = Callable[[FederationRecord, RoundRecord], Awaitable[pb.RoundSummary]]


class Renderer:
    """Reads what a message needs beyond the record at hand."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._assignments: SingleFlight[str, pb.Assignment] = SingleFlight(KEPT_ASSIGNMENTS)

    async def federation(
        self,
        record: FederationRecord,
        now_ms: int,
        view: pb.FederationView.ValueType = pb.FEDERATION_VIEW_UNSPECIFIED,
        history_after: int = 0,
    ) -> pb.Federation:
        """A federation, as much of it as the view names; of its history a page."""
        federation = pb.Federation(
            federation_id=record.federation_id,
            spec=record.spec.to_proto(),
            phase=pb.Phase.Value(f"PHASE_{record.phase}"),
            failure=record.failure,
            member_count=await self._member_count(record),
            trained_rounds=record.trained,
            now_unix_ms=now_ms,
            stopped=record.stopped,
            deleting=record.deleting,
            sits_out=record.sits_out,
            epoch=record.epoch if record.key_id else 0,
            rotation_pending=record.rotation_due and not record.ended,
        )
        federation.spec.round.rounds = record.rounds
        if record.early_stopping is not None:
            federation.early_stopping.CopyFrom(
                _early_stopping_to_proto(record.early_stopping, ended=record.converged)
            )
        if view == pb.FEDERATION_VIEW_UNSPECIFIED:
            federation.members.extend(await self._members(record, now_ms))
            federation.applicants.extend(await self._applicants(record))
            if (current := await self._current(record, self._summary)) is not None:
                federation.current.CopyFrom(current)
        if view in {pb.FEDERATION_VIEW_UNSPECIFIED, pb.FEDERATION_VIEW_HISTORY}:
            await self._add_history(federation, record, history_after)
        return federation

    async def listed(self, record: FederationRecord) -> pb.Federation:
        """A federation in a line: counts, and the current round without reports. Costs the same whatever its size."""
        federation = await self.federation(record, 0, pb.FEDERATION_VIEW_SPECIFICATION)
        if (current := await self._current(record, self._without_reports)) is not None:
            federation.current.CopyFrom(current)
        return federation

    async def _member_count(self, record: FederationRecord) -> int:
        """Members, without reading them all: those that joined, less the revoked."""
        count = await self._store.members.count(record.federation_id)
        for client_id in record.revoked:
            member = await self._store.members.find(record.federation_id, client_id)
            count -= member is not None and not record.admits(member)
        return count

    async def _members(self, record: FederationRecord, now_ms: int) -> list[pb.Member]:
        joined = await self._store.members.all(record.federation_id)
        members = {name: member for name, member in joined.items() if record.admits(member)}
        sightings = await self._store.presence.sightings(record.federation_id, list(members))
        copies = await self._store.presence.copies(record.federation_id)
        troubles = await self._troubles(record)
        misfits = members if record.split else [n for n, member in members.items() if not record.fits(member)]
        troubles |= dict.fromkeys(misfits, _MISFIT)
        shown = []
        for name, member in members.items():
            message = member_to_proto(member, sightings.get(name), now_ms, troubles.get(name))
            message.copy_refused_unix_ms = copies.get(name, 0)
            if record.ended and message.idle_ms > GONE_MS and message.stage != Stage.FINISHED:
                message.stage, message.progress = "", 0.0
            shown.append(message)
        return shown

    async def _applicants(self, record: FederationRecord) -> list[pb.Applicant]:
        """Who could not join, without those that were revoked since."""
        said = await self._store.members.applicants(record.federation_id)
        return [
            pb.Applicant(client_id=name, reason=seen.reason or "", why=seen.why, said_unix_ms=seen.at_ms)
            for name, seen in said.items()
            if seen.at_ms > record.revoked.get(name, 0)
        ]

    async def _troubles(self, record: FederationRecord) -> dict[str, tuple[str, str]]:
        """Members that refuse the plan in force, with their words."""
        if record.plan is None:
            return {}
        objections = await self._store.plans.objections(record, record.plan.number)
        return {name: (said.reason.value, said.why) for name, said in objections.items()}

    async def _add_history(self, federation: pb.Federation, record: FederationRecord, after: int) -> None:
        """Adds ended rounds until the page is full; one at least, however large it is."""
        current = record.ticket.sequence if record.ticket else 0
        room = HISTORY_BYTES
        for sequence in range(after + 1, record.sequence + 1):
            found = await self._store.rounds.read(record, sequence) if sequence != current else None
            if found is None:
                continue
            if room <= 0:
                federation.more_history = True
                return
            summary = await self._summary(record, found.record)
            federation.history.append(summary)
            room -= summary.ByteSize()

    async def _current(self, record: FederationRecord, summary: _Summary) -> pb.RoundSummary | None:
        ticket = record.ticket
        if ticket is None:
            return None
        found = await self._store.rounds.read(record, ticket.sequence)
        if found is not None:
            return await summary(record, found.record)
        return pb.RoundSummary(
            round_id=record.round_id(ticket.sequence),
            kind=pb.RoundKind.Value(f"ROUND_KIND_{ticket.kind}"),
            number=ticket.number,
            attempt=ticket.attempt,
            state=pb.ROUND_STATE_SELECTING,
            sequence=ticket.sequence,
        )

    async def _without_reports(self, federation: FederationRecord, record: RoundRecord) -> pb.RoundSummary:
        aggregating = record.round.state is RoundState.AGGREGATING
        shards = await self._store.rounds.shards(federation, record) if aggregating else {}
        count = await self._store.updates.count(federation, record.sequence)
        return round_to_proto(record, count, shards_done=len(record.results) or len(shards))

    async def _summary(self, federation: FederationRecord, record: RoundRecord) -> pb.RoundSummary:
        summary = await self._without_reports(federation, record)
        commits = await self._store.updates.commits(federation, record.sequence)
        committed = {commit.update.client_id for commit in commits}
        refusals = await self._store.updates.refusals(federation, record.sequence)
        left_out = record.dropped_ids | committed
        dropped = [*record.dropped, *(drop for drop in refusals if drop.client_id not in left_out)]
        evaluations = await self._store.rounds.evaluations(federation, record.sequence)
        summary.update_count = len(commits)
        summary.upload_bytes = sum(commit.update.report.upload_bytes for commit in commits)
        summary.updates.extend(_report_to_proto(commit) for commit in commits)
        summary.dropped.extend(pb.DroppedUpdate(**drop.model_dump(exclude={"format"})) for drop in dropped)
        objections = await self._store.rounds.objections(federation, record.sequence)
        summary.objections.extend(pb.Objection(client_id=said.client_id, why=said.why) for said in objections)
        summary.evaluations.extend(_evaluation_to_proto(evaluation) for evaluation in evaluations)
        return summary

    async def assignment(self, federation: FederationRecord, assignment: Assignment) -> pb.Assignment:
        """An assignment with the layouts and results it refers to.

        The same object for all who are assigned the same, but for a notice.

        Raises: ROUND_UNKNOWN, RESULT_UNKNOWN: what it refers to has expired.
        """
        key = f"{federation.federation_id}/{assignment.assignment_id}"
        shared = await self._assignments.get(key, lambda: self._assignment(federation, assignment))
        if not assignment.notice:
            return shared
        own = pb.Assignment(
            notice=assignment.notice,
            notice_reason=assignment.notice_reason,
            notice_round_id=assignment.notice_round_id,
        )
        own.MergeFrom(shared)
        return own

    async def _assignment(self, federation: FederationRecord, assignment: Assignment) -> pb.Assignment:
        message = pb.Assignment(assignment_id=assignment.assignment_id)
        match assignment.work:
            case Wait(why):
                message.wait.why = why
            case Halt(why, sequence, plan):
                message.halt.why = why
                if sequence:
                    message.halt.result.CopyFrom(await self._result(federation, sequence))
                if sequence and (reference := await self._plan(federation, plan)):
                    message.halt.plan.CopyFrom(reference)
            case Vote(round_):
                message.vote.CopyFrom(pb.Vote(round=await self._round(federation, round_)))
            case MakePlan(negotiation):
                message.make_plan.CopyFrom(await self._make_plan(federation, negotiation))
            case Train() as train:
                message.train.CopyFrom(await self._train(federation, train))
            case Serve(round_, step):
                message.serve.CopyFrom(await self._serve(federation, round_, step))
            case Finish(sequence, plan):
                result = await self._result(federation, sequence)
                message.finish.CopyFrom(pb.Finish(result=result, plan=await self._plan(federation, plan)))
        return message

    async def _round(self, federation: FederationRecord, record: RoundRecord) -> pb.RoundRef:
        return pb.RoundRef(
            round_id=record.round.round_id,
            number=record.round.number,
            attempt=record.round.attempt,
            layout=await self._layout(federation, record.layout_digest),
            deadline_unix_ms=record.round.deadline_ms,
            epoch=record.epoch,
            context=context_of(federation, record).to_proto() if record.round.convenes else None,
        )

    async def _serve(self, federation: FederationRecord, record: RoundRecord, step: ServeStep) -> pb.Serve:
        serve = pb.Serve(
            round=await self._round(federation, record), step=pb.Serve.Step.Value(f"STEP_{step}")
        )
        if step is ServeStep.SIGN:
            serve.proposed = bytes.fromhex(record.proposed)
        if step is ServeStep.ANSWER:
            signed = await self._store.committees.statements(Statement.SIGNATURE, federation, record.sequence)
            serve.certificate.CopyFrom(certificate_of(record, signed))
        return serve

    async def _make_plan(self, federation: FederationRecord, negotiation: Negotiation) -> pb.MakePlan:
        return pb.MakePlan(
            plan_number=negotiation.plan_number,
            votes=await self._result(federation, negotiation.votes_sequence),
            tiers=negotiation.tiers,
            matrices=[matrix_to_proto(m) for m in federation.model.matrices] if federation.model else [],
        )

    async def _train(self, federation: FederationRecord, train: Train) -> pb.Train:
        base = train.base_sequence
        return pb.Train(
            round=await self._round(federation, train.round),
            plan=await self._plan(federation, train.plan),
            base=await self._result(federation, base) if base else None,
            base_plan=await self._plan(federation, train.base_plan),
        )

    async def _plan(self, federation: FederationRecord, plan: PlanRecord | None) -> pb.PlanRef | None:
        if plan is None:
            return None
        sequence = plan.negotiation.votes_sequence
        return pb.PlanRef(
            plan_number=plan.number,
            digest=digest_to_proto(plan.digest),
            votes=None if votes_of(federation).by_ballots else await self._result(federation, sequence),
            vote_round_id=federation.round_id(sequence),
        )

    async def _result(self, federation: FederationRecord, sequence: int) -> common_pb2.ResultRef:
        found = await self._store.rounds.read(federation, sequence)
        if found is None:
            raise DomainError(Reason.RESULT_UNKNOWN, "the result that the assignment refers to has expired")
        record = found.record
        return common_pb2.ResultRef(
            round_id=record.round.round_id,
            round_number=record.round.number,
            layout=await self._layout(federation, record.layout_digest),
            shards=[digest_to_proto(digest) for digest in record.results],
            contributor_count=record.contributor_count,
            epoch=record.epoch,
        )

    async def _layout(self, federation: FederationRecord, digest: str) -> common_pb2.Layout:
        return layout_to_proto((await self._store.rounds.layout(federation.federation_id, digest)).layout())


def member_to_proto(
    member: MemberRecord, seen: Sighting | None, now_ms: int, trouble: tuple[str, str] | None = None
) -> pb.Member:
    """A member. `trouble`: a Reason and words that count more than what it says itself."""
    said = (seen.reason or "", seen.why) if seen else ("", "")
    reason, why = trouble or said
    return pb.Member(
        client_id=member.client_id,
        rank=member.rank,
        budget=member.budget,
        example_count=member.example_count,
        idle_ms=max(0, now_ms - seen.at_ms) if seen else NEVER_SEEN_MS,
        stage=seen.stage if seen else "",
        progress=seen.progress if seen else 0.0,
        reason=reason,
        why=why,
        certificate_ends_unix_ms=seen.certificate_ends_ms if seen else 0,
    )


def round_to_proto(record: RoundRecord, update_count: int, shards_done: int) -> pb.RoundSummary:
    """A round without what its clients reported."""
    round_ = record.round
    return pb.RoundSummary(
        round_id=round_.round_id,
        kind=pb.RoundKind.Value(f"ROUND_KIND_{round_.kind}"),
        number=round_.number,
        attempt=round_.attempt,
        state=pb.RoundState.Value(f"ROUND_STATE_{round_.state}"),
        reason=round_.reason or "",
        cohort_count=len(round_.cohort),
        update_count=update_count,
        opened_unix_ms=round_.opened_ms,
        ended_unix_ms=round_.ended_ms,
        aggregate_cpu_s=record.aggregate_cpu_s,
        aggregate_wall_s=record.aggregate_wall_s,
        shards_done=shards_done,
        shard_count=record.shard_count,
        sequence=record.sequence,
        committee=record.order,
    )


def _report_to_proto(commit: Commit) -> pb.UpdateReport:
    fields = commit.update.report.model_dump(exclude={"format", "base_model"})
    return pb.UpdateReport(client_id=commit.update.client_id, norm=commit.update.norm, **fields)


def _early_stopping_to_proto(seen: EarlyStopping, *, ended: bool) -> pb.EarlyStopping:
    return pb.EarlyStopping(best_round=seen.best, best=seen.value, judged_round=seen.judged, ended=ended)


def _evaluation_to_proto(evaluation: EvaluationRecord) -> pb.EvaluationReport:
    fields = evaluation.model_dump(exclude={"format": True, "means": {"format"}})
    return pb.EvaluationReport(**fields)
