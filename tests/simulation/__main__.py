"""`make simulate`: random schedules of faults against a whole cluster, in virtual time."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from os import sched_getaffinity
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.simulation.cluster import Size
from tests.simulation.sabotage import SABOTAGES
from tests.simulation.shrinking import shrunk
from tests.simulation.simulation import Report, Schedule, run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_console = Console(highlight=False)
CORES: Final = len(sched_getaffinity(0))
CHUNKS: Final = 25
"""Of schedules that a process runs: what ended runs leave to the garbage collector slows the next ones down."""


@dataclass
class _Tally:
    """What the runs have shown."""

    started_s: float = field(default_factory=time.perf_counter)
    virtual_s: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    failed: list[Report] = field(default_factory=list)

    def add(self, report: Report) -> None:
        self.virtual_s += report.virtual_s
        self.ends[report.phase] += 1
        self.kinds.update(_kinds(report.schedule.size))
        self.faults.update(type(fault).__name__ for fault in report.met)
        if report.violation:
            self.failed.append(report)


def _kinds(size: Size) -> Iterator[str]:
    """What is said of a run beside its end."""
    yield (
        "complete mode"
        if size.complete
        else f"selective, {size.negotiation}"
        if size.keyed
        else "no protection"
    )
    if size.liars:
        yield "clients that lie"
    if size.coordinators:
        yield "coordinators that cheat"
    if size.hostile:
        yield "a member that does not train"


@app.command()
def main(
    schedules: Annotated[int, typer.Option(min=1, help="How many schedules to run.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the first; the next ones follow.")] = 0,
    failures: Annotated[int, typer.Option(min=1, help="Stop after so many that fail.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="How many run at once; by default one a core.")] = CORES,
    trace: Annotated[
        bool, typer.Option(help="Print what happens in every run, not only in those that fail.")
    ] = False,
    sabotage: Annotated[
        str | None, typer.Option(help=f"Take a rule of the product away first: {', '.join(SABOTAGES)}.")
    ] = None,
) -> None:
    """Runs federations in virtual time while calls, processes, clocks and the store fail; checks what must hold.

    A seed gives the same run every time: `--seed N --schedules 1 --trace` repeats one.
    """
    if sabotage is not None and sabotage not in SABOTAGES:
        raise typer.BadParameter(f"choose one of {', '.join(SABOTAGES)}", param_hint="--sabotage")
    tally = _Tally()
    kinds = SABOTAGES[sabotage].kinds if sabotage else ()
    every = [Schedule.of(number, *kinds) for number in range(seed, seed + schedules)]
    with _sabotaged(sabotage):
        with _running(every, min(jobs, schedules), trace) as reports:
            for report in _progress(reports, schedules, tally):
                tally.add(report)
                if trace:
                    _console.print("\n".join(report.trace), markup=False, soft_wrap=True)
                if len(tally.failed) >= failures:
                    break
        for report in tally.failed:
            _explain(report)
    _summarise(tally)
    raise typer.Exit(1 if tally.failed else 0)


def _sabotaged(name: str | None) -> AbstractContextManager[Any]:
    return SABOTAGES[name].work() if name else nullcontext()


@contextmanager
def _running(schedules: Sequence[Schedule], jobs: int, traced: bool) -> Iterator[Iterator[Report]]:
    """The reports in order of the schedules; so many run at once, each in a process of its own."""
    fork = get_context("fork")  # knows of the sabotage
    with fork.Pool(jobs, maxtasksperchild=CHUNKS) as pool:
        yield pool.imap(partial(run, traced=traced), schedules, chunksize=4)


def _progress(reports: Iterable[Report], total: int, tally: _Tally) -> Iterator[Report]:
    columns = (
        TextColumn("seed {task.fields[seed]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console) as bar:
        task = bar.add_task("", total=total, seed="", failed=0)
        for report in reports:
            yield report
            bar.update(task, advance=1, seed=report.schedule.seed, failed=len(tally.failed))


def _explain(failed: Report) -> None:
    """The smallest way to the failure, step by step."""
    _console.rule(f"seed {failed.schedule.seed} fails")
    with _console.status(f"looking for the fewest of its {len(failed.met)} faults that still fail"):
        least = shrunk(failed)
        least = run(least.schedule.with_only(least.met), traced=True)
    _console.print("\n".join(least.trace), markup=False, soft_wrap=True)
    _console.rule()
    _console.print(f"violated: {least.violation}\n", markup=False, style="red")
    _console.print(
        f"with {len(least.met)} of {len(failed.met)} faults, in {least.schedule.size}:", markup=False
    )
    for fault in least.met:
        _console.print(f"  {fault}\n    {fault!r}", markup=False, soft_wrap=True)


def _summarise(tally: _Tally) -> None:
    seconds = time.perf_counter() - tally.started_s
    count = sum(tally.ends.values())
    table = Table(show_header=False, box=None)
    table.add_row("schedules", str(count), f"{count / seconds:.1f} a second")
    table.add_row("virtual time", f"{tally.virtual_s / 3600:.1f} h", "")
    for name, number in (
        *sorted(tally.kinds.items()),
        *sorted(tally.ends.items()),
        *tally.faults.most_common(),
    ):
        table.add_row(name, str(number), f"{number / count:.2f} a schedule")
    table.add_row("failed", str(len(tally.failed)), " ".join(str(r.schedule.seed) for r in tally.failed))
    _console.print(table)


if __name__ == "__main__":
    app()
