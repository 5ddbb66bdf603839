"""Runs federations on a real local cluster for an attacker to watch.

Servers are processes of their own. The agents of a federation are the real ones (`client_agent.agent.Agent` with its
learner, certificate, state folder and connections) and share one process, so that torch is loaded once for all runs.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import yaml

from attack.capture import Round, Tap, replayed
from client_agent.agent import Agent, Outcome
from client_agent.config import AgentConfig
from client_agent.learner import Learner
from client_agent.learning import Trained, Weights
from client_agent.progress import Activity
from client_agent.worker import Worker
from shelora.cli.cluster import LocalCluster
from shelora.cli.operator import operator
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec

PATIENCE_S: Final = 600
"""Seconds for one federation."""
WORKERS: Final = 2
"""Agents that train at once, a thread each."""
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
    data: str = ""
    """Where its texts are from."""


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
    clear_bits: int = 16
    """Under `selective`."""

    @property
    def bits(self) -> int:
        """Of values that travel in the clear."""
        return self.clear_bits if self.mode == "selective" else 32

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
                "protection": {"mode": self.mode, "clear_bits": self.clear_bits},
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
    trained: Mapping[str, Sequence[Weights]]
    """By client, its updates before they were protected: its own to keep, if it is curious."""


def perform(cluster: LocalCluster, tap: Tap, scene: Scene, model: Path, folder: Path) -> Performance:
    """Runs a scene to its end. Raises: INTERNAL if an agent does not finish."""
    before = len(tap.taken())
    homes = folder / scene.name
    for client in scene.clients:
        _prepare(cluster, scene, client, model, homes / client.name)
    trained: dict[str, list[Weights]] = {client.name: [] for client in scene.clients}
    outcomes = asyncio.run(_run(cluster, scene, homes, trained))
    if set(outcomes) != {Outcome.FINISHED}:
        raise DomainError(Reason.INTERNAL, f"the agents of {scene.name} ended as {outcomes}")
    log = tap.taken()[before:]
    rounds = [r for r in replayed(log, scene.name) if _trains(r)]
    return Performance(scene, rounds, log, homes, trained)


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


class Hoarder(Learner):
    """A learner that keeps every update it made."""

    def __init__(self, hoard: list[Weights], *args: Any) -> None:  # noqa: ANN401 - those of Learner
        self._hoard = hoard
        super().__init__(*args)

    def train(self, number: int, activity: Activity, variant: str = "") -> Trained:
        """As of `Learner`."""
        trained = super().train(number, activity, variant)
        self._hoard.append(trained.weights)
        return trained


async def _run(
    cluster: LocalCluster, scene: Scene, homes: Path, trained: Mapping[str, list[Weights]]
) -> Sequence[Outcome]:
    async with operator(cluster.addresses.coordinator, cluster.credentials) as connection:
        await connection.create(scene.specification().to_proto())
        await connection.start(scene.name)
    workers = [Worker() for _ in range(WORKERS)]
    agents = []
    for number, client in enumerate(scene.clients):
        home = homes / client.name
        await cluster.enrol_client(scene.name, client.name, home / "state")
        learn = partial(Hoarder, trained[client.name])
        config = AgentConfig.load(home / "agent.yaml", {})
        agents.append(Agent(config, learn, worker=workers[number % WORKERS]))
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.gather(*(agent.run() for agent in agents))
    finally:
        await asyncio.gather(*(worker.close() for worker in workers))
