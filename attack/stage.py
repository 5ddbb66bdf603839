"""Runs federations on a real local cluster for an attacker to watch.

Servers are processes of their own. The agents of a federation are the real ones (`client_agent.agent.Agent` with its
learner, certificate, state folder and connections) and share one process, so that torch is loaded once for all runs.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from attack.capture import Round, Tap, replayed
from client_agent.agent import Agent, Outcome
from client_agent.config import AgentConfig
from client_agent.learner import Learner
from client_agent.worker import Worker
from shelora.cli.cluster import LocalCluster
from shelora.cli.operator import operator
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec

PATIENCE_S: Final = 600
"""Seconds for one federation."""
SETTINGS: Final = {"coordinator": {"TICK_S": "0.5"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """What is private of one client, and what it configures."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    rank: int = 16
    alpha: float = 16.0
    budget: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One federation to attack."""

    name: str
    task: str
    """`causal-lm` or `sequence-classification`."""
    mode: str
    clients: tuple[Client, ...]
    steps: int
    batch: int
    rounds: int
    max_tokens: int
    learning_rate: float
    classes: tuple[str, ...] = ()
    modules: tuple[str, ...]

    def specification(self) -> FederationSpec:
        """What the operator asks for."""
        return FederationSpec.model_validate(
            {
                "name": self.name,
                "training": {
                    "base_model": "public",
                    "task": self.task,
                    "labels": self.classes,
                    "target_modules": self.modules,
                    "local_steps": self.steps,
                    "batch_size": self.batch,
                    "learning_rate": self.learning_rate,
                    "max_tokens": self.max_tokens,
                    "calibration_examples": 4,
                    "evaluation_examples": 0,
                },
                "round": {"rounds": self.rounds, "clients": len(self.clients), "deadline_s": PATIENCE_S},
                "protection": {"mode": self.mode},
                "screening": {"max_norm_ratio": 0.0},
            }
        )


@dataclass(frozen=True, slots=True)
class Performance:
    """A federation that has ended: what the servers saw of it, and where its agents kept their state."""

    scene: Scene
    rounds: list[Round]
    """Training rounds alone, in order."""
    log: bytes
    """All that Redis wrote while it ran."""
    homes: Path


def perform(cluster: LocalCluster, tap: Tap, scene: Scene, model: Path, folder: Path) -> Performance:
    """Runs a scene to its end. Raises: INTERNAL if an agent does not finish."""
    before = len(tap.taken())
    homes = folder / scene.name
    for client in scene.clients:
        _prepare(cluster, scene, client, model, homes / client.name)
    outcomes = asyncio.run(_run(cluster, scene, homes))
    if set(outcomes) != {Outcome.FINISHED}:
        raise DomainError(Reason.INTERNAL, f"the agents of {scene.name} ended as {outcomes}")
    log = tap.taken()[before:]
    rounds = [r for r in replayed(log, scene.name) if _trains(r)]
    return Performance(scene, rounds, log, homes)


def _trains(round_: Round) -> bool:
    """Whether a round adds up updates; a vote adds up tensors named after matrices, and has no matrices."""
    return bool(round_.layout.matrices)


def _prepare(cluster: LocalCluster, scene: Scene, client: Client, model: Path, home: Path) -> None:
    """Writes a client's data and configuration."""
    home.mkdir(parents=True)
    labels = client.labels or ("",) * len(client.texts)
    rows = [{"text": text, "label": label} for text, label in zip(client.texts, labels, strict=True)]
    (home / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    addresses = cluster.addresses
    config: dict[str, Any] = {
        "federation": scene.name,
        "client_id": client.name,
        "coordinator": addresses.coordinator,
        "aggregation": list(addresses.aggregation),
        "key_authority": addresses.key_authority,
        "state_dir": "state",
        "model": {"path": str(model.absolute()), "device": "cpu"},
        "data": {"train": "train.jsonl"},
        "lora": {"rank": client.rank, "alpha": client.alpha},
        "budget": client.budget,
        "resources": {"threads": 1},
        "protection": {"accept": [scene.mode]},
    }
    (home / "agent.yaml").write_text(yaml.safe_dump(config))


async def _run(cluster: LocalCluster, scene: Scene, homes: Path) -> Sequence[Outcome]:
    async with operator(cluster.addresses.coordinator, cluster.credentials) as connection:
        await connection.create(scene.specification().to_proto())
        await connection.start(scene.name)
    worker = Worker()
    agents = []
    for client in scene.clients:
        home = homes / client.name
        await cluster.enrol_client(scene.name, client.name, home / "state")
        agents.append(Agent(AgentConfig.load(home / "agent.yaml", {}), Learner, worker=worker))
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.gather(*(agent.run() for agent in agents))
    finally:
        await worker.close()
