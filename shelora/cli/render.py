"""Federations as tables for people."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.text import Text

from shelora.terminal import Records
from shelora.transport.identity import Role
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1 import enrolment_pb2
from shelora.view import (
    MAX_REMARKS,
    NEVER_MS,
    PHASES,
    RoundFigures,
    activity,
    caution,
    client_privacy,
    early_stopping,
    encrypts,
    figures_by_round,
    heading,
    member_troubles,
    protection_summary,
    remarks,
    sitting_out,
    size,
    taken_back,
    training_rounds,
    when,
    who_knows_figures,
)


def federation_view(federation: pb.Federation) -> RenderableType:
    """Everything about a federation: where it stands, its agents, its rounds."""
    parts: list[RenderableType] = [_headline(federation), _members_table(federation)]
    if troubles := member_troubles(federation):
        parts.append(_troubles_table(troubles))
    rounds = training_rounds(federation)
    if rounds:
        parts.append(rounds_table(figures_by_round(rounds)))
        if told := who_knows_figures(federation.spec):
            parts.append(Text(told, style="dim"))
    if made := remarks(federation):
        parts.append(_remarks_table(made[-MAX_REMARKS:]))
    return Panel(Group(*parts), box=box.HORIZONTALS, padding=0)


def _troubles_table(troubles: Sequence[tuple[str, str, str]]) -> Records:
    title = "\nagents that cannot do their work"
    table = Records("agent", "reason", "why", title=title, sentences=["why"])
    for trouble in troubles[:MAX_REMARKS]:
        table.add(*trouble)
    return table


def federations_table(federations: Sequence[pb.Federation]) -> RenderableType:
    """One line a federation."""
    table = Records("federation", "phase", "agents", "rounds", "now", sentences=["now"], lines=True)
    for federation in federations:
        done = f"{federation.trained_rounds} of {federation.spec.round.rounds}"
        name, phase = federation.federation_id, PHASES.get(federation.phase, "unknown")
        table.add(name, phase, str(federation.member_count), done, activity(federation))
    return table


def rounds_table(rounds: Sequence[RoundFigures]) -> Records:
    """One line a training round: quality, traffic, seconds."""
    title = "\ntraining rounds: medians over agents, times in seconds"
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


def _headline(federation: pb.Federation) -> Text:
    spec = federation.spec
    protection = protection_summary(spec.protection.mode)
    text = Text.assemble(
        (heading(federation), "bold"), f"\n{spec.training.base_model}, {protection}\n{activity(federation)}"
    )
    if warning := caution(spec):
        text.append(f"\n{warning}", style="yellow")
    if told := client_privacy(spec):
        text.append(f"\n{told}")
    if told := early_stopping(federation):
        text.append(f"\n{told}")
    for told in (taken_back(federation), sitting_out(federation)):
        if told:
            text.append(f"\n{told}", style="yellow")
    if federation.failure:
        text.append(f"\n{federation.failure}", style="red")
    return text


def _members_table(federation: pb.Federation) -> Records:
    table = Records("agent", "rank", "encrypts", "examples", "stage", "progress", "seen")
    for member in federation.members:
        seen = f"{member.idle_ms / 1000:.0f} s" if member.idle_ms < NEVER_MS else "-"
        budget = encrypts(federation.spec.protection.mode, member.budget)
        bar = ProgressBar(total=1, completed=member.progress, width=10)
        row: list[RenderableType] = [member.client_id, str(member.rank), budget, str(member.example_count)]
        table.add(*row, member.stage or "-", bar if member.stage else "", seen)
    return table


def revocations_table(revocations: Iterable[enrolment_pb2.Revocation]) -> Records:
    """One line a revocation."""
    table = Records("role", "federation", "client", "revoked", "since then")
    for revocation in revocations:
        since = "enrolled again" if revocation.enrolled_again else ""
        holder = (revocation.role or Role.CLIENT, revocation.federation_id, revocation.client_id)
        table.add(*holder, when(revocation.at_unix_ms), since)
    return table


def _remarks_table(made: Sequence[tuple[str, str, str, str]]) -> Records:
    title = "\nupdates refused, left out or given up, and objections"
    table = Records("round", "agent", "reason", "why", title=title, sentences=["why"])
    for remark in made:
        table.add(*remark)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
