"""Several splits of the demo's data, each run in complete mode and without protection: what protection costs.

One run tells little: on data this uneven runs differ by a few percent. Runs of a pair share the split and the
initial factors. They cannot share the batches: those of complete mode depend on who sits on a round's committee. A
pair's runs are kept, so that an interrupted comparison goes on where it was.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from examples.reuters.cohort import SPLIT_SEED, Protection
from shelora.terminal import Records
from shelora.view import size

MODES: Final = (Protection.COMPLETE, Protection.NONE)
MOST_DIFFERENCE: Final = 0.015
"""Accuracy that complete mode may lack on average."""
MOST_WALL: Final = 1.1
"""Wall seconds of complete mode over those without protection."""

Summary = Mapping[str, Any]
Run = Callable[[Protection, int, Path], Summary]
"""Runs the demo under a mode on the split of a seed, in a folder; the summary."""


@dataclass(frozen=True)
class Pair:
    """Two runs on one split."""

    seed: int
    complete: Summary
    none: Summary

    @property
    def difference(self) -> float:
        """Final accuracy of complete mode less that of the other run."""
        return float(self.complete["final_test_accuracy"] - self.none["final_test_accuracy"])

    def ratio(self, field: str) -> float:
        """Complete mode's over the other run's."""
        return float(self.complete[field] / self.none[field])


def pairs(
    count: int, folder: Path, run: Run, configuration: Callable[[Protection, int], Any]
) -> Iterator[Pair]:
    """The pairs of so many seeds, each as soon as it is whole.

    Args: configuration: of the run under a mode and seed; a kept run of another one is made anew.
    """
    for seed in range(SPLIT_SEED, SPLIT_SEED + count):
        complete, none = (
            _kept(folder / f"{mode}-{seed}", configuration(mode, seed))
            or run(mode, seed, folder / f"{mode}-{seed}")
            for mode in MODES
        )
        yield Pair(seed, complete, none)


def _kept(folder: Path, configuration: Any) -> Summary | None:  # noqa: ANN401 - a JSON object
    path = folder / "summary.json"
    found: Summary | None = json.loads(path.read_text()) if path.exists() else None
    return found if found is not None and found["configuration"] == configuration else None


def keep(folder: Path, summary: Summary) -> None:
    """Notes that a run is whole. What else it left, models of every agent among it, is deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / ".summary.draft"
    draft.write_text(json.dumps(summary, indent=2) + "\n")
    draft.replace(folder / "summary.json")


def summarized(found: Sequence[Pair]) -> dict[str, Any]:
    """What `summary.json` holds: each pair, means and standard errors, and whether these are close enough."""
    difference = _mean([pair.difference for pair in found])
    wall, cpu = (_mean([pair.ratio(field) for pair in found]) for field in ("wall_s", "cpu_s"))
    return {
        "pairs": [
            {
                "seed": pair.seed,
                "complete": pair.complete["final_test_accuracy"],
                "none": pair.none["final_test_accuracy"],
                "difference": pair.difference,
                "wall_ratio": pair.ratio("wall_s"),
                "cpu_ratio": pair.ratio("cpu_s"),
            }
            for pair in found
        ],
        "accuracy_difference": difference,
        "wall_ratio": wall,
        "cpu_ratio": cpu,
        "most_upload_bytes": max(p.complete["upload_bytes_per_agent_per_round"] for p in found),
        "most_download_bytes": max(p.complete["download_bytes_per_agent_per_round"] for p in found),
        "accuracy_kept": difference["mean"] >= -MOST_DIFFERENCE,
        "wall_kept": wall["mean"] <= MOST_WALL,
    }


def _mean(values: Sequence[float]) -> dict[str, float]:
    """Mean, and its standard error if there are two or more."""
    error = {"standard_error": statistics.stdev(values) / len(values) ** 0.5} if len(values) > 1 else {}
    return {"mean": statistics.fmean(values), **error}


def table(found: Sequence[Pair]) -> Records:
    """The pairs for people, their means below."""
    headings = ("seed", "complete", "none", "points apart", "up", "down", "wall, of none", "CPU, of none")
    shown = Records(*headings, title="\ncomplete mode against no protection, by split", numbers=headings[1:])
    for pair in found:
        shown.add(
            str(pair.seed),
            *(f"{run['final_test_accuracy']:.1%}" for run in (pair.complete, pair.none)),
            f"{100 * pair.difference:+.1f}",
            *(size(pair.complete[f"{way}_bytes_per_agent_per_round"]) for way in ("upload", "download")),
            *(f"{pair.ratio(field):.2f}" for field in ("wall_s", "cpu_s")),
        )
    means = summarized(found)
    shown.add(
        "mean",
        *(
            f"{statistics.fmean(run['final_test_accuracy'] for run in runs):.1%}"
            for runs in ([p.complete for p in found], [p.none for p in found])
        ),
        _said(means["accuracy_difference"], 100, "+.1f"),
        *(size(means[f"most_{way}_bytes"]) for way in ("upload", "download")),
        _said(means["wall_ratio"], 1, ".2f"),
        _said(means["cpu_ratio"], 1, ".2f"),
    )
    return shown


def _said(mean: Mapping[str, float], factor: float, form: str) -> str:
    error = mean.get("standard_error")
    spread = "" if error is None else f" ± {factor * error:{form.lstrip('+')}}"
    return f"{factor * mean['mean']:{form}}{spread}"
