"""A run for people to read: tables and notes."""

from rich.table import Table

from bench.figures import MEGABYTE, TARGETS, Run
from bench.tables import ways_table


class Report:
    """Tables and notes of a run."""

    def __init__(self, run: Run) -> None:
        self._run = run

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
        published, ours, complete = self._run.published, self._run.ours, self._run.complete
        clients = self._run.workload.clients
        shards = complete.aggregation.usual.cpu_s + complete.committee.usual.cpu_s
        clear_up, clear_down = ours.upload_clear_bytes, ours.download_clear_bytes
        table = ways_table("All ways: one round, CPU time, one thread")
        table.add_row(
            f"as described, {self._run.workload.budget:.0%}",
            _bytes(published.upload_bytes + clear_up),
            _bytes(published.download_bytes + clear_down),
            _seconds(published.encrypt_cpu_s / clients),
            _seconds(published.aggregate_cpu_s),
            _share(published.max_abs_error, ours.largest_entry),
            "B, most of A",
        )
        for share, found, clear in (
            (self._run.workload.budget, self._run.usual, "B, most of A"),
            (1, self._run.everything, "B"),
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
        published, ours, everything = self._run.published, self._run.ours, self._run.everything
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
        figures = self._run.figures()
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
        return what, published, ours, f"{self._run.figures()[name]:,.0f}", self._target(name)

    def _reached(self, what: str, name: str, published: str, ours: str) -> tuple[str, str, str, str, str]:
        return what, published, ours, "", self._target(name)

    def _target(self, name: str) -> str:
        mark = "[green]✓[/]" if name not in self._run.missed() else "[red]missed[/]"
        return f"{TARGETS[name]} {mark}"

    def notes(self) -> list[str]:
        """What a reader must know to judge the table."""
        published, ours, workload = self._run.published, self._run.ours, self._run.workload
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
        found, memory = self._run.complete, self._run.memory
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


def _seconds(value: float) -> str:
    return f"{value:,.3f} s" if value < 10 else f"{value:,.1f} s"


def _bytes(value: float) -> str:
    return f"{value / MEGABYTE:,.2f} MB"
