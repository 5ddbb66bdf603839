"""Complete mode on real processes: a member of the committee is killed after its commit, and the sum is exact."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np

from client_agent.learning import Weights
from client_agent.state import _load_weights
from services.key_authority.custody import read_vault
from services.key_authority.sealer import SealingKey
from shelora.cli.cluster import LocalCluster
from shelora.cli.operator import operator
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
ERROR = 0.12
"""Of the mean, relative to its largest value. In the first round bounds are those of what training could move at most,
a hundred times what it moves here, so small directions are lost in noise: 0.02 to 0.06 from run to run. A client more
or less is a quarter."""


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


def cut(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of that rank: what every agent takes of a sum."""
    U, S, Vt = np.linalg.svd(matrix)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


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
    for agent in AGENTS:
        applied = _load_weights(tmp_path / agent.name / "state" / "applied.safetensors")
        assert applied is not None
        for name in applied[1].factors:
            mean = sum(product(trained[a.name], name, a.alpha / a.rank) for a in AGENTS) / len(AGENTS)
            mean = cut(mean, max(a.rank for a in AGENTS))
            found = product(applied[1], name, agent.alpha / agent.rank)
            taken = float((found * mean).sum() / (mean * mean).sum())
            assert np.abs(found - taken * mean).max() < ERROR * np.abs(mean).max()
            # Who trained little takes over less of what changes much (`shelora.lora.moderation`).
            assert 1 - ERROR < taken < 1 + ERROR or (agent.rank == 1 and 0.2 < taken < 1)
        for name, tensor in applied[1].tensors.items() if agent.rank > 1 else ():
            mean = sum(trained[a.name].tensors[name].astype(np.float64) for a in AGENTS) / len(AGENTS)
            np.testing.assert_allclose(tensor, mean, atol=ERROR)
    folder = tmp_path / "cluster"
    vault = read_vault(folder / "key-authority", SealingKey.from_file(folder / "sealing-key"))
    epochs = vault.epochs()
    assert epochs
    assert [vault.read(epoch).ckks_secret_key for epoch in epochs] == [b""] * len(epochs)
