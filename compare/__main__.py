"""`python -m compare run` fills the cells, `python -m compare report` writes docs/comparison.md from them."""

import logging
import os
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from compare import report as reports
from compare.cells import Place, run_missing
from compare.settings import DATA, Cell, Cohort

METHODS: Final = (
    "complete", "selective", "exact", "fedit", "ffa", "ffa-activations", "rolora", "fedrot", "flora", "dropped",
    "published", "pooled", "alone",
)  # fmt: skip
"""As in `compare.methods.registry`, which loads torch."""
app = typer.Typer(
    add_completion=False, help="Compares ways of federated LoRA side by side (docs/comparison.md)."
)

Runs = Annotated[Path, typer.Option(help="Folder of encoded data and finished cells.")]


def cohorts(data: list[str], clients: list[int], *, even: bool, equal: bool) -> list[Cohort]:
    """Cohorts by data set: uneven labels and mixed ranks, and where asked for the milder ones too."""
    return [
        Cohort.on(name, count, uneven=uneven, mixed=mixed)
        for count in clients
        for uneven, mixed in [
            (True, True),
            *([(False, True)] if even else []),
            *([(True, False)] if equal else []),
        ]
        for name in data
    ]


@app.command()
def run(
    data: Annotated[list[str], typer.Option(help=f"Data sets: {', '.join(DATA)}.")] = list(DATA),  # noqa: B006
    clients: Annotated[list[int], typer.Option(help="Numbers of clients.")] = [4, 20],  # noqa: B006
    methods: Annotated[list[str], typer.Option(help=f"Methods: {', '.join(METHODS)}.")] = list(METHODS),  # noqa: B006
    even: Annotated[bool, typer.Option(help="Also labels divided evenly.")] = True,  # noqa: FBT002
    equal: Annotated[bool, typer.Option(help="Also equal ranks.")] = True,  # noqa: FBT002
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Begin no cell after so long; run again to go on.")
    ] = 600,
    processes: Annotated[int, typer.Option(min=1, help="Cells at once; one a core.")] = os.cpu_count() or 1,
    assets: Annotated[Path, typer.Option(help="Folder of models and data, fetched once.")] = Path("assets"),
    runs: Runs = Path("runs/compare"),
) -> None:
    """Runs the cells that are missing; exits with 3 if some are missing still."""
    logging.disable(logging.WARNING)
    for given, known in ((data, DATA), (methods, METHODS)):
        if unknown := set(given) - set(known):
            raise typer.BadParameter(f"{', '.join(sorted(unknown))}: use {', '.join(known)}")
    console = Console()

    def told(cell: Cell, result: dict[str, float], left: int) -> None:
        metric = cell.cohort.setting.metric
        console.print(
            f"{cell.key}: {metric.name} {metric.shown(result[metric.name])}, worst client "
            f"{metric.shown(result['worst'])}, {result['wall_s']:.0f} s; {left} to run",
            soft_wrap=True,
            highlight=False,
        )

    chosen = cohorts(data, clients, even=even, equal=equal)
    place = Place(assets=assets, runs=runs)
    try:
        whole = run_missing(chosen, methods, place, processes=processes, seconds=60 * minutes, report=told)
    except BrokenProcessPool:
        console.print(
            "A process was killed, for want of memory or time: run again to go on from the last cell."
        )
        raise typer.Exit(1) from None
    if not whole:
        console.print("Cells are missing still: run again to go on.")
        raise typer.Exit(3)


@app.command()
def report(
    runs: Runs = Path("runs/compare"),
    docs: Annotated[Path, typer.Option(help="Folder of comparison.md and images/comparison.svg.")] = Path(
        "docs"
    ),
) -> None:
    """Writes the table and the plot from the finished cells."""
    place = Place(runs=runs)
    every = cohorts(list(DATA), [4, 20], even=True, equal=True)
    reports.write(every, METHODS, place, docs)
    Console().print(f"{docs / 'comparison.md'}, {docs / 'images' / 'comparison.svg'}")


if __name__ == "__main__":
    app()
