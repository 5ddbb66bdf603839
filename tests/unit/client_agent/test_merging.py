"""An adapter merged into its base: the same logits without PEFT; another base is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from client_agent.checkpoint import quiet
from client_agent.config import AgentConfig
from client_agent.keys import EpochSecrets
from client_agent.learner import Learner
from client_agent.learning import Origin
from client_agent.main import app
from client_agent.progress import Activity
from client_agent.state import AgentState
from shelora.federation import TrainingSpec
from tests.unit.client_agent.tiny import LABELS

CASES = {
    "sequence-classification": {"labels": LABELS},
    "causal-lm": {"task": "causal-lm", "target_modules": ("q_proj", "v_proj")},
}


def trained(folder: Path, model: Path, task: str) -> Learner:
    """A learner with what it trained, saved in its state."""
    config = AgentConfig.load(folder / "agent.yaml", {"SHELORA_AGENT__MODEL__PATH": str(model)})
    (folder / "agent.yaml").write_text((folder / "agent.yaml").read_text() + "\n")
    state = AgentState(config.state_dir)
    try:
        spec = TrainingSpec(base_model="tiny", local_steps=4, batch_size=4, learning_rate=0.05, **CASES[task])
        learner = Learner(config, spec, state)
        learner.start(EpochSecrets.unprotected("films", 1))
        learner.model.load(learner.train(1, Activity()).weights)
        state.adapters.save("fed.a.1", lambda place: learner.save_adapter(place, Origin(1, 3)))
    finally:
        state.close()
    return learner


def export(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("SHELORA_AGENT__MODEL__PATH", str(model))
    arguments = ["export", "--config", str(folder / "agent.yaml"), "--to", str(folder / "whole"), "--merged"]
    with pytest.raises(SystemExit) as ended:
        app(arguments)
    return int(ended.value.code or 0)


@pytest.mark.parametrize("task", CASES)
def test_a_merged_model_gives_the_logits_of_the_adapted_one(
    task: str, agent_folder: Path, bert_folder: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled = task == "sequence-classification"
    model = bert_folder if labelled else llama_folder
    learner = trained(agent_folder, model, task)
    assert export(agent_folder, model, monkeypatch) == 0
    kind = AutoModelForSequenceClassification if labelled else AutoModelForCausalLM
    with quiet():
        loaded = kind.from_pretrained(agent_folder / "whole").eval()
    ids = AutoTokenizer.from_pretrained(agent_folder / "whole")(["the movie was good"], return_tensors="pt")
    with torch.inference_mode():
        found = loaded(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits
        torch.testing.assert_close(found, learner.model.logits(ids["input_ids"]), rtol=1e-4, atol=1e-5)
    if labelled:
        assert loaded.config.id2label == dict(enumerate(LABELS))
    card = (agent_folder / "whole" / "README.md").read_text()
    assert 'library_name: "transformers"' in card
    assert "AutoPeft" not in card
    assert export(agent_folder, model, monkeypatch) == 2  # it is there


def test_an_adapter_of_another_base_is_refused_and_nothing_is_left(
    agent_folder: Path,
    bert_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained(agent_folder, bert_folder, "sequence-classification")
    other = shutil.copytree(bert_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"][5] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert export(agent_folder, other, monkeypatch) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "holds other weights than those that the adapter was trained on: name that model" in told
    assert not list(agent_folder.glob("whole*"))
