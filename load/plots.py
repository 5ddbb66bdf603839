"""Plots of runs: cost against the size of the cohort, memory over time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib import pyplot as plt

from load.run import Measured

mpl.use("Agg")

SHOWN_RPCS: Final = ("Heartbeat", "PutShard", "CommitUpdate", "GetResult", "assignment")
MB: Final = 1e6


def plot_cost(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Round time, latency, memory and CPU of every service against the number of agents.

    Args: runs: `load.figures.figures` of runs of different sizes.
    """
    runs = sorted(runs, key=lambda run: run["agents"])
    services = list(runs[-1]["services"])
    figure, panels = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    _lines(
        panels[0][0],
        runs,
        {
            "round": lambda run: _mean(run["round_s"]),
            "  collecting": lambda run: _mean(run["collect_s"]),
            "  aggregating": lambda run: _mean(run["aggregate_s"]),
            "vote": lambda run: _mean(run["vote_s"]),
        },
        "seconds",
        "time of a round",
    )
    _lines(
        panels[0][1],
        runs,
        {rpc: _of(("latency_s", rpc, "p95")) for rpc in SHOWN_RPCS},
        "seconds",
        "95th percentile of a call's time, seen by agents",
    )
    memory = {name: _of(("services", name, "peak_bytes"), 1 / MB) for name in services}
    _lines(panels[1][0], runs, memory, "MB", "peak memory (RSS) of a process")
    cpu = {name: _of(("services", name, "cpu_s")) for name in services}
    _lines(panels[1][1], runs, cpu, "seconds", "CPU time of a process, whole run")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_memory(run: Measured, path: Path) -> None:
    """Memory of every service over one run."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, usage in run.usage.items():
        axes.plot(usage.at_s, [value / MB for value in usage.rss_bytes], label=name)
    axes.set_xlabel("seconds")
    axes.set_ylabel("MB")
    axes.set_ylim(bottom=0)
    axes.set_title(f"memory (RSS) of the services, {run.plan.agents} agents, {run.plan.rounds} rounds")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _lines(
    axes: Any,  # noqa: ANN401 - matplotlib's Axes
    runs: Sequence[Mapping[str, Any]],
    series: Mapping[str, Callable[[Mapping[str, Any]], float]],
    unit: str,
    title: str,
) -> None:
    sizes = [run["agents"] for run in runs]
    for name, value in series.items():
        axes.plot(sizes, [value(run) for run in runs], marker="o", label=name)
    axes.set_xticks(sizes)
    axes.set_xlabel("agents")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")


def _of(path: Sequence[str], factor: float = 1.0) -> Callable[[Mapping[str, Any]], float]:
    """Reads a figure of a run; 0 if the run has none."""

    def value(run: Mapping[str, Any]) -> float:
        found: Any = run
        for name in path:
            found = found.get(name, {})
        return float(found or 0.0) * factor

    return value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
