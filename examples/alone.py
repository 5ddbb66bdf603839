"""Training without a federation, for comparison: the same model, steps and rates, on one's own data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from client_agent.config import AgentConfig
from client_agent.evaluation import evaluate
from client_agent.learner import initial_values
from client_agent.learning import Evaluation
from client_agent.preparation import Prepared, prepare
from client_agent.schedule import Schedule
from client_agent.training import TrainingRun, train
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.obfuscation import Obfuscation

_SECRET = bytes(32)
"""Of initial values: anybody's, as nobody else trains with this model."""


def prepared(file: Mapping[str, Any], path: Path, spec: FederationSpec) -> Prepared:
    """Model and data of an agent's file, which is written to `path`, in the state that training starts from.

    Raises: DomainError: the data or the model cannot be used.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(file), sort_keys=False))
    ready = prepare(AgentConfig.load(path), spec.training)
    ready.model.initialise(initial_values(spec.training, Obfuscation(_SECRET, 1)))
    return ready


def train_alone(ready: Prepared, spec: FederationSpec) -> None:
    """Trains for as many rounds and steps as a member of the federation, at the same rates."""
    schedule = Schedule(spec.training, spec.round.rounds)
    for number in range(1, spec.round.rounds + 1):
        rates = schedule.rates(number, spec.training.steps(len(ready.examples)))
        run = TrainingRun(rates=rates, batch_size=spec.training.batch_size, seed=number)
        train(ready.model, ready.encoder, ready.examples, run, lambda _: None)


def evaluated(ready: Prepared) -> Evaluation:
    """On all test examples. Raises: DATA_INVALID if there are none."""
    if ready.test is None:
        raise DomainError(Reason.DATA_INVALID, "there are no test examples")
    return evaluate(ready.model, ready.encoder, ready.test, lambda _: None)
