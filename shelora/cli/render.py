"""Federations as tables for people, and the figures of a round that tables and summaries share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median, median_low
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.text import Text

from shelora.strategies.registry import strategies, strategy_of
from shelora.terminal import Records
from shelora.transport.identity import Role
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1 import enrolment_pb2

NEVER_MS: Final = 2**62
"""More than any time since a member was seen."""
SILENT_MS: Final = 60_000
"""Silence that is pointed out."""
_COPIES: Final = "two processes have this identity, of which one counts; the other was refused"
MAX_DROPPED: Final = 20
"""Updates refused or left out that are shown, the newest."""
_STATE = {
    pb.ROUND_STATE_SELECTING: "selecting a cohort",
    pb.ROUND_STATE_KEYING: "seating the committee",
    pb.ROUND_STATE_COLLECTING: "collecting updates",
    pb.ROUND_STATE_CERTIFYING: "agreeing on updates",
    pb.ROUND_STATE_AGGREGATING: "aggregating",
    pb.ROUND_STATE_PUBLISHED: "published",
    pb.ROUND_STATE_ABANDONED: "abandoned",
}
_PHASE = {
    pb.PHASE_CREATED: "created",
    pb.PHASE_RUNNING: "running",
    pb.PHASE_FINISHED: "finished",
    pb.PHASE_FAILED: "failed",
}


@dataclass(frozen=True)
class RoundFigures:
    """One training round in numbers, medians over its agents unless said otherwise: what one agent says moves none."""

    number: int
    train_loss: float | None
    test_accuracy: float | None
    """Share of all evaluated test examples, after applying the round's result; of an agent count as many as the median
    agent has twice."""
    test_examples: int
    """Of these."""
    upload_bytes: float
    download_bytes: float
    train_s: float
    encrypt_s: float
    aggregate_s: float
    """Wall seconds of aggregation on the servers."""
    decrypt_s: float


def round_figures(summary: pb.RoundSummary) -> RoundFigures:
    """Figures of one round from what its agents reported."""
    updates, evaluations = summary.updates, summary.evaluations
    counted = _believed([e.example_count for e in evaluations])
    tested = sum(counted)
    right = sum(
        count * e.correct_count / e.example_count
        for count, e in zip(counted, evaluations, strict=True)
        if count
    )
    return RoundFigures(
        number=summary.number,
        train_loss=median_low(u.train_loss for u in updates) if updates else None,
        test_accuracy=right / tested if tested else None,
        test_examples=tested,
        upload_bytes=_median(u.upload_bytes for u in updates),
        download_bytes=_median(e.download_bytes for e in evaluations),
        train_s=_median(u.train_s for u in updates),
        encrypt_s=_median(u.encrypt_s for u in updates),
        aggregate_s=summary.aggregate_wall_s,
        decrypt_s=_median(e.decrypt_s for e in evaluations),
    )


def training_rounds(federation: pb.Federation) -> list[pb.RoundSummary]:
    """The published training rounds, oldest first."""
    return [
        r for r in federation.history if r.kind == pb.ROUND_KIND_TRAIN and r.state == pb.ROUND_STATE_PUBLISHED
    ]


def federation_view(federation: pb.Federation) -> RenderableType:
    """Everything about a federation: where it stands, its agents, its rounds."""
    parts: list[RenderableType] = [_headline(federation), _members_table(federation)]
    if troubles := member_troubles(federation):
        parts.append(_troubles_table(troubles))
    rounds = training_rounds(federation)
    if rounds:
        parts.append(rounds_table([round_figures(r) for r in rounds]))
    dropped = dropped_updates(federation)
    if dropped:
        parts.append(_dropped_table(dropped[-MAX_DROPPED:]))
    return Panel(Group(*parts), box=box.HORIZONTALS, padding=0)


def standing(federation: pb.Federation) -> str:
    """Where a federation stands, in one line."""
    return f"{_title(federation)}: {_now(federation)}"


def _title(federation: pb.Federation) -> str:
    phase = _PHASE.get(federation.phase, "unknown")
    return f"federation {federation.federation_id} · {phase}{_epoch(federation)}"


def _epoch(federation: pb.Federation) -> str:
    if not federation.epoch:
        return ""
    return f" · keys of epoch {federation.epoch}" + (
        ", new ones follow" if federation.rotation_pending else ""
    )


def dropped_updates(federation: pb.Federation) -> list[tuple[str, pb.DroppedUpdate]]:
    """Updates that are in no aggregate, oldest first, each with the name of its round."""
    current = [federation.current] if federation.HasField("current") else []
    return [(_name(r), drop) for r in [*federation.history, *current] for drop in r.dropped]


def member_troubles(federation: pb.Federation) -> list[tuple[str, str, str]]:
    """What keeps members from their work: client, Reason, words; two copies of one, and long silence, included."""
    found = []
    for member in federation.members:
        if member.reason:
            found.append((member.client_id, member.reason, member.why))
        if member.copy_refused_unix_ms:
            at = datetime.fromtimestamp(member.copy_refused_unix_ms / 1000, UTC)
            found.append((member.client_id, "CLIENT_REPLACED", f"{_COPIES}, last at {at:%Y-%m-%d %H:%M} UTC"))
        if federation.phase == pb.PHASE_RUNNING and member.idle_ms > SILENT_MS:
            seen = f"for {_minutes(member.idle_ms)}" if member.idle_ms < NEVER_MS else "lately"
            found.append((member.client_id, "silent", f"nothing was heard of it {seen}"))
    return found


def _minutes(idle_ms: int) -> str:
    minutes = idle_ms / 60_000
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def _troubles_table(troubles: Sequence[tuple[str, str, str]]) -> Records:
    title = "\nagents that cannot do their work"
    table = Records("agent", "reason", "why", title=title, sentences=["why"])
    for trouble in troubles[:MAX_DROPPED]:
        table.add(*trouble)
    return table


def federations_table(federations: Sequence[pb.Federation]) -> RenderableType:
    """One line a federation."""
    table = Records("federation", "phase", "agents", "rounds", "now", sentences=["now"], lines=True)
    for federation in federations:
        done = f"{federation.trained_rounds} of {federation.spec.round.rounds}"
        name, phase = federation.federation_id, _PHASE.get(federation.phase, "unknown")
        table.add(name, phase, str(federation.member_count), done, _now(federation))
    return table


def rounds_table(rounds: Sequence[RoundFigures]) -> Records:
    """One line a training round: quality, traffic, seconds."""
    title = "\ntraining rounds: means over agents, times in seconds"
    headings = ("round", "loss", "accuracy", "up", "down", "train", "encrypt", "aggregate", "decrypt")
    table = Records(*headings, title=title, numbers=headings)
    for figures in rounds:
        table.add(
            str(figures.number),
            _number(figures.train_loss, ".3f"),
            _number(figures.test_accuracy, ".1%"),
            size(figures.upload_bytes) if figures.upload_bytes else "-",
            size(figures.download_bytes) if figures.download_bytes else "-",
            f"{figures.train_s:.1f}",
            f"{figures.encrypt_s:.2f}",
            f"{figures.aggregate_s:.2f}",
            f"{figures.decrypt_s:.2f}" if figures.download_bytes else "-",
        )
    return table


def size(count: float) -> str:
    """Bytes for people: 1 MB is 10^6 bytes."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def _headline(federation: pb.Federation) -> Text:
    spec = federation.spec
    protection = _summary(spec.protection.mode)
    text = Text.assemble(
        (_title(federation), "bold"), f"\n{spec.training.base_model}, {protection}\n{_now(federation)}"
    )
    if federation.failure:
        text.append(f"\n{federation.failure}", style="red")
    return text


def _summary(mode: str) -> str:
    """What a strategy protects; its name if this version does not know it."""
    return strategy_of(mode).summary if mode in strategies() else mode


def _encrypts(mode: str, budget: float) -> str:
    """What a client of that budget encrypts."""
    return strategy_of(mode).encrypts(budget) if mode in strategies() else "-"


def _now(federation: pb.Federation) -> str:
    """What is going on, in one line."""
    if federation.deleting:
        return "being deleted"
    if federation.stopped:
        done = f"after {federation.trained_rounds} rounds"
        return f"stopped {done}" if federation.phase != pb.PHASE_RUNNING else f"stopping {done}"
    if federation.phase != pb.PHASE_RUNNING:
        return "-" if federation.phase != pb.PHASE_CREATED else f"{federation.member_count} agents joined"
    if not federation.HasField("current"):
        return f"waiting for {federation.spec.round.clients} agents, {federation.member_count} joined"
    current = federation.current
    name = "negotiation"
    if current.kind == pb.ROUND_KIND_TRAIN:
        name = f"round {current.number} of {federation.spec.round.rounds}"
    attempt = f" (attempt {current.attempt})" if current.attempt > 1 else ""
    return f"{name}{attempt}: {_STATE.get(current.state, '')}, {_progress(current)}"


def _progress(current: pb.RoundSummary) -> str:
    if current.state == pb.ROUND_STATE_AGGREGATING:
        return f"{current.shards_done} of {current.shard_count} shards"
    dropped = f", {len(current.dropped)} refused" if current.dropped else ""
    return f"{current.update_count} of {current.cohort_count} updates, {size(current.upload_bytes)}{dropped}"


def _members_table(federation: pb.Federation) -> Records:
    table = Records("agent", "rank", "encrypts", "examples", "stage", "progress", "seen")
    for member in federation.members:
        seen = f"{member.idle_ms / 1000:.0f} s" if member.idle_ms < NEVER_MS else "-"
        budget = _encrypts(federation.spec.protection.mode, member.budget)
        bar = ProgressBar(total=1, completed=member.progress, width=10)
        row: list[RenderableType] = [member.client_id, str(member.rank), budget, str(member.example_count)]
        table.add(*row, member.stage or "-", bar if member.stage else "", seen)
    return table


def revocations_table(revocations: Iterable[enrolment_pb2.Revocation]) -> Records:
    """One line a revocation."""
    table = Records("role", "federation", "client", "revoked (UTC)", "since then")
    for revocation in revocations:
        at = datetime.fromtimestamp(revocation.at_unix_ms / 1000, UTC)
        since = "enrolled again" if revocation.enrolled_again else ""
        holder = (revocation.role or Role.CLIENT, revocation.federation_id, revocation.client_id)
        table.add(*holder, f"{at:%Y-%m-%d %H:%M:%S}", since)
    return table


def _dropped_table(dropped: Sequence[tuple[str, pb.DroppedUpdate]]) -> Records:
    title = "\nupdates refused or left out"
    table = Records("round", "agent", "reason", "why", title=title, sentences=["why"])
    for name, drop in dropped:
        table.add(name, drop.client_id, drop.reason, drop.why)
    return table


def _name(summary: pb.RoundSummary) -> str:
    number = str(summary.number) if summary.kind == pb.ROUND_KIND_TRAIN else "vote"
    return f"{number}, attempt {summary.attempt}" if summary.attempt > 1 else number


def _median(values: Iterable[float]) -> float:
    collected = list(values)
    return median(collected) if collected else 0.0


def _believed(counts: Sequence[int]) -> list[int]:
    """What agents say they tested, each up to twice the median: nobody outweighs the others by claiming a billion."""
    most = int(2 * median(counts)) if counts else 0
    return [min(count, most) for count in counts]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
