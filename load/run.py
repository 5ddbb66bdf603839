"""One run: a cluster, a federation of so many simulated agents, and what it cost."""

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import redis

from load.agents import Share, state_dir
from load.resources import Usage, sampled
from shelora.cli.cluster import LocalCluster
from shelora.cli.processes import Process
from shelora.federation import FederationSpec
from shelora.operator import Operator, operator
from shelora.strategies.registry import DEFAULT
from shelora.v1 import coordinator_pb2 as pb

FEDERATION: Final = "load"
DEADLINE_S: Final = 900
POLL_S: Final = 1.0
ENROLLING: Final = 8
"""Agents enrolled at once."""
REPLICAS: Final = 2
"""Aggregation replicas, of one worker each."""

Tell = Callable[[str, int, int], None]
"""Told what is going on, and how much of it is done of how much."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run."""

    agents: int
    rounds: int
    processes: int
    """Processes that the agents share."""
    directions: int
    """`max_directions` of the federation: what an agent downloads is in proportion to it, but for `complete`."""
    starts_per_s: float
    """Agents started a second."""
    mode: str = DEFAULT
    """How updates are protected."""

    @property
    def spec(self) -> FederationSpec:
        return FederationSpec.model_validate(
            {
                "name": FEDERATION,
                "training": {"base_model": "synthetic", "labels": [f"class-{i}" for i in range(8)]},
                "round": {
                    "rounds": self.rounds,
                    "clients": self.agents,
                    "min_updates": max(2, self.agents // 2),
                    "deadline_s": DEADLINE_S,
                    "max_attempts": 1,
                },
                "protection": {"mode": self.mode, "max_directions": self.directions},
            }
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run cost."""

    plan: Plan
    enrol_s: float
    """Wall seconds to enrol all agents."""
    wall_s: float
    """From the first agent's start to the last one's end."""
    federation: pb.Federation
    usage: dict[str, Usage]
    """By service process."""
    redis_peak_bytes: int
    """Most memory that Redis held of its own account."""
    seconds: dict[str, list[float]]
    """Of every call, by RPC."""
    failures: dict[str, int]
    """By RPC and reason."""
    outcomes: dict[str, int]
    """How the agents ended."""
    bytes_up: float
    bytes_down: float
    sent: dict[str, int]
    """Bytes of all agents' messages, by RPC."""
    received: dict[str, int]

    @property
    def problems(self) -> list[str]:
        """Why the run is no success."""
        spec, rounds = self.federation.spec.round, self.federation.history
        found = [f"{count} x {failure}" for failure, count in self.failures.items()]
        found += [f"{count} agents ended {how}" for how, count in self.outcomes.items() if how != "finished"]
        if self.federation.phase != pb.PHASE_FINISHED:
            found.append(f"the federation did not finish: {self.federation.failure}")
        found += [
            f"round {r.round_id} had {r.update_count} updates of {spec.clients} agents"
            for r in rounds
            if r.update_count != spec.clients
        ]
        return found


def run(plan: Plan, folder: Path, tell: Tell) -> Measured:
    """Runs a plan in an empty folder. Raises DomainError with the end of its log if a process died."""
    with LocalCluster(
        folder / "cluster", fixed_ports=False, aggregation_replicas=REPLICAS, workers=1
    ) as cluster:
        return asyncio.run(_run(plan, cluster, folder, tell))


async def _run(plan: Plan, cluster: LocalCluster, folder: Path, tell: Tell) -> Measured:
    names = [f"agent-{index:04d}" for index in range(plan.agents)]
    homes, services = folder / "agents", tuple(cluster.processes)
    enrol_s = await _enrol(cluster, names, homes, tell)
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(
            operator(cluster.addresses.coordinator, cluster.credentials)
        )
        sampler = stack.enter_context(sampled(services))
        await connection.create(plan.spec.to_proto())
        await connection.start(FEDERATION)
        began = time.monotonic()
        shares = [_spawn(plan, cluster, names, homes, index) for index in range(plan.processes)]
        await _until_over(connection, cluster, shares, tell)
        wall_s = time.monotonic() - began
        federation = await connection.get(FEDERATION)
    found = [json.loads(_output(homes, index).read_text()) for index in range(plan.processes)]
    memory = redis.Redis.from_url(cluster.addresses.redis_url).info("memory")
    return Measured(
        plan=plan,
        enrol_s=enrol_s,
        wall_s=wall_s,
        federation=federation,
        usage=dict(sampler.usage),
        redis_peak_bytes=int(memory["used_memory_peak"]),
        seconds=_joined(part["seconds"] for part in found),
        failures=sum((Counter(part["failures"]) for part in found), Counter()),
        outcomes=sum((Counter(part["outcomes"]) for part in found), Counter()),
        bytes_up=sum(part["bytes"]["up"] for part in found),
        bytes_down=sum(part["bytes"]["down"] for part in found),
        sent=sum((Counter(part["sent"]) for part in found), Counter()),
        received=sum((Counter(part["received"]) for part in found), Counter()),
    )


async def _enrol(cluster: LocalCluster, names: Sequence[str], homes: Path, tell: Tell) -> float:
    """Enrols every agent as its owner would. Returns the seconds it took."""
    began, slots, done = time.monotonic(), asyncio.Semaphore(ENROLLING), 0

    async def enrol(name: str) -> None:
        nonlocal done
        async with slots:
            await cluster.enrol_client(FEDERATION, name, state_dir(homes, name))
        done += 1
        tell("enrolling", done, len(names))

    async with asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(enrol(name))
    return time.monotonic() - began


def _spawn(plan: Plan, cluster: LocalCluster, names: Sequence[str], homes: Path, index: int) -> Process:
    """Starts a process with its share of the agents."""
    share = Share(
        federation=FEDERATION,
        names=tuple(names[index :: plan.processes]),
        addresses=cluster.addresses,
        folder=homes,
        deadline_s=DEADLINE_S,
        starts_per_s=plan.starts_per_s / plan.processes,
        output=_output(homes, index),
    )
    path = homes / f"share-{index}.json"
    path.write_text(share.model_dump_json())
    return cluster.spawn(f"agents-{index}", "load.agents", [str(path)], {})


def _output(homes: Path, index: int) -> Path:
    return homes / f"outcome-{index}.json"


async def _until_over(
    connection: Operator, cluster: LocalCluster, shares: Sequence[Process], tell: Tell
) -> None:
    """Waits until every share has written its outcome; raises if one died, or a server did."""
    while any(share.popen.poll() is None for share in shares):
        for process in cluster.processes:
            if process not in shares:
                process.require_alive()
        (federation,) = await connection.list()  # costs little, whatever the number of agents
        tell(*_position(federation))
        await asyncio.sleep(POLL_S)
    for index, share in enumerate(shares):
        if share.popen.returncode not in {0, 1}:
            raise share.failure(f"(share {index}) exited with {share.popen.returncode}")


def _position(federation: pb.Federation) -> tuple[str, int, int]:
    """What the federation is doing, and how much of it is done of how much."""
    clients = federation.spec.round.clients
    if not federation.HasField("current"):
        if federation.phase == pb.PHASE_FINISHED:
            return "applying the last result", clients, clients
        return "joining", federation.member_count, clients
    current = federation.current
    name = f"round {current.number}" if current.kind == pb.ROUND_KIND_TRAIN else "vote"
    if current.state == pb.ROUND_STATE_AGGREGATING:
        return f"{name}: aggregating", current.shards_done, current.shard_count
    return f"{name}: collecting", current.update_count, clients


def _joined(parts: Any) -> dict[str, list[float]]:  # noqa: ANN401 - an iterator of JSON objects
    joined: defaultdict[str, list[float]] = defaultdict(list)
    for part in parts:
        for rpc, seconds in part.items():
            joined[rpc] += seconds
    return dict(joined)
