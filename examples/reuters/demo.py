"""The demo: a real federation of four agents on this machine, every part a process of its own.

    python -m examples.reuters.demo [--protection complete | --seeds 5]

Fetches model and data, divides the data, starts the cluster and the agents, shows the federation live, and leaves
summary, plot and adapter in runs/demo. Without --protection it does so twice, selective and then complete, and sets
both side by side. --seeds compares complete mode with no protection over several splits (seeds.py).
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from examples.agents import HOME, Servers
from examples.local import ASSETS, AgentFile, Meter, ends_well, finish, run_federation
from examples.report import modes_table, plot_rounds
from examples.reuters import seeds as paired
from examples.reuters.assets import MINILM, REUTERS, fetch
from examples.reuters.cohort import (
    AGENTS,
    DIRICHLET_ALPHA,
    SPLIT_SEED,
    AgentProfile,
    Protection,
    agent_config,
    federation_spec,
    write_data,
)
from shelora.cli.supervision import clear
from shelora.federation import FederationSpec
from shelora.terminal import CommandLine, Terminal
from shelora.view import size

ADAPTER_OF: Final = "newsroom-3"
"""The agent whose adapter the demo keeps: the one of the largest rank."""

BOTH: Final = (Protection.SELECTIVE, Protection.COMPLETE)
"""What runs, one after the other, if no mode is asked for."""

console = Terminal()
app = CommandLine(add_completion=False)


@app.command()
def main(
    protection: Annotated[
        Protection | None,
        typer.Option(help="selective, complete, or none for comparison; left out: selective, then complete."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Folder for everything the run leaves.")] = Path("runs/demo"),
    *,
    seeds: Annotated[
        int,
        typer.Option(
            min=0,
            help="Compare complete with none on so many splits of the data, three minutes a run; runs that are done "
            "are kept in a folder beside, runs/demo-seeds.",
        ),
    ] = 0,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Serve the operator's page beside it, and print its address.")
    ] = False,
) -> None:
    """Run a federation of four agents on Reuters R8 with all-MiniLM-L6-v2."""
    if seeds and (protection or dashboard):
        raise typer.BadParameter("--seeds runs complete and none, without --protection and --dashboard")
    modes = (protection,) if protection else BOTH
    with ends_well(console):
        if seeds:
            compare_seeds(seeds, folder.with_name(f"{folder.name}-seeds"))  # a later demo clears its own
            return
        folders = [folder if mode is modes[0] else folder / mode for mode in modes]
        runs = [run(*one, dashboard=dashboard) for one in zip(modes, folders, strict=True)]
        compare(runs, folder)


def run(
    protection: Protection,
    folder: Path,
    *,
    seed: int = SPLIT_SEED,
    initial_seed: int = 0,
    dashboard: bool = False,
) -> dict[str, Any]:
    """The federation under one mode. Returns its summary; raises DomainError with the reason if anything fails.

    Args: seed: of the split of the data; initial_seed: of the initial factors, 0 for secret ones.
    """
    meter = Meter()
    with console.stages("fetching model and data (about 120 MB the first time)"):
        model, data = fetch(MINILM, ASSETS), fetch(REUTERS, ASSETS)
    clear(folder)
    folder.mkdir(parents=True)
    spec = federation_spec(protection, initial_seed)
    counts = write_data(data, folder / HOME, seed)
    console.say("examples: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    agents = agent_files(model, protection)
    federation = run_federation(spec, agents, folder, console, dashboard=dashboard)
    ran = configuration(spec, seed)
    summary = finish(federation, ran, folder, meter.spent(), console, adapter_of=ADAPTER_OF)
    plot_rounds(summary, folder / "rounds.png")
    up, down = (size(summary[f"{way}_bytes_per_agent_per_round"]) for way in ("upload", "download"))
    console.say(
        f"final test accuracy {summary['final_test_accuracy']:.1%} on {summary['final_test_examples']} test examples"
        f" · {up} up and {down} down an agent and round · {summary['wall_s']:.0f} s\n"
        f"left in {folder}: summary.json, rounds.png, report.html, adapter/ (load it with PeftModel.from_pretrained)"
    )
    return summary


def configuration(spec: FederationSpec, seed: int) -> dict[str, Any]:
    """What was run, as the summary has it."""
    return {
        "federation": spec.model_dump(mode="json"),
        "agents": {a.name: {"rank": a.rank, "alpha": a.alpha, "budget": a.budget} for a in AGENTS},
        "split": {"dirichlet_alpha": DIRICHLET_ALPHA, "seed": seed},
    }


def compare_seeds(count: int, folder: Path) -> None:
    """Runs complete mode and none on so many splits; shows them side by side and writes summary.json."""

    def one(protection: Protection, seed: int, home: Path) -> dict[str, Any]:
        console.say(f"\nseed {seed}, {protection}")
        summary = run(protection, home, seed=seed, initial_seed=seed)
        clear(home)
        paired.keep(home, summary)
        return summary

    done: list[paired.Pair] = []
    for pair in paired.pairs(
        count, folder, one, lambda mode, seed: configuration(federation_spec(mode, seed), seed)
    ):
        done.append(pair)
        (folder / "summary.json").write_text(json.dumps(paired.summarized(done), indent=2) + "\n")
        console.print(paired.table(done))
    console.say(
        f"left in {folder}: summary.json, and one of every run; runs that are there are not made again"
    )


def compare(summaries: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes summary.json, the fields of the first run and those of each under `modes`; shows them side by side."""
    modes = {s["configuration"]["federation"]["protection"]["mode"]: s for s in summaries}
    (folder / "summary.json").write_text(json.dumps({**summaries[0], "modes": modes}, indent=2) + "\n")
    if len(modes) > 1:
        console.print(modes_table(modes))
        console.say(
            f"left in {folder}: summary.json of all; the plot and adapter of a later mode lie in its folder"
        )


def agent_files(model: Path, protection: Protection) -> dict[str, AgentFile]:
    """Of the four agents, by name."""

    def file(profile: AgentProfile, servers: Servers) -> dict[str, Any]:
        return agent_config(servers, profile, model, protection)

    return {profile.name: partial(file, profile) for profile in AGENTS}


if __name__ == "__main__":
    app()
