"""What a member should do now, derived from the federation's state alone.

An assignment's identifier names the work by what fixes it (a round, a plan number, a reason to wait), so it changes
if and only if the work changes, on whichever replica it is derived.
"""

import hashlib
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, TypeAlias

from coordinator.records import FederationRecord, Negotiation, Phase, PlanRecord, RoundRecord
from shelora.rounds import RoundKind, RoundState


@dataclass(frozen=True)
class Wait:
    """Nothing to do yet."""

    why: str


@dataclass(frozen=True)
class Vote:
    """Score the columns for this round."""

    round: RoundRecord


@dataclass(frozen=True)
class MakePlan:
    """Rank the votes and publish the plan."""

    negotiation: Negotiation


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train for this round."""

    round: RoundRecord
    plan: PlanRecord | None
    base_sequence: int
    """Round whose result is the start; 0 for the keyed initial factors."""
    base_plan: PlanRecord | None


class ServeStep(StrEnum):
    """What a member of a committee does next."""

    CHECK = "CHECK"
    SIGN = "SIGN"
    ANSWER = "ANSWER"


@dataclass(frozen=True)
class Serve:
    """Serve on the committee of a round that has stopped collecting."""

    round: RoundRecord
    step: ServeStep


@dataclass(frozen=True)
class Finish:
    """Apply the final result."""

    result_sequence: int
    plan: PlanRecord | None


@dataclass(frozen=True)
class Halt:
    """The federation has failed, or is being deleted."""

    why: str
    result_sequence: int = 0
    """Round whose result is kept; 0 for none."""
    plan: PlanRecord | None = None


_OPEN: Final = frozenset({RoundState.KEYING, RoundState.COLLECTING})
"""States of a round in which agents train."""

Work: TypeAlias = Wait | Vote | MakePlan | Train | Serve | Finish | Halt


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Work with the identifier under which an agent does it once."""

    assignment_id: str
    work: Work
    notice: str = ""
    """Why the member's newest update was left out, in words; "" if it was not."""
    notice_reason: str = ""
    notice_round_id: str = ""

    @property
    def last(self) -> bool:
        """Whether no other assignment follows."""
        return isinstance(self.work, Finish | Halt)


def assignment_for(
    federation: FederationRecord,
    round_: RoundRecord | None,
    client_id: str,
    *,
    committed: bool,
) -> Assignment:
    """What a member should do.

    Args: round_: the round of the federation's ticket, None if it does not exist; committed: whether the member has
    committed its update to it.
    """
    work = _work(federation, round_, client_id, committed=committed)
    assignment = Assignment(assignment_id=_identifier(federation, work), work=work)
    notice = next((drop for drop in federation.notices if drop.client_id == client_id), None)
    if notice is None:
        return assignment
    about = federation.round_id(federation.noticed_sequence)
    return replace(assignment, notice=notice.why, notice_reason=notice.reason, notice_round_id=about)


def _work(
    federation: FederationRecord, round_: RoundRecord | None, client_id: str, *, committed: bool
) -> Work:
    if federation.deleting:
        return Halt("its operator deletes the federation")
    match federation.phase:
        case Phase.CREATED:
            return Wait("the operator has not started the federation")
        case Phase.FINISHED:
            return Finish(federation.result_sequence, federation.result_plan)
        case Phase.FAILED:
            return Halt(federation.failure, federation.result_sequence, federation.result_plan)
        case Phase.RUNNING if federation.ticket is None:
            return _between_rounds(federation, client_id)
        case _:
            return _in_round(federation, round_, client_id, committed=committed)


def _between_rounds(federation: FederationRecord, client_id: str) -> Work:
    negotiation = federation.negotiation
    if negotiation is not None:
        leads = negotiation.leader == client_id
        return MakePlan(negotiation) if leads else Wait("another agent makes the plan")
    if federation.split:
        return Wait(
            "the agents that joined have different models: more than half must have the same one, or more must join"
        )
    if not federation.sequence:
        enough = f"waiting until {federation.spec.round.clients} agents"
        return Wait(f"{enough} with the same model have joined")
    return Wait("the next round is about to begin")


def _in_round(
    federation: FederationRecord, round_: RoundRecord | None, client_id: str, *, committed: bool
) -> Work:
    if round_ is None or round_.round.state is RoundState.SELECTING:
        return Wait("a round is about to open")
    if round_.round.state not in _OPEN:
        return _once_closed(round_, client_id)
    if committed:
        return Wait("the update is committed; waiting for the other agents")
    if client_id not in round_.round.cohort or client_id in round_.dropped_ids:
        return Wait(_SITS_OUT if client_id == federation.sits_out else _FROM_THE_NEXT)
    if round_.round.kind is RoundKind.VOTE:
        return Vote(round_)
    plan = federation.ticket.plan if federation.ticket else None
    return Train(
        round=round_, plan=plan, base_sequence=federation.result_sequence, base_plan=federation.result_plan
    )


_FROM_THE_NEXT: Final = "a round is in progress; this agent takes part from the next one"
_SITS_OUT: Final = (
    "most agents refused or could not open results with this agent's update; they go on without it"
)


def _once_closed(round_: RoundRecord, client_id: str) -> Work:
    """No update counts any more: the committee's members serve."""
    certifying = round_.round.state is RoundState.CERTIFYING
    if client_id in round_.order and not round_.round.ended:
        if not certifying:
            return Serve(round_, ServeStep.ANSWER)
        return Serve(round_, ServeStep.SIGN if round_.proposed else ServeStep.CHECK)
    if certifying:
        return Wait("the committee is agreeing on the updates that count")
    return Wait("the updates are being aggregated")


def _identifier(federation: FederationRecord, work: Work) -> str:
    match work:
        case Vote(round_) | Train(round=round_):
            return f"{round_.round.kind.lower()}/{round_.round.round_id}"
        case Serve(round_, step):
            return f"serve/{round_.round.round_id}/{step.lower()}"
        case MakePlan(negotiation):
            return f"plan/{federation.federation_id}.{federation.instance}/{negotiation.plan_number}"
        case Finish(sequence):
            return f"finish/{federation.round_id(sequence)}"
        case Halt(why=why) | Wait(why):
            return f"{type(work).__name__.lower()}/{hashlib.sha256(why.encode()).hexdigest()[:16]}"
