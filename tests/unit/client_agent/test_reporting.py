"""Trackers of experiments: off unless asked for, steps counted over rounds, refused where they do not belong."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from client_agent import reporting
from client_agent.config import AgentConfig
from client_agent.keys import EpochSecrets
from client_agent.learner import Learner
from client_agent.progress import Activity
from client_agent.state import AgentState
from shelora.errors import DomainError, Reason
from shelora.federation import TrainingSpec
from tests.unit.client_agent.tiny import LABELS

SPEC = TrainingSpec(
    base_model="tiny", labels=LABELS, local_steps=2, batch_size=4, learning_rate=0.01, max_tokens=16
)


class Told(TrainerCallback):
    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.begun = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begun += 1

    def on_log(
        self, _args: Any, state: Any, _control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self.losses[state.global_step] = logs["loss"]


def learner(folder: Path, state: AgentState, **environment: str) -> Learner:
    config = AgentConfig.load(
        folder / "agent.yaml", {f"SHELORA_AGENT__{k}": v for k, v in environment.items()}
    )
    made = Learner(config, SPEC, state, 3)
    made.start(EpochSecrets.unprotected("films", 1))
    return made


def test_a_tracker_is_told_every_step_of_every_round(
    agent_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    monkeypatch.setattr(reporting, "require_trackers", lambda _: None)
    monkeypatch.setattr("client_agent.preparation.require_trackers", lambda _: None)
    monkeypatch.setitem(reporting._CALLBACKS, "mlflow", lambda: told)
    state = AgentState(tmp_path / "s")
    try:
        reported = learner(agent_folder, state, TRAINING__REPORT_TO="[mlflow]")
        losses = [reported.train(number, Activity()).loss for number in (1, 2)]
    finally:
        state.close()
    assert sorted(told.losses) == [1, 2, 3, 4]
    assert told.begun == 2
    assert [(told.losses[1] + told.losses[2]) / 2, (told.losses[3] + told.losses[4]) / 2] == pytest.approx(
        losses, rel=1e-3
    )


def test_a_tracker_that_is_not_installed_is_refused(
    agent_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    state = AgentState(tmp_path / "s")
    try:
        with pytest.raises(DomainError, match=r"report_to = wandb: .* pip install wandb") as refused:
            learner(agent_folder, state, TRAINING__REPORT_TO="[wandb]")
    finally:
        state.close()
    assert refused.value.reason is Reason.CONFIGURATION_INVALID


def test_privacy_tells_no_tracker(agent_folder: Path) -> None:
    changes = {
        "SHELORA_AGENT__PRIVACY": "{epsilon: 8, delta: 1e-5}",
        "SHELORA_AGENT__TRAINING__REPORT_TO": "[wandb]",
    }
    with pytest.raises(DomainError, match="gradient_checkpointing, packing and report_to"):
        AgentConfig.load(agent_folder / "agent.yaml", changes)
