"""Tiny real models, made once, and an agent's folders."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import BertModel, LlamaConfig, LlamaForCausalLM

from client_agent.data import Examples
from client_agent.encoding import Encoder
from client_agent.model import AdaptedModel
from client_agent.state import AgentState
from shelora.obfuscation import Obfuscation
from shelora.transport.tls import IdentityFolder
from tests.identities import TestAuthority, client
from tests.unit.client_agent.tiny import BAD, GOOD, LABELS, bert_config, classifier, save_model


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    return save_model(BertModel(bert_config()), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def poolerless_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    return save_model(
        BertModel(bert_config(), add_pooling_layer=False), tmp_path_factory.mktemp("poolerless")
    )


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return save_model(LlamaForCausalLM(config), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def examples() -> Examples:
    texts = [f"the movie was {word}" for word in GOOD + BAD]
    texts += [f"{word} movie" for word in GOOD + BAD]
    return Examples(tuple(texts), (1,) * 5 + (0,) * 5 + (1,) * 5 + (0,) * 5)


@pytest.fixture
def obfuscation() -> Obfuscation:
    return Obfuscation(bytes(range(32)), 1)


@pytest.fixture
def model(bert_folder: Path, obfuscation: Obfuscation) -> AdaptedModel:
    adapted = classifier(bert_folder)
    adapted.initialise(obfuscation)
    return adapted


@pytest.fixture
def encoder(model: AdaptedModel) -> Encoder:
    return Encoder(model.tokenizer, 32, append_end=False)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[AgentState]:
    opened = AgentState(tmp_path / "state")
    yield opened
    opened.close()


@pytest.fixture
def agent_folder(tmp_path: Path, bert_folder: Path, examples: Examples) -> Path:
    """A folder with agent.yaml, its identity and its data; addresses are of nobody."""
    rows = [{"text": t, "label": LABELS[y]} for t, y in zip(examples.texts, examples.labels, strict=True)]
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = TestAuthority(tmp_path).held(client("one", "films"))
    IdentityFolder(tmp_path / "state" / "identity").write(held)
    (tmp_path / "agent.yaml").write_text(
        f"""
federation: films
client_id: one
coordinator: 127.0.0.1:1
aggregation: ["127.0.0.1:2"]
key_authority: 127.0.0.1:3
state_dir: state
model: {{path: {bert_folder}, device: cpu}}
data: {{train: train.jsonl, test: test.jsonl}}
lora: {{rank: 4, alpha: 8}}
resources: {{threads: 1}}
"""
    )
    return tmp_path
