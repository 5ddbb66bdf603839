"""`python -m attack`: runs federations, captures what servers store, attacks it, prints what came back."""

import logging
import shutil
import sys
from pathlib import Path
from typing import Annotated

import structlog
import typer

from attack.findings import problems
from attack.report import show, write
from attack.runner import Plan, end_with_parent, progress, run, work
from shelora.cli.supervision import interruptible
from shelora.errors import DomainError
from shelora.terminal import CommandLine, Terminal

app = CommandLine(add_completion=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Option(help="Folder for everything the run leaves.")] = Path("runs/attack"),
    downloads: Annotated[Path, typer.Option(help="Where models and data lie, or are fetched to.")] = Path(
        "assets"
    ),
    only: Annotated[str, typer.Option(help="Only cases whose name holds this.")] = "",
    seed: Annotated[int, typer.Option(help="Draws the clients' texts.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Federations and attacks at once, one core each.")] = 2,
    *,
    everything: Annotated[bool, typer.Option("--all", help="Sums of single steps, too.")] = False,
    one_of_many: Annotated[
        bool, typer.Option("--work", hidden=True, help="Be one of the processes.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier run left.")] = False,
) -> None:
    """Attacks the messages of real federations in every protection mode and prints a table.

    It runs about thirty federations, a quarter of an hour on two cores, and says after each how far it is. What an
    earlier run found is not done again unless something that it came from has changed, so a run that was broken off
    goes on where it stopped.

    Exits with 1 if an attack that must succeed on unprotected messages does not (the attack is broken then), or if one
    on servers' messages does better than chance in a mode that promises that none does.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    plan = Plan(folder=folder, downloads=downloads, only=only, seed=seed, everything=everything)
    terminal = Terminal()
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with interruptible():
            if one_of_many:
                end_with_parent()
                work(plan)
                return
            findings = run(plan, workers)
    except KeyboardInterrupt:
        sys.exit("stopped" if one_of_many else f"stopped; {progress(plan)}")
    except DomainError as error:
        terminal.refuse(error, "the run failed: ")
        sys.exit(1)
    write(findings, folder)
    show(findings, folder, terminal)
    sys.exit(1 if problems(findings) else 0)


if __name__ == "__main__":
    app()
