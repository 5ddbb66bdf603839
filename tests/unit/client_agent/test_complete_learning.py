"""Clients of unequal ranks learn together in complete mode: real models and encryption, no servers, no committee."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from client_agent.config import AgentConfig
from client_agent.keys import EpochSecrets
from client_agent.learner import Learner
from client_agent.learning import Weights
from client_agent.progress import Activity
from client_agent.state import AgentState
from shelora.federation import TrainingSpec
from tests.unit.client_agent.tiny import LABELS
from tests.unit.strategies.runs import SumProtection
from tests.unit.strategies.sums import Round

RANKS = (1, 2, 4)
SPEC = TrainingSpec(base_model="tiny", labels=LABELS, local_steps=20, batch_size=10, learning_rate=0.05)
MOVE = SPEC.local_steps * SPEC.learning_rate
SECRETS = EpochSecrets.unprotected("films", 1)


@dataclass(frozen=True)
class Sender:
    """What a learner trained, as the harness sends it."""

    model: object
    weight: int
    weights: Weights

    def __getattr__(self, name: str) -> object:
        return getattr(self.weights, name)


@pytest.fixture
def learners(agent_folder: Path, tmp_path: Path) -> Iterator[list[Learner]]:
    made, states = [], []
    for rank in RANKS:
        environment = {"LORA__RANK": rank, "LORA__ALPHA": 2 * rank, "STATE_DIR": tmp_path / str(rank)}
        config = AgentConfig.load(
            agent_folder / "agent.yaml", {f"SHELORA_AGENT__{k}": str(v) for k, v in environment.items()}
        )
        states.append(AgentState(config.state_dir))
        made.append(Learner(config, SPEC, states[-1]))
        made[-1].start(SECRETS)
    yield made
    for state in states:
        state.close()


def logits(learner: Learner) -> torch.Tensor:
    tokens = torch.tensor([[2, 16, 17, 18, 5, 3], [2, 16, 17, 18, 10, 3]])
    with torch.inference_mode():
        return learner.model.module(input_ids=tokens).logits


def test_clients_of_any_rank_hold_one_global_model_after_every_round_and_it_learns(
    learners: list[Learner],
) -> None:
    losses = []
    for number in (1, 2, 3):
        trained = [learner.train(number, Activity()) for learner in learners]
        losses.append(np.mean([outcome.loss for outcome in trained]))
        senders = [
            Sender(learner.model, weight, outcome.weights)
            for learner, weight, outcome in zip(learners, (256, 100, 30), trained, strict=True)
        ]
        round_ = Round(
            senders, SumProtection(tensor_bound=4.0), SECRETS.obfuscation, number=number, largest_move=MOVE
        )
        # At this learning rate a round may move more than the last one by what bounds leave room for.
        assert round_.clipping.clipped < 0.05 * round_.clipping.values
        for index, learner in enumerate(learners):
            learner.apply(f"films.{number}", round_.parts(client=index), SECRETS.obfuscation, number)
        shown = [logits(learner) for learner in learners]
        for other in shown[1:]:
            torch.testing.assert_close(other, shown[0], rtol=1e-3, atol=1e-3)
        frozen = [len(learner.model.weights().frozen) for learner in learners]
        assert frozen[0] == len(learners[0].model.matrices)
        assert frozen[2] == 0, "the largest rank holds all of it in its adapter"
    assert losses[-1] < 0.7 * losses[0]
