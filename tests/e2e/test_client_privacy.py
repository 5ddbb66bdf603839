"""Client privacy on real processes: agents add their noise, count the sum, and tell nothing of their examples."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client_agent.state import _load_weights
from client_agent.sum_budget import LEDGER
from shelora.cli.cluster import LocalCluster
from shelora.errors import DomainError, Reason
from shelora.operator import operator
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import client_privacy, training_rounds
from tests.e2e import federations
from tests.e2e.agents import AGENTS, specification, start_agent

PRIVACY = {"noise_multiplier": 1.0, "delta": 1e-3, "clip": 0.5, "tolerated": 1}
DEVIATION = 0.5 / 2**0.5 / 3**0.5
"""Of the noise in a value of the mean: 1.0 times the clip for two honest clients, of three that add theirs."""


async def test_a_round_of_hidden_clients_ends_with_their_noise_in_the_model_and_nothing_told(
    cluster: LocalCluster, model: Path, tmp_path: Path
):
    spec = specification("complete", {"client_privacy": PRIVACY}, rounds=1, clients=3, min_updates=3)
    agents = [
        await start_agent(cluster, replace(agent, budget=1.0), cluster.addresses, model, tmp_path)
        for agent in AGENTS
    ]
    await federations.start(cluster, spec)
    federation = await federations.wait_until_over(cluster, spec, agents)

    assert federation.phase == pb.PHASE_FINISHED, federation.failure
    assert [process.popen.returncode for process in agents] == [0] * 3
    (summary,) = training_rounds(federation)
    assert [member.example_count for member in federation.members] == [1] * 3
    assert [(u.example_count, u.train_loss) for u in summary.updates] == [(1, 0.0)] * 3
    assert {(e.example_count, e.correct_count, e.loss) for e in summary.evaluations} == {(0, 0, 0.0)}
    assert "at delta 0.001" in client_privacy(federation.spec)

    applied = [_load_weights(tmp_path / a.name / "state" / "applied.safetensors") for a in AGENTS]
    heads = [np.concatenate([t.ravel() for t in found[1].tensors.values()]) for found in applied if found]
    assert len(heads) == 3
    assert np.array_equal(heads[0], heads[1])
    assert np.array_equal(heads[0], heads[2])
    assert (
        0.5 * DEVIATION < heads[0].std() < 2 * DEVIATION
    )  # what 40 steps do alone is cut to 0.5 over all of it
    for agent in AGENTS:
        ledger = json.loads((tmp_path / agent.name / "state" / LEDGER).read_text())
        assert list(ledger["sums"].values()) == [1.0]
    async with operator(cluster.addresses.coordinator, cluster.credentials) as connection:
        with pytest.raises(DomainError, match="Create another federation") as refused:
            await connection.extend("weather", 1)
    assert refused.value.reason is Reason.INVALID_ARGUMENT
