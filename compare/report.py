"""The page of the comparison: a table for every cohort that has run, and a plot, between two marks in comparison.md."""

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Final

from compare.cells import Place, chosen_rate
from compare.metrics import Metric, best
from compare.settings import SEEDS, Cell, Cohort
from tools.prose import wrapped

BEGIN: Final = "<!-- written by `python -m compare report` -->"
END: Final = "<!-- end of what is written -->"
TITLES: Final = {
    "complete": ("**complete**", "nothing"),
    "selective": ("**selective**, all columns", "B"),
    "exact": ("exact sum (FlexLoRA)", "all"),
    "fedit": ("averaged apart (FedIT)", "all"),
    "ffa": ("A frozen, random (FFA-LoRA)", "all"),
    "ffa-activations": ("A frozen, along activations", "all"),
    "rolora": ("A and B in turn (RoLoRA)", "all"),
    "fedrot": ("turned, then averaged (FedRot-LoRA)", "all"),
    "flora": ("stacked (FLoRA)", "all"),
    "dropped": ("10 % of columns dropped", "all that is sent"),
    "published": ("SHE-LoRA as published, 10 %", "B, 90 % of A"),
    "pooled": ("pooled data", "–"),
    "alone": ("each client alone", "–"),
}
"""What a table calls a method, and what servers see of an update."""
SHOWN_CLEAR: Final = ("exact", "fedit", "ffa", "ffa-activations", "rolora", "fedrot", "flora")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A method in a cohort: the results of all seeds."""

    method: str
    rate: float
    results: Sequence[dict[str, float]]

    def mean(self, figure: str) -> float:
        """Over the seeds."""
        return mean(r[figure] for r in self.results)

    def error(self, figure: str) -> float:
        """Standard error of the mean."""
        return float(stdev(r[figure] for r in self.results) / len(self.results) ** 0.5)


def rows(cohort: Cohort, methods: Sequence[str], place: Place) -> list[Row]:
    """The methods of which every seed has run."""
    found = []
    for method in methods:
        cell = Cell(cohort=cohort, method=method, seed=0, learning_rate=0)
        rate = chosen_rate(cell, place)
        if rate is None:
            continue
        cells = [Cell(cohort=cohort, method=method, seed=seed, learning_rate=rate) for seed in SEEDS]
        results = [r for r in map(place.known, cells) if r is not None]
        if len(results) == len(SEEDS):
            found.append(Row(method=method, rate=rate, results=results))
    return found


def write(cohorts: Iterable[Cohort], methods: Sequence[str], place: Place, docs: Path) -> None:
    """Puts tables and the plot into the page."""
    found = [(cohort, rows(cohort, methods, place)) for cohort in cohorts]
    found = [(cohort, each) for cohort, each in found if each]
    page = docs / "comparison.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    text = "\n".join(
        [
            BEGIN,
            "",
            *(_versions() if found else ()),
            *(line for c, each in found for line in _table(c, each)),
            END,
        ]
    )
    page.write_text(wrapped(before + text + after), encoding="utf-8")
    if found:
        _plot(found, docs / "images" / "comparison.svg")


def _versions() -> list[str]:
    names = ("torch", "numpy", "tenseal", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return [
        f"Python {platform.python_version()} on {platform.machine()}, {versions}.",
        "",
        "![Accuracy or loss of every method, with mixed ranks and uneven labels](images/comparison.svg)",
        "",
    ]


def gap(row: Row, others: Sequence[Row], figure: str, metric: Metric) -> tuple[float, float, str]:
    """How far a method is from the best one in the clear: mean of paired differences, its standard error, the other."""
    clear = [other for other in others if other.method in SHOWN_CLEAR]
    other = clear[best(metric, [each.mean(figure) for each in clear])]
    differences = [a[figure] - b[figure] for a, b in zip(row.results, other.results, strict=True)]
    return mean(differences), float(stdev(differences) / len(differences) ** 0.5), other.method


def _table(cohort: Cohort, found: Sequence[Row]) -> list[str]:
    lines = [
        f"### {cohort.setting.title}: {cohort.words}",
        "",
        "| | servers see | after a third | after all | worst client | directions | up | down | server | rate |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_line(row, cohort.setting.metric) for row in found),
        "",
    ]
    ours = next((row for row in found if row.method == "complete"), None)
    if ours and any(row.method in SHOWN_CLEAR for row in found):
        lines += [_verdict(ours, found, cohort.setting.metric), ""]
    return lines


def _line(row: Row, metric: Metric) -> str:
    title, sees = TITLES[row.method]
    shown = [metric.with_error(row.mean(f), row.error(f)) for f in ("early", metric.name, "worst")]
    sent = [f"{row.mean(f) / 1000:,.0f} kB" if row.mean(f) else "–" for f in ("up", "down")]
    server = f"{1000 * row.mean('server_s'):.0f} ms" if row.mean("server_s") else "–"
    cells = [title, sees, *shown, f"{row.mean('effective_rank'):.1f}", *sent, server, f"{row.rate:g}"]
    return f"| {' | '.join(cells)} |"


def _verdict(ours: Row, found: Sequence[Row], metric: Metric) -> str:
    parts = []
    for figure, words in ((metric.name, metric.words), ("worst", "the worst client")):
        difference, error, other = gap(ours, found, figure, metric)
        parts.append(f"{metric.difference(difference, error)} in {words} against {TITLES[other][0]}")
    return f"`complete` against the best in the clear, paired by seed: {'; '.join(parts)}."


def _plot(found: Sequence[tuple[Cohort, Sequence[Row]]], path: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415 - only the plot needs it

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "compare", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot as plt  # noqa: PLC0415

    main = [(c, each) for c, each in found if c.uneven and c.mixed]
    figure, axes = plt.subplots(
        max(1, len(main)), 1, figsize=(6.4, 3.4 * max(1, len(main))), squeeze=False, layout="constrained"
    )
    for axis, (cohort, each) in zip(axes[:, 0], main, strict=False):
        metric = cohort.setting.metric
        ordered = sorted(each, key=lambda row: metric.merit(row.mean(metric.name)))
        places = range(len(ordered))
        for figure_name, marker, label in (
            (metric.name, "o", "all test examples"),
            ("worst", "x", "worst client"),
        ):
            axis.errorbar(
                [metric.factor * row.mean(figure_name) for row in ordered],
                list(places),
                xerr=[metric.factor * row.error(figure_name) for row in ordered],
                fmt=marker, markersize=4, capsize=2, label=label,
            )  # fmt: skip
        axis.set_yticks(list(places), [TITLES[row.method][0].replace("**", "") for row in ordered])
        axis.set_title(f"{cohort.setting.title}, {cohort.clients} clients")
        axis.set_xlabel(metric.axis)
        axis.grid(axis="x", alpha=0.3)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
