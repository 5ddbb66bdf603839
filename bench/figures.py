"""The figures of a run, their targets, and the summary file."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.baselines import Baseline
from bench.complete import Complete
from bench.memory import Memory
from bench.ours import Once, Ours
from bench.published import Published
from bench.workload import Costs, Workload

MEGABYTE = 1e6


@dataclass(frozen=True)
class Target:
    """A figure that a run must reach."""

    least: float | None = None
    most: float | None = None

    def met(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        sign, limit = ("≥", self.least) if self.least is not None else ("≤", self.most or 0.0)
        return f"{sign} {limit / MEGABYTE:g} MB" if limit >= MEGABYTE else f"{sign} {limit:g}"


TARGETS = {
    "encrypt_cpu_ratio": Target(least=300),
    "aggregate_cpu_ratio": Target(least=5000),
    "upload_bytes_ratio": Target(least=300),
    "download_bytes_ratio": Target(least=80),
    "max_abs_error": Target(most=5e-7),
    "encrypt_all_s": Target(most=2),
    "encrypt_all_upload_bytes": Target(most=45e6),
    "complete_upload_bytes": Target(most=21.3e6),
    "complete_download_bytes": Target(most=21.3e6),
    "complete_encrypt_us_per_value": Target(most=0.1),
    "complete_aggregate_ns_per_value_and_client": Target(most=5),
    "complete_relative_error": Target(most=1e-4),
}
"""Ratios are published over ours. 21.3 MB are the factors themselves, as float32."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything one run measured."""

    workload: Workload
    published: Published
    ours: Ours
    usual: Once
    """The workload's budget at a federation's default precision."""
    everything: Once
    """Every column encrypted."""
    complete: Complete
    memory: Memory
    others: Sequence[Baseline]

    def figures(self) -> dict[str, float]:
        """The figures that have targets."""
        published, ours = self.published, self.ours
        return {
            "encrypt_cpu_ratio": published.encrypt_cpu_s / ours.encryption.usual.cpu_s,
            "aggregate_cpu_ratio": published.aggregate_cpu_s / ours.aggregation.usual.cpu_s,
            "upload_bytes_ratio": published.upload_bytes / ours.upload_bytes,
            "download_bytes_ratio": published.download_bytes / ours.download_bytes,
            "max_abs_error": ours.max_abs_error,
            "encrypt_all_s": self.everything.encryption.wall_s,
            "encrypt_all_upload_bytes": float(self.everything.upload_bytes),
            **self._complete_figures(),
        }

    def _complete_figures(self) -> dict[str, float]:
        found, clients = self.complete, self.workload.clients
        return {
            "complete_upload_bytes": float(found.upload_bytes),
            "complete_download_bytes": float(found.download_bytes),
            "complete_encrypt_us_per_value": found.encrypt_us_per_value(clients),
            "complete_aggregate_ns_per_value_and_client": found.aggregate_ns_per_value_and_client(clients),
            "complete_relative_error": found.relative_error,
        }

    def missed(self) -> list[str]:
        """Names of the targets that were not reached."""
        return [name for name, value in self.figures().items() if not TARGETS[name].met(value)]

    def write(self, path: Path) -> None:
        """Writes the summary as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self._summary(), indent=2) + "\n", encoding="utf-8")

    def _summary(self) -> dict[str, Any]:
        published = self.published
        return {
            **self.figures(),
            "missed": self.missed(),
            "workload": asdict(self.workload),
            "published": {
                "encrypt_cpu_s": published.encrypt_cpu_s,
                "multiply_cpu_s": published.multiply_cpu_s,
                "aggregate_cpu_s": published.aggregate_cpu_s,
                "upload_bytes": published.upload_bytes,
                "download_bytes": published.download_bytes,
                **_raw(published),
            },
            "ours": {"encrypted_aggregation_cpu_s": self.ours.encrypted_aggregation_cpu_s, **_raw(self.ours)},
            "usual": asdict(self.usual),
            "encrypt_all": asdict(self.everything),
            "others": [asdict(row) for row in self.others],
            "complete": {
                **_raw(self.complete),
                "profile": self.complete.profile,
                "sketch": self.complete.sketch,
                "memory": asdict(self.memory),
            },
            "versions": {name: version(name) for name in ("numpy", "tenseal")}
            | {"python": platform.python_version()},
            "machine": {
                "cpu_count": os.cpu_count(),
                "architecture": platform.machine(),
                "system": platform.system(),
                "load_average": os.getloadavg()[0],
            },
        }


def _raw(record: Published | Ours | Complete) -> dict[str, Any]:
    """The fields of a record that are figures."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {
        name: value.summary() if isinstance(value, Costs) else value
        for name, value in values.items()
        if isinstance(value, Costs | int | float)
    }
