"""Agents for end-to-end tests: a tiny real BERT, a task it can learn, configurations, processes."""

import csv
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import yaml
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from shelora.cli.cluster import Addresses, LocalCluster
from shelora.cli.processes import Process
from shelora.federation import FederationSpec
from shelora.strategies.registry import DEFAULT

LABELS = ("cold", "warm")
WORDS = {"cold": ["ice", "snow", "frost", "winter"], "warm": ["sun", "beach", "fire", "summer"]}
FILLER = ["the", "a", "is", "was", "on", "in", "and", "today"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@dataclass(frozen=True)
class Agent:
    """What differs between test agents."""

    name: str
    rank: int
    alpha: float
    budget: float
    suffix: str
    """Format of its data: .jsonl, .csv or .parquet."""


AGENTS = (
    Agent("clinic", rank=2, alpha=6, budget=1.0, suffix=".jsonl"),
    Agent("bank", rank=4, alpha=4, budget=1.0, suffix=".csv"),
    Agent("sensor", rank=4, alpha=4, budget=0.25, suffix=".parquet"),
)


def save_tiny_bert(folder: Path) -> Path:
    """A BERT of two layers that knows the words but not the task, and its tokenizer."""
    vocabulary = [*SPECIAL, *FILLER, *WORDS["cold"], *WORDS["warm"]]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=len(WORDS["cold"]) + len(WORDS["warm"]),
    )
    torch.set_num_threads(1)  # two threads on busy cores wait for each other
    torch.manual_seed(0)
    pretrained = BertForSequenceClassification(config)
    _teach_words(pretrained, fast)
    pretrained.bert.save_pretrained(folder)
    return folder


def _teach_words(model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast) -> None:
    """Trains all weights to name the one word of a sentence that is not filler."""
    rng, words = random.Random(0), [*WORDS["cold"], *WORDS["warm"]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        targets = [rng.randrange(len(words)) for _ in range(32)]
        texts = [
            " ".join(_shuffled(rng, [rng.choice(FILLER) for _ in range(6)] + [words[t]])) for t in targets
        ]
        outcome = model(**tokenizer(texts, return_tensors="pt", padding=True), labels=torch.tensor(targets))
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()


def _shuffled(rng: random.Random, words: list[str]) -> list[str]:
    return rng.sample(words, len(words))


def specification(
    mode: str = DEFAULT, protection: Mapping[str, Any] | None = None, **round_fields: float
) -> FederationSpec:
    return FederationSpec.model_validate(
        {
            "name": "weather",
            "training": {
                "base_model": "tiny-bert",
                "labels": LABELS,
                "local_steps": 40,
                "batch_size": 32,
                "learning_rate": 0.01,
                "max_tokens": 16,
                "calibration_examples": 16,
                "evaluation_examples": 20,
            },
            "round": {"rounds": 2, "clients": 3, "min_updates": 2, "deadline_s": 120, **round_fields},
            "protection": {"mode": mode, **(protection or {})},
        }
    )


async def start_agent(
    cluster: LocalCluster, agent: Agent, addresses: Addresses, model: Path, folder: Path
) -> Process:
    """Enrols the agent, writes data and configuration and starts the daemon."""
    await enrol(cluster, agent, folder)
    return spawn_agent(cluster, agent, addresses, model, folder)


async def enrol(cluster: LocalCluster, agent: Agent, folder: Path) -> None:
    await cluster.enrol_client("weather", agent.name, folder / agent.name / "state")


def spawn_agent(
    cluster: LocalCluster, agent: Agent, addresses: Addresses, model: Path, folder: Path
) -> Process:
    """Writes data and configuration of an enrolled agent and starts the daemon."""
    return cluster.spawn(
        agent.name,
        "client_agent.main",
        ["run", "--config", str(configure(agent, addresses, model, folder))],
        {},
    )


def configure(agent: Agent, addresses: Addresses, model: Path, folder: Path) -> Path:
    home = folder / agent.name
    home.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 64), ("test", 20)):
        write_examples(home / f"{part}{agent.suffix}", count, seed=f"{agent.name}/{part}")
    config = {
        "federation": "weather",
        "client_id": agent.name,
        "coordinator": addresses.coordinator,
        "aggregation": list(addresses.aggregation),
        "key_authority": addresses.key_authority,
        "state_dir": "state",
        "model": {"path": str(model), "device": "cpu"},
        "data": {"train": f"train{agent.suffix}", "test": f"test{agent.suffix}"},
        "lora": {"rank": agent.rank, "alpha": agent.alpha},
        "budget": agent.budget,
        "resources": {"threads": 1},
    }
    path = home / "agent.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_examples(path: Path, count: int, seed: str) -> None:
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        label = LABELS[index % 2]
        words = [rng.choice(FILLER) for _ in range(6)] + [rng.choice(WORDS[label]) for _ in range(2)]
        rows.append({"text": " ".join(_shuffled(rng, words)), "label": label})
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
