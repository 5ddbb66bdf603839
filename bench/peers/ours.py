"""Our own servers and agents on the plan's work."""

import asyncio
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import yaml

from bench.peers.outcome import SERVERS, Outcome, Span, Times
from bench.peers.plan import ALPHA, CLIENTS, RANK
from bench.peers.usage import Usage, sampled
from bench.peers.wire import Wire, counted
from examples.local import WORKERS
from examples.measured import with_own_figures
from examples.reuters.cohort import AGENTS, Protection, agent_config
from shelora.cli.cluster import Addresses, LocalCluster
from shelora.cli.processes import Process
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.operator import operator
from shelora.protocol import Stage
from shelora.v1 import coordinator_pb2 as pb
from shelora.version import VERSION
from shelora.view import round_figures, training_rounds

POLL_S: Final = 0.5
_LOGS: Final = {"SHELORA_AGENT__LOG__JSON_LINES": "true", "SHELORA_AGENT__LOG__LEVEL": "DEBUG"}
"""Stages are logged with their times."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    spec: FederationSpec
    model: Path
    folder: Path
    wire: Wire
    usage: Usage

    def start(self, cluster: LocalCluster, servers: Addresses, name: str) -> Process:
        """Enrols an agent and starts it."""
        home = self.folder / "data" / name
        asyncio.run(cluster.enrol_client(self.spec.name, name, home / "state"))
        profile = replace(next(a for a in AGENTS if a.name == name), rank=RANK, alpha=ALPHA, budget=1.0)
        protection = Protection(self.spec.protection.mode)
        config = home / "agent.yaml"
        config.write_text(yaml.safe_dump(agent_config(servers, profile, self.model, protection)))
        process = cluster.spawn(name, "client_agent.main", ["run", "--config", str(config)], _LOGS)
        self.usage.add(name, process.popen.pid)
        return process

    def through_the_wire(self, servers: Addresses) -> Addresses:
        """The same servers, as agents reach them."""
        return replace(
            servers,
            coordinator=self.wire.front(servers.coordinator),
            key_authority=self.wire.front(servers.key_authority),
            aggregation=tuple(map(self.wire.front, servers.aggregation)),
        )


def run(spec: FederationSpec, model: Path, folder: Path) -> Outcome:
    """Runs the federation in a folder that holds the clients' data.

    Raises: DomainError: the federation, an agent or a server failed.
    """
    with counted() as wire, sampled() as usage:
        this, began = _Run(spec=spec, model=model, folder=folder, wire=wire, usage=usage), time.time()
        with LocalCluster(folder / "cluster", fixed_ports=False, workers=WORKERS) as cluster:
            for process in cluster.processes:
                usage.add(SERVERS, process.popen.pid)
            servers = this.through_the_wire(cluster.addresses)
            agents = [this.start(cluster, servers, name) for name in CLIENTS]
            federation = asyncio.run(_until_over(cluster, spec, agents))
            ended = time.time()
            usage.sample()
        states = {name: folder / "data" / name / "state" for name in CLIENTS}
        rounds = training_rounds(with_own_figures(federation, states))
        stages = {agent.name: _stages(agent.log) for agent in agents}
        accuracy = round_figures(rounds[-1]).test_accuracy
        if accuracy is None:
            raise DomainError(Reason.INTERNAL, "no agent reported an evaluation of the last round")
        return Outcome.of(
            system="shelora",
            version=VERSION,
            protection=f"{spec.protection.mode}, TLS",
            times=Times(began=began, ended=ended, trained=trained(rounds, stages)),
            usage=usage,
            clients=CLIENTS,
            bytes_up=wire.up,
            bytes_down=wire.down,
            accuracy=accuracy,
        )


async def _until_over(
    cluster: LocalCluster, spec: FederationSpec, agents: Sequence[Process]
) -> pb.Federation:
    """Starts the federation. Returns it when all agents have ended."""
    async with operator(cluster.addresses.coordinator, cluster.credentials) as connection:
        await connection.create(spec.to_proto())
        await connection.start(spec.name)
        while any(agent.popen.poll() is None for agent in agents):
            for server in cluster.servers.values():
                server.require_alive()
            await asyncio.sleep(POLL_S)
        for agent in agents:
            if agent.popen.returncode:
                agent.require_alive()
        return await connection.get(spec.name)


def trained(
    rounds: Iterable[pb.RoundSummary], stages: Mapping[str, Sequence[tuple[str, float]]]
) -> Mapping[int, Sequence[Span]]:
    """When every agent trained, by round: from when its log says that it began, for as long as its update says.

    Args: stages: that each agent entered, and when, Unix seconds.
    """
    begun = {
        name: [at for stage, at in entered if stage == Stage.TRAINING] for name, entered in stages.items()
    }
    found: dict[int, list[Span]] = {}
    for round_ in rounds:
        for update in round_.updates:
            at = begun[update.client_id][round_.number - 1]
            found.setdefault(round_.number, []).append(Span(at, at + update.train_s))
    return found


def _stages(log: Path) -> list[tuple[str, float]]:
    """Every stage that the agent entered, and when, Unix seconds."""
    records: list[dict[str, Any]] = [
        json.loads(line) for line in log.read_text("utf-8").splitlines() if '"event": "stage"' in line
    ]
    return [(record["stage"], datetime.fromisoformat(record["timestamp"]).timestamp()) for record in records]
