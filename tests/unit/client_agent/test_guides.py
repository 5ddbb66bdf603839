"""Guides for tuning models: their files are valid, their commands run."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel
from typer.testing import CliRunner

from client_agent.checkpoint import quiet
from client_agent.config import AgentConfig
from client_agent.main import app
from client_agent.state import AgentState
from shelora.federation import FederationSpec
from tests.unit.client_agent.notes import ranked
from tests.unit.client_agent.tiny import classifier, save_chat_model

DOCS = Path(__file__).parents[3] / "docs"
GUIDES = ("chat.md", "vision.md", "training.md", "own-trainer.md", "data.md")
FEDERATION = {"name": "f", "training": {"base_model": "b", "labels": ["x", "y"]}}


def commands(guide: str) -> list[list[str]]:
    """Commands of the agent that a guide shows as lines of their own."""
    lines = re.findall(r"^(?: {4})?client-agent (.*)$", (DOCS / guide).read_text(), flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def blocks(guide: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", (DOCS / guide).read_text(), flags=re.DOTALL | re.MULTILINE)


def agent_file(folder: Path, **fields) -> None:
    """An agent's file with addresses of nobody."""
    content = {
        "federation": "f",
        "client_id": "one",
        "coordinator": "127.0.0.1:1",
        "aggregation": ["127.0.0.1:2"],
        "key_authority": "127.0.0.1:3",
        "state_dir": "state",
        "model": {"path": "base", "device": "cpu"},
        "data": {"train": "train.jsonl"},
        "resources": {"threads": 1},
        **fields,
    }
    (folder / "agent.yaml").write_text(yaml.safe_dump(content))


def of_federation(content: dict) -> bool:
    """Whether a block of YAML is of a federation's file; `training` is a section of both files."""
    return content.keys() <= FederationSpec.model_fields.keys() and (
        "training" not in content or "base_model" in content["training"]
    )


@pytest.mark.parametrize("guide", GUIDES)
def test_files_that_a_guide_shows_are_valid(guide, tmp_path):
    for block in blocks(guide, "yaml"):
        content = yaml.safe_load(block)
        if of_federation(content):
            FederationSpec.model_validate(FEDERATION | content)
        else:
            agent_file(tmp_path, **content)
            AgentConfig.load(tmp_path / "agent.yaml", {})


@pytest.fixture
def chat(tmp_path):
    """A model with a template, and the records that the guide shows."""
    (tmp_path / "base").mkdir()
    save_chat_model(tmp_path / "base")
    (records,) = blocks("chat.md", "json")
    assert len([json.loads(line) for line in records.splitlines()]) == 4
    (tmp_path / "train.jsonl").write_text(records)
    agent_file(tmp_path)
    return tmp_path


@pytest.fixture
def vision(tmp_path):
    """A small vision transformer, and a folder for each class."""
    torch.manual_seed(1)
    size = {"height": 16, "width": 16}
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
    )
    with quiet():
        ViTModel(config).save_pretrained(tmp_path / "base")
        ViTImageProcessor(size=size).save_pretrained(tmp_path / "base")
    for label in ("cat", "dog"):
        (tmp_path / "photographs" / label).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (20, 20), (60 * number, 0, 0)).save(
                tmp_path / "photographs" / label / f"{number}.png"
            )
    agent_file(tmp_path, data={"train": "photographs"})
    return tmp_path


@pytest.fixture
def training(tmp_path, bert_folder):
    """An agent that has the adapter of a round, and its best one."""
    agent_file(tmp_path, model={"path": str(bert_folder), "device": "cpu"})
    model = classifier(bert_folder)
    state = AgentState(tmp_path / "state")
    state.adapters.save("fed.a.1", lambda folder: written(model, folder))
    state.adapters.keep_if_best(ranked("fed.a", 1, 1.0))
    state.close()
    return tmp_path


def written(model, folder: Path) -> None:
    model.save_adapter(folder)
    (folder / "README.md").write_text('---\npipeline_tag: "text-classification"\n---\n')


@pytest.mark.parametrize(("guide", "shown"), [("chat", 1), ("vision", 1), ("training", 2)])
def test_commands_that_a_guide_shows_run(guide, shown, request, monkeypatch):
    folder = request.getfixturevalue(guide)
    monkeypatch.chdir(folder)
    found = commands(f"{guide}.md")
    assert len(found) == shown
    for words in found:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
