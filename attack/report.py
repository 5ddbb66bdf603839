"""Writes findings: a table for people, JSON, Markdown for the documents, a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from attack.findings import Finding


def table(findings: Sequence[Finding]) -> Table:
    """For a terminal."""
    shown = Table(title="What the captured messages give away", show_lines=False)
    for heading in ("setting", "attacker", "data", "result", "chance"):
        shown.add_column(heading, overflow="fold")
    for finding in findings:
        shown.add_row(*cells(finding))
    return shown


def cells(finding: Finding) -> tuple[str, str, str, str, str]:
    """A row's words."""
    counts = ", ".join(f"{count} {what}" for what, count in finding.counts.items())
    figures = ", ".join(f"{name} {value:.2f}" for name, value in finding.figures.items())
    chance = ", ".join(f"{name} {value:.2f}" for name, value in finding.chance.items())
    return (
        finding.setting,
        finding.attacker,
        finding.data,
        f"{figures} ({counts})" if counts else figures,
        chance or "0",
    )


def markdown(findings: Sequence[Finding]) -> str:
    """The same as a table of docs/."""
    head = "| setting | attacker | data | result | chance |\n|---|---|---|---|---|\n"
    return head + "".join("| " + " | ".join(cells(finding)) + " |\n" for finding in findings)


def write(findings: Sequence[Finding], folder: Path) -> None:
    """Leaves table.md, findings.json and recall.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(findings))
    (folder / "findings.json").write_text(json.dumps([asdict(f) for f in findings], indent=2))
    _plot(findings, folder / "attack.png")


def _plot(findings: Sequence[Finding], path: Path) -> None:
    """One bar a row: the first figure, with chance as a mark."""
    import matplotlib as mpl  # noqa: PLC0415 - only a report pays for it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - as above

    figure, axes = plt.subplots(figsize=(10, 0.32 * len(findings) + 1.5), layout="constrained")
    for place, finding in enumerate(reversed(findings)):
        name, value = next(iter(finding.figures.items()))
        axes.barh(place, value, color="#b03a2e" if value > 0.5 + 0.2 * (name == "auc") else "#5d8aa8")
        if name in finding.chance:
            axes.plot([finding.chance[name]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1)
    labels = [f"{f.setting} · {f.attacker} · {f.data} · {next(iter(f.figures))}" for f in reversed(findings)]
    axes.set_yticks(range(len(findings)), labels, fontsize=7)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("figure (black: chance)")
    figure.savefig(path, dpi=150)
    plt.close(figure)
