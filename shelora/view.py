"""What is said of a federation to people, in words and figures: on a terminal, on the operator's page, in reports.

Pure: from what the coordinator answered to text and numbers. How it looks is decided elsewhere.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from statistics import median, median_low
from typing import Final, Literal

from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec, one_step
from shelora.strategies.registry import strategies, strategy_of
from shelora.v1 import coordinator_pb2 as pb

NEVER_MS: Final = 2**62
"""More than any time since a member was seen."""
SILENT_MS: Final = 60_000
"""Silence that is pointed out."""
_COPIES: Final = "two processes have this identity, of which one counts; the other was refused"
MAX_REMARKS: Final = 20
"""Remarks that are shown, the newest."""
STATES: Final = {
    pb.ROUND_STATE_SELECTING: "selecting a cohort",
    pb.ROUND_STATE_KEYING: "seating the committee",
    pb.ROUND_STATE_COLLECTING: "collecting updates",
    pb.ROUND_STATE_CERTIFYING: "agreeing on updates",
    pb.ROUND_STATE_AGGREGATING: "aggregating",
    pb.ROUND_STATE_PUBLISHED: "published",
    pb.ROUND_STATE_ABANDONED: "abandoned",
}
PHASES: Final = {
    pb.PHASE_CREATED: "created",
    pb.PHASE_RUNNING: "running",
    pb.PHASE_FINISHED: "finished",
    pb.PHASE_FAILED: "failed",
}


@dataclass(frozen=True, kw_only=True)
class RoundFigures:
    """One training round in numbers, medians over its agents unless said otherwise: what one agent says moves none."""

    number: int
    train_loss: float | None
    test_accuracy: float | None
    """Share of all evaluated test examples, after applying the round's result; of an agent count as many as the median
    agent has twice. Where agents tell none of their own, the mean that the next round's sum held."""
    test_examples: int
    """Of these, as far as agents say how many."""
    upload_bytes: float
    download_bytes: float
    train_s: float
    encrypt_s: float
    aggregate_s: float
    """Wall seconds of aggregation on the servers."""
    decrypt_s: float


def figures_by_round(rounds: Sequence[pb.RoundSummary]) -> list[RoundFigures]:
    """Figures of the rounds of `training_rounds`, in their order."""
    return [round_figures(summary, later) for summary, later in with_later(rounds)]


def with_later(
    rounds: Sequence[pb.RoundSummary],
) -> Iterator[tuple[pb.RoundSummary, pb.RoundSummary | None]]:
    """Each of the rounds of `training_rounds`, and the one that began from its result, if there is one."""
    return zip_longest(rounds, rounds[1:])


def round_figures(summary: pb.RoundSummary, later: pb.RoundSummary | None = None) -> RoundFigures:
    """Figures of one round from what its agents reported.

    Args: later: The round that began from its result, whose sum may hold how good that is.
    """
    updates, evaluations = summary.updates, summary.evaluations
    losses = [u.train_loss for u in updates if u.train_loss]  # 0: not told
    counted = _believed([e.example_count for e in evaluations])
    tested = sum(counted)
    right = sum(
        count * e.correct_count / e.example_count
        for count, e in zip(counted, evaluations, strict=True)
        if count
    )
    return RoundFigures(
        number=summary.number,
        train_loss=median_low(losses) if losses else mean_told(summary, "train_loss"),
        test_accuracy=right / tested if tested else mean_told(later, "accuracy"),
        test_examples=tested,
        upload_bytes=_median(u.upload_bytes for u in updates),
        download_bytes=_median(e.download_bytes for e in evaluations),
        train_s=_median(u.train_s for u in updates),
        encrypt_s=_median(u.encrypt_s for u in updates),
        aggregate_s=summary.aggregate_wall_s,
        decrypt_s=_median(e.decrypt_s for e in evaluations),
    )


def means_of(summary: pb.RoundSummary | None, name: Literal["accuracy", "loss", "train_loss"]) -> list[float]:
    """What agents say that a mean in a round's sum was."""
    reports = summary.evaluations if summary is not None else ()
    return [getattr(one.means, name) for one in reports if one.means.HasField(name)]


def mean_told(
    summary: pb.RoundSummary | None, name: Literal["accuracy", "loss", "train_loss"]
) -> float | None:
    """The median of these, as one agent's word does not count; None if none says it."""
    told = means_of(summary, name)
    return median_low(told) if told else None


def training_rounds(federation: pb.Federation) -> list[pb.RoundSummary]:
    """The published training rounds, oldest first, without those that were spoiled."""
    return _published(federation)[0]


def spoiled_rounds(federation: pb.Federation) -> list[pb.RoundSummary]:
    """The published training rounds that were taken back: most could not open the sum, or objected. Oldest first."""
    return _published(federation)[1]


def taken_back(federation: pb.Federation) -> str:
    """Which results were taken back, in a sentence; "" for none."""
    names = "; ".join(f"round {round_name(summary)}" for summary in spoiled_rounds(federation))
    return f"results taken back, as most agents objected or could not open them: {names}" if names else ""


def sitting_out(federation: pb.Federation) -> str:
    """Which agent is left out since, in a sentence; "" for none."""
    name = federation.sits_out
    return f"{name} sits out: its update was in every result that was taken back" if name else ""


def _published(federation: pb.Federation) -> tuple[list[pb.RoundSummary], list[pb.RoundSummary]]:
    """Published training rounds: those that count, and those that the abandonment of the next one took back."""
    counting: list[pb.RoundSummary] = []
    spoiled: list[pb.RoundSummary] = []
    for summary in federation.history:
        if summary.kind != pb.ROUND_KIND_TRAIN:
            continue
        if summary.state == pb.ROUND_STATE_PUBLISHED:
            counting.append(summary)
        elif summary.reason == Reason.SUM_UNREADABLE and counting:
            spoiled.append(counting.pop())
    return counting, spoiled


def status_line(federation: pb.Federation) -> str:
    """Where a federation stands, in one line."""
    return f"{heading(federation)}: {activity(federation)}"


def heading(federation: pb.Federation) -> str:
    """Name, phase and epoch."""
    phase = PHASES.get(federation.phase, "unknown")
    return f"federation {federation.federation_id} · {phase}{_epoch(federation)}"


def _epoch(federation: pb.Federation) -> str:
    if not federation.epoch:
        return ""
    return f" · keys of epoch {federation.epoch}" + (
        ", new ones follow" if federation.rotation_pending else ""
    )


def remarks(federation: pb.Federation) -> list[tuple[str, str, str, str]]:
    """Updates that are in no aggregate, and objections to results: round, client, reason, words.

    Oldest first.
    """
    current = [federation.current] if federation.HasField("current") else []
    return [remark for summary in [*federation.history, *current] for remark in round_remarks(summary)]


def round_remarks(summary: pb.RoundSummary) -> Iterator[tuple[str, str, str, str]]:
    """`remarks` of one round."""
    name = round_name(summary)
    for drop in summary.dropped:
        yield name, drop.client_id, f"gave up: {drop.reason}" if drop.gave_up else drop.reason, drop.why
    for said in summary.objections:
        yield name, said.client_id, "objects to the result", said.why


def could_not_join(federation: pb.Federation) -> list[tuple[str, str, str]]:
    """Who ended before it was a member: client, Reason, words."""
    return [(one.client_id, one.reason, f"it did not join: {one.why}") for one in federation.applicants]


def member_troubles(federation: pb.Federation) -> list[tuple[str, str, str]]:
    """What keeps agents from their work: client, Reason, words; two copies of one, and long silence, included."""
    found = could_not_join(federation)
    for member in federation.members:
        if member.reason:
            found.append((member.client_id, member.reason, member.why))
        if member.copy_refused_unix_ms:
            at = when(member.copy_refused_unix_ms)
            found.append((member.client_id, "CLIENT_REPLACED", f"{_COPIES}, last at {at}"))
        if federation.phase == pb.PHASE_RUNNING and member.idle_ms > SILENT_MS:
            seen = f"for {_minutes(member.idle_ms)}" if member.idle_ms < NEVER_MS else "lately"
            found.append((member.client_id, "silent", f"nothing was heard of it {seen}"))
    return found


def _minutes(idle_ms: int) -> str:
    minutes = idle_ms / 60_000
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def when(unix_ms: int) -> str:
    """A time that a server told, UTC; it may be one that no calendar has."""
    try:
        return f"{datetime.fromtimestamp(unix_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, ValueError, OSError):
        return "an unknown time"


def size(count: float) -> str:
    """Bytes for people: 1 MB is 10^6 bytes."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def protection_summary(mode: str) -> str:
    """What a strategy protects; its name if this version does not know it."""
    return strategy_of(mode).summary if mode in strategies() else mode


def encrypts(mode: str, budget: float) -> str:
    """What a client of that budget encrypts."""
    return strategy_of(mode).encrypts(budget) if mode in strategies() else "-"


def servers_see(mode: str) -> str:
    """What servers see of an update, in a sentence."""
    if mode not in strategies():
        return f"This version does not know the mode {mode}: ask its makers."
    return strategy_of(mode).servers_see


def client_privacy(spec: pb.FederationSpec) -> str:
    """What sums may tell of one client, in a sentence; "" if that is not bounded.

    It is worked out from the specification, which agents hold the coordinator to.
    """
    if not spec.protection.HasField("client_privacy"):
        return ""
    try:
        privacy = FederationSpec.from_proto(spec).protection.client_privacy
    except DomainError:
        return "client privacy of a kind that this version does not know: ask its makers"
    assert privacy is not None
    members = "member" if privacy.tolerated == 1 else "members"
    return (
        f"client privacy: epsilon {privacy.promised:.3g} at delta {privacy.delta:g} for all of one client's data, "
        f"taken away or not ({privacy.promised_replaced:.3g} if replaced), over at most {privacy.sums:,} sums, against "
        f"all who see the model, with up to {privacy.tolerated:,} colluding {members} of a sum's {privacy.updates:,} "
        "or more"
    )


def tells_means(mode: str) -> bool:
    """Whether agents tell nothing of their own examples, and means over several at most."""
    return mode in strategies() and not strategy_of(mode).shows_factors


def who_knows_figures(spec: pb.FederationSpec) -> str:
    """Who knows accuracies and losses, in a sentence, where agents do not report their own; "" where they do."""
    if not tells_means(spec.protection.mode):
        return ""
    if spec.protection.HasField("client_privacy"):
        return "accuracy and losses: each agent knows its own, and reports none under client privacy"
    if spec.protection.figures != "means":
        return (
            "accuracy and losses: each agent knows its own, and reports none, as protection.figures is none"
        )
    return (
        "accuracy and losses are means out of the encrypted sums: how good a result is, the next round's sum tells; of "
        "the last one each agent knows its own figures (figures.json and the card in its state folder)"
    )


def needs_keys(mode: str) -> bool:
    """Whether updates are protected by an epoch's keys; False for a mode that this version does not know."""
    return mode in strategies() and strategy_of(mode).needs_keys


def needs_committee(mode: str) -> bool:
    """Whether a committee of clients opens each round's sum."""
    return mode in strategies() and strategy_of(mode).needs_committee


def caution(spec: pb.FederationSpec) -> str:
    """What an operator should know of a specification that is valid and unwise, in a sentence; "" for none."""
    mode = spec.protection.mode
    if tells_means(mode) and spec.round.HasField("stop") and spec.protection.figures != "means":
        return "round.stop never ends it: it judges by means in the sums, and protection.figures is none"
    return one_step(mode, spec.training.local_steps) if mode in strategies() else ""


def activity(federation: pb.Federation) -> str:
    """What is going on, in one line."""
    if federation.deleting:
        return "being deleted"
    if federation.stopped and federation.phase == pb.PHASE_RUNNING:
        return f"stopping after {federation.trained_rounds} rounds"
    if federation.phase == pb.PHASE_CREATED:
        return f"{federation.member_count} agents joined"
    if federation.phase != pb.PHASE_RUNNING:
        return _outcome(federation)
    if not federation.HasField("current"):
        return f"waiting for {federation.spec.round.clients} agents, {federation.member_count} joined"
    current = federation.current
    name = "negotiation"
    if current.kind == pb.ROUND_KIND_TRAIN:
        name = f"round {current.number} of {federation.spec.round.rounds}"
    attempt = f" (attempt {current.attempt})" if current.attempt > 1 else ""
    return f"{name}{attempt}: {STATES.get(current.state, '')}, {_progress(current)}"


def _outcome(federation: pb.Federation) -> str:
    """What a federation came to that has ended."""
    rounds, seen = federation.trained_rounds, federation.early_stopping
    if federation.stopped:
        return f"stopped after {rounds} rounds"
    if seen.ended:
        patience = federation.spec.round.stop.patience
        words = f"{patience} in a row were not better than round {seen.best_round}"
        return f"ended by its rule after {rounds} rounds: {words}"
    return f"{rounds} of {federation.spec.round.rounds} training rounds done"


def early_stopping(federation: pb.Federation) -> str:
    """What the rule that may end a federation early has seen, in a sentence; "" without one, or before it has."""
    if not federation.HasField("early_stopping"):
        return ""
    rule, seen = federation.spec.round.stop, federation.early_stopping
    value = f"accuracy {seen.best:.1%}" if rule.metric == "accuracy" else f"loss {seen.best:.4f}"
    whose = "mean" if tells_means(federation.spec.protection.mode) else "median"
    best = f"best round: {seen.best_round}, {value}, the {whose} over agents"
    if federation.phase != pb.PHASE_RUNNING:
        return best
    by = f" by more than {rule.threshold:g}" if rule.threshold else ""
    return f"{best}, of {seen.judged_round} judged; {rule.patience} in a row that are not better{by} end it"


def _progress(current: pb.RoundSummary) -> str:
    if current.state == pb.ROUND_STATE_AGGREGATING:
        return f"{current.shards_done} of {current.shard_count} shards"
    dropped = f", {len(current.dropped)} refused" if current.dropped else ""
    return f"{current.update_count} of {current.cohort_count} updates, {size(current.upload_bytes)}{dropped}"


def round_name(summary: pb.RoundSummary) -> str:
    """Its number, and its attempt if it is not the first."""
    number = str(summary.number) if summary.kind == pb.ROUND_KIND_TRAIN else "vote"
    return f"{number}, attempt {summary.attempt}" if summary.attempt > 1 else number


def _median(values: Iterable[float]) -> float:
    collected = list(values)
    return median(collected) if collected else 0.0


def _believed(counts: Sequence[int]) -> list[int]:
    """What agents say they tested, each up to twice the median: nobody outweighs the others by claiming a billion."""
    most = int(2 * median(counts)) if counts else 0
    return [min(count, most) for count in counts]
