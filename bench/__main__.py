"""`python -m bench`: prints the table, writes runs/bench/summary.json, fails if a target is missed."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from bench import ours, published
from bench.figures import Run
from bench.workload import Workload

SUMMARY = Path("runs/bench/summary.json")
app = typer.Typer(add_completion=False)


@app.command()
def compare(
    matrices: Annotated[int, typer.Option(min=8, help="Adapted matrices of the round.")] = 104,
    sample: Annotated[int, typer.Option(min=4, help="Products of the published way to measure.")] = 64,
    output: Annotated[Path, typer.Option(help="Where to write the summary.")] = SUMMARY,
) -> None:
    """Compares our protection path with the published way; exits with 1 if a target is missed."""
    run = _measured(Workload(matrices=matrices), sample)
    console = Console()
    console.print(run.table())
    for note in run.notes():
        console.print(f"• {note}")
    run.write(output)
    console.print(f"Summary: {output}")
    if run.missed():
        console.print(f"[red]Missed: {', '.join(run.missed())}[/]")
        raise typer.Exit(1)


def _measured(workload: Workload, sample: int) -> Run:
    with Progress() as progress:
        our_task = progress.add_task("our way", total=ours.steps(workload))
        their_task = progress.add_task("published way", total=sample)
        all_task = progress.add_task("all columns encrypted", total=1)
        our_figures = ours.measure(workload, lambda: progress.advance(our_task))
        their_figures = published.measure(workload, sample, lambda: progress.advance(their_task))
        everything = ours.measure_everything_encrypted(workload)
        progress.advance(all_task)
    return Run(workload, their_figures, our_figures, everything)


if __name__ == "__main__":
    app()
