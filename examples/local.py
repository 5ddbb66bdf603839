"""A federation on this machine, every part a process of its own: what all demos run."""

import asyncio
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import yaml

from examples.agents import HOME, Servers
from examples.measured import with_own_figures
from examples.report import summarize
from shelora.cli.cluster import LocalCluster
from shelora.cli.page import open_beside
from shelora.cli.processes import Process
from shelora.cli.render import rounds_table
from shelora.cli.screen import FederationScreen
from shelora.cli.supervision import interruptible
from shelora.dashboard.rendering import report
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.operator import Operator, operator
from shelora.terminal import Terminal
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import figures_by_round, training_rounds

ASSETS: Final = Path("assets")
"""Models and data that demos fetch once."""
REFRESH_S: Final = 0.5
WORKERS: Final = 2
"""Of aggregation."""

AgentFile = Callable[[Servers], Mapping[str, Any]]
"""The content of an agent's YAML file, for these servers."""


@contextmanager
def ends_well(console: Terminal, what: str = "the demo") -> Iterator[None]:
    """Says why it failed or that it was interrupted, and exits. Args: what: ran."""
    try:
        with interruptible():
            yield
    except DomainError as error:
        console.refuse(error, f"{what} failed: ")
        sys.exit(1)
    except KeyboardInterrupt:
        console.say("interrupted; every process was stopped", style="yellow")
        sys.exit(130)


class Meter:
    """What a run has spent so far."""

    def __init__(self) -> None:
        self._started, self._before = time.monotonic(), _children_cpu_s()

    def spent(self) -> dict[str, float]:
        """wall_s, and cpu_s of all processes that were started here and have ended, theirs included."""
        return {"wall_s": time.monotonic() - self._started, "cpu_s": _children_cpu_s() - self._before}


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_federation(
    spec: FederationSpec,
    agents: Mapping[str, AgentFile],
    folder: Path,
    console: Terminal,
    *,
    dashboard: bool = False,
) -> pb.Federation:
    """Starts a cluster and the agents, shows the federation live, and stops every process.

    Args:
        spec: The federation.
        agents: By name; what each needs beside its YAML file lies in `folder/agents/NAME`.
        folder: For everything the run leaves.
        console: Where to show it.
        dashboard: Serve the operator's page, too.

    Returns: the federation, with what every agent measured, as its own folder has it.
    Raises: DomainError if the federation, an agent or a server failed.
    """
    with ExitStack() as stack:
        with console.stages("starting a cluster") as tell:
            cluster = stack.enter_context(
                LocalCluster(folder / "cluster", fixed_ports=False, workers=WORKERS, tell=tell)
            )
        if dashboard:
            console.say(f"the operator's page; this address lets in whoever has it:\n{open_beside(cluster)}")
        running = [_start(cluster, spec.name, *agent, folder / HOME) for agent in agents.items()]
        console.say(f"{len(running)} agents enrolled with a token each; {cluster.trust}")
        federation = asyncio.run(_follow(cluster, running, spec, console))
    return with_own_figures(federation, {name: folder / HOME / name / "state" for name in agents})


def _start(cluster: LocalCluster, federation: str, name: str, file: AgentFile, agents: Path) -> Process:
    """Enrols the agent, writes its configuration and starts its daemon."""
    home = agents / name
    asyncio.run(cluster.enrol_client(federation, name, home / "state"))
    config = home / "agent.yaml"
    config.write_text(yaml.safe_dump(dict(file(cluster.addresses)), sort_keys=False))
    return cluster.spawn(name, "client_agent.main", ["run", "--config", str(config)], {})


async def _follow(
    cluster: LocalCluster, agents: Sequence[Process], spec: FederationSpec, console: Terminal
) -> pb.Federation:
    """Creates and starts the federation and shows it until every agent has reported its last evaluation."""
    async with operator(cluster.addresses.coordinator, cluster.credentials) as connection:
        await connection.create(spec.to_proto())
        federation = await connection.start(spec.name)
        with FederationScreen(console) as screen:
            screen.show(federation)
            while federation.phase == pb.PHASE_RUNNING:
                _require_alive(cluster, agents)
                await asyncio.sleep(REFRESH_S)
                federation = await connection.get(spec.name, federation.history)
                screen.show(federation)
            return await _last_reports(connection, agents, federation, screen)


def _require_alive(cluster: LocalCluster, agents: Sequence[Process]) -> None:
    """Raises with the end of its log if a server died, or an agent ended before the federation."""
    for process in cluster.processes:
        if process not in agents:
            process.require_alive()
    for agent in agents:
        if agent.popen.poll() not in {None, 0}:
            agent.require_alive()


async def _last_reports(
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
    federation: pb.Federation,
    ran: Mapping[str, Any],
    folder: Path,
    spent: Mapping[str, float],
    console: Terminal,
    *,
    adapter_of: str,
) -> dict[str, Any]:
    """Keeps an agent's adapter and a report, and prints the table of rounds. Returns the summary.

    Args: ran: The configuration.
    """
    summary = summarize(federation, ran, spent)
    (folder / "report.html").write_text(report(federation), encoding="utf-8")
    shutil.copytree(folder / HOME / adapter_of / "state" / "adapter", folder / "adapter")
    console.print(rounds_table(figures_by_round(training_rounds(federation))))
    return summary
