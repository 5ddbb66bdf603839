"""The demo: a real federation of four agents on this machine, every part a process of its own.

    python -m examples.reuters.demo [--protection complete | --seeds 5]

Fetches model and data, divides the data, starts the cluster and the agents, shows the federation live, and leaves
summary, plot and adapter in runs/demo. Without --protection it does so twice, selective and then complete, and sets
both side by side. --seeds compares complete mode with no protection over several splits (seeds.py).
"""

import asyncio
import json
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import yaml

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
from examples.reuters.report import modes_table, plot_rounds, summarize
from shelora.cli.cluster import LocalCluster
from shelora.cli.operator import Operator, operator
from shelora.cli.page import open_beside
from shelora.cli.processes import Process
from shelora.cli.render import rounds_table
from shelora.cli.screen import FederationScreen
from shelora.cli.supervision import clear, interruptible
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.terminal import CommandLine, Terminal
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import round_figures, size, training_rounds

ASSETS: Final = Path("assets")
REFRESH_S: Final = 0.5
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
    try:
        with interruptible():
            if seeds:
                compare_seeds(seeds, folder.with_name(f"{folder.name}-seeds"))  # a later demo clears its own
                return
            folders = [folder if mode is modes[0] else folder / mode for mode in modes]
            runs = [run(*one, dashboard=dashboard) for one in zip(modes, folders, strict=True)]
            compare(runs, folder)
    except DomainError as error:
        console.refuse(error, "the demo failed: ")
        sys.exit(1)
    except KeyboardInterrupt:
        console.say("interrupted; every process was stopped", style="yellow")
        sys.exit(130)


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
    started, before = time.monotonic(), children_cpu_s()
    with console.stages("fetching model and data (about 120 MB the first time)"):
        model, data = fetch(MINILM, ASSETS), fetch(REUTERS, ASSETS)
    clear(folder)
    folder.mkdir(parents=True)
    spec = federation_spec(protection, initial_seed)
    counts = write_data(data, folder / "agents", seed)
    console.say("examples: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    with ExitStack() as stack:
        with console.stages("starting a cluster") as tell:
            cluster = stack.enter_context(
                LocalCluster(folder / "cluster", fixed_ports=False, workers=2, tell=tell)
            )
        if dashboard:
            console.say(f"the operator's page; this address lets in whoever has it:\n{open_beside(cluster)}")
        agents = [start_agent(cluster, profile, folder, model, protection) for profile in AGENTS]
        console.say(f"{len(agents)} agents enrolled with a token each; {cluster.trust}")
        federation = asyncio.run(follow(cluster, agents, spec))
    spent = {"wall_s": time.monotonic() - started, "cpu_s": children_cpu_s() - before}
    return finish(federation, configuration(spec, seed), folder, spent)


def configuration(spec: FederationSpec, seed: int) -> dict[str, Any]:
    """What was run, as the summary has it."""
    return {
        "federation": spec.model_dump(mode="json"),
        "agents": {a.name: {"rank": a.rank, "alpha": a.alpha, "budget": a.budget} for a in AGENTS},
        "split": {"dirichlet_alpha": DIRICHLET_ALPHA, "seed": seed},
    }


def children_cpu_s() -> float:
    """CPU seconds of all processes that were started here and have ended, theirs included."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


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


def start_agent(
    cluster: LocalCluster, profile: AgentProfile, folder: Path, model: Path, protection: Protection
) -> Process:
    """Enrols the agent, writes its configuration and starts its daemon."""
    home = folder / "agents" / profile.name
    asyncio.run(cluster.enrol_client("reuters", profile.name, home / "state"))
    config = home / "agent.yaml"
    config.write_text(
        yaml.safe_dump(agent_config(cluster.addresses, profile, model, protection), sort_keys=False)
    )
    return cluster.spawn(profile.name, "client_agent.main", ["run", "--config", str(config)], {})


async def follow(cluster: LocalCluster, agents: Sequence[Process], spec: FederationSpec) -> pb.Federation:
    """Creates and starts the federation and shows it until every agent has reported its last evaluation."""
    async with operator(cluster.addresses.coordinator, cluster.credentials) as connection:
        await connection.create(spec.to_proto())
        federation = await connection.start(spec.name)
        with FederationScreen(console) as screen:
            screen.show(federation)
            while federation.phase == pb.PHASE_RUNNING:
                require_alive(cluster, agents)
                await asyncio.sleep(REFRESH_S)
                federation = await connection.get(spec.name, federation.history)
                screen.show(federation)
            return await last_reports(connection, agents, federation, screen)


def require_alive(cluster: LocalCluster, agents: Sequence[Process]) -> None:
    """Raises with the end of its log if a server died, or an agent ended before the federation."""
    for process in cluster.processes:
        if process not in agents:
            process.require_alive()
    for agent in agents:
        if agent.popen.poll() not in {None, 0}:
            agent.require_alive()


async def last_reports(
    connection: Operator, agents: Sequence[Process], federation: pb.Federation, screen: FederationScreen
) -> pb.Federation:
    """Waits until the agents have exited; raises if the federation or an agent failed."""
    if federation.phase == pb.PHASE_FAILED:
        raise DomainError(Reason.INTERNAL, f"the federation failed: {federation.failure}")
    while any(agent.popen.poll() is None for agent in agents):
        await asyncio.sleep(REFRESH_S)
        federation = await connection.get(federation.federation_id, federation.history)
        screen.show(federation)
    for agent in agents:
        if agent.popen.returncode:
            agent.require_alive()
    federation = await connection.get(federation.federation_id)
    screen.show(federation)
    return federation


def finish(
    federation: pb.Federation, ran: dict[str, Any], folder: Path, spent: dict[str, float]
) -> dict[str, Any]:
    """Writes plot and adapter; prints the final table. Returns the summary.

    Args: ran: the configuration; spent: seconds.
    """
    summary = summarize(federation, ran, spent)
    plot_rounds(summary, folder / "rounds.png")
    shutil.copytree(folder / "agents" / ADAPTER_OF / "state" / "adapter", folder / "adapter")
    console.print(rounds_table([round_figures(r) for r in training_rounds(federation)]))
    up, down = (size(summary[f"{way}_bytes_per_agent_per_round"]) for way in ("upload", "download"))
    console.say(
        f"final test accuracy {summary['final_test_accuracy']:.1%} on {summary['final_test_examples']} test examples"
        f" · {up} up and {down} down an agent and round · {spent['wall_s']:.0f} s\n"
        f"left in {folder}: summary.json, rounds.png, adapter/ (load it with PeftModel.from_pretrained)"
    )
    return summary


if __name__ == "__main__":
    app()
