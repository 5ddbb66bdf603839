"""The saved adapter: it names the federation's base model, keeps its labels, loads with PEFT, says what it is."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftConfig
from transformers import AutoConfig, AutoTokenizer

from client_agent.card import licence_of
from client_agent.checkpoint import quiet
from client_agent.config import AgentConfig
from client_agent.keys import EpochSecrets
from client_agent.learner import Learner
from client_agent.learning import Evaluation, Origin
from client_agent.state import AgentState
from shelora.federation import TrainingSpec
from tests.unit.client_agent.tiny import LABELS

ORIGIN = Origin(3, 5, "c0ffee")


@pytest.fixture
def make_learner(agent_folder: Path, tmp_path: Path):
    states: list[AgentState] = []

    def make(model: Path, **spec: object) -> Learner:
        config = AgentConfig.load(agent_folder / "agent.yaml", {"SHELORA_AGENT__MODEL__PATH": str(model)})
        states.append(AgentState(config.state_dir))
        learner = Learner(config, TrainingSpec(**spec), states[0])
        learner.start(EpochSecrets.unprotected("films", 1))
        (tmp_path / "adapter").mkdir()
        return learner

    yield make
    for state in states:
        state.close()


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_a_classifier_loads_with_its_labels_by_the_federations_name(
    make_learner, bert_folder: Path, tmp_path: Path
) -> None:
    local = shutil.copytree(bert_folder, tmp_path / "local")
    (local / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\nlicense: mit\n")
    labels = (*LABELS, "neither: [odd]")
    learner = make_learner(local, base_model=str(bert_folder), labels=labels)
    learner.save_adapter(tmp_path / "adapter", ORIGIN)
    for file in (tmp_path / "adapter").iterdir():
        assert str(local) not in file.read_text(errors="replace"), f"{file.name} names a path of this machine"
    assert PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(bert_folder)
    known = AutoConfig.from_pretrained(tmp_path / "adapter")
    assert (known.num_labels, tuple(known.id2label.values())) == (3, labels)
    ids = AutoTokenizer.from_pretrained(tmp_path / "adapter")(["the movie was good"], return_tensors="pt")
    with quiet(), torch.inference_mode():
        named = {"num_labels": known.num_labels, "id2label": known.id2label, "label2id": known.label2id}
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", **named)
        logits = loaded.eval()(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits
    torch.testing.assert_close(logits, learner.model.logits(ids["input_ids"]).detach())
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert front(card) == {
        "base_model": str(bert_folder),
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["lora", "federated-learning", "shelora"],
        "license": "apache-2.0",
    }
    assert "classes: 'bad', 'good', 'neither: [odd]'" in card
    assert "Training round 3 of 1, the aggregate of 5 clients" in card
    assert "Examples at this client: 20 for training, 20 for tests" in card
    assert "Not evaluated by this client" in card


def test_a_decoder_loads_and_its_card_says_how_good_it_is(
    make_learner, llama_folder: Path, tmp_path: Path
) -> None:
    learner = make_learner(
        llama_folder, base_model=str(llama_folder), task="causal-lm", target_modules=("q_proj", "v_proj")
    )
    learner.save_adapter(tmp_path / "adapter", ORIGIN)
    with quiet():
        assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").peft_config
    card = learner.card(ORIGIN, Evaluation(count=200, correct=50, loss=1.25, seconds=0.1))
    assert "25.0% of 200 next tokens right, loss 1.2500" in card
    assert front(card)["pipeline_tag"] == "text-generation"
    assert "license" not in front(card)
    assert "not stated where it was loaded from" in card


def test_the_example_in_the_card_is_python(make_learner, bert_folder: Path) -> None:
    card = make_learner(bert_folder, base_model="tiny", labels=LABELS).card(ORIGIN, None)
    compile(card.split("```python")[1].split("```")[0], "card", "exec")


@pytest.mark.parametrize(
    ("content", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense:\n- mit\n---\n", ""),
        ("license: mit\n", ""),
        ("---\ntags: []\n---\nlicense: mit\n", ""),
        ("---\nlicense: \x1b[31m\n---\n", ""),
        ("\xff", ""),
    ],
)
def test_a_licence_is_what_the_base_models_card_says(tmp_path: Path, content: str, licence: str) -> None:
    (tmp_path / "README.md").write_bytes(content.encode("latin-1"))
    assert licence_of(str(tmp_path)) == licence
    assert licence_of(str(tmp_path / "none")) == ""
