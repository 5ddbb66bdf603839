"""Use cases of members: joining, being heard of, giving up, saying what they measured."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from coordinator import checks, transitions
from coordinator.assignments import MakePlan, Train, Vote, assignment_for
from coordinator.handlers.limits import Limits, limit_reached
from coordinator.handlers.lookup import Lookup
from coordinator.liveness import Liveness
from coordinator.metrics import tell_evaluation
from coordinator.records import Dropped, EvaluationRecord, FederationRecord, MemberRecord, Sighting
from shelora.errors import DomainError, Reason
from shelora.v1 import common_pb2

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class MemberHandlers:
    """What a client says of itself.

    Attributes:
        lookup: Records.
        limits: How much the coordinator takes on.
        liveness: How often members beat.
    """

    lookup: Lookup
    limits: Limits
    liveness: Liveness

    async def join(
        self,
        federation_id: str,
        member: MemberRecord,
        matrices: Sequence[common_pb2.Matrix],
        tensors: Sequence[common_pb2.Tensor],
    ) -> FederationRecord:
        """Makes a client a member. Raises INVALID_ARGUMENT, MODEL_MISMATCH, FEDERATION_CLOSED, LIMIT_REACHED."""
        record = await self.lookup.federation(federation_id)
        model = await asyncio.to_thread(checks.model, record.spec, matrices, tensors, record.model)
        transitions.required_model(record, model)
        checks.require_rank(record.spec, model, member.rank)
        if not await self.lookup.store.members.has(federation_id, member.client_id):
            count = await self.lookup.store.members.count(federation_id)
            if count >= self.limits.max_members:
                raise limit_reached(
                    f"the federation has {count} members, the most this coordinator takes (max_members)"
                )
        await self.lookup.touch(
            federation_id, member.client_id
        )  # before it is a member, so that it is never one unseen
        if not record.sequence:
            await self.lookup.store.members.put_shapes(federation_id, member.client_id, model)
        await self.lookup.store.members.put(federation_id, member.model_copy(update={"shapes": model.digest}))
        _log.info("client_joined", federation_id=federation_id, client_id=member.client_id, rank=member.rank)
        return record

    async def heartbeat(self, federation_id: str, client_id: str, seen: Sighting, session: str = "") -> float:
        """Keeps what a member says of itself, and why another client could not become one.

        Returns: Seconds until it is to do so again.
        Raises: CLIENT_UNKNOWN, CLIENT_REPLACED.
        """
        members = await self.lookup.store.presence.see(federation_id, client_id, seen, session)
        if not members:
            if seen.reason is not None:
                await self.lookup.store.members.put_applicant(federation_id, client_id, seen)
            await self.lookup.member(federation_id, client_id)
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
        await self.lookup.member(federation_id, client_id)
        federation, round_ = await self.lookup.current(federation_id)
        assignment = assignment_for(federation, round_, client_id, committed=False)
        if assignment.assignment_id != assignment_id:
            return
        match assignment.work:
            case Vote(record) | Train(round=record):
                if await self.lookup.store.updates.commit_of(federation, record.sequence, client_id) is None:
                    await self.lookup.store.updates.put_refusal(federation, record.sequence, said)
            case MakePlan(negotiation):
                number = negotiation.plan_number
                await self.lookup.store.federations.transact(
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

    async def object_to_result(self, federation_id: str, round_id: str, said: Dropped) -> None:
        """Keeps that the newest result serves a client badly, once; nothing of another, or of one that servers screen.

        Raises: CLIENT_UNKNOWN.
        """
        client_id = said.client_id
        await self.lookup.member(federation_id, client_id)
        federation = await self.lookup.federation(federation_id)
        sequence = federation.result_sequence
        if not (federation.strategy.needs_committee and sequence):
            return
        if federation.round_id(sequence) != round_id:
            return
        if not await self.lookup.store.rounds.put_objection(federation, sequence, said):
            return
        _log.warning(
            "result_objected_to",
            federation_id=federation_id,
            client_id=client_id,
            round_id=round_id,
            why=said.why,
        )

    async def report_evaluation(
        self, federation_id: str, round_id: str, evaluation: EvaluationRecord
    ) -> None:
        """Keeps what a member measured. Raises CLIENT_UNKNOWN, ROUND_UNKNOWN."""
        await self.lookup.member(federation_id, evaluation.client_id)
        await self.lookup.touch(federation_id, evaluation.client_id)
        federation = await self.lookup.federation(federation_id)
        record = await self.lookup.round(federation, round_id)
        await self.lookup.store.rounds.put_evaluation(federation, record.sequence, evaluation)
        right = evaluation.correct_count
        tell_evaluation(federation_id, right, evaluation.example_count - right)
