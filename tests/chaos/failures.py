"""Processes die, drain and join while a federation runs: nothing is lost, nothing counted or done twice.

`make test-failures` runs these.
"""

import asyncio
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shelora.cli.cluster import LocalCluster, Process
from shelora.cli.operator import operator
from shelora.federation import FederationSpec
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import training_rounds
from tests.chaos.nursery import ForkingCluster, Nursery
from tests.chaos.relay import TcpRelay
from tests.e2e.agents import AGENTS, Agent, configure, specification

CLINIC, BANK, _ = AGENTS
POLL_S = 0.05
STEPS = 20
DRAIN_S = 25
"""The default grace is 20."""
COORDINATOR = {"LEASE_S": "2", "TICK_S": "0.2", "AGGREGATION_REFRESH_S": "0.5"}


@dataclass
class World:
    """A cluster with two coordinators and two replicas of aggregation, reached through relays."""

    cluster: LocalCluster
    relay: TcpRelay
    folder: Path
    model: Path

    @asynccontextmanager
    async def federation(self, name: str, rounds: int, mode: str = "none") -> AsyncIterator["Federation"]:
        """A federation of two agents that has been started; they run until the context ends."""
        usual = specification(mode, rounds=rounds, clients=2)
        training = usual.training.model_copy(update={"local_steps": STEPS})
        described = usual.model_copy(update={"name": name, "training": training})
        async with operator(self.cluster.addresses.coordinator, self.cluster.credentials) as connection:
            await connection.create(described.to_proto())
            await connection.start(name)
            running = Federation(self, described, connection)
            for agent in (CLINIC, BANK):
                await self.cluster.enrol_client(name, agent.name, running.home / agent.name / "state")
                running.run(agent)
            try:
                yield running
            finally:
                for process in running.agents.values():
                    process.popen.send_signal(signal.SIGCONT)
                    process.popen.kill()


class Federation:
    """A running federation and its agents."""

    def __init__(self, world: World, spec: FederationSpec, connection: Any) -> None:
        self._world = world
        self._spec = spec
        self._connection = connection
        self.home = world.folder / spec.name
        self.agents: dict[str, Process] = {}

    def run(self, agent: Agent) -> None:
        """Starts an agent, or starts it again."""
        config = configure(agent, self._world.cluster.addresses, self._world.model, self.home)
        environment = {
            "SHELORA_AGENT__FEDERATION": self._spec.name,
            "SHELORA_AGENT__PROTECTION__ACCEPT": f"[{self._spec.protection.level}]",
            "SHELORA_AGENT__LOG__JSON_LINES": "true",
            "SHELORA_AGENT__LOG__LEVEL": "DEBUG",
        }
        name, arguments = f"{self._spec.name}-{agent.name}", ["run", "--config", str(config)]
        self.agents[agent.name] = self._world.cluster.spawn(name, "client_agent.main", arguments, environment)

    async def kill_and_run_again(self, agent: Agent) -> None:
        self.agents[agent.name].popen.kill()
        await asyncio.to_thread(self.agents[agent.name].popen.wait)
        self.run(agent)

    def said(self, agent: Agent, event: str, **fields: Any) -> list[dict[str, Any]]:
        """What an agent has logged."""
        return logged(self._log(agent), event, **fields)

    @asynccontextmanager
    async def in_the_middle_of_round(self, number: int) -> AsyncIterator[None]:
        """One agent has committed its update, the other stands still before it can."""
        await until(lambda: len(self.said(BANK, "assigned", work="train")) >= number)
        self.agents[BANK.name].popen.send_signal(signal.SIGSTOP)
        before = 1 if self._spec.protection.mode == "selective" else 0
        await until(lambda: len(self.said(CLINIC, "update_committed")) >= number + before)
        yield
        self.agents[BANK.name].popen.send_signal(signal.SIGCONT)

    async def finished(self) -> pb.Federation:
        """The federation at its end: each round published at the first attempt, with both updates."""
        await until(lambda: all(process.popen.poll() is not None for process in self.agents.values()))
        assert {name: process.popen.poll() for name, process in self.agents.items()} == {
            "clinic": 0,
            "bank": 0,
        }
        federation = await self._connection.get(self._spec.name)
        assert federation.phase == pb.PHASE_FINISHED, federation.failure
        assert all(r.state == pb.ROUND_STATE_PUBLISHED for r in federation.history)
        rounds = training_rounds(federation)
        assert [(r.number, r.attempt, r.update_count) for r in rounds] == [
            (number, 1, 2) for number in range(1, self._spec.round.rounds + 1)
        ]
        for agent in (CLINIC, BANK):
            trained = Counter(event["round_number"] for event in self.said(agent, "trained"))
            assert trained == dict.fromkeys(range(1, self._spec.round.rounds + 1), 1)
        return federation

    def _log(self, agent: Agent) -> Path:
        return log_of(self._world, f"{self._spec.name}-{agent.name}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery, model: Path) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("failures")
    with (
        TcpRelay() as relay,
        ForkingCluster(
            nursery,
            folder / "cluster",
            coordinators=2,
            aggregation_replicas=2,
            workers=1,
            announce=True,
            settings={"coordinator": COORDINATOR},
            relay=relay,
        ) as cluster,
    ):
        yield World(cluster, relay, folder, model)


async def test_an_agent_killed_in_training_upload_and_decryption_goes_on_where_it_was(world: World):
    async with world.federation("killed-agent", rounds=1, mode="selective") as federation:
        await until(lambda: federation.said(CLINIC, "stage", stage="training"))
        await federation.kill_and_run_again(CLINIC)

        await until(lambda: federation.said(CLINIC, "trained"))
        for front in ("aggregation-0", "aggregation-1"):
            world.relay.delay(front, 0.05)
        await until(lambda: stored(world, "killed-agent", CLINIC.name) > 1)  # one is its vote
        await federation.kill_and_run_again(CLINIC)
        for front in ("aggregation-0", "aggregation-1"):
            world.relay.delay(front, 0.0)

        await until(lambda: federation.said(CLINIC, "stage", stage="decrypting") and _finishing(federation))
        await federation.kill_and_run_again(CLINIC)
        await federation.finished()

    for direction in ("shard_upload", "shard_download"):
        moved = Counter((event["round"], event["shard"]) for event in federation.said(CLINIC, direction))
        assert len(moved) > 1
        again = [event for event in federation.said(CLINIC, direction) if event["offset"] == event["of"]]
        assert not again
    uploads = Counter((e["round"], e["shard"]) for e in federation.said(CLINIC, "shard_upload"))
    assert sum(uploads.values()) <= len(uploads) + 1, "at most the shard that was under way is sent again"
    downloads = Counter((e["round"], e["shard"]) for e in federation.said(CLINIC, "shard_download", offset=0))
    final = federation.said(CLINIC, "assigned", work="finish")[0]["assignment_id"].removeprefix("finish/")
    assert {n for (name, _), n in downloads.items() if name == final} == {1}, (
        "what was there is not fetched again"
    )


async def test_servers_killed_and_restarted_in_the_middle_of_a_round_lose_nothing(world: World):
    servers = world.cluster.servers
    async with world.federation("killed-servers", rounds=2) as federation:
        async with federation.in_the_middle_of_round(1):
            for name in ("redis", "coordinator-0", "coordinator-1", "aggregation-0"):
                servers[name].popen.kill()
            for name in ("redis", "coordinator-0", "coordinator-1", "aggregation-0"):
                await asyncio.to_thread(world.cluster.restart, name)
        async with federation.in_the_middle_of_round(2):
            for name in ("coordinator-0", "aggregation-1", "key-authority"):
                servers[name].terminate()
                assert await asyncio.to_thread(servers[name].popen.wait, DRAIN_S) == 0, (
                    f"{name} did not drain"
                )
                await asyncio.to_thread(world.cluster.restart, name)
        await federation.finished()


async def test_a_replica_started_later_takes_its_share_and_that_of_one_that_died(world: World):
    async with world.federation("replicas", rounds=2) as federation:
        async with federation.in_the_middle_of_round(1):
            name = await asyncio.to_thread(world.cluster.add_aggregation)
            address = world.relay.front(name)
            await until(
                lambda: all(logged(log, "replica_found", address=address) for log in coordinators(world))
            )
            world.cluster.servers["aggregation-0"].popen.kill()
        await federation.finished()
        assert logged(log_of(world, name), "shard_aggregated"), "the new replica aggregated nothing"
    await asyncio.to_thread(world.cluster.restart, "aggregation-0")


def _finishing(federation: Federation) -> bool:
    """Whether the decryption under way is that of the final result: the summed votes come before."""
    assigned = federation.said(CLINIC, "assigned", work="finish")
    stages = federation.said(CLINIC, "stage", stage="decrypting")
    return bool(assigned) and stages[-1]["timestamp"] > assigned[0]["timestamp"]


def stored(world: World, federation: str, client: str) -> int:
    """Shards of a client that have arrived completely."""
    logs = [log_of(world, name) for name in world.cluster.servers if name.startswith("aggregation")]
    events = [event for log in logs for event in logged(log, "shard_stored", client_id=client)]
    return sum(event["round_id"].startswith(f"{federation}.") for event in events)


def coordinators(world: World) -> list[Path]:
    return [log_of(world, name) for name in world.cluster.servers if name.startswith("coordinator")]


def log_of(world: World, process: str) -> Path:
    return world.folder / "cluster" / "logs" / f"{process}.log"


def logged(log: Path, event: str, **fields: Any) -> list[dict[str, Any]]:
    """Records of a log, by event and fields. A line that is just being written is left out."""
    found = []
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        if f'"{event}"' in line and line.endswith("}"):
            record = json.loads(line)
            if record["event"] == event and fields.items() <= record.items():
                found.append(record)
    return found


async def until(condition: Callable[[], object]) -> None:
    """Waits until a condition holds; the test's own timeout is the limit."""
    while not condition():  # noqa: ASYNC110 - other processes change it
        await asyncio.sleep(POLL_S)
