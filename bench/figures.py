"""The figures of a run, their targets, the table and the summary file."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.baselines import Baseline
from bench.complete import Complete
from bench.memory import Memory
from bench.ours import Once, Ours
from bench.published import Published
from bench.tables import ways_table
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

    def table(self) -> Table:
        """Figure, published way, ours, ratio, target."""
        table = Table(title="One round at OpenLLaMA-3B shapes, CPU time, one thread")
        for heading in ("figure", "published way", "ours", "ratio", "target"):
            table.add_column(heading, justify="left" if heading == "figure" else "right")
        for row in self._rows():
            table.add_row(*row)
        return table

    def ways(self) -> Table:
        """All ways side by side: bytes and CPU of a round, what an error there is, what stays clear."""
        published, ours, complete = self.published, self.ours, self.complete
        clients = self.workload.clients
        shards = complete.aggregation.usual.cpu_s + complete.committee.usual.cpu_s
        clear_up, clear_down = ours.upload_clear_bytes, ours.download_clear_bytes
        table = ways_table("All ways: one round, CPU time, one thread")
        table.add_row(
            f"as described, {self.workload.budget:.0%}",
            _bytes(published.upload_bytes + clear_up),
            _bytes(published.download_bytes + clear_down),
            _seconds(published.encrypt_cpu_s / clients),
            _seconds(published.aggregate_cpu_s),
            _share(published.max_abs_error, ours.largest_entry),
            "B, most of A",
        )
        for share, found, clear in (
            (self.workload.budget, self.usual, "B, most of A"),
            (1, self.everything, "B"),
        ):
            table.add_row(
                f"selective, {share:.0%}",
                _bytes(found.upload_bytes + found.upload_clear_bytes),
                _bytes(found.download_bytes),
                _seconds(found.protection.cpu_s),
                _seconds(found.aggregation.cpu_s),
                _share(found.max_abs_error, found.largest_entry),
                f"{clear}, in 16 bits",
            )
        table.add_row(
            "complete",
            _bytes(complete.upload_bytes),
            _bytes(complete.download_bytes),
            _seconds(complete.protection.usual.cpu_s / clients),
            _seconds(shards),
            _share(complete.max_abs_error, complete.largest_entry),
            "nothing",
        )
        return table

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        published, ours, everything = self.published, self.ours, self.everything
        return [
            self._compared(
                "encryption, all clients",
                "encrypt_cpu_ratio",
                _seconds(published.encrypt_cpu_s),
                _seconds(ours.encryption.usual.cpu_s),
            ),
            self._compared(
                "aggregation",
                "aggregate_cpu_ratio",
                _seconds(published.aggregate_cpu_s),
                _seconds(ours.aggregation.usual.cpu_s),
            ),
            (
                "  of it encrypted",
                _seconds(published.multiply_cpu_s),
                _seconds(ours.encrypted_aggregation_cpu_s),
                "",
                "",
            ),
            self._compared(
                "ciphertexts up, a client",
                "upload_bytes_ratio",
                _bytes(published.upload_bytes),
                _bytes(ours.upload_bytes),
            ),
            ("  clear part up", "", _bytes(ours.upload_clear_bytes), "", ""),
            self._compared(
                "ciphertexts down",
                "download_bytes_ratio",
                _bytes(published.download_bytes),
                _bytes(ours.download_bytes),
            ),
            ("  clear part down", "", _bytes(ours.download_clear_bytes), "", ""),
            self._reached(
                "largest error of ΔW",
                "max_abs_error",
                f"{published.max_abs_error:.1e}",
                f"{ours.max_abs_error:.1e}",
            ),
            self._reached(
                "all columns, a client: encryption",
                "encrypt_all_s",
                "",
                f"{everything.encryption.wall_s:.2f} s wall",
            ),
            self._reached(
                "all columns, a client: ciphertexts up",
                "encrypt_all_upload_bytes",
                "",
                _bytes(everything.upload_bytes),
            ),
            *self._complete_rows(),
        ]

    def _complete_rows(self) -> list[tuple[str, str, str, str, str]]:
        figures = self._complete_figures()
        shown = {
            "up, a client": ("complete_upload_bytes", _bytes),
            "down": ("complete_download_bytes", _bytes),
            "a client's protection, a value": ("complete_encrypt_us_per_value", "{:.3f} µs".format),
            "aggregation, a value and client": (
                "complete_aggregate_ns_per_value_and_client",
                "{:.2f} ns".format,
            ),
            "error of ΔW beyond the cut, of its largest entry": ("complete_relative_error", "{:.1e}".format),
        }
        return [
            self._reached(f"complete: {what}", name, "", show(figures[name]))
            for what, (name, show) in shown.items()
        ]

    def _compared(self, what: str, name: str, published: str, ours: str) -> tuple[str, str, str, str, str]:
        return what, published, ours, f"{self.figures()[name]:,.0f}", self._target(name)

    def _reached(self, what: str, name: str, published: str, ours: str) -> tuple[str, str, str, str, str]:
        return what, published, ours, "", self._target(name)

    def _target(self, name: str) -> str:
        mark = "[green]✓[/]" if name not in self.missed() else "[red]missed[/]"
        return f"{TARGETS[name]} {mark}"

    def notes(self) -> list[str]:
        """What a reader must know to judge the table."""
        published, ours, workload = self.published, self.ours, self.workload
        products = workload.matrices * workload.columns * workload.clients
        vectors = published.vectors * workload.clients
        costs = {
            name: _seconds(getattr(ours, name).usual.cpu_s)
            for name in ("validation", "protection", "restoration")
        }
        return [
            (
                f"Scaled up: of the published way, {len(published.encryption.runs)} of {vectors} encryptions and "
                f"{len(published.products.runs)} of {products} products were measured."
            ),
            (
                f"Not scaled up: our way ran all {workload.matrices} matrices, {len(ours.aggregation.runs)} times, "
                "by turns with the published way. Of everything repeated the median counts."
            ),
            (
                "Aggregation is, published: loading, products, sums, saving, B A of the clear columns. "
                "Ours: bytes of shards to bytes of results, with QR and the products of the clear columns."
            ),
            (
                "The published way's encrypted part is its products and sums; ours is what aggregation costs "
                "beyond a round with nothing encrypted."
            ),
            (
                "The published result is ΔW; ours is Q and M with Q M = ΔW. Both send B and the clear columns up: in "
                "float32 where they are set against each other, in a federation's 16 bits in the rows of selective."
            ),
            (
                f"Ours in {ours.shards} shards, {ours.chunks} ciphertexts a row of A. Not compared: validation of all "
                f"updates {costs['validation']}, their protection in all {costs['protection']}, restoration by one "
                f"client {costs['restoration']}."
            ),
            f"Largest entry of ΔW: {ours.largest_entry:.1e}. The published error is that of its sample.",
            *self._complete_notes(),
        ]

    def _complete_notes(self) -> list[str]:
        found, memory = self.complete, self.memory
        columns, rows, core = found.sketch
        return [
            (
                f"Complete mode: sketches k = {columns}, l = {rows}, s = {core}, profile {found.profile}, "
                f"{found.values} values in {found.shards} shards; dealings, committee keys and opening are counted."
            ),
            (
                f"Beyond the cut: against the same sketches in float64. The cut itself misses {found.cut_error:.3f} of "
                f"the norm of ΔW, the best one of that rank {found.best_cut_error:.3f}; four clients of that rank "
                "together have more directions than one keeps, in every mode."
            ),
            (
                f"Complete mode, not compared: the committee {_seconds(found.committee.usual.cpu_s)} in all, "
                f"validation {_seconds(found.validation.usual.cpu_s)}, restoration by one client "
                f"{_seconds(found.restoration.usual.cpu_s)}; {found.clipped} values were clipped."
            ),
            (
                f"Complete mode, most memory beyond what the process had before: a client that protects "
                f"{_bytes(memory.protecting)}, a server that aggregates {_bytes(memory.aggregating)}, a client that "
                f"restores {_bytes(memory.restoring)}; the largest shard has {_bytes(memory.largest_shard)}."
            ),
        ]


def _share(error: float, largest: float) -> str:
    return f"{error / largest:.1e}"


def _raw(record: Published | Ours | Complete) -> dict[str, Any]:
    """The fields of a record that are figures."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {
        name: value.summary() if isinstance(value, Costs) else value
        for name, value in values.items()
        if isinstance(value, Costs | int | float)
    }


def _seconds(value: float) -> str:
    return f"{value:,.3f} s" if value < 10 else f"{value:,.1f} s"


def _bytes(value: float) -> str:
    return f"{value / MEGABYTE:,.2f} MB"
