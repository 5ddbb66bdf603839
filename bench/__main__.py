"""`python -m bench`: prints the table, writes runs/bench/summary.json, fails if a target is missed."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from bench import baselines, complete, memory, ours, published
from bench.figures import Run
from bench.report import Report
from bench.workload import Workload
from services.aggregation.workers import ALLOCATOR

PARTS = 5
"""Turns of the ways."""
WIDTH = 110
"""Of what goes into a file or pipe."""
SUMMARY = Path("runs/bench/summary.json")
app = typer.Typer(add_completion=False)


@app.command()
def compare(
    matrices: Annotated[int, typer.Option(min=8, help="Adapted matrices of the round.")] = 104,
    sample: Annotated[int, typer.Option(min=4, help="Products of the published way to measure, about.")] = 80,
    output: Annotated[Path, typer.Option(help="Where to write the summary.")] = SUMMARY,
) -> None:
    """Compares our protection modes with the published way; exits with 1 if a target is missed."""
    run = _measured(Workload(matrices=matrices), sample)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    report = Report(run)
    console.print(report.table())
    console.print(report.ways())
    console.print(baselines.table(run.others))
    for note in report.notes():
        console.print(f"• {note}")
    run.write(output)
    console.print(f"Summary: {output}")
    if run.missed():
        console.print(f"[red]Missed: {', '.join(run.missed())}[/]")
        raise typer.Exit(1)


def _measured(workload: Workload, sample: int) -> Run:
    """All ways by turns, so that a busy machine is as busy for all."""
    columns = max(1, min(sample // (PARTS * workload.clients), workload.columns))
    with Progress() as progress:
        task = progress.add_task(
            "measuring", total=PARTS * (2 + columns * workload.clients) + 2 * workload.matrices + 3
        )
        step = partial(progress.advance, task)
        mine, theirs = ours.Measurement(workload), published.Measurement(workload)
        sums = complete.Measurement(workload)
        for index in range(PARTS):
            mine.part()
            step()
            sums.part()
            step()
            theirs.part(index, columns, step)
        mine.compare(step)
        sums.compare(step)
        usual, everything = (ours.measure_once(workload, budget) for budget in (workload.budget, 1.0))
        step()
        peaks = memory.measure(workload)
        step()
        others = baselines.measure(workload)
        step()
    return Run(
        workload=workload,
        published=theirs.found,
        ours=mine.found,
        usual=usual,
        everything=everything,
        complete=sums.found,
        memory=peaks,
        others=others,
    )


def _like_a_worker() -> None:
    """Starts anew with the allocator settings of aggregation workers, which hold for both ways."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        command = [sys.executable, "-m", "bench", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **ALLOCATOR})  # noqa: S606 - ourselves


if __name__ == "__main__":
    _like_a_worker()
    app()
