"""`python -m bench.peers`: runs ours or a peer on the demo's work and prints what it took (README.md)."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer

from bench.peers import flower, nvflare, ours
from bench.peers.outcome import Outcome, table
from bench.peers.plan import Plan, divided, specification
from examples.local import ASSETS, ends_well
from examples.reuters.assets import MINILM, REUTERS, fetch
from examples.reuters.cohort import Protection
from shelora.cli.supervision import clear
from shelora.errors import DomainError, Reason
from shelora.terminal import CommandLine, Terminal

RUNS: Final = Path("runs/peers")
console = Terminal()
app = CommandLine(add_completion=False)


class System(StrEnum):
    """What is run, and how."""

    NONE = "none"
    SELECTIVE = "selective"
    COMPLETE = "complete"
    FLOWER = "flower"
    FLOWER_TLS = "flower-tls"
    NVFLARE = "nvflare"
    NVFLARE_TLS = "nvflare-tls"


_PEERS: Final = {
    System.FLOWER: (flower.run, False),
    System.FLOWER_TLS: (flower.run, True),
    System.NVFLARE: (nvflare.run, False),
    System.NVFLARE_TLS: (nvflare.run, True),
}


@app.command("run")
def run_systems(
    systems: Annotated[list[System], typer.Argument(help="What to run, one after the other.")],
    venv: Annotated[
        Path | None, typer.Option(help="The virtual environment that the peer is installed in.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds; 0: the demo's.")] = 0,
    steps: Annotated[int, typer.Option(min=0, help="Steps a round; 0: the demo's.")] = 0,
    folder: Annotated[Path, typer.Option(help="Folder for everything the runs leave.")] = RUNS,
) -> None:
    """Run systems on the demo's work: four clients, Reuters R8, MiniLM, rank 8 for all."""
    with ends_well(console, "the run"):
        for system in systems:
            outcome = _run(system, venv, rounds, steps, folder.absolute() / system)
            console.say(table([outcome]))


@app.command()
def report(folder: Annotated[Path, typer.Option(help="Folder of the runs.")] = RUNS) -> None:
    """Print the table of all runs, in Markdown."""
    found = [folder / system / "outcome.json" for system in System]
    console.say(table(Outcome.read(path) for path in found if path.exists()))


def _run(system: System, venv: Path | None, rounds: int, steps: int, folder: Path) -> Outcome:
    """Raises: DomainError with the reason if anything fails."""
    model, data = fetch(MINILM, ASSETS), fetch(REUTERS, ASSETS)
    clear(folder)
    (folder / "data").mkdir(parents=True)
    divided(data, folder / "data")
    ours_alone = system not in _PEERS
    spec = specification(Protection(system) if ours_alone else Protection.NONE, rounds, steps)
    began = time.monotonic()
    if ours_alone:
        outcome = ours.run(spec, model, folder)
    elif venv is None:
        raise DomainError(
            Reason.CONFIGURATION_INVALID, f"{system} needs --venv: bench/peers/README.md says how to make it"
        )
    else:
        runs, tls = _PEERS[system]
        outcome = runs(Plan.of(spec, model, folder), venv.absolute(), folder, tls=tls)
    console.say(
        f"{system}: {time.monotonic() - began:.0f} s with what comes before and after; {outcome.write(folder)}"
    )
    return outcome


if __name__ == "__main__":
    app()
