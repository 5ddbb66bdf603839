"""Complete mode on real processes: a member of the committee is killed after its commit, and the sum is exact."""

import asyncio
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from client_agent.learning import Weights
from client_agent.state import _load_weights
from services.key_authority.custody import read_vault
from services.key_authority.sealer import SealingKey
from shelora.cli.cluster import LocalCluster
from shelora.operator import operator
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import training_rounds
from tests.e2e import federations
from tests.e2e.agents import Agent, spawn_agent, specification, start_agent

AGENTS = (
    Agent("clinic", rank=1, alpha=2, budget=1.0, suffix=".jsonl"),
    Agent("bank", rank=1, alpha=1, budget=1.0, suffix=".csv"),
    Agent("sensor", rank=1, alpha=1, budget=0.25, suffix=".parquet"),
    Agent("ward", rank=8, alpha=8, budget=0.0, suffix=".jsonl"),
)
"""All of them on the committee. Their ranks add up to less than the columns of a sketch, so that sketches are exact."""
NEARER = 4
"""How many times nearer what an agent holds must be to the sum of all than to the sum without any one of them: 25 times
in ten runs on busy cores. The first round's bounds are those of what training could move at most, a hundred times what
it moves here, so single values are off by up to 6 % of the largest."""
SCALE = 0.1
"""How far the length of what an agent holds may be from that of the mean: 0.005 in those runs."""


def product(weights: Weights, name: str, scaling: float) -> np.ndarray:
    """Everything that a client's model holds beside its base, of one matrix."""
    factors, frozen = weights.factors[name], weights.frozen.get(name)
    change = scaling * factors.B.astype(np.float64) @ factors.A
    return change if frozen is None else change + frozen.B.astype(np.float64) @ frozen.A


async def until(cluster: LocalCluster, reached: Callable[[pb.RoundSummary], bool]) -> None:
    async with operator(cluster.addresses.coordinator, cluster.credentials) as connection:
        while not reached((await connection.get("weather")).current):  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.05)


async def kept(path: Path) -> Weights:
    """What an agent trained, before it applies the result and forgets it."""
    while (found := _load_weights(path)) is None:  # noqa: ASYNC110 - of another process
        await asyncio.sleep(0.02)
    return found[1]


def cut(matrix: np.ndarray) -> np.ndarray:
    """The best approximation of the largest rank: what every agent takes of a sum."""
    rank = max(agent.rank for agent in AGENTS)
    U, S, Vt = np.linalg.svd(matrix)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


def means(trained: Mapping[str, Weights], agents: Sequence[Agent]) -> dict[str, np.ndarray]:
    """The mean of what these agents trained, by matrix and tensor."""
    found = {}
    for name in trained[agents[0].name].factors:
        products = [product(trained[a.name], name, a.alpha / a.rank) for a in agents]
        found[name] = cut(np.mean(products, axis=0))
    for name in trained[agents[0].name].tensors:
        found[name] = np.mean([trained[a.name].tensors[name] for a in agents], axis=0, dtype=np.float64)
    return found


def scales(found: Mapping[str, np.ndarray], mean: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How long what was found is beside the mean, in its direction."""
    return {
        name: float((value * mean[name]).sum() / (mean[name] ** 2).sum()) for name, value in found.items()
    }


def distance(found: Mapping[str, np.ndarray], mean: Mapping[str, np.ndarray]) -> float:
    """Whatever the lengths: agents take over less of what changes much beside what they trained themselves."""
    of = scales(found, mean)
    return float(np.sqrt(sum(((value - of[name] * mean[name]) ** 2).sum() for name, value in found.items())))


async def test_a_member_that_dies_after_its_commit_counts_and_the_sum_is_that_of_all(
    cluster: LocalCluster, model: Path, tmp_path: Path
):
    spec = specification("complete", rounds=1, clients=4, min_updates=3, committee_s=5)
    agents = {
        agent.name: await start_agent(cluster, agent, cluster.addresses, model, tmp_path) for agent in AGENTS
    }
    await federations.start(cluster, spec)
    async with asyncio.timeout(federations.TIMEOUT_S):
        await until(cluster, lambda current: current.state == pb.ROUND_STATE_COLLECTING)
        os.kill(agents["bank"].popen.pid, signal.SIGSTOP)  # the round cannot close
        await until(cluster, lambda current: current.update_count == 3)
        agents["clinic"].popen.kill()
        agents["clinic"].popen.wait()
        os.kill(agents["bank"].popen.pid, signal.SIGCONT)
        paths = {agent.name: tmp_path / agent.name / "state" / "trained.safetensors" for agent in AGENTS}
        trained = dict(zip(paths, await asyncio.gather(*map(kept, paths.values())), strict=True))
    killed, agents["clinic"] = (
        agents["clinic"],
        spawn_agent(cluster, AGENTS[0], cluster.addresses, model, tmp_path),
    )
    living = list(agents.values())
    federation = await federations.wait_until_over(cluster, spec, living, [killed])

    assert federation.phase == pb.PHASE_FINISHED, federation.failure
    assert [process.popen.returncode for process in living] == [0] * 4
    (summary,) = training_rounds(federation)
    assert summary.update_count == 4
    assert not summary.dropped
    everyone = means(trained, AGENTS)
    without = [means(trained, [a for a in AGENTS if a is not left_out]) for left_out in AGENTS]
    longest = dict.fromkeys(everyone, 0.0)
    for agent in AGENTS:
        applied = _load_weights(tmp_path / agent.name / "state" / "applied.safetensors")
        assert applied is not None
        weights = applied[1]
        matrices = {n: product(weights, n, agent.alpha / agent.rank) for n in weights.factors}
        for found in (matrices, weights.tensors):
            nearest = min(distance(found, mean) for mean in without)
            assert NEARER * distance(found, everyone) < nearest, agent.name
            longest |= {name: max(longest[name], scale) for name, scale in scales(found, everyone).items()}
    assert all(abs(scale - 1) < SCALE for scale in longest.values()), longest
    folder = tmp_path / "cluster"
    vault = read_vault(folder / "key-authority", SealingKey.from_file(folder / "sealing-key"))
    epochs = vault.epochs()
    assert epochs
    assert [vault.read(epoch).ckks_secret_key for epoch in epochs] == [b""] * len(epochs)
