"""Writes findings: a short table for a terminal, the whole one in Markdown, JSON, a plot."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from attack import beside, experiments, malicious, simulated
from attack.findings import UNPROTECTED, Finding, bare, verdict
from shelora.terminal import Records, Terminal

HEADINGS: Final = ("setting", "attacker", "data", "result", "the same under none", "chance")
TITLES: Final = {
    experiments.TEXT: "Text of a client, decoded from the clear B of the last layer, A unknown",
    experiments.BY_B: "Words of a client: DAGER's check on B, the initial A known",
    experiments.BY_A: "Words of a client: DAGER's check on how A moved (selective: with a colluding client)",
    experiments.VISIBLE: "Words of a client: DAGER's check on A in round 2, so much of A encrypted",
    experiments.UNMIXED: "Columns of B that come back from an orthonormal basis",
    experiments.MEMBERSHIP: "Was this text in the batch?",
    experiments.LABELS: "Labels of a client, those of all others known",
    beside.BY_LOSS: "Was this text in the batch? By the mean loss that a client reports",
    beside.BY_REPORTS: "Labels of a client by the losses and accuracies that it reports, those of all others known",
    beside.BESIDE: "What servers keep beside updates, and should not",
    beside.STATEMENTS: "What a round's committee was dealt and stated",
    beside.ONE_KEY: "Differences of two updates of complete (one key for both would make them small)",
    experiments.IN_SUMS: "Words of the others, seen by a fellow member in the sum",
    malicious.MALICIOUS: "Words of a client: all servers and one client cheat together (complete)",
    simulated.ORDER: "Places of the columns of A, on simulated rows",
}
"""Of the parts of the short table; a server attacks where nobody else is named."""
LEGEND: Final = (
    "Shares, or AUC, from 0 to 1. Columns are modes: 16 and 32 bits are selective, 16 the default; "
    "basis is none, as if B had travelled as an orthonormal basis."
)
FORMS: Final = {
    "none": ("#b03a2e", "o"),
    "basis": ("#d68910", "v"),
    "32 bits": ("#7d3c98", "s"),
    "16 bits": ("#2e5d8a", "D"),
    "complete": ("#2e7d32", "P"),
    "control": ("#b03a2e", "o"),
    "members check": ("#2e7d32", "P"),
}
"""Colour and shape of a column's points; a mode has the same in all panels."""
OTHERS: Final = (("#b03a2e", "o"), ("#2e5d8a", "D"), ("#2e7d32", "P"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One measure of one attack that has a chance to be held against, in every form that it was tried on."""

    what: str
    cells: Mapping[str, float]
    """By column."""
    chance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The lines of one attack."""

    title: str
    columns: Sequence[str]
    lines: Sequence[Line]


def parts(findings: Sequence[Finding]) -> Iterator[Part]:
    """The short table: a part an attack, a line a measure, modes side by side."""
    for attack in dict.fromkeys(finding.attack for finding in findings):
        of = [finding for finding in findings if finding.attack == attack]
        columns = tuple(dict.fromkeys(finding.column for finding in of))
        if lines := tuple(_lines(of)):
            yield Part(title=TITLES.get(attack, attack), columns=columns, lines=lines)


def _lines(findings: Sequence[Finding]) -> Iterator[Line]:
    several = len({finding.data for finding in findings}) > 1
    for key in dict.fromkeys((*finding.beside, finding.variant) for finding in findings):
        of = {f.column: f for f in findings if (*f.beside, f.variant) == key}
        _, terms, data, variant = key
        if variant and (unprotected := bare(findings).get(key[:3])):
            of = {UNPROTECTED: unprotected} | of
        where = [*([data] if several else []), terms, *([variant] if variant else [])]
        for measure in dict.fromkeys(measure for finding in of.values() for measure in finding.chance):
            yield Line(
                what=", ".join([measure, *where]),
                cells={c: f.figures[measure] for c, f in of.items() if measure in f.figures},
                chance=max(finding.chance.get(measure, 0.0) for finding in of.values()),
            )


def show(findings: Sequence[Finding], folder: Path, terminal: Terminal) -> None:
    """Prints the short table, what it comes to, and where the rest lies."""
    for part in parts(findings):
        numbers = (*part.columns, "chance")
        shown = Records("", *numbers, title=part.title, numbers=numbers, sentences=("",))
        for line in part.lines:
            figures = (line.cells.get(column) for column in part.columns)
            shown.add(line.what, *("" if f is None else f"{f:.2f}" for f in figures), f"{line.chance:.2f}")
        terminal.print(shown)
        terminal.print()
    terminal.say(LEGEND)
    terminal.say(f"Attackers, counts and digests of the captures: {folder / 'table.md'}, findings.json.")
    terminal.say(f"The plot: {folder / 'attack.png'}.")
    terminal.print()
    for problem in (problem for finding in findings for problem in finding.problems()):
        terminal.say(problem, style="red")
    for sentence in verdict(findings):
        terminal.say(sentence, style="bold")


def rows(findings: Sequence[Finding]) -> Iterator[tuple[str, ...]]:
    """A row's words for every heading; the same attack's figures under `none` are among them, where it was tried."""
    unprotected = bare(findings)
    for finding in findings:
        counts = ", ".join(f"{count} {what}" for what, count in finding.counts.items())
        figures = _words(finding.figures)
        other = unprotected.get(finding.beside)
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
    """The whole table, a row a finding."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *rows(findings)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write(findings: Sequence[Finding], folder: Path) -> None:
    """Leaves table.md, findings.json (with the digests of the captures) and attack.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(findings))
    (folder / "findings.json").write_text(json.dumps([asdict(f) for f in findings], indent=2))
    _plot(list(parts(findings)), folder / "attack.png")


def _plot(shown: Sequence[Part], path: Path) -> None:
    """The short table as a picture: a panel a part, a line a measure, a point a column, a stroke for chance."""
    import matplotlib as mpl  # noqa: PLC0415 - only a report pays for it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - as above

    heights = [len(part.lines) + 2 for part in shown]
    figure, panels = plt.subplots(
        len(shown),
        1,
        figsize=(10, 1 + 0.2 * sum(heights)),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
        layout="constrained",
    )
    for axes, part in zip(panels[:, 0], shown, strict=True):
        _panel(axes, part)
    figure.suptitle("What captured messages give away; black: by chance", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axes: Any, part: Part) -> None:  # noqa: ANN401 - matplotlib's
    places = range(len(part.lines))
    for place, line in zip(places, part.lines, strict=True):
        axes.plot([line.chance] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
    for column, other in zip(part.columns, OTHERS * len(part.columns), strict=False):
        colour, shape = FORMS.get(column, other)
        points = [
            (line.cells[column], place) for place, line in enumerate(part.lines) if column in line.cells
        ]
        x, y = zip(*points, strict=True) if points else ((), ())
        axes.scatter(x, y, color=colour, marker=shape, s=20, alpha=0.75, label=column, zorder=3)
    axes.set_yticks(places, [line.what for line in part.lines], fontsize=7)
    axes.set_ylim(len(part.lines) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["right", "top"]].set_visible(False)
    axes.set_title(part.title, loc="left", fontsize=8, weight="bold")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7, frameon=False)
