"""A script's trainer and a user's loop in place of the agent's own."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from client_agent import federate as federating
from client_agent.config import AgentConfig
from client_agent.data import read_examples
from client_agent.federate import TrainerLearner, federate
from client_agent.learner import Learner
from client_agent.learners import learner_of
from client_agent.progress import Activity, Stopped
from client_agent.state import AgentState
from examples.own_trainer.loop import PlainLoop
from shelora.errors import DomainError, Reason
from shelora.federation import TrainingSpec
from tests.unit.client_agent.tiny import LABELS

SPEC = TrainingSpec(
    base_model="tiny", labels=LABELS, local_steps=6, batch_size=4, learning_rate=0.01, max_tokens=16
)


class Texts(Dataset[dict[str, Any]]):
    def __init__(self, folder: Path, tokenizer: Any) -> None:
        known = read_examples(folder / "train.jsonl", "text", "label", LABELS)
        self.ids = tokenizer(list(known.texts))["input_ids"]
        self.labels = list(known.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def scripted(
    folder: Path, model: Path, *, targets: tuple[str, ...] = ("query", "value"), **arguments: Any
) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(LABELS))
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), task_type=TaskType.SEQ_CLS)
    values: dict[str, Any] = {
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 4,
    } | arguments
    data = Texts(folder, tokenizer)
    return Trainer(
        model=get_peft_model(base, lora),
        args=TrainingArguments(output_dir=str(folder / "checkpoints"), **values),
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def learned(folder: Path, trainer: Trainer, state: AgentState) -> TrainerLearner:
    return TrainerLearner(federating._settings(folder / "agent.yaml", trainer), SPEC, state, 3, trainer)


def test_a_script_trains_the_federations_steps_with_its_own_arguments_and_again_the_same(
    agent_folder: Path, bert_folder: Path, obfuscation: Any, state: AgentState
) -> None:
    trainer = scripted(agent_folder, bert_folder, learning_rate=0.5, max_steps=1000, weight_decay=0.1)
    learner = learned(agent_folder, trainer, state)
    assert (learner.model.rank, learner.model.scaling) == (3, 2.0)
    assert trainer.model is learner.model.module
    learner.model.initialise(obfuscation)
    start, before = learner.model.weights(), learner.evaluate(Activity())
    outcomes = []
    for _ in range(2):
        learner.model.load(start)
        outcomes.append(learner.train(1, Activity(), variant=""))
        (agent_folder / "state" / "trained.safetensors").unlink()  # or it would not be trained again
    assert trainer.state.global_step == SPEC.local_steps
    assert (trainer.args.learning_rate, trainer.args.max_steps) == (0.5, 1000)
    moved = max(float(np.abs(f.B).max()) for f in outcomes[0].weights.factors.values())
    assert 0 < moved <= SPEC.learning_rate * SPEC.local_steps * 1.5
    for name, factors in outcomes[0].weights.factors.items():
        np.testing.assert_array_equal(factors.B, outcomes[1].weights.factors[name].B)
    learner.model.load(outcomes[0].weights)
    after = learner.evaluate(Activity())
    assert before is not None
    assert after is not None
    assert after.count == 20
    assert after.loss < before.loss
    assert not (agent_folder / "checkpoints").exists() or not list(
        (agent_folder / "checkpoints").glob("checkpoint-*")
    )


def test_a_scripts_metrics_and_those_of_the_agents_file_are_computed(
    agent_folder: Path, bert_folder: Path, obfuscation: Any, state: AgentState
) -> None:
    path = agent_folder / "agent.yaml"
    named = {"metrics": ["examples.own_trainer.metrics:balanced_accuracy"]}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | named))
    trainer = scripted(agent_folder, bert_folder)
    trainer.compute_metrics = lambda seen: {"seen": len(seen.label_ids)}
    learner = learned(agent_folder, trainer, state)
    learner.model.initialise(obfuscation)
    told = learner.evaluate(Activity())
    assert told is not None
    assert set(told.figures) == {"macro_f1", "balanced_accuracy", "seen"}
    assert told.figures["seen"] == told.count


def test_a_scripts_round_stops_within_a_step(
    agent_folder: Path, bert_folder: Path, obfuscation: Any, state: AgentState
) -> None:
    learner = learned(agent_folder, scripted(agent_folder, bert_folder), state)
    learner.model.initialise(obfuscation)
    start, activity = learner.model.weights(), Activity()
    activity.stop()
    with pytest.raises(Stopped):
        learner.train(1, activity)
    for name, factors in learner.model.weights().factors.items():
        np.testing.assert_array_equal(factors.B, start.factors[name].B)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optim": "adafactor"}, "optim=.*taken for an attack: take one of adamw_torch"),
        ({"targets": ("key",)}, "adapts other matrices than the federation, such as"),
    ],
)
def test_what_a_federation_cannot_use_of_a_script_is_refused(
    agent_folder: Path, bert_folder: Path, state: AgentState, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(DomainError, match=words) as caught:
        learned(agent_folder, scripted(agent_folder, bert_folder, **change), state)
    assert caught.value.reason is Reason.CONFIGURATION_INVALID
    assert "\n" not in caught.value.message


def test_a_script_on_two_gpus_is_refused(
    agent_folder: Path, bert_folder: Path, state: AgentState, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = scripted(agent_folder, bert_folder)
    monkeypatch.setattr(trainer.args, "_n_gpu", 2)
    with pytest.raises(DomainError, match=r"an agent has one device: .* set CUDA_VISIBLE_DEVICES to one GPU"):
        learned(agent_folder, trainer, state)


def test_a_script_with_its_own_rates_or_without_data_is_refused(
    agent_folder: Path, bert_folder: Path, state: AgentState
) -> None:
    trainer = scripted(agent_folder, bert_folder)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    with pytest.raises(DomainError, match="the federation sets the rates"):
        learned(agent_folder, trainer, state)
    trainer.optimizer, trainer.train_dataset = None, None
    with pytest.raises(DomainError, match=r"Trainer\(train_dataset=...\): give one dataset"):
        learned(agent_folder, trainer, state)


def test_a_script_without_an_agents_file_ends_with_one_line_and_2(
    agent_folder: Path, bert_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        federate(scripted(agent_folder, bert_folder), agent_folder / "none.yaml")
    assert ended.value.code == 2
    assert "federate: " in capsys.readouterr().err


def test_a_loop_of_ones_own_trains_what_the_agents_loop_trains(
    agent_folder: Path, obfuscation: Any, tmp_path: Path
) -> None:
    config = AgentConfig.load(agent_folder / "agent.yaml", {})
    found = []
    for name, kind in (("own", PlainLoop), ("usual", Learner)):
        state = AgentState(tmp_path / name)
        learner = kind(config, SPEC, state, 3)
        learner.model.initialise(obfuscation)
        found.append(learner.train(1, Activity()))
        state.close()
    own, usual = found
    assert own.loss == pytest.approx(usual.loss, rel=1e-6)
    for name, factors in own.weights.factors.items():
        np.testing.assert_array_equal(factors.B, usual.weights.factors[name].B)


def test_a_learner_is_found_by_the_name_of_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    assert learner_of("transformers") is Learner
    assert learner_of("examples.own_trainer.loop:PlainLoop") is PlainLoop
    module = ModuleType("of_mine")
    module.number = 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "of_mine", module)
    for name, words in (
        ("none", "learner = none: no installed package offers it; known are transformers"),
        ("of_mine:missing", "learner = of_mine:missing: it cannot be loaded"),
        ("nowhere.at.all:X", "it cannot be loaded: No module named 'nowhere'; install"),
        ("of_mine:number", "it is a int"),
    ):
        with pytest.raises(DomainError, match=words) as caught:
            learner_of(name)
        assert caught.value.reason is Reason.CONFIGURATION_INVALID


def test_a_loop_of_ones_own_and_privacy_do_not_go_together(agent_folder: Path, tmp_path: Path) -> None:
    config = AgentConfig.load(
        agent_folder / "agent.yaml", {"SHELORA_AGENT__PRIVACY": "{epsilon: 8, delta: 1e-5}"}
    )
    state = AgentState(tmp_path / "private")
    try:
        with pytest.raises(DomainError, match="only the agent's own loop bounds each example's gradient"):
            PlainLoop(config, SPEC, state, 3)
    finally:
        state.close()
