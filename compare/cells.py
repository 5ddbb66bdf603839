"""Which cells there are, what is known of them, and running those that are missing, one process a core."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from compare.metrics import best
from compare.settings import SEEDS, Cell, Cohort, tuning

THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""A process computes on one core: several beside each other would wait for one another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where things lie."""

    assets: Path = Path("assets")
    """Models and data, fetched once."""
    runs: Path = Path("runs/compare")
    """Encoded data and finished cells."""

    def path(self, cell: Cell) -> Path:
        """Of a cell's result."""
        return self.runs / "cells" / f"{cell.key}.json"

    def known(self, cell: Cell) -> dict[str, float] | None:
        """A cell's result; None if it has not run, or was another cell under the same name."""
        try:
            found = json.loads(self.path(cell).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        same: bool = found.get("cell") == json.loads(json.dumps(cell.identity()))
        return found["result"] if same else None

    def keep(self, cell: Cell, result: dict[str, float]) -> None:
        """Writes a result, whole or not at all."""
        path = self.path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.part")
        scratch.write_text(
            json.dumps({"cell": cell.identity(), "result": result}, indent=1) + "\n", encoding="utf-8"
        )
        scratch.replace(path)


def chosen_rate(cell: Cell, place: Place) -> float | None:
    """The learning rate that did best in tuning; None while a run of it is missing."""
    metric, cells = cell.cohort.setting.metric, tuning(cell)
    values = [found[metric.name] for found in map(place.known, cells) if found is not None]
    return cells[best(metric, values)].learning_rate if len(values) == len(cells) else None


def wanted(cohorts: Iterable[Cohort], methods: Sequence[str], place: Place) -> Iterator[Cell]:
    """Cells in the order in which they are best run: method by method, its tuning, then its seeds.

    A cell whose rate is not known yet has rate 0.
    """
    for cohort in cohorts:
        for method in methods:
            cell = Cell(cohort=cohort, method=method, seed=SEEDS[0], learning_rate=0.0)
            yield from tuning(cell)
            rate = chosen_rate(cell, place) or 0.0
            yield from (replace(cell, seed=seed, learning_rate=rate) for seed in SEEDS)


def missing(cohorts: Sequence[Cohort], methods: Sequence[str], place: Place) -> list[Cell]:
    """Cells that can run now and have not, each once."""
    found = {cell.key: cell for cell in wanted(cohorts, methods, place) if cell.learning_rate}
    return [cell for cell in found.values() if place.known(cell) is None]


def complete(cohorts: Sequence[Cohort], methods: Sequence[str], place: Place) -> bool:
    """Whether every cell has run."""
    return all(
        cell.learning_rate and place.known(cell) is not None for cell in wanted(cohorts, methods, place)
    )


def run_missing(
    cohorts: Sequence[Cohort],
    methods: Sequence[str],
    place: Place,
    *,
    processes: int,
    seconds: float,
    report: Callable[[Cell, dict[str, float], int], None],
) -> bool:
    """Runs what is missing for so long; whoever runs is finished. Returns whether nothing is missing any more.

    Args: report: Called with each finished cell, its result, and how many can run but have not.
    """
    ends = time.monotonic() + seconds
    for name in THREADS:
        os.environ[name] = "1"
    context = multiprocessing.get_context("spawn")
    running: dict[Future[dict[str, float]], Cell] = {}
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        while True:
            busy = {cell.key for cell in running.values()}
            left = [cell for cell in missing(cohorts, methods, place) if cell.key not in busy]
            for cell in left[: processes - len(running)] if time.monotonic() < ends else []:
                running[pool.submit(partial(_run, cell, place))] = cell
            if not running:
                return complete(cohorts, methods, place)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                cell = running.pop(future)
                place.keep(cell, future.result())
                report(cell, future.result(), len(left))


def _run(cell: Cell, place: Place) -> dict[str, float]:
    import torch  # noqa: PLC0415 - the process that plans needs none

    from compare.run import run  # noqa: PLC0415

    torch.set_num_threads(1)
    return run(cell, place.assets, place.runs / "data").record()
