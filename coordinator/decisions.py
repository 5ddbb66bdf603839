"""What a federation needs next, decided from its state alone: the driver's pure half.

`decide` looks at one consistent view and names one step. The driver takes it, writes, and looks again. Because every
step is derived from what is stored, a driver that starts after a crash takes up exactly where the last one stopped.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from math import ceil
from statistics import median_high, median_low
from typing import Final, TypeAlias

from coordinator import committees, transitions
from coordinator.committees import Proceedings, Until
from coordinator.records import (
    Commit,
    Dropped,
    EvaluationRecord,
    FederationRecord,
    Garbage,
    MemberRecord,
    Model,
    Negotiation,
    Phase,
    PlanRecord,
    RoundRecord,
    Ticket,
)
from shelora.errors import Reason
from shelora.lora.layout import Layout
from shelora.lora.screening import counted_examples
from shelora.negotiation.votes import vote_layout
from shelora.rounds import (
    Event,
    Round,
    RoundKind,
    RoundState,
    Turnout,
    grace_ends_ms,
    select_cohort,
    should_close,
)
from shelora.strategies.port import RoundTerms

GATHERING: Final = frozenset({RoundState.SELECTING, RoundState.KEYING, RoundState.COLLECTING})
"""States of a round that has no updates to lose but those that clients can send again."""
UNOPENED: Final = frozenset({Reason.SUM_UNREADABLE, Reason.ANSWERS_REFUSED, Reason.RESULT_REFUSED})
"""Reasons of clients that give a round up because they cannot open, or cannot use, the result that it begins from."""
LATE_LOOK_MS: Final = 5_000
"""Time between two looks at a round that waits beyond its deadline: about a heartbeat."""
LEAD_MS: Final = 60_000
"""Time after which a leader that does not say that it makes the plan is replaced."""


@dataclass(frozen=True, kw_only=True)
class View:
    """The state a decision is made on."""

    federation: FederationRecord
    round: RoundRecord | None
    """The round of the ticket, if it exists."""
    members: Mapping[str, MemberRecord]
    """Need not be read while a round is in progress, nor before there are enough for the first."""
    alive: AbstractSet[str]
    """Members heard of lately."""
    update_count: int
    """Updates committed to the round, without those that are not counted."""
    voters: Sequence[str]
    """Who committed them, in order; only read when it has ended."""
    overlap: float | None = None
    """Median overlap with the plan that its updates report; only read when it has ended."""
    objectors: AbstractSet[str] = frozenset()
    """Members that reject the plan in force, without those that have committed to the round all the same."""
    given_up: Sequence[Dropped] = ()
    """Clients that gave the round up, or whose update was refused, and have not committed."""
    against: Sequence[Dropped] = ()
    """Clients that object to the result which the round began from; they take part all the same. Only read while it
    collects, and when it has ended."""
    unawaited: int = 0
    """Clients of a collecting round that are not waited for and have not committed, though they may."""
    laggards: AbstractSet[str] = frozenset()
    """Clients that missed the newest round that closed, or were left out of it for another base model; only read when
    the next one is made."""
    sending: int = 0
    """Clients of a collecting round that are seen sending their update; only read once it is late and has too few."""
    working: AbstractSet[str] = frozenset()
    """Members that say they do what they were asked; only read while a plan is made."""
    revoked: Mapping[str, int] = field(default_factory=dict)
    """Clients of the federation that this process knows to be revoked, with the time up to which they are."""
    evaluations: Sequence[EvaluationRecord] = ()
    """Of the result that a training round began from; only read when it has ended, and under a rule to stop."""
    proceedings: Proceedings = field(default_factory=Proceedings)
    """Of the round's committee; empty without one."""


@dataclass(frozen=True)
class Rest:
    """Nothing to do before the given time or the next change."""

    until_ms: int | None = None
    """Unix milliseconds; None: only a change matters."""


@dataclass(frozen=True)
class Done:
    """The federation has ended and everything is cleaned up."""


@dataclass(frozen=True)
class OpenKeys:
    """Have the key authority make the keys of an epoch, then begin it."""

    epoch: int


@dataclass(frozen=True)
class FixModel:
    """Fix the federation's model: that of this member."""

    member: str


@dataclass(frozen=True)
class Delete:
    """Delete everything of a federation: at aggregation, the key authority, in the store."""


@dataclass(frozen=True)
class RetireEpochs:
    """Have the key authority destroy the keys of the epochs before one."""

    before: int


@dataclass(frozen=True)
class WriteFederation:
    """Write the federation's record."""

    name: str
    record: FederationRecord


@dataclass(frozen=True)
class CreateRound:
    """Store the layout, then the round of the ticket."""

    record: RoundRecord
    layout: Layout


@dataclass(frozen=True)
class OpenRound:
    """Make the round known to aggregation, then start collecting."""

    record: RoundRecord


@dataclass(frozen=True)
class WriteRound:
    """Write the round's record."""

    name: str
    record: RoundRecord


@dataclass(frozen=True)
class Aggregate:
    """Aggregate all shards of the committed updates, then publish."""

    record: RoundRecord


@dataclass(frozen=True)
class PublishOpened:
    """Publish an aggregated round with the answers that open it."""

    record: RoundRecord


@dataclass(frozen=True)
class Sweep:
    """Have aggregation delete what no one needs any more."""

    garbage: tuple[Garbage, ...]


Decision: TypeAlias = (
    Rest
    | Done
    | FixModel
    | Delete
    | OpenKeys
    | RetireEpochs
    | WriteFederation
    | CreateRound
    | OpenRound
    | WriteRound
    | Aggregate
    | PublishOpened
    | Sweep
)


def decide(view: View, now_ms: int) -> Decision:
    """The next step. `now_ms`: Unix milliseconds."""
    federation = view.federation
    if federation.deleting:
        return Delete()
    fresh = {name: at for name, at in view.revoked.items() if at > federation.revoked.get(name, 0)}
    if fresh and not federation.ended:
        return WriteFederation("revoke_clients", transitions.revoked(federation, fresh))
    step = _step(view, now_ms)
    if not isinstance(step, Rest | Done):
        return step
    if federation.garbage:
        return Sweep(federation.garbage)
    if federation.retired_before < federation.oldest_epoch:
        return RetireEpochs(federation.oldest_epoch)
    return step


def _step(view: View, now_ms: int) -> Decision:
    """What brings the federation nearer to its end."""
    federation = view.federation
    if federation.phase is not Phase.RUNNING:
        return Done() if federation.ended else Rest()
    if federation.ticket is not None:
        return _within_round(view, federation.ticket, now_ms)
    if federation.stopped:
        if (
            federation.key_id and federation.rotation_due
        ):  # keys that may be made already are not left unnoted
            return OpenKeys(federation.epoch + 1)
        return WriteFederation("end_stopped", transitions.stopped_now(federation))
    return _between(view, now_ms)


def _between(view: View, now_ms: int) -> Decision:
    """No round is in progress: gather clients, open keys, agree on a plan, or begin a round."""
    federation = view.federation
    if not federation.sequence and len(view.members) < federation.spec.round.clients:
        return Rest()
    if federation.model is None:
        return _elect(view)
    if federation.strategy.needs_keys and (federation.rotation_due or not federation.key_id):
        return OpenKeys(federation.epoch + 1 if federation.key_id else federation.epoch)
    if federation.negotiation is not None:
        return _negotiate(view, federation.negotiation, now_ms)
    if len(view.alive) < federation.spec.round.min_updates:
        return Rest()
    kind = RoundKind.VOTE if _needs_vote(view) else RoundKind.TRAIN
    return WriteFederation("begin_round", transitions.begun(federation, kind))


def _elect(view: View) -> Decision:
    """The model that more than half of those who joined have in common; waits for others while there is none."""
    shapes = transitions.elected_shapes(view.members)
    holder = next((name for name, member in view.members.items() if member.shapes == shapes), None)
    if shapes and holder:
        return FixModel(holder)
    federation = view.federation
    return Rest() if federation.split else WriteFederation("note_split", transitions.divided(federation))


def _needs_vote(view: View) -> bool:
    federation = view.federation
    if not (federation.strategy.needs_plan and transitions.budgets(view.members)):
        return False
    rules = federation.spec.round
    due = 0 < rules.replan_every_rounds <= federation.trained - federation.planned_at
    drifted = federation.overlap is not None and federation.overlap < rules.replan_below_overlap
    return federation.plan is None or due or drifted or _outgrown(view)


def _outgrown(view: View) -> bool:
    """Whether members encrypt more than the plan covers, who joined after it: they sit out until the next one.

    At most one vote a training round is held for them, unless too few are left: clients change budgets as they like.
    """
    federation, covered = view.federation, covered_by(view.federation.plan, view)
    wanted = len(covered) < len(view.alive)
    return wanted and (
        federation.planned_at < federation.trained or len(covered) < federation.spec.round.min_updates
    )


def covered_by(plan: PlanRecord | None, view: View) -> frozenset[str]:
    """The members alive whose budgets a plan reaches: agents encrypt no less, so the others cannot train under it."""
    tiers = plan.negotiation.tiers if plan else ()
    most = max(tiers, default=0.0) if view.federation.strategy.needs_plan else math.inf
    return frozenset(
        name for name in view.alive if name not in view.members or view.members[name].budget <= most
    )


def _negotiate(view: View, negotiation: Negotiation, now_ms: int) -> Decision:
    """Waits for the leader's plan; names the next candidate if it is silent, idle or gone."""
    federation = view.federation
    overdue = now_ms >= negotiation.deadline_ms
    idle = now_ms >= negotiation.led_ms + LEAD_MS and negotiation.leader not in view.working
    waiting = bool(negotiation.leader) and not (overdue or idle)
    candidate = next((name for name in negotiation.candidates if name in view.alive), None)
    if waiting and (negotiation.leader in view.alive or candidate is None):
        return Rest(negotiation.deadline_ms)
    if candidate is not None:
        return WriteFederation("name_leader", transitions.led(federation, candidate, now_ms))
    if not overdue and negotiation.candidates:
        return Rest(negotiation.deadline_ms)
    after = transitions.unplanned(federation)
    return WriteFederation("fail_federation" if after.ended else "end_negotiation", after)


def _within_round(view: View, ticket: Ticket, now_ms: int) -> Decision:
    federation, record = view.federation, view.round
    if record is None:
        outgrown = ticket.kind is RoundKind.TRAIN and _outgrown(view)
        if _is_stale(federation, ticket) or federation.rotation_due or federation.stopped or outgrown:
            return WriteFederation("cancel_ticket", transitions.cancelled(federation))
        return _create(view, ticket)
    if record.round.ended:
        after = transitions.settled(
            federation,
            record,
            view.voters,
            view.members,
            now_ms,
            overlap=view.overlap,
            said=(*view.given_up, *(view.against if record.round.reason is Reason.SUM_UNREADABLE else ())),
            evaluations=view.evaluations,
        )
        return WriteFederation("end_by_rule" if after.converged else "settle_round", after)
    if reason := _why_void(federation, ticket, record.round):
        return abandon(record, reason, now_ms)
    return _in_progress(view, record, now_ms)


def _is_stale(federation: FederationRecord, ticket: Ticket) -> bool:
    """Whether the plan of a round has been discarded."""
    return ticket.kind is RoundKind.TRAIN and ticket.plan != federation.plan


def _why_void(federation: FederationRecord, ticket: Ticket, round_: Round) -> Reason | None:
    """Why nobody needs a round's result any more; None if it is needed."""
    if _is_stale(federation, ticket):
        return Reason.PLAN_REFUSED
    if round_.kind is RoundKind.VOTE and federation.rotation_due:  # its plan would be void at once
        return Reason.EPOCH_RETIRED
    if federation.stopped and round_.state in GATHERING:
        return Reason.FEDERATION_CLOSED
    return None


def _in_progress(view: View, record: RoundRecord, now_ms: int) -> Decision:
    """A round goes on, without those of its cohort that were revoked."""
    if gone := revoked_since(record, view.federation.revoked):
        return _without_revoked(record, gone, now_ms)
    if _is_refused(view, record):
        return WriteFederation("drop_plan", transitions.without_plan(view.federation, now_ms))
    match record.round.state:
        case RoundState.SELECTING:
            return OpenRound(record)
        case RoundState.KEYING | RoundState.CERTIFYING:
            return _convene(view, record, now_ms)
        case RoundState.AGGREGATING:
            return _finish(view, record, now_ms)
        case _:
            return _collect(view, record, now_ms)


def _convene(view: View, record: RoundRecord, now_ms: int) -> Decision:
    """The committee's steps: its keys, its checks, its signatures."""
    grace_s = view.federation.spec.round.committee_s
    if record.round.state is RoundState.KEYING:
        after = committees.seated(record, view.proceedings, now_ms, grace_s)
    else:
        context = committees.context_of(view.federation, record)
        after = committees.certified(context, record, view.proceedings, now_ms, grace_s)
    if isinstance(after, Until):
        return Rest(after.ms)
    return WriteRound(committees.STEP_NAMES[after.round.state], after)


def _finish(view: View, record: RoundRecord, now_ms: int) -> Decision:
    """Aggregates what counts; with a committee the answers that open the sum are waited for."""
    if not record.round.convenes or not view.proceedings.aggregated:
        return Aggregate(record)
    grace_s = view.federation.spec.round.committee_s
    answers = committees.has_answers(record, view.proceedings, now_ms, grace_s)
    if isinstance(answers, Until):
        return Rest(answers.ms)
    return PublishOpened(record) if answers else abandon(record, Reason.ANSWERS_MISSING, now_ms)


def _objecting(view: View, record: RoundRecord) -> set[str]:
    """Clients of a training round's cohort that reject its plan."""
    return set() if record.round.kind is RoundKind.VOTE else set(record.round.cohort) & view.objectors


def _is_refused(view: View, record: RoundRecord) -> bool:
    """Whether the plan of a round is to be discarded: by more than half, or as too few are left to train by it.

    Not once a round under it has closed: those who took part found it right.
    """
    federation, round_ = view.federation, record.round
    if federation.plan is None or federation.plan.number == federation.accepted_plan:
        return False
    if round_.state not in GATHERING:
        return False
    objecting, asked = len(_objecting(view, record)), len(round_.cohort)
    return bool(objecting) and (2 * objecting > asked or asked - objecting < round_.min_updates)


def revoked_since(record: RoundRecord, revoked: Mapping[str, int]) -> list[str]:
    """Clients of a round's cohort that were revoked after it was made, and whose updates still count."""
    return [
        name
        for name in record.round.cohort
        if revoked.get(name, 0) > record.revoked_ms and name not in record.dropped_ids
    ]


def _without_revoked(record: RoundRecord, gone: Sequence[str], now_ms: int) -> WriteRound:
    """Goes on without revoked clients, whatever they have committed; not with fewer than a result needs.

    Nor with a set that was proposed to a committee with one of them: no other set follows.
    """
    why = "the client's certificate was revoked"
    dropped = (
        *record.dropped,
        *(Dropped(client_id=name, reason=Reason.CERTIFICATE_REVOKED, why=why) for name in gone),
    )
    few = len(record.round.cohort) - len(dropped) < record.round.min_updates
    if few or set(gone).intersection(record.contributors):
        return abandon(record, Reason.CERTIFICATE_REVOKED, now_ms)
    return WriteRound("drop_contributor", record.model_copy(update={"dropped": dropped}))


def _create(view: View, ticket: Ticket) -> Decision:
    """Selects the cohort among the members alive now that accept the plan. Waits while they are too few."""
    federation = view.federation
    rules, training = federation.spec.round, ticket.kind is RoundKind.TRAIN
    able = covered_by(ticket.plan, view) if training else view.alive
    willing = able - view.objectors if ticket.plan else able
    if len(willing) < rules.min_updates or federation.model is None:
        return Rest()
    asked = willing - frozenset(federation.silent)
    if len(asked - {federation.sits_out}) >= rules.min_updates:
        asked -= {federation.sits_out}
    if len(asked) < rules.min_updates:
        return WriteFederation("readmit_silent", transitions.readmitted(federation))
    round_id = federation.round_id(ticket.sequence)
    cohort = select_cohort(round_id, asked, federation.spec.cohort_limit if training else 0)
    layout = layout_of(federation, federation.model, ticket, view.members)
    round_ = Round(
        round_id=round_id,
        kind=ticket.kind,
        number=ticket.number,
        attempt=ticket.attempt,
        min_updates=rules.min_updates,
        deadline_s=rules.deadline_s,
        cohort=cohort,
        target_updates=rules.target_updates if training else 0,
        draw=ticket.draw,
    )
    record = RoundRecord(
        round=round_,
        sequence=ticket.sequence,
        layout_digest=layout.digest.hex(),
        shard_count=len(layout.shards),
        plan_number=ticket.plan.number if ticket.plan else 0,
        epoch=federation.epoch,
        revoked_ms=federation.revoked_ms,
        laggards=tuple(name for name in round_.cohort if name in view.laggards),
        most_weight=most_weight(_claims(view, cohort), federation),
        start=federation.result_digest,
    )
    return CreateRound(record, layout)


def _claims(view: View, cohort: Sequence[str]) -> list[int]:
    """Examples of those clients of a cohort that are waited for, or of all if these are too few for an update of each.

    A round in which only those come that claim few must not have a scale for those that claim many: members refuse sets
    that one update could outweigh.
    """
    expected = [name for name in cohort if name not in view.laggards]
    if len(expected) < view.federation.spec.round.min_updates:
        expected = list(cohort)
    return [view.members[name].example_count for name in expected]


def most_weight(counts: Sequence[int], federation: FederationRecord) -> int:
    """Largest weight of an update whose client weighs it itself: as many examples as count at most.

    1 where sums hide clients: what one changes is bounded for all alike, and example counts would tell of them.
    """
    if federation.spec.protection.client_privacy is not None:
        return 1
    return ceil(max(counted_examples(counts, federation.spec.screening.max_example_ratio)))


def layout_of(
    federation: FederationRecord, model: Model, ticket: Ticket, members: Mapping[str, MemberRecord]
) -> Layout:
    """The layout of a round: votes, or updates under the ticket's plan."""
    protection = federation.spec.protection
    key_id = bytes.fromhex(federation.key_id)
    if ticket.kind is RoundKind.VOTE:
        return vote_layout(model.matrices, protection.parameters, key_id)
    plan = ticket.plan
    round_ = RoundTerms(
        key_id=key_id,
        tiers=plan.negotiation.tiers if plan else (),
        tier_columns=plan.tier_columns if plan else (),
        max_rank=max(member.rank for member in members.values()),
    )
    return federation.strategy.layout(model, protection, round_)


def _has_way_back(view: View, record: RoundRecord) -> bool:
    """Whether the result that a round begins from can be taken back."""
    return record.round.convenes and view.federation.retractable


def _unable(view: View, record: RoundRecord) -> set[str]:
    """Clients of a round that cannot begin from the result it begins from, if there is a way back from it."""
    if not _has_way_back(view, record):
        return set()
    return {drop.client_id for drop in view.given_up if drop.reason in UNOPENED} - record.dropped_ids


def _is_taken_back(view: View, record: RoundRecord) -> bool:
    """Whether more than half of a round's clients cannot begin from its result, or object to it."""
    if not _has_way_back(view, record):
        return False
    objecting = {drop.client_id for drop in view.against} & {*record.round.cohort} - record.dropped_ids
    return 2 * len(_unable(view, record) | objecting) > len(record.round.cohort) - len(record.dropped)


def _turnout(view: View, record: RoundRecord, objecting: AbstractSet[str]) -> Turnout:
    """Does not wait for clients that cannot open the round's start, while these may become more than half."""
    unable = _unable(view, record)
    gone = objecting | {drop.client_id for drop in view.given_up} - unable
    asked, absent = len(record.round.cohort), len(record.dropped) + len(gone - record.dropped_ids)
    if 2 * (asked - absent - view.update_count) > asked - len(record.dropped):
        return Turnout(
            view.update_count, absent=absent, unawaited=view.unawaited + len(unable), sending=view.sending
        )
    return Turnout(
        view.update_count, absent=absent + len(unable), unawaited=view.unawaited, sending=view.sending
    )


def _collect(view: View, record: RoundRecord, now_ms: int) -> Decision:
    if _is_taken_back(view, record):
        return abandon(record, Reason.SUM_UNREADABLE, now_ms)
    if record.round.convenes and not committees.is_able(record, view.proceedings):
        return abandon(record, Reason.COMMITTEE_INCOMPLETE, now_ms)
    round_, objecting = record.round, _objecting(view, record)
    turnout = _turnout(view, record, objecting)
    grace = view.federation.spec.round.grace
    ends_ms = grace_ends_ms(round_, record.most_ms, grace)
    due = should_close(round_, turnout, now_ms, ends_ms, grace)
    if due is Event.CLOSE:
        closed = record.model_copy(
            update={
                "round": record.round.advance(Event.CLOSE, now_ms),
                "closed_ms": now_ms,
                "step_ms": now_ms,
            }
        )
        return WriteRound("close_round", closed)
    if due is Event.ABANDON:
        reason = Reason.PLAN_REFUSED if objecting and now_ms < round_.deadline_ms else Reason.TOO_FEW_UPDATES
        return abandon(record, reason, now_ms)
    most = turnout.updates >= round_.min_updates and 2 * turnout.updates > len(round_.cohort)
    if most and not record.most_ms:
        return WriteRound("note_majority", record.model_copy(update={"most_ms": now_ms}))
    late_ms = now_ms + LATE_LOOK_MS if now_ms >= round_.deadline_ms else round_.deadline_ms
    return Rest(min(late_ms, ends_ms or late_ms))


def abandon(record: RoundRecord, reason: Reason, now_ms: int) -> WriteRound:
    """Ends a round without a result."""
    return WriteRound(
        "abandon_round",
        record.model_copy(update={"round": record.round.advance(Event.ABANDON, now_ms, reason)}),
    )


def median_overlap(commits: Sequence[Commit]) -> float | None:
    """Median of the overlaps that updates report, of two the higher: one lie forces no vote. None without any."""
    reported = [commit.update.report.overlap for commit in commits]
    known = [overlap for overlap in reported if overlap is not None]
    return median_high(known) if known else None


def median_train_loss(commits: Sequence[Commit]) -> float:
    """Median of the training losses that updates report, of two the lower, nats; 0 if none reports one."""
    return median_low([c.update.report.train_loss for c in commits if c.update.report.train_loss] or [0.0])


def known_means(evaluations: Sequence[EvaluationRecord]) -> dict[str, float | None]:
    """`train_loss` (nats) and `accuracy` of the means in a sum: medians over the agents that report them."""
    means = [one.means for one in evaluations if one.means]
    return {
        "train_loss": _middle(one.train_loss for one in means),
        "accuracy": _middle(one.accuracy for one in means),
    }


def _middle(values: Iterable[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return median_low(told) if told else None


def contributors(record: RoundRecord, commits: Sequence[Commit]) -> list[Commit]:
    """The updates that go into the aggregate, in order of their clients."""
    kept = (commit for commit in commits if commit.update.client_id not in record.dropped_ids)
    return sorted(kept, key=lambda commit: commit.update.client_id)
