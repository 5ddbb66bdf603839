"""Writes findings: a table for people, JSON, Markdown for the documents, a plot."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from rich.table import Table

from attack.findings import Finding

HEADINGS: Final = ("setting", "attacker", "data", "result", "the same under none", "chance")
BEYOND: Final = "#b03a2e"
WITHIN: Final = "#5d8aa8"
ERRORS: Final = 3
"""Standard errors above chance from which a bar is drawn as a leak."""
SLACK: Final = 0.02
"""Above chance that is not drawn as a leak, where no error is known."""


def table(findings: Sequence[Finding]) -> Table:
    """For a terminal."""
    shown = Table(title="What the captured messages give away", show_lines=False)
    for heading in HEADINGS:
        shown.add_column(heading, overflow="fold")
    for row in rows(findings):
        shown.add_row(*row)
    return shown


def rows(findings: Sequence[Finding]) -> Iterator[tuple[str, ...]]:
    """A row's words for every heading; the same attack's figures under `none` are among them, where it was tried."""
    bare = {finding.beside: finding for finding in findings if finding.unprotected}
    for finding in findings:
        counts = ", ".join(f"{count} {what}" for what, count in finding.counts.items())
        figures = _words(finding.figures)
        other = bare.get(finding.beside)
        yield (
            finding.setting,
            finding.attacker,
            finding.data,
            f"{figures} ({counts})" if counts else figures,
            _words(other.figures) if other and other is not finding else "",
            _words(finding.chance) or "0",
        )


def _words(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in figures.items())


def markdown(findings: Sequence[Finding]) -> str:
    """The same as a table of docs/."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *rows(findings)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write(findings: Sequence[Finding], folder: Path) -> None:
    """Leaves table.md, findings.json (with the digests of the captures) and attack.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(findings))
    (folder / "findings.json").write_text(json.dumps([asdict(f) for f in findings], indent=2))
    _plot(findings, folder / "attack.png")


def _plot(findings: Sequence[Finding], path: Path) -> None:
    """One bar a row: its first figure beside what guessing gives, its words on the right."""
    import matplotlib as mpl  # noqa: PLC0415 - only a report pays for it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - as above

    figure, axes = plt.subplots(figsize=(13, 0.4 * len(findings) + 1.4))
    figure.subplots_adjust(left=0.03, right=0.27, top=1 - 0.75 / (0.4 * len(findings) + 1.4), bottom=0.03)
    for place, finding in enumerate(reversed(findings)):
        name, value = next(iter(finding.figures.items()))
        chance = finding.chance.get(name, 0.0)
        beyond = value > chance + max(ERRORS * finding.error.get(name, 0.0), SLACK)
        axes.barh(place, value, color=BEYOND if beyond else WITHIN)
        axes.plot([chance] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
        axes.text(1.03, place, f"{value:.2f} {name}", va="center", fontsize=8, weight="bold")
        words = f"{finding.setting}\n{finding.attacker} \N{MIDDLE DOT} {finding.data}"
        axes.text(1.5, place, words, va="center", fontsize=7, linespacing=1.2)
    axes.set_yticks([])
    axes.set_ylim(-0.6, len(findings) - 0.4)
    axes.set_xlim(0, 1)
    axes.xaxis.tick_top()
    axes.spines[["right", "bottom"]].set_visible(False)
    title = (
        "What the captured messages give away. Red: beyond chance by three standard errors; black: chance."
    )
    figure.suptitle(title, x=0.03, ha="left", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
