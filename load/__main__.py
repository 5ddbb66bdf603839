"""`python -m load`: runs simulated agents against a local cluster and reports what they cost its services."""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from load.figures import figures, tables, write_summary
from load.plots import plot_cost, plot_memory
from load.run import Measured, Plan, run
from shelora.cli.supervision import clear, interruptible
from shelora.errors import DomainError
from shelora.strategies.registry import DEFAULT
from shelora.terminal import CommandLine, Terminal

console = Terminal()
app = CommandLine(add_completion=False)


@app.command()
def main(
    agents: Annotated[
        list[int], typer.Option(min=2, help="Agents of the federation; repeat for a run of each size.")
    ] = [1000],  # noqa: B006 - read only
    rounds: Annotated[int, typer.Option(min=1, help="Training rounds.")] = 3,
    processes: Annotated[int, typer.Option(min=1, help="Processes that the agents share.")] = 2,
    directions: Annotated[
        int,
        typer.Option(min=1, help="max_directions: what agents download is in proportion to it (selective)."),
    ] = 32,
    starts_per_s: Annotated[float, typer.Option(min=0.1, help="Agents started a second.")] = 20.0,
    mode: Annotated[str, typer.Option(help="Protection: complete or selective.")] = DEFAULT,
    folder: Annotated[Path, typer.Option(help="Folder for everything the runs leave.")] = Path("runs/load"),
) -> None:
    """Runs a federation of simulated agents on a real local cluster, and reports what it cost.

    The agents are real, with certificates, connections, encryption and decryption of their own, but train nothing:
    updates are random. Exits with 1 if any call failed, any agent did not finish, or any update was missed.
    """
    runs: list[Measured] = []
    try:
        with interruptible():
            clear(folder)
            folder.mkdir(parents=True)
            for count in sorted(set(agents)):
                plan = Plan(
                    agents=count,
                    rounds=rounds,
                    processes=min(processes, count),
                    directions=directions,
                    starts_per_s=starts_per_s,
                    mode=mode,
                )
                runs.append(_run(plan, folder / f"{count}"))
                console.print(*tables(figures(runs[-1])))
                _report(runs, folder)
    except DomainError as error:
        console.refuse(error, "the run failed: ")
        sys.exit(1)
    except KeyboardInterrupt:
        console.say("interrupted; every process was stopped", style="yellow")
        sys.exit(130)
    sys.exit(_verdict(runs, folder))


def _run(plan: Plan, folder: Path) -> Measured:
    """Runs a plan and shows how far it is. Agents' folders, which hold thousands of files, are deleted after it."""
    (folder / "agents").mkdir(parents=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        told = ""
        task = progress.add_task(f"{plan.agents} agents", total=plan.agents)

        def tell(what: str, done: int, total: int) -> None:
            nonlocal told
            progress.update(task, description=f"{plan.agents} agents, {what}", completed=done, total=total)
            if not console.is_terminal and what != told:
                console.say(f"{plan.agents} agents, {what}")
            told = what

        measured = run(plan, folder, tell)
    shutil.rmtree(folder / "agents")
    return measured


def _report(runs: list[Measured], folder: Path) -> None:
    """Writes what is known so far: a long sweep that is interrupted leaves its finished runs."""
    write_summary(runs, folder / "summary.json")
    plot_memory(runs[-1], folder / "memory.png")
    plot_cost([figures(done) for done in runs], folder / "cost.png")


def _verdict(runs: list[Measured], folder: Path) -> int:
    problems = [f"{run.plan.agents} agents: {problem}" for run in runs for problem in run.problems]
    for problem in problems:
        console.say(problem, style="red")
    if not problems:
        console.say("no call failed; every agent finished, and every update counted")
    console.say(f"left in {folder}: summary.json, cost.png, memory.png")
    return 1 if problems else 0


if __name__ == "__main__":
    app()
