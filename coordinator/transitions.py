"""How a federation's record changes: pure functions from record to record, applied by compare-and-set.

A function that finds nothing to change returns the record it was given, so a repeated request writes nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from coordinator import stopping
from coordinator.records import (
    MAX_NOTICES,
    Dropped,
    EvaluationRecord,
    FederationRecord,
    Garbage,
    MemberRecord,
    Model,
    Negotiation,
    Phase,
    PlanRecord,
    ResultRecord,
    RoundRecord,
    StoredDigest,
    Ticket,
)
from coordinator.votes import votes_of
from shelora.committee.context import result_digest
from shelora.errors import DomainError, Reason
from shelora.federation import MAX_ROUNDS
from shelora.lora.layout import Matrix, Tensor
from shelora.rounds import RoundKind, RoundState

MAX_NAMED: Final = 5
"""Clients that the words for a failure name."""
MAX_PLAN_TIERS: Final = 16
"""Tiers of a plan: each costs slots in every matrix, whatever the number of clients."""

MAX_SUSPECTS: Final = 64
"""Clients of a result among which the one that spoils results is looked for. Each costs at most one result; in a larger
cohort one client moves the mean little."""

_SPOILED: Final = (
    "more than half of its clients could not open it, or objected to it. Leaving out one client after another did not "
    "help: more than one client spoils the sums, or too few clients are left without one. Create another federation, "
    "with clients that you trust; if you trust these, with a lower training.learning_rate: honest results can do harm, "
    "too"
)
_STEADY: Final = "see that agents run without interruption, or raise round.committee_s"

WHY: Final[Mapping[Reason, str]] = {
    Reason.TOO_FEW_UPDATES: "fewer than {least} clients sent an update in time; see that enough agents run, or "
    "raise round.deadline_s",
    Reason.SHARD_MISSING: "updates of too many clients were lost from aggregation's store",
    Reason.MODEL_MISMATCH: "the agents have different base models; their logs say which part differs",
    Reason.NORM_OUTLIER: "too few updates were left after those that are too large beside the others; see "
    "`shelora federation show`, and raise screening.max_norm_ratio if those updates are honest",
    Reason.COMMITTEE_INCOMPLETE: f"members of the committee were silent or restarted; {_STEADY}",
    Reason.QUORUM_MISSING: f"too few members of the committee signed the set of updates; {_STEADY}",
    Reason.ANSWERS_MISSING: f"too few members of the committee opened the sum; {_STEADY}",
    Reason.DEALING_REFUSED: "too few updates were left whose keys the committee accepts; see that all agents are of "
    "one version",
    Reason.SET_REFUSED: "clients with many examples stayed away, and one of them could outweigh those that came; "
    "see that enough agents run, or raise round.min_updates",
    Reason.ROUND_UNKNOWN: "aggregation's store lost the round",
    Reason.WORKER_FAILED: "aggregation's workers kept failing",
}
"""Words for the reasons of abandonment that operators meet."""

NO_FAULT: Final = frozenset(
    {
        Reason.PLAN_REFUSED,
        Reason.EPOCH_RETIRED,
        Reason.CERTIFICATE_REVOKED,
        Reason.FEDERATION_CLOSED,
    }
)
"""Reasons that do not count as attempts: bounded by the candidates to lead, by what operators ask and revoke."""


def edit(record: FederationRecord, **changes: Any) -> FederationRecord:  # noqa: ANN401 - any field
    """The record with some fields replaced. Results that agents need no more become garbage."""
    after = record.model_copy(update=changes)
    unused = sorted(record.results_in_use - after.results_in_use)
    garbage = tuple(Garbage(round_id=record.round_id(sequence), results=True) for sequence in unused)
    return after.model_copy(update={"garbage": (*after.garbage, *garbage)}) if garbage else after


def require_open(record: FederationRecord) -> FederationRecord:
    """Raises FEDERATION_CLOSED after the end."""
    if record.ended:
        state = "has finished" if record.phase is Phase.FINISHED else "has failed"
        raise DomainError(Reason.FEDERATION_CLOSED, f"federation {record.federation_id} {state}")
    if record.deleting:
        raise DomainError(Reason.FEDERATION_CLOSED, f"federation {record.federation_id} is being deleted")
    return record


def started(record: FederationRecord) -> FederationRecord:
    """Raises FEDERATION_CLOSED after the end."""
    require_open(record)
    return edit(record, phase=Phase.RUNNING)


def stop_asked(record: FederationRecord) -> FederationRecord:
    """Notes that the operator stops the federation; nothing changes after its end."""
    if record.ended or record.deleting:
        return record
    stopped = edit(record, stopped=True)
    return stopped_now(stopped) if record.phase is Phase.CREATED else stopped


_UNPUBLISHED: Final = "before a round was published"
_TAKEN_BACK: Final = "while its first round was repeated: the result of that had been taken back"


def stopped_now(record: FederationRecord) -> FederationRecord:
    """Ends a federation that was stopped, with its newest result; without any it has failed."""
    if not record.result_sequence:
        taken_back = record.suspects is not None
        return failed(record, f"its operator stopped it {_TAKEN_BACK if taken_back else _UNPUBLISHED}")
    extra = record.trained - record.spec.round.rounds  # those that were trained are all, until it is extended
    return edit(record, phase=Phase.FINISHED, ticket=None, negotiation=None, extra_rounds=extra)


def extended(record: FederationRecord, rounds: int) -> FederationRecord:
    """Has the federation train `rounds` rounds in all. One that finished goes on from its result.

    Raises: INVALID_ARGUMENT for fewer rounds than there are, too many, or more than client privacy is planned for;
    FEDERATION_CLOSED if it has failed.
    """
    if record.phase is Phase.FAILED or record.deleting:
        gone = "is being deleted" if record.deleting else "has failed"
        raise DomainError(
            Reason.FEDERATION_CLOSED,
            f"federation {record.federation_id} {gone} and cannot go on: create another one; agents keep the adapter "
            "of the newest result",
        )
    if not record.rounds <= rounds <= MAX_ROUNDS:
        raise DomainError(
            Reason.INVALID_ARGUMENT,
            f"rounds must be {record.rounds}, as many as there are now, to {MAX_ROUNDS}, not {rounds}: to end it "
            "earlier, stop it",
        )
    privacy = record.spec.protection.client_privacy
    if privacy is not None and rounds > privacy.sums:
        raise DomainError(
            Reason.INVALID_ARGUMENT,
            f"the noise of earlier rounds was for {privacy.sums} sums (protection.client_privacy.sums), and cannot be "
            f"raised afterwards: {rounds} rounds would tell more of clients than was promised. Create another "
            "federation, with sums for as many rounds as it may come to have",
        )
    if rounds == record.rounds:
        return record
    extra = rounds - record.spec.round.rounds
    phase = Phase.RUNNING if record.phase is Phase.FINISHED else record.phase
    return edit(
        record,
        extra_rounds=extra,
        stopped=False,
        early_stopping=None,
        converged=False,
        phase=phase,
        attempt=1,
    )


def deletion_asked(record: FederationRecord) -> FederationRecord:
    """Begins the deletion of a federation: its agents get notice, then everything of it is deleted."""
    return edit(record, deleting=True)


def required_model(record: FederationRecord, model: Model) -> FederationRecord:
    """The record as it is, for a client with a model that fits. Nothing is fixed by who comes first.

    Raises: MODEL_MISMATCH naming the first difference; FEDERATION_CLOSED after the end.
    """
    require_open(record)
    if record.model is not None:
        _require_same("matrix", record.model.matrices, model.matrices)
        _require_same("tensor", record.model.tensors, model.tensors)
    return record


def elected_shapes(members: Mapping[str, MemberRecord]) -> str | None:
    """The digest of the model that more than half of the members have; None if no model has as many."""
    counts = Counter(member.shapes for member in members.values())
    shapes, votes = counts.most_common(1)[0] if counts else ("", 0)
    return shapes if 2 * votes > len(members) else None


def with_model(record: FederationRecord, model: Model) -> FederationRecord:
    """Fixes the federation's model; clients with another one are no longer members."""
    return edit(record, model=model, split=False)


def divided(record: FederationRecord) -> FederationRecord:
    """Notes that no model is that of more than half of those that joined."""
    return edit(record, split=True)


def _require_same(kind: str, known: Sequence[Matrix | Tensor], given: Sequence[Matrix | Tensor]) -> None:
    for expected, found in zip(known, given, strict=False):
        if expected != found:
            raise DomainError(
                Reason.MODEL_MISMATCH,
                f"{kind} {_described(found)} differs from the federation's {_described(expected)}: "
                "use the same base model, revision and target_modules as the other agents",
            )
    if len(known) != len(given):
        longer = known if len(known) > len(given) else given
        first = _described(longer[min(len(known), len(given))])
        side = "is missing" if longer is known else "is not in the federation's model"
        raise DomainError(Reason.MODEL_MISMATCH, f"{kind} {first} {side}")


def _described(item: Matrix | Tensor) -> str:
    if isinstance(item, Matrix):
        return f"{item.name} [{item.out_features}, {item.in_features}]"
    return f"{item.name} {list(item.shape)}"


def with_key(record: FederationRecord, epoch: int, key_id: bytes) -> FederationRecord:
    """Begins an epoch. Plan and votes of the one before are void: its secrets order and seal them."""
    if not record.key_id:  # the first one; who asked for another still does
        asked = record.rotate_from == record.epoch
        return edit(record, epoch=epoch, key_id=key_id.hex(), rotate_from=epoch if asked else 0)
    return edit(
        record,
        epoch=epoch,
        key_id=key_id.hex(),
        rotated_at=record.trained,
        attempt=1,
        plan=None,
        negotiation=None,
        overlap=None,
    )


def rotation_asked(record: FederationRecord, from_epoch: int) -> FederationRecord:
    """Has the federation leave an epoch, 0 for the present one; nothing changes if it has left it already.

    Raises: FEDERATION_CLOSED; INVALID_ARGUMENT without keys, or for an epoch that has not begun.
    """
    require_open(record)
    if not record.strategy.needs_keys:
        mode = record.strategy.name
        raise DomainError(Reason.INVALID_ARGUMENT, f'under protection "{mode}" there are no keys to rotate')
    if from_epoch > record.epoch:
        raise DomainError(
            Reason.INVALID_ARGUMENT,
            f"from_epoch {from_epoch} has not begun: the present one is {record.epoch}",
        )
    if 0 < from_epoch < record.epoch:
        return record
    return edit(record, rotate_from=record.epoch)


def revoked(record: FederationRecord, clients: Mapping[str, int]) -> FederationRecord:
    """Takes revocations in: a revoked client is no longer a member, and gets none of the next epoch's keys.

    Args: clients: with the time up to which their certificates are revoked, Unix milliseconds.
    """
    model = record.model if record.sequence else None  # no round yet: the others decide anew
    return edit(record, revoked={**record.revoked, **clients}, rotate_from=record.epoch, model=model)


def retired(record: FederationRecord, before: int) -> FederationRecord:
    """Notes that the key authority has destroyed the keys of the epochs before one."""
    return edit(record, retired_before=before)


def failed(record: FederationRecord, why: str) -> FederationRecord:
    """Ends the federation before its last round."""
    return edit(record, phase=Phase.FAILED, failure=why, ticket=None, negotiation=None)


def begun(record: FederationRecord, kind: RoundKind) -> FederationRecord:
    """Fixes which round comes next."""
    ticket = Ticket(
        sequence=record.sequence + 1,
        kind=kind,
        number=record.trained + 1 if kind is RoundKind.TRAIN else 0,
        attempt=record.attempt,
        plan=record.plan if kind is RoundKind.TRAIN else None,
        draw=record.draws + 1 if record.strategy.needs_committee and kind is RoundKind.TRAIN else 0,
    )
    return edit(record, sequence=ticket.sequence, ticket=ticket)


def cancelled(record: FederationRecord) -> FederationRecord:
    """Takes the ticket back before its round exists."""
    return edit(record, ticket=None)


def readmitted(record: FederationRecord) -> FederationRecord:
    """Asks clients again that kept a committee from being seated: without them there are too few. Costs an attempt."""
    after = edit(record, silent=(), ticket=None, attempt=record.attempt + 1)
    if record.attempt < record.spec.round.max_attempts:
        return after
    why = WHY[Reason.COMMITTEE_INCOMPLETE]
    return failed(after, f"no committee came about in {record.attempt} attempts: {why}")


def swept(record: FederationRecord, garbage: Sequence[Garbage]) -> FederationRecord:
    """Forgets rounds that aggregation has deleted."""
    return edit(record, garbage=tuple(item for item in record.garbage if item not in garbage))


def settled(
    record: FederationRecord,
    ended: RoundRecord,
    voters: Sequence[str],
    members: Mapping[str, MemberRecord],
    now_ms: int,
    overlap: float | None = None,
    said: Sequence[Dropped] = (),
    evaluations: Sequence[EvaluationRecord] = (),
) -> FederationRecord:
    """Takes the outcome of an ended round into the federation.

    Args: voters: who committed, in order; for a published vote the candidates to lead. members: by client. overlap:
    median overlap with the plan that updates report. said: why clients have no update in the round, or object to
    the result it began from. evaluations: of that result.
    """
    if ended.closed_ms and record.ticket and record.ticket.plan:
        record = edit(record, accepted_plan=record.ticket.plan.number)
    if ended.round.state is RoundState.ABANDONED:
        after = _after_abandonment(record, ended, absence(ended, voters, said))
    elif ended.round.kind is RoundKind.VOTE:
        outcome = votes_of(record).outcome(record, ended, voters, budgets(members), now_ms)
        after = edit(record, attempt=1, planned_at=record.trained, overlap=None, **outcome)
    else:
        after = edit(_after_training(record, ended, members, evaluations), overlap=overlap)
    if ended.round.spent:
        after = edit(after, draws=ended.round.draw)
    told = ended.dropped if ended.round.kind is RoundKind.TRAIN else _misfits(ended.dropped)
    garbage = (*after.garbage, _remains(ended, after))
    return edit(
        after, ticket=None, garbage=garbage, notices=told[:MAX_NOTICES], noticed_sequence=ended.sequence
    )


def _misfits(dropped: Sequence[Dropped]) -> tuple[Dropped, ...]:
    return tuple(drop for drop in dropped if drop.reason is Reason.MODEL_MISMATCH)


def _remains(ended: RoundRecord, after: FederationRecord) -> Garbage:
    """What aggregation may delete of an ended round: its updates, and its result unless agents need it."""
    return Garbage(round_id=ended.round.round_id, results=ended.sequence not in after.results_in_use)


def absence(ended: RoundRecord, committed: Sequence[str], said: Sequence[Dropped]) -> str:
    """Why a round was abandoned, in words: what clients said themselves, then from whom nothing came."""
    parts = [f"{drop.client_id}: {drop.reason}, {drop.why}" for drop in said[:MAX_NAMED]]
    known = {*committed, *ended.dropped_ids, *(drop.client_id for drop in said)}
    silent = [name for name in ended.round.cohort if name not in known]
    if silent:
        more = f" and {len(silent) - MAX_NAMED} more" if len(silent) > MAX_NAMED else ""
        parts.append(f"nothing came from {', '.join(silent[:MAX_NAMED])}{more}")
    return "; ".join(parts)


def _after_abandonment(record: FederationRecord, ended: RoundRecord, absent: str) -> FederationRecord:
    reason = ended.round.reason
    if reason in NO_FAULT:
        return edit(record, attempt=1)
    if reason is Reason.SUM_UNREADABLE:
        return retracted(record, ended.round.draw, absent)
    if ended.silent:  # nothing was uploaded, and each time there are fewer
        return edit(record, silent=tuple(sorted({*record.silent, *ended.silent})))
    if record.attempt < record.spec.round.max_attempts:
        return edit(record, attempt=record.attempt + 1)
    name = f"round {ended.round.number}" if ended.round.kind is RoundKind.TRAIN else "the vote"
    words = WHY.get(reason, "see the coordinator's log") if reason else ""
    why = words.format(least=record.spec.round.min_updates)
    said = f". {absent}" if absent else ""
    return failed(record, f"{name} was abandoned {record.attempt} times, at last for {reason}: {why}{said}")


def retracted(record: FederationRecord, draw: int, said: str) -> FederationRecord:
    """Takes the newest result back, which agents cannot open or refuse: its round is repeated from the result before.

    The repetition is an attempt at the same round, with a draw of its own, and one suspect sits it out. As long as that
    clears somebody, attempts are not limited: each leaves a suspect less. After the last attempt the federation has
    failed, with the result before.

    Args: draw: of the round that was to begin from it; spent, as a draw belongs to one start. said: what agents say.
    """
    number, attempts = record.trained, record.result_attempt
    left = _suspects(record)
    narrowed = bool(left) and len(left) < len(record.suspects or (*left, ""))
    suspects = left or record.result_contributors  # others spoiled earlier results: the search begins anew
    after = edit(
        record,
        **_as_newest(record.result_before),
        result_before=None,
        suspects=suspects,
        sits_out=suspects[0] if suspects else "",
        trained=number - 1,
        rotated_at=min(record.rotated_at, number - 1),
        draws=max(draw, record.draws),
        attempt=attempts + 1,
    )
    if narrowed or attempts < record.spec.round.max_attempts:
        return after
    return failed(
        after,
        f"the sum of round {number} was spoiled in attempt {attempts}, the last one: {_SPOILED}. {said}",
    )


def _suspects(record: FederationRecord) -> tuple[str, ...]:
    """Who may have spoiled all results that were taken back, the newest too; nobody if that was not one alone."""
    known = record.result_contributors if record.suspects is None else record.suspects
    return tuple(name for name in known if name in record.result_contributors)


def _as_newest(result: ResultRecord | None) -> dict[str, Any]:
    """The fields of a record whose newest result that is."""
    if result is None:
        return {
            "result_sequence": 0,
            "result_layout": "",
            "result_plan": None,
            "result_epoch": 0,
            "result_opening": None,
            "result_attempt": 1,
            "result_digest": "",
            "result_contributors": (),
        }
    fields = ("sequence", "layout", "plan", "epoch", "opening", "attempt", "digest", "contributors")
    return {f"result_{name}": getattr(result, name) for name in fields}


def _after_training(
    record: FederationRecord,
    ended: RoundRecord,
    members: Mapping[str, MemberRecord],
    evaluations: Sequence[EvaluationRecord],
) -> FederationRecord:
    number, rule = ended.round.number, record.spec.round.stop
    last, early_stopping = number >= record.rounds, record.early_stopping
    if rule is not None:
        of_means = not record.strategy.shows_factors
        value = stopping.value_of(rule, evaluations, record.spec.round.min_updates, of_means=of_means)
        early_stopping = stopping.judged(rule, early_stopping, number - (2 if of_means else 1), value)
    converged = not last and rule is not None and stopping.is_over(rule, early_stopping)
    result = ResultRecord(
        sequence=ended.sequence,
        layout=ended.layout_digest,
        plan=record.ticket.plan if record.ticket else None,
        epoch=ended.epoch,
        opening=ended.opening,
        attempt=ended.round.attempt,
        digest=_digest_of(ended),
        contributors=_by_weight(ended.contributors, members),
    )
    return edit(
        record,
        **_as_newest(result),
        attempt=1,
        trained=number,
        result_before=record.result if ended.round.convenes else None,
        silent=(),
        early_stopping=early_stopping,
        converged=converged,
        extra_rounds=number - record.spec.round.rounds if converged else record.extra_rounds,
        phase=Phase.FINISHED if last or converged else record.phase,
    )


def _digest_of(ended: RoundRecord) -> str:
    shards = (bytes.fromhex(shard.sha256) for shard in ended.results)
    return result_digest(ended.round.round_id, shards).hex()


def _by_weight(contributors: Sequence[str], members: Mapping[str, MemberRecord]) -> tuple[str, ...]:
    """In the order in which they are suspected: who weighs most can do most. Nobody if they are too many."""
    if len(contributors) > MAX_SUSPECTS:
        return ()
    counts = {name: members[name].example_count if name in members else 0 for name in contributors}
    return tuple(sorted(contributors, key=lambda name: (-counts[name], name)))


def budgets(members: Mapping[str, MemberRecord]) -> tuple[float, ...]:
    """The tiers: distinct budgets above zero, increasing, at most MAX_PLAN_TIERS of them.

    Members of many budgets form groups of about the same size, from the smallest budget up; the largest of a group is
    its tier: agents encrypt no less than their budget, so those of a group encrypt somewhat more.
    """
    distinct = sorted({member.budget for member in members.values()} - {0.0})
    if len(distinct) <= MAX_PLAN_TIERS:
        return tuple(distinct)
    ranked = sorted(member.budget for member in members.values() if member.budget)
    return tuple(
        sorted({ranked[group * len(ranked) // MAX_PLAN_TIERS - 1] for group in range(1, MAX_PLAN_TIERS + 1)})
    )


def led(record: FederationRecord, leader: str, now_ms: int) -> FederationRecord:
    """Names who makes the plan, under a new plan number. A former leader that did not publish is out."""
    negotiation = _negotiation(record)
    number = record.plan_count + 1
    named = negotiation.model_copy(
        update={
            "plan_number": number,
            "leader": leader,
            "candidates": tuple(name for name in negotiation.candidates if name != leader),
            "deadline_ms": now_ms + 1000 * record.spec.round.deadline_s,
            "led_ms": now_ms,
        }
    )
    return edit(record, plan_count=number, negotiation=named)


def without_leader(record: FederationRecord, client_id: str, number: int) -> FederationRecord:
    """Takes the lead from a client that gave it up; the next candidate follows."""
    negotiation = record.negotiation
    if negotiation is None or (negotiation.leader, negotiation.plan_number) != (client_id, number):
        return record
    return edit(record, negotiation=negotiation.model_copy(update={"leader": ""}))


def unplanned(record: FederationRecord) -> FederationRecord:
    """Ends a negotiation that led to no plan.

    The plan before it stays in force, or the one that the newest result was made under comes back if its keys are still
    those of today. Where there is neither, but a result, another vote follows; without a result the federation fails.
    """
    if record.plan is not None:
        return edit(record, negotiation=None)
    if record.result_plan is not None and record.result_epoch == record.epoch:
        return edit(record, negotiation=None, plan=record.result_plan)
    if record.result_sequence:
        return edit(record, negotiation=None)
    return failed(record, "no client published a plan that the others accept, and no candidate is left")


def _negotiation(record: FederationRecord) -> Negotiation:
    if record.negotiation is None:
        raise DomainError(Reason.PLAN_UNKNOWN, "no plan is being negotiated")
    return record.negotiation


def with_plan(
    record: FederationRecord,
    client_id: str,
    number: int,
    digest: StoredDigest,
    matrices: Sequence[Matrix],
) -> FederationRecord:
    """Takes the leader's plan.

    Raises: NOT_LEADER; DIGEST_MISMATCH if the leader published another plan under this number;
    INVALID_ARGUMENT if the matrices are not the model's or their counts do not fit the tiers.
    """
    published = _published(record, client_id, number)
    if published is not None:
        if published.digest != digest:
            raise DomainError(Reason.DIGEST_MISMATCH, f"plan {number} is published with another digest")
        return record
    negotiation = require_leader(record, client_id, number)
    columns = _tier_columns(record, negotiation, matrices)
    plan = PlanRecord(number=number, digest=digest, negotiation=negotiation, tier_columns=columns)
    return edit(record, plan=plan, negotiation=None)


def _published(record: FederationRecord, client_id: str, number: int) -> PlanRecord | None:
    """The plan in use that this client published under this number."""
    plans = (plan for plan in record.plans if plan.number == number)
    return next((plan for plan in plans if plan.negotiation.leader == client_id), None)


def require_publisher(record: FederationRecord, client_id: str, number: int) -> None:
    """Raises NOT_LEADER unless this client is to publish a plan under this number, or has done so."""
    if _published(record, client_id, number) is None:
        require_leader(record, client_id, number)


def require_leader(record: FederationRecord, client_id: str, number: int) -> Negotiation:
    """Raises NOT_LEADER unless this client is to publish a plan under this number."""
    negotiation = record.negotiation
    if negotiation is None or (negotiation.leader, negotiation.plan_number) != (client_id, number):
        raise DomainError(Reason.NOT_LEADER, f"plan {number} is not awaited from this client (any more)")
    return negotiation


def _tier_columns(
    record: FederationRecord, negotiation: Negotiation, matrices: Sequence[Matrix]
) -> tuple[tuple[int, ...], ...]:
    known = record.model.matrices if record.model else ()
    shapes = [Matrix(m.name, m.out_features, m.in_features) for m in matrices]
    if tuple(shapes) != known:
        raise DomainError(
            Reason.INVALID_ARGUMENT, "the plan's matrices are not those of the federation's model"
        )
    if any(len(m.tier_columns) != len(negotiation.tiers) for m in matrices):
        raise DomainError(
            Reason.INVALID_ARGUMENT, f"every matrix needs {len(negotiation.tiers)} entries of tier_columns"
        )
    return tuple(m.tier_columns for m in matrices)


def require_in_force(record: FederationRecord, number: int, sha256: str) -> bool:
    """Whether a plan is in force; False for the one discarded last, so that a late rejection succeeds.

    Raises: PLAN_UNKNOWN for any other.
    """
    negotiation, plan = record.negotiation, record.plan
    if plan is not None and (plan.number, plan.digest.sha256) == (number, sha256):
        return True
    if negotiation is not None and number == negotiation.rejected:
        return False
    raise DomainError(Reason.PLAN_UNKNOWN, f"plan {number} is not in force")


def without_plan(record: FederationRecord, now_ms: int) -> FederationRecord:
    """Discards the plan in force, which too many members found not to match the votes; the next candidate leads."""
    if record.plan is None:
        return record
    deadline_ms = now_ms + 1000 * record.spec.round.deadline_s
    update = {"leader": "", "rejected": record.plan.number, "deadline_ms": deadline_ms}
    return edit(record, plan=None, negotiation=record.plan.negotiation.model_copy(update=update))
