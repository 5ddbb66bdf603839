"""A round's committee: from the keys of its members over their checks to a certified set. Pure, as `decisions` is.

The coordinator relays and counts. It cannot work out who the members are (their order takes the epoch's secret), reads
no share, and a set that it makes up finds no quorum. What it decides is how long a silent member is waited for, and
whose updates are left out. Members lie as they like, up to the committee's threshold.
"""

from collections import Counter
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from coordinator.records import Dropped, FederationRecord, RoundRecord
from shelora.additive import parameters
from shelora.committee.certificate import ContributorSet
from shelora.committee.context import COMMON_START, RoundContext
from shelora.committee.rules import CommitteeRule, committee_rule
from shelora.committee.verdict import Checked, Verdict, judge
from shelora.errors import DomainError, Reason
from shelora.rounds import Event, RoundState

SILENT_WHY = (
    "it gave no key for the round's committee within round.committee_s, or gave one for a committee that differs from "
    "the others'; it is asked again after the next result"
)
REFUSED_WHY = (
    "the committee does not hold a sound share of the update's key; if this happens again, install the version of the "
    "agent that the others have"
)


@dataclass(frozen=True, kw_only=True)
class Proceedings:
    """What clients have stated to the committee of a round, and as its members, as far as its state asks for it."""

    orders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Committees that clients work out, by their digest."""
    views: Mapping[str, str] = field(default_factory=dict)
    """By client, the digest of the committee that it works out; a member has given its key with it."""
    departed: AbstractSet[str] = frozenset()
    """Members that lost their key."""
    dealings: Mapping[str, tuple[bytes, int]] = field(default_factory=dict)
    """Of updates that count, by client: digest of the dealing, weight."""
    checks: Mapping[int, Checked] = field(default_factory=dict)
    """By the member's position."""
    signed: AbstractSet[str] = frozenset()
    """Members that signed the proposed set."""
    answered: AbstractSet[str] = frozenset()
    """Members that gave the sum of their shares."""
    aggregated: bool = False
    """Whether all shards are."""


@dataclass(frozen=True)
class Until:
    """Nothing to do before that time, in Unix milliseconds, or the next statement."""

    ms: int


def context_of(federation: FederationRecord, record: RoundRecord) -> RoundContext:
    """What is signed over in a round with a committee."""
    round_ = record.round
    return RoundContext(
        federation_id=federation.federation_id,
        instance=federation.instance,
        round_id=round_.round_id,
        kind=round_.kind,
        round_number=round_.draw,
        attempt=round_.attempt,
        epoch=record.epoch,
        layout_digest=bytes.fromhex(record.layout_digest),
        parameters=parameters.DEFAULT,
        cohort=round_.cohort,
        most_contributors=len(round_.cohort),
        rule=rule_of(record),
        min_updates=round_.min_updates,
        most_weight=record.most_weight,
        start=bytes.fromhex(record.start) or COMMON_START,
    )


def rule_of(record: RoundRecord) -> CommitteeRule:
    """The size of a round's committee, and what it withstands."""
    return committee_rule(len(record.round.cohort))


def present(record: RoundRecord, now: Proceedings) -> list[str]:
    """Members of a seated committee that still have their keys and their rights."""
    revoked = {d.client_id for d in record.dropped if d.reason is Reason.CERTIFICATE_REVOKED}
    return [name for name in record.order if name not in now.departed | revoked]


def seated(record: RoundRecord, now: Proceedings, now_ms: int, grace_s: int) -> RoundRecord | Until:
    """A round that is keying: seats the committee once every member of it has given its key.

    The committee is what more than half of the cohort work out; after the grace period, of those who said so. A round
    whose committee is incomplete then is abandoned, and says who was silent or works out another one: nothing has been
    uploaded yet.
    """
    overdue, until = _grace(record, now_ms, grace_s)
    cohort = [name for name in record.round.cohort if name not in record.dropped_ids]
    asked = len(now.views) if overdue else len(cohort)
    count = Counter(now.views.values())
    digest = next((digest for digest in now.orders if 2 * count[digest] > asked), "")
    order = now.orders.get(digest, ())
    with_key = {name for name, stated in now.views.items() if stated == digest} - record.dropped_ids
    silent = [name for name in order or cohort if name not in with_key]
    lost = any(name in now.departed for name in order)
    if order and not silent and not lost:
        return _advanced(record, Event.SEAT, now_ms, order=order)
    if not (overdue or lost):
        return until
    named = tuple(
        Dropped(client_id=name, reason=Reason.COMMITTEE_INCOMPLETE, why=SILENT_WHY)
        for name in sorted(silent)
        if name not in record.dropped_ids
    )
    return _abandoned(
        record,
        Reason.COMMITTEE_INCOMPLETE,
        now_ms,
        silent=tuple(sorted(silent)),
        dropped=(*record.dropped, *named),
    )


def is_able(record: RoundRecord, now: Proceedings) -> bool:
    """Whether enough members of a seated committee are left to certify a set."""
    return len(present(record, now)) >= rule_of(record).quorum


def certified(
    context: RoundContext, record: RoundRecord, now: Proceedings, now_ms: int, grace_s: int
) -> RoundRecord | Until:
    """A round that is certifying: proposes one set once the members have checked, and goes on when a quorum signed it.

    No other set is ever proposed: members sign one a draw.
    """
    overdue, until = _grace(record, now_ms, grace_s)
    if not is_able(record, now):
        return _abandoned(record, Reason.QUORUM_MISSING, now_ms)
    if record.proposed:
        if len(now.signed) >= context.rule.quorum:
            return _advanced(record, Event.CERTIFY, now_ms)
        return _abandoned(record, Reason.QUORUM_MISSING, now_ms) if overdue else until
    checked = {position for position in _positions(record, now) if position in now.checks}
    if not overdue and checked != _positions(record, now):
        return until
    try:
        verdict = judge(context, frozenset(now.dealings), {p: now.checks[p] for p in checked})
        return _proposed(context, record, now, verdict, now_ms)
    except DomainError as error:
        return _abandoned(record, error.reason, now_ms)


def _proposed(
    context: RoundContext, record: RoundRecord, now: Proceedings, verdict: Verdict, now_ms: int
) -> RoundRecord:
    """Raises: DEALING_REFUSED: too few updates are left; SET_REFUSED: one could outweigh them."""
    if len(verdict.contributors) < context.min_updates:
        raise DomainError(Reason.DEALING_REFUSED, "too few updates are left")
    chosen = ContributorSet.of(context, {name: now.dealings[name] for name in verdict.contributors})
    left_out = tuple(
        Dropped(client_id=name, reason=Reason.DEALING_REFUSED, why=REFUSED_WHY) for name in verdict.left_out
    )
    return record.model_copy(
        update={
            "contributors": chosen.contributors,
            "proposed": chosen.content.hex(),
            "dropped": (*record.dropped, *left_out),
            "step_ms": now_ms,
        }
    )


def _positions(record: RoundRecord, now: Proceedings) -> set[int]:
    return {record.order.index(name) + 1 for name in present(record, now)}


def may_answer(record: RoundRecord, now: Proceedings) -> set[str]:
    """Members that can give the sum of their shares over the certified set: they hold all of them."""
    wanted = set(record.contributors)
    able = (p for p in _positions(record, now) if p in now.checks and now.checks[p].held >= wanted)
    return {record.order[position - 1] for position in able}


def has_answers(record: RoundRecord, now: Proceedings, now_ms: int, grace_s: int) -> bool | Until:
    """Whether an aggregated round has the answers to open its sum; False: it will not get them.

    More answers than T + l let agents see through liars: all who can answer are waited for, for a while.
    """
    overdue, until = _grace(record, now_ms, grace_s)
    able = may_answer(record, now) | now.answered
    enough = len(now.answered) >= rule_of(record).needed
    if len(able) < rule_of(record).needed:
        return False
    if able <= now.answered or overdue:
        return enough
    return until


def _grace(record: RoundRecord, now_ms: int, grace_s: int) -> tuple[bool, Until]:
    """Whether silent members are waited for no longer, and until when they are."""
    until_ms = record.step_ms + 1000 * grace_s
    return now_ms >= until_ms, Until(until_ms)


def _advanced(record: RoundRecord, event: Event, now_ms: int, **changes: object) -> RoundRecord:
    round_ = record.round.advance(event, now_ms)
    return record.model_copy(update={"round": round_, "step_ms": now_ms, **changes})


def _abandoned(record: RoundRecord, reason: Reason, now_ms: int, **changes: object) -> RoundRecord:
    round_ = record.round.advance(Event.ABANDON, now_ms, reason)
    return record.model_copy(update={"round": round_, **changes})


STEP_NAMES = {
    RoundState.COLLECTING: "seat_committee",
    RoundState.CERTIFYING: "propose_set",
    RoundState.AGGREGATING: "certify_set",
    RoundState.ABANDONED: "abandon_round",
}
"""Names of the writes that these steps lead to, by the state of the written record."""
