"""A local cluster of real servers for a session, and agents that run in this process against it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertModel

from client_agent.agent import Agent
from client_agent.config import AgentConfig
from client_agent.learner import Learner
from shelora.cli.cluster import LocalCluster
from shelora.federation import FederationSpec
from shelora.transport.channel import open_channel
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1 import coordinator_pb2_grpc as pb_grpc
from tests.unit.client_agent.tiny import BAD, GOOD, LABELS, bert_config, save_model


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster"), fixed_ports=False, workers=1) as running:
        yield running


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    return save_model(BertModel(bert_config()), tmp_path_factory.mktemp("bert"))


@dataclass
class Federation:
    """One federation, its coordinator and the folders of its agents."""

    spec: FederationSpec
    coordinator: Any
    cluster: LocalCluster
    folder: Path
    model: Path

    async def start(self) -> None:
        await self.coordinator.CreateFederation(pb.CreateFederationRequest(spec=self.spec.to_proto()))
        await self.coordinator.StartFederation(pb.StartFederationRequest(federation_id=self.spec.name))

    async def now(self) -> pb.Federation:
        return await self.coordinator.GetFederation(pb.GetFederationRequest(federation_id=self.spec.name))

    async def agent(self, name: str, *, rank: int = 4, budget: float = 1.0, **changes: Any) -> Agent:
        home = self.folder / name
        home.mkdir(exist_ok=True)
        if not (home / "state" / "identity").exists():
            await self.cluster.enrol_client(self.spec.name, name, home / "state")
        rows = [{"text": f"the movie was {w}", "label": LABELS[w in GOOD]} for w in GOOD + BAD]
        for part in ("train", "test"):
            (home / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "federation": self.spec.name,
            "client_id": name,
            "coordinator": self.cluster.addresses.coordinator,
            "aggregation": list(self.cluster.addresses.aggregation),
            "key_authority": self.cluster.addresses.key_authority,
            "state_dir": "state",
            "model": {"path": str(self.model), "device": "cpu"},
            "data": {"train": "train.jsonl", "test": "test.jsonl"},
            "lora": {"rank": rank, "alpha": 8},
            "budget": budget,
            "resources": {"threads": 1},
        }
        (home / "agent.yaml").write_text(yaml.safe_dump(values | changes))
        return Agent(AgentConfig.load(home / "agent.yaml", {}), Learner, retry_s=0.2)

    async def until(self, condition: Callable[[pb.Federation], bool]) -> pb.Federation:
        """Waits until a condition holds; the test's own timeout is the limit."""
        while not condition(federation := await self.now()):  # noqa: ASYNC110 - another process changes it
            await asyncio.sleep(0.05)
        return federation


@pytest.fixture
async def make_federation(
    cluster: LocalCluster, bert_folder: Path, tmp_path: Path
) -> AsyncIterator[Callable[..., Federation]]:
    async with open_channel(cluster.addresses.coordinator, cluster.credentials) as channel:

        def make(
            name: str, *, mode: str = "selective", local_steps: int = 30, **round_fields: int
        ) -> Federation:
            spec = FederationSpec.model_validate(
                {
                    "name": name,
                    "training": {
                        "base_model": "tiny-bert",
                        "labels": LABELS,
                        "local_steps": local_steps,
                        "batch_size": 8,
                        "learning_rate": 0.02,
                        "max_tokens": 16,
                        "calibration_examples": 8,
                        "evaluation_examples": 5,
                    },
                    "round": {"rounds": 2, "clients": 2, "min_updates": 2, "deadline_s": 120, **round_fields},
                    "protection": {"mode": mode},
                }
            )
            return Federation(spec, pb_grpc.CoordinatorStub(channel), cluster, tmp_path, bert_folder)

        yield make
