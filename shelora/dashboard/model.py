"""What the page shows of federations, as plain values: pure, from the coordinator's answers and the page's memory.

Figures of a round are medians over its agents, and are shown only if `min_updates` agents reported: those of fewer
would be nearly one agent's own. Members' rows hold no loss, no accuracy and no number of examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

from markupsafe import Markup

from shelora.dashboard.charts import Series, line_chart, sparkline
from shelora.dashboard.memory import PresenceHistory
from shelora.protocol import Stage
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import (
    MAX_REMARKS,
    NEVER_MS,
    PHASES,
    SILENT_MS,
    STATES,
    RoundFigures,
    activity,
    caution,
    client_privacy,
    could_not_join,
    early_stopping,
    encrypts,
    means_of,
    member_troubles,
    needs_committee,
    needs_keys,
    protection_summary,
    remarks,
    round_figures,
    round_name,
    round_remarks,
    servers_see,
    sitting_out,
    size,
    spoiled_rounds,
    taken_back,
    tells_means,
    training_rounds,
    who_knows_figures,
    with_later,
)

MAX_ROUNDS: Final = 12
"""Rounds in the timeline, the newest."""
ENDING_MS: Final = 3_600_000
"""Milliseconds to the end of a certificate that should have been renewed: agents ask after two thirds of its life."""
MAX_ROWS: Final = 500
"""Members shown; those in trouble first."""
MAX_REFUSALS: Final = 3
"""Of a member in its row, the newest."""
MAX_POINTS: Final = 400
"""Rounds in a chart; of more, every second, third and so on."""
PLAIN_STAGES: Final = (pb.ROUND_STATE_SELECTING, pb.ROUND_STATE_COLLECTING, pb.ROUND_STATE_AGGREGATING)
COMMITTEE_STAGES: Final = (
    pb.ROUND_STATE_SELECTING,
    pb.ROUND_STATE_KEYING,
    pb.ROUND_STATE_COLLECTING,
    pb.ROUND_STATE_CERTIFYING,
    pb.ROUND_STATE_AGGREGATING,
)
_SHORT: Final = {
    pb.ROUND_STATE_SELECTING: "selecting",
    pb.ROUND_STATE_KEYING: "keying",
    pb.ROUND_STATE_COLLECTING: "collecting",
    pb.ROUND_STATE_CERTIFYING: "certifying",
    pb.ROUND_STATE_AGGREGATING: "aggregating",
}


@dataclass(frozen=True, kw_only=True)
class FederationRow:
    """One federation in the list."""

    name: str
    phase: str
    now: str
    members: int
    trained: int
    rounds: int


@dataclass(frozen=True)
class StageStatus:
    """One stage of a round."""

    name: str
    status: str
    """`done`, `now`, `next` or `lost`."""


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """One round of the timeline."""

    name: str
    stages: tuple[StageStatus, ...]
    state: str
    updates: str
    lasted: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class MemberRow:
    """One member."""

    name: str
    rank: int
    encrypts: str
    stage: str
    progress: float
    activity: str
    seen: str
    dot: str
    """Class of its mark: `ok`; silent for long it is `bad` while the federation runs, then `gone`."""
    certificate: str
    """When its certificate ends, in words; "-" if that is not known."""
    ending: bool
    """Whether its certificate was not renewed when it should have been."""
    troubles: tuple[str, ...]
    refusals: tuple[str, ...]
    """Rounds that have ended and do not count its update, or to whose result it objected: the newest first."""
    spark: Markup
    in_committee: bool
    """Whether it sits on the committee of the round in progress."""


@dataclass(frozen=True, kw_only=True)
class FederationPage:
    """Everything about one federation."""

    row: FederationRow
    epoch: int
    rotates: bool
    failure: str
    base_model: str
    protection: str
    mode: str
    servers_see: str
    caution: str
    """What is unwise about its specification; "" for nothing."""
    client_privacy: str
    """What sums may tell of one client; "" if no bound is promised."""
    early_stopping: str
    """What the rule that may end it early has seen; "" without one."""
    taken_back: str
    """Which results were taken back; "" for none."""
    sitting_out: str
    """Which agent is left out since; "" for none."""
    committee: bool
    keyed: bool
    rounds: tuple[RoundRow, ...]
    members: tuple[MemberRow, ...]
    more_members: int
    applicants: tuple[str, ...]
    """Clients that could not join, each with its reason in words."""
    remarks: tuple[tuple[str, str, str, str], ...]
    """What became of updates, and objections, the newest first: round, client, reason, words."""
    figures: tuple[RoundFigures, ...]
    withheld: bool
    """Whether figures of some round are not shown, as too few agents reported."""
    quality: Markup
    loss: Markup
    traffic: Markup
    accuracy: str
    """The newest."""
    figures_known: str
    """Who knows accuracies and losses, if agents do not report their own; "" if they do."""
    up: str
    down: str
    actions: frozenset[str]
    """What can be done now: start, stop, extend, rotate, delete."""


def federation_row(federation: pb.Federation) -> FederationRow:
    """One line of the list."""
    return FederationRow(
        name=federation.federation_id,
        phase="deleting" if federation.deleting else PHASES.get(federation.phase, "unknown"),
        now=activity(federation),
        members=federation.member_count,
        trained=federation.trained_rounds,
        rounds=federation.spec.round.rounds,
    )


def federation_page(federation: pb.Federation, memory: PresenceHistory, now_s: float) -> FederationPage:
    """The whole page of a federation.

    Args:
        federation: With members and history.
        memory: What this process remembers.
        now_s: Now, by the clock of the memory.
    """
    mode, least = federation.spec.protection.mode, federation.spec.round.min_updates
    summaries = training_rounds(federation)
    figures = tuple(shown_figures(r, least, later) for r, later in with_later(summaries))
    rows = _members(federation, memory, now_s)
    drawn = figures[:: 1 + len(figures) // MAX_POINTS]
    newest = figures[-1] if figures else None
    return FederationPage(
        row=federation_row(federation),
        epoch=federation.epoch,
        rotates=federation.rotation_pending,
        failure=federation.failure,
        base_model=federation.spec.training.base_model,
        protection=protection_summary(mode),
        mode=mode,
        servers_see=servers_see(mode),
        caution=caution(federation.spec),
        client_privacy=client_privacy(federation.spec),
        early_stopping=early_stopping(federation),
        taken_back=taken_back(federation),
        sitting_out=sitting_out(federation),
        committee=needs_committee(mode),
        keyed=needs_keys(mode),
        rounds=_timeline(federation),
        members=rows[:MAX_ROWS],
        more_members=max(0, len(rows) - MAX_ROWS),
        applicants=tuple(": ".join(words) for words in could_not_join(federation)),
        remarks=tuple(reversed(remarks(federation)[-MAX_REMARKS:])),
        figures=figures,
        withheld=any(
            0 < count < least for r in summaries for count in (_losses(r), len(r.updates), _tests(r))
        ),
        quality=_quality(drawn),
        loss=_loss(drawn),
        traffic=_traffic(drawn),
        accuracy=_newest_accuracy(figures, of_means=tells_means(mode)),
        figures_known=who_knows_figures(federation.spec),
        up=size(newest.upload_bytes) if newest and newest.upload_bytes else "-",
        down=size(newest.download_bytes) if newest and newest.download_bytes else "-",
        actions=_actions(federation),
    )


def shown_figures(summary: pb.RoundSummary, least: int, later: pb.RoundSummary | None = None) -> RoundFigures:
    """Figures of a round, without those that fewer than `least` agents reported; accuracy is a median as well.

    Args: later: The round that began from its result.
    """
    figures = round_figures(summary, later)
    if _tests(summary):
        figures = replace(figures, test_accuracy=_median_accuracy(summary))
    if max(_losses(summary), len(means_of(summary, "train_loss"))) < least:
        figures = replace(figures, train_loss=None)
    if len(summary.updates) < least:
        figures = replace(figures, upload_bytes=0.0, train_s=0.0, encrypt_s=0.0)
    if max(_tests(summary), len(means_of(later, "accuracy"))) < least:
        figures = replace(figures, test_accuracy=None, test_examples=0)
    if len(summary.evaluations) < least:
        figures = replace(figures, download_bytes=0.0, decrypt_s=0.0)
    return figures


def _newest_accuracy(figures: Sequence[RoundFigures], *, of_means: bool) -> str:
    """That of the newest result; of means, the newest that is known, with its round."""
    if not of_means:
        return _share(figures[-1].test_accuracy if figures else None)
    known = [f"{_share(f.test_accuracy)}, round {f.number}" for f in figures if f.test_accuracy is not None]
    return known[-1] if known else "-"


def _losses(summary: pb.RoundSummary) -> int:
    """Agents that told a training loss; some do not, though they sent an update."""
    return sum(1 for update in summary.updates if update.train_loss)


def _tests(summary: pb.RoundSummary) -> int:
    """Agents that evaluated the round's result on examples of their own."""
    return sum(1 for evaluation in summary.evaluations if evaluation.example_count)


def _median_accuracy(summary: pb.RoundSummary) -> float | None:
    """Over the agents: one of three could halve the share of all their examples by claiming many that are wrong."""
    shares = [e.correct_count / e.example_count for e in summary.evaluations if e.example_count]
    return median(shares) if shares else None


def ago(seconds: float) -> str:
    """How long ago, for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def _ends(seconds: float) -> str:
    """When something ends, for people."""
    return f"in {ago(seconds)}" if seconds > 0 else f"{ago(-seconds)} ago"


def _actions(federation: pb.Federation) -> frozenset[str]:
    if federation.deleting:
        return frozenset()
    by_phase = {
        pb.PHASE_CREATED: {"start", "stop", "extend"},
        pb.PHASE_RUNNING: {"extend"} if federation.stopped else {"stop", "extend", "rotate"},
        pb.PHASE_FINISHED: {"extend"},
    }
    possible = by_phase.get(federation.phase, set())
    keyed = needs_keys(federation.spec.protection.mode)
    return frozenset(possible - (set() if keyed else {"rotate"})) | {"delete"}


def _timeline(federation: pb.Federation) -> tuple[RoundRow, ...]:
    """The newest rounds, the newest first."""
    current = [federation.current] if federation.HasField("current") else []
    newest = [*federation.history[-MAX_ROUNDS:], *current][-MAX_ROUNDS:]
    committee = needs_committee(federation.spec.protection.mode)
    spoiled = {r.sequence for r in spoiled_rounds(federation)}
    return tuple(
        _round(r, federation.now_unix_ms, committee=committee, spoiled=r.sequence in spoiled)
        for r in reversed(newest)
    )


def _round(summary: pb.RoundSummary, now_ms: int, *, committee: bool, spoiled: bool) -> RoundRow:
    stages = COMMITTEE_STAGES if committee and summary.kind == pb.ROUND_KIND_TRAIN else PLAIN_STAGES
    dropped = f", {len(summary.dropped)} refused or left out" if summary.dropped else ""
    arrived = f"{summary.update_count} of {summary.cohort_count} updates, {size(summary.upload_bytes)}"
    seated = f", committee of {len(summary.committee)}" if summary.committee else ""
    end = summary.ended_unix_ms or now_ms
    return RoundRow(
        name="negotiation" if summary.kind == pb.ROUND_KIND_VOTE else f"round {round_name(summary)}",
        stages=tuple(StageStatus(_SHORT[s], _status(s, summary, stages)) for s in stages),
        state="published, then taken back" if spoiled else STATES.get(summary.state, ""),
        updates=f"{arrived}{dropped}{seated}",
        lasted=ago((end - summary.opened_unix_ms) / 1000) if 0 < summary.opened_unix_ms <= end else "",
        reason=summary.reason,
    )


def _status(stage: int, summary: pb.RoundSummary, stages: Sequence[int]) -> str:
    if summary.state == pb.ROUND_STATE_PUBLISHED:
        return "done"
    if summary.state == pb.ROUND_STATE_ABANDONED:
        return "lost"
    if summary.state not in stages:
        return "next"
    place, reached = stages.index(stage), stages.index(summary.state)
    return "now" if place == reached else "done" if place < reached else "next"


def _members(federation: pb.Federation, memory: PresenceHistory, now_s: float) -> tuple[MemberRow, ...]:
    troubles: dict[str, list[str]] = {}
    for client, reason, why in member_troubles(federation):
        troubles.setdefault(client, []).append(f"{reason}: {why}")
    refusals = _refusals(federation)
    rows = [
        _member(
            federation,
            m,
            troubles=troubles.get(m.client_id, ()),
            refusals=refusals.get(m.client_id, ()),
            memory=memory,
            now_s=now_s,
        )
        for m in federation.members
    ]
    return tuple(sorted(rows, key=lambda row: (not row.troubles, row.name)))


def _refusals(federation: pb.Federation) -> dict[str, list[str]]:
    """By client; `_activity` tells of the round in progress."""
    found: dict[str, list[str]] = {}
    for summary in reversed(federation.history):
        for name, client, reason, _ in round_remarks(summary):
            found.setdefault(client, []).append(f"round {name}: {reason}")
    return {client: said[:MAX_REFUSALS] for client, said in found.items()}


def _member(
    federation: pb.Federation,
    member: pb.Member,
    *,
    troubles: Sequence[str],
    refusals: Sequence[str],
    memory: PresenceHistory,
    now_s: float,
) -> MemberRow:
    name, left_ms = member.client_id, member.certificate_ends_unix_ms - federation.now_unix_ms
    known = bool(member.certificate_ends_unix_ms)
    return MemberRow(
        name=name,
        rank=member.rank,
        encrypts=encrypts(federation.spec.protection.mode, member.budget),
        stage=member.stage,
        progress=member.progress,
        activity=_activity(federation, member, memory, now_s),
        seen=f"{ago(member.idle_ms / 1000)} ago" if member.idle_ms < NEVER_MS else "not lately",
        dot="ok"
        if member.idle_ms <= SILENT_MS
        else "bad"
        if federation.phase == pb.PHASE_RUNNING
        else "gone",
        certificate=_ends(left_ms / 1000) if known else "-",
        ending=known and left_ms < ENDING_MS,
        troubles=tuple(troubles),
        refusals=tuple(refusals),
        spark=sparkline(memory.heard(federation.federation_id, name), name),
        in_committee=name in federation.current.committee,
    )


def _activity(federation: pb.Federation, member: pb.Member, memory: PresenceHistory, now_s: float) -> str:
    """The last thing of note that a member did in the round in progress, in words."""
    current, name = federation.current, member.client_id
    for drop in current.dropped:
        if drop.client_id == name:
            return f"gave up: {drop.reason}" if drop.gave_up else f"update refused: {drop.reason}"
    for report in current.updates:
        if report.client_id == name:
            sent_s = memory.sent_s(federation.federation_id, name, current.round_id)
            when = f", {ago(now_s - sent_s)} ago" if sent_s is not None else ""
            what = "ballot" if current.kind == pb.ROUND_KIND_VOTE else "update"
            return f"{what} sent, {size(report.upload_bytes)}{when}"
    silent = member.idle_ms > SILENT_MS
    if not member.stage:  # it has not said, or so long ago that the coordinator has forgotten it
        return "silent" if silent else "joined"
    share = f", {member.progress:.0%}" if 0 < member.progress < 1 else ""
    gone = silent and member.stage != Stage.FINISHED
    return f"{'silent since ' if gone else ''}{member.stage}{share}"


def _quality(figures: Sequence[RoundFigures]) -> Markup:
    values = [f.test_accuracy for f in figures]
    words = [_share(v) for v in values]
    one = Series(name="accuracy", values=values, words=words, kind="a")
    return line_chart("Test accuracy over agents", [f.number for f in figures], [one], unit="%")


def _loss(figures: Sequence[RoundFigures]) -> Markup:
    values = [f.train_loss for f in figures]
    words = ["" if v is None else f"{v:.3f}" for v in values]
    one = Series(name="loss", values=values, words=words, kind="a")
    return line_chart("Training loss over agents", [f.number for f in figures], [one])


def _traffic(figures: Sequence[RoundFigures]) -> Markup:
    up, down = ([getattr(f, f"{way}_bytes") or None for f in figures] for way in ("upload", "download"))
    both = [
        Series(name=name, values=values, words=["" if v is None else size(v) for v in values], kind=kind)
        for name, values, kind in (("up", up, "a"), ("down", down, "b"))
    ]
    return line_chart("Bytes an agent, median", [f.number for f in figures], both, unit="B")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
