"""What a federation needs next, decided from its state alone: the driver's pure half.

`decide` looks at one consistent view and names one step. The driver takes it, writes, and looks again. Because every
step is derived from what is stored, a driver that starts after a crash takes up exactly where the last one stopped.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from coordinator import transitions
from coordinator.records import (
    Commit,
    Dropped,
    FederationRecord,
    Garbage,
    Member,
    Model,
    Negotiation,
    Phase,
    RoundRecord,
    Ticket,
)
from shelora.errors import Reason
from shelora.lora.layout import Layout, build_layout
from shelora.negotiation.votes import vote_layout
from shelora.rounds import Event, Round, RoundKind, RoundState, select_cohort, should_close


@dataclass(frozen=True)
class View:
    """The state a decision is made on."""

    federation: FederationRecord
    round: RoundRecord | None
    """The round of the ticket, if it exists."""
    members: Mapping[str, Member]
    """Need not be read while a round is in progress, nor before there are enough for the first."""
    alive: AbstractSet[str]
    """Members heard of lately."""
    update_count: int
    """Updates committed to the round, without those that are not counted."""
    voters: Sequence[str]
    """Who committed them, in order; only read when it has ended."""
    overlap: float | None = None
    """Mean overlap with the plan that its updates report; only read when it has ended."""
    revoked: Mapping[str, int] = field(default_factory=dict)
    """Clients of the federation that this process knows to be revoked, with the time up to which they are."""


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
class Sweep:
    """Have aggregation delete what no one needs any more."""

    garbage: tuple[Garbage, ...]


Decision: TypeAlias = (
    Rest
    | Done
    | OpenKeys
    | RetireEpochs
    | WriteFederation
    | CreateRound
    | OpenRound
    | WriteRound
    | Aggregate
    | Sweep
)


def decide(view: View, now_ms: int) -> Decision:
    """The next step. `now_ms`: Unix milliseconds."""
    federation = view.federation
    fresh = {name: at for name, at in view.revoked.items() if at > federation.revoked.get(name, 0)}
    if fresh and not federation.ended:
        return WriteFederation("revoke_clients", transitions.revoked(federation, fresh))
    if federation.phase is Phase.RUNNING:
        step = _within_round(view, federation.ticket, now_ms) if federation.ticket else _between(view, now_ms)
    else:
        step = Done() if federation.ended else Rest()
    if not isinstance(step, Rest | Done):
        return step
    if federation.garbage:
        return Sweep(federation.garbage)
    if federation.retired_before < federation.oldest_epoch:
        return RetireEpochs(federation.oldest_epoch)
    return step


def _between(view: View, now_ms: int) -> Decision:
    """No round is in progress: gather clients, open keys, agree on a plan, or begin a round."""
    federation = view.federation
    if not federation.sequence and len(view.members) < federation.spec.round.clients:
        return Rest()
    if federation.model is None:
        return Rest()
    if federation.selective and (federation.rotation_due or not federation.key_id):
        return OpenKeys(federation.epoch + 1 if federation.key_id else federation.epoch)
    if federation.negotiation is not None:
        return _negotiate(view, federation.negotiation, now_ms)
    if len(view.alive) < federation.spec.round.min_updates:
        return Rest()
    kind = RoundKind.VOTE if _needs_vote(view) else RoundKind.TRAIN
    return WriteFederation("begin_round", transitions.begun(federation, kind))


def _needs_vote(view: View) -> bool:
    federation = view.federation
    if not (federation.selective and transitions.budgets(view.members)):
        return False
    rules = federation.spec.round
    due = 0 < rules.replan_every_rounds <= federation.trained - federation.planned_at
    drifted = federation.overlap is not None and federation.overlap < rules.replan_below_overlap
    return federation.plan is None or due or drifted


def _negotiate(view: View, negotiation: Negotiation, now_ms: int) -> Decision:
    """Waits for the leader's plan; names the next candidate if it is silent or gone."""
    federation = view.federation
    overdue = now_ms >= negotiation.deadline_ms
    waiting = bool(negotiation.leader) and not overdue
    candidate = next((name for name in negotiation.candidates if name in view.alive), None)
    if waiting and (negotiation.leader in view.alive or candidate is None):
        return Rest(negotiation.deadline_ms)
    if candidate is not None:
        return WriteFederation("name_leader", transitions.led(federation, candidate, now_ms))
    if not overdue and negotiation.candidates:
        return Rest(negotiation.deadline_ms)
    why = "no client published a plan that the others accept, and no candidate is left"
    return WriteFederation("fail_federation", transitions.failed(federation, why))


def _within_round(view: View, ticket: Ticket, now_ms: int) -> Decision:
    federation, record = view.federation, view.round
    stale = ticket.kind is RoundKind.TRAIN and ticket.plan != federation.plan
    if record is None:
        if stale or federation.rotation_due:
            return WriteFederation("cancel_ticket", transitions.cancelled(federation))
        return _create(view, ticket)
    if record.round.ended:
        after = transitions.settled(
            federation, record, view.voters, view.members, now_ms, overlap=view.overlap
        )
        return WriteFederation("settle_round", after)
    if stale:
        return abandon(record, Reason.PLAN_REFUSED, now_ms)
    if (
        record.round.kind is RoundKind.VOTE and federation.rotation_due
    ):  # for a plan that would be void at once
        return abandon(record, Reason.EPOCH_RETIRED, now_ms)
    return _in_progress(view, record, now_ms)


def _in_progress(view: View, record: RoundRecord, now_ms: int) -> Decision:
    """A round goes on, without those of its cohort that were revoked."""
    if gone := revoked_since(record, view.federation.revoked):
        return _without_revoked(record, gone, now_ms)
    if record.round.state is RoundState.SELECTING:
        return OpenRound(record)
    if record.round.state is RoundState.AGGREGATING:
        return Aggregate(record)
    return _collect(view, record, now_ms)


def revoked_since(record: RoundRecord, revoked: Mapping[str, int]) -> list[str]:
    """Clients of a round's cohort that were revoked after it was made, and whose updates still count."""
    return [
        name
        for name in record.round.cohort
        if revoked.get(name, 0) > record.revoked_ms and name not in record.dropped_ids
    ]


def _without_revoked(record: RoundRecord, gone: Sequence[str], now_ms: int) -> WriteRound:
    """Goes on without revoked clients, whatever they have committed; not with fewer than a result needs."""
    why = "the client's certificate was revoked"
    dropped = (
        *record.dropped,
        *(Dropped(client_id=name, reason=Reason.CERTIFICATE_REVOKED, why=why) for name in gone),
    )
    if len(record.round.cohort) - len(dropped) < record.round.min_updates:
        return abandon(record, Reason.CERTIFICATE_REVOKED, now_ms)
    return WriteRound("drop_contributor", record.model_copy(update={"dropped": dropped}))


def _create(view: View, ticket: Ticket) -> Decision:
    """Selects the cohort among the members alive now. Waits while they are too few."""
    federation = view.federation
    rules, training = federation.spec.round, ticket.kind is RoundKind.TRAIN
    if len(view.alive) < rules.min_updates or federation.model is None:
        return Rest()
    round_id = federation.round_id(ticket.sequence)
    layout = layout_of(federation, federation.model, ticket, view.members)
    round_ = Round(
        round_id=round_id,
        kind=ticket.kind,
        number=ticket.number,
        attempt=ticket.attempt,
        min_updates=rules.min_updates,
        deadline_s=rules.deadline_s,
        cohort=select_cohort(round_id, view.alive, rules.cohort_limit if training else 0),
        target_updates=rules.target_updates if training else 0,
    )
    record = RoundRecord(
        round=round_,
        sequence=ticket.sequence,
        layout_digest=layout.digest.hex(),
        shard_count=len(layout.shards),
        plan_number=ticket.plan.number if ticket.plan else 0,
        epoch=federation.epoch,
        revoked_ms=federation.revoked_ms,
    )
    return CreateRound(record, layout)


def layout_of(
    federation: FederationRecord, model: Model, ticket: Ticket, members: Mapping[str, Member]
) -> Layout:
    """The layout of a round: votes, or updates under the ticket's plan."""
    protection = federation.spec.protection
    key_id = bytes.fromhex(federation.key_id)
    if ticket.kind is RoundKind.VOTE:
        return vote_layout(model.matrices, protection.parameters, key_id)
    plan = ticket.plan
    columns = plan.tier_columns if plan else ((),) * len(model.matrices)
    encrypts = plan is not None or (federation.selective and bool(model.tensors))
    return build_layout(
        parameters=protection.parameters,
        key_id=key_id if encrypts else b"",
        matrices=[replace(m, tier_columns=c) for m, c in zip(model.matrices, columns, strict=True)],
        tensors=model.tensors,
        tiers=plan.negotiation.tiers if plan else (),
        encrypt_tensors=federation.selective,
        max_rank=max(member.rank for member in members.values()),
        max_directions=protection.max_directions,
    )


def _collect(view: View, record: RoundRecord, now_ms: int) -> Decision:
    due = should_close(record.round, view.update_count, now_ms, absent=len(record.dropped))
    if due is Event.CLOSE:
        closed = record.model_copy(
            update={"round": record.round.advance(Event.CLOSE, now_ms), "closed_ms": now_ms}
        )
        return WriteRound("close_round", closed)
    if due is Event.ABANDON:
        return abandon(record, Reason.TOO_FEW_UPDATES, now_ms)
    return Rest(record.round.deadline_ms)


def abandon(record: RoundRecord, reason: Reason, now_ms: int) -> WriteRound:
    """Ends a round without a result."""
    return WriteRound(
        "abandon_round",
        record.model_copy(update={"round": record.round.advance(Event.ABANDON, now_ms, reason)}),
    )


def mean_overlap(commits: Sequence[Commit]) -> float | None:
    """Mean of the overlaps that updates report; None if none does."""
    reported = [commit.update.report.overlap for commit in commits]
    known = [overlap for overlap in reported if overlap is not None]
    return sum(known) / len(known) if known else None


def mean_train_loss(commits: Sequence[Commit]) -> float:
    """Mean of the training losses that updates report, weighted by examples; nats."""
    reports = [commit.update.report for commit in commits]
    examples = sum(report.example_count for report in reports)
    return sum(report.train_loss * (report.example_count / examples) for report in reports)


def contributors(record: RoundRecord, commits: Sequence[Commit]) -> list[Commit]:
    """The updates that go into the aggregate, in order of their clients."""
    kept = (commit for commit in commits if commit.update.client_id not in record.dropped_ids)
    return sorted(kept, key=lambda commit: commit.update.client_id)
