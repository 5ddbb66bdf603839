"""Processes die, drain and join while a federation runs: nothing is lost, nothing counted or done twice.

`make test-failures` runs these.
"""

import asyncio
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from coordinator.main import now_ms
from coordinator.store import redis_store
from services.common.redis_client import connect
from shelora.cli.cluster import LocalCluster
from shelora.cli.processes import Process
from shelora.federation import FederationSpec
from shelora.operator import operator
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import training_rounds
from tests.chaos import invariants
from tests.chaos.auditor import certified, rounds_of
from tests.chaos.nursery import ForkingCluster, Nursery
from tests.chaos.relay import TcpRelay
from tests.e2e.agents import AGENTS, Agent, configure, specification

pytestmark = pytest.mark.timeout(900)

CLINIC, BANK, SENSOR = AGENTS
WARD = Agent("ward", rank=8, alpha=8, budget=0.0, suffix=".jsonl")
COMMITTEE = (CLINIC, BANK, SENSOR, WARD)
"""Four: three of them certify a set, two of them open it."""
POLL_S = 0.05
STEPS = 60
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
    async def federation(
        self, name: str, mode: str, *, agents: Sequence[Agent] = (CLINIC, BANK), **rules: int
    ) -> AsyncIterator["Federation"]:
        """A federation that has been started, and its agents; they run until the context ends."""
        usual = specification(mode, clients=len(agents), **rules)
        training = usual.training.model_copy(update={"local_steps": STEPS})
        described = usual.model_copy(update={"name": name, "training": training})
        async with operator(self.cluster.addresses.coordinator, self.cluster.credentials) as connection:
            await connection.create(described.to_proto())
            await connection.start(name)
            running = Federation(self, described, connection)
            for agent in agents:
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

    def stop(self, *agents: Agent) -> None:
        for agent in agents:
            self.agents[agent.name].popen.send_signal(signal.SIGSTOP)

    def go_on(self, *agents: Agent) -> None:
        for agent in agents:
            self.agents[agent.name].popen.send_signal(signal.SIGCONT)

    async def restart(self, *agents: Agent) -> None:
        """Kills agents and runs them again, until they are back. What they held as members of a committee is gone."""
        before = {agent: len(self.said(agent, "model_ready")) for agent in agents}
        for agent in agents:
            await self.kill_and_run_again(agent)
        for agent in agents:
            await until(lambda agent=agent: len(self.said(agent, "model_ready")) > before[agent])

    def said(self, agent: Agent, event: str, **fields: Any) -> list[dict[str, Any]]:
        """What an agent has logged."""
        return logged(self._log(agent), event, **fields)

    @asynccontextmanager
    async def in_the_middle_of_round(self, number: int, late: Agent = BANK) -> AsyncIterator[None]:
        """All have committed their updates but one that stands still before it can."""
        await until(lambda: len(self.said(late, "stage", stage="training")) >= number)
        self.stop(late)
        others = self._spec.round.clients - 1
        await self.reached(lambda current: current.update_count == others)
        yield
        self.go_on(late)

    @asynccontextmanager
    async def certifying(self, *absent: Agent) -> AsyncIterator[None]:
        """A round has all updates and too few members to certify them: some stand still after their commits."""
        async with self.in_the_middle_of_round(1, WARD):
            self.stop(*absent)
        await self.reached(lambda current: current.state == pb.ROUND_STATE_CERTIFYING)
        yield
        self.go_on(*absent)

    async def reached(self, condition: Callable[[pb.RoundSummary], object]) -> None:
        """Waits until the round in progress is as asked for."""
        while not condition((await self._connection.get(self._spec.name)).current):  # noqa: ASYNC110 - as below
            await asyncio.sleep(POLL_S)

    async def finished(self, lost: Sequence[str] = ()) -> pb.Federation:
        """The federation at its end: each round published with all updates, the first after these lost attempts."""
        await until(lambda: all(process.popen.poll() is not None for process in self.agents.values()))
        ended = {name: process.popen.poll() for name, process in self.agents.items()}
        assert ended == dict.fromkeys(self.agents, 0)
        federation = await self._connection.get(self._spec.name)
        assert federation.phase == pb.PHASE_FINISHED, federation.failure
        assert [r.reason for r in federation.history if r.state == pb.ROUND_STATE_ABANDONED] == list(lost)
        numbers, updates = range(1, self._spec.round.rounds + 1), self._spec.round.clients
        assert [(r.number, r.attempt, r.update_count) for r in training_rounds(federation)] == [
            (number, 1 + len(lost) if number == 1 else 1, updates) for number in numbers
        ]
        await self._nothing_is_amiss()
        return federation

    def trained(self, agent: Agent) -> Counter[int]:
        """How often an agent trained, by number of the round."""
        return Counter(event["round_number"] for event in self.said(agent, "trained"))

    async def _nothing_is_amiss(self) -> None:
        """What `make chaos` looks at, of this federation."""
        logs = {name: log_of(self._world, f"{self._spec.name}-{name}") for name in self.agents}
        noted = {name: certified(self.home / name / "state") for name in self.agents}
        async with connect(self._world.cluster.addresses.redis_url) as client:
            store = redis_store(client, now_ms, timedelta(days=30))
            rounds = await rounds_of(store, (await store.federations.read(self._spec.name)).record)
        findings = [
            invariants.every_commit_counts_once(rounds),
            invariants.one_set_a_draw(rounds, noted),
            invariants.no_sum_of_too_few(rounds),
            invariants.spent_rounds_train_anew(rounds, logs),
            invariants.nothing_is_trained_twice(logs),
        ]
        assert not [found for found in findings if not found.holds]

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
    async with world.federation("killed-agent", "selective", rounds=1) as federation:
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


@pytest.mark.parametrize("mode", ["complete", "none"])
async def test_servers_killed_and_restarted_in_the_middle_of_a_round_lose_nothing(world: World, mode: str):
    servers = world.cluster.servers
    async with world.federation(f"killed-servers-{mode}", mode, rounds=2) as federation:
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
    for agent in (CLINIC, BANK):
        assert federation.trained(agent) == {1: 1, 2: 1}


async def test_members_killed_after_and_before_the_certificate_are_not_missed(world: World):
    rules = {"rounds": 2, "min_updates": 3, "committee_s": 20}
    async with world.federation("lost-members", "complete", agents=COMMITTEE, **rules) as federation:
        async with federation.certifying(BANK, SENSOR):
            with standing_still(world, "aggregation-0", "aggregation-1"):
                federation.go_on(SENSOR)  # the third to sign; what the fourth holds is never asked for
                await federation.reached(lambda current: current.state == pb.ROUND_STATE_AGGREGATING)
                await federation.restart(BANK)
        async with federation.in_the_middle_of_round(2, WARD):
            await federation.restart(BANK)
        await federation.finished()
    for agent in COMMITTEE:
        assert federation.trained(agent) == {1: 1, 2: 1}
    assert len({event["round"] for event in federation.said(BANK, "sits_out")}) == 2


async def test_a_round_whose_committee_loses_its_quorum_is_trained_anew(world: World):
    rules = {"rounds": 1, "min_updates": 3}
    async with world.federation("lost-quorum", "complete", agents=COMMITTEE, **rules) as federation:
        async with federation.certifying(BANK, SENSOR):
            await federation.restart(BANK, SENSOR)
        await federation.finished(lost=["QUORUM_MISSING"])
    for agent in COMMITTEE:
        assert federation.trained(agent) == {1: 2}, "a set of the first updates may have been certified"


async def test_servers_killed_while_a_committee_certifies_and_opens_lose_nothing(world: World):
    servers, kept = world.cluster.servers, ("redis", "coordinator-0", "coordinator-1")
    replicas = ("aggregation-0", "aggregation-1")
    rules = {"rounds": 1, "min_updates": 3, "committee_s": 120}
    async with world.federation("killed-openers", "complete", agents=COMMITTEE, **rules) as federation:
        async with federation.certifying(BANK, SENSOR):
            for name in kept:
                servers[name].popen.kill()
            for name in kept:
                await asyncio.to_thread(world.cluster.restart, name)
            for name in replicas:
                servers[name].popen.send_signal(signal.SIGSTOP)
        await federation.reached(lambda current: current.state == pb.ROUND_STATE_AGGREGATING)
        for name in (*kept, *replicas):
            servers[name].popen.kill()
        for name in (*kept, *replicas):
            await asyncio.to_thread(world.cluster.restart, name)
        await federation.finished()
    for agent in COMMITTEE:
        assert federation.trained(agent) == {1: 1}


async def test_a_replica_started_later_takes_its_share_and_that_of_one_that_died(world: World):
    async with world.federation("replicas", "none", rounds=2) as federation:
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


@contextmanager
def standing_still(world: World, *names: str) -> Iterator[None]:
    """Servers are stopped, and go on at the end."""
    for name in names:
        world.cluster.servers[name].popen.send_signal(signal.SIGSTOP)
    yield
    for name in names:
        world.cluster.servers[name].popen.send_signal(signal.SIGCONT)


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
