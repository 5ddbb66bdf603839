"""One hostile member of four keeps the others from learning by no more than 5 points, where they need not its data.

Real agents and servers, in the mode in which nobody but agents sees an update. A tiny model; what the demo's federation
loses is measured by `python -m tests.insiders.poisoning`. The control are agents that apply whatever they are given.
"""

import asyncio
from pathlib import Path

import pytest

from client_agent.config import AgentConfig
from shelora.cli.cluster import LocalCluster
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import training_rounds
from tests.e2e import federations
from tests.e2e.agents import LABELS, Agent, configure, enrol, save_tiny_bert, specification
from tests.insiders.poisoning import accuracy, flip

HOSTILE = "hostile"
AGENTS = [
    Agent(name, rank=4, alpha=8, budget=1.0, suffix=".jsonl") for name in ("clinic", "bank", "ward", HOSTILE)
]
LEARNED = 0.95
"""Of test examples, at least, without the hostile one: all of them, as a rule."""
MOST_POINTS = 0.05
ROUNDS, ATTEMPTS = 3, 10
HONEST, TRUSTING = "client_agent.main", "tests.insiders.trusting_agent"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("attack", ["absent", "boost", "head", "claim+flip"])
def test_the_others_learn_within_five_points_of_what_they_learn_without_it(
    attack: str, model: Path, tmp_path: Path
) -> None:
    federation = _attacked(attack, HONEST, model, tmp_path)
    assert federation.phase == pb.PHASE_FINISHED, federation.failure
    least = LEARNED if attack == "absent" else LEARNED - MOST_POINTS
    assert _learned(federation) >= least, _shown(federation)


@pytest.mark.parametrize("attack", ["boost", "head"])
def test_control_agents_that_apply_whatever_comes_do_not_learn(
    attack: str, model: Path, tmp_path: Path
) -> None:
    federation = _attacked(attack, TRUSTING, model, tmp_path)
    assert _learned(federation) < LEARNED - 3 * MOST_POINTS, _shown(federation)


def _attacked(attack: str, module: str, model: Path, folder: Path) -> pb.Federation:
    taking_part = [agent for agent in AGENTS if attack != "absent" or agent.name != HOSTILE]
    rules = {"rounds": ROUNDS, "clients": len(taking_part), "min_updates": 2, "max_attempts": ATTEMPTS}
    spec = specification("complete", {"tensor_bound": 4.0}, **rules)
    with LocalCluster(folder / "cluster", fixed_ports=False, workers=1) as cluster:
        asyncio.run(federations.start(cluster, spec))
        agents = []
        for agent in taking_part:
            asyncio.run(enrol(cluster, agent, folder))
            config = configure(agent, cluster.addresses, model, folder)
            attacks = agent.name == HOSTILE
            if attacks and "flip" in attack:
                flip(AgentConfig.load(config, {}).data.train, LABELS)
            program = "tests.insiders.hostile_agent" if attacks else module
            arguments = [*([attack] if attacks else []), "run", "--config", str(config)]
            agents.append(cluster.spawn(agent.name, program, arguments, {}))
        return asyncio.run(federations.wait_until_over(cluster, spec, agents))


def _learned(federation: pb.Federation) -> float:
    """Share of their test examples that the honest members get right in the end."""
    return accuracy(training_rounds(federation)[-1], HOSTILE)


def _shown(federation: pb.Federation) -> list[float]:
    return [accuracy(summary, HOSTILE) for summary in training_rounds(federation)]
