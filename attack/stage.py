"""Runs federations on a real local cluster for an attacker to watch.

Servers are processes of their own. The agents of a federation are the real ones (`client_agent.agent.Agent` with its
learner, certificate, state folder and connections) and share one process, so that torch is loaded once for all runs.
"""

import asyncio
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import yaml

from attack.capture import Round, Tap, beside, replayed
from client_agent.agent import Agent, Outcome
from client_agent.config import AgentConfig
from client_agent.judging import Judge
from client_agent.keys import EpochSecrets
from client_agent.learner import Learner
from client_agent.learning import Trained, Weights
from client_agent.progress import Activity
from client_agent.state import AgentState
from client_agent.worker import Worker
from shelora.cli.cluster import LocalCluster
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.operator import operator
from shelora.strategies.port import Strategy
from shelora.strategies.registry import strategy_of
from shelora.transport.channel import call, open_channel
from shelora.v1.key_authority_pb2 import GetEpochSecretsRequest, GetEpochSecretsResponse
from shelora.v1.key_authority_pb2_grpc import KeyAuthorityStub

PATIENCE_S: Final = 1800
"""Seconds for one federation: on a busy machine one of sixteen clients takes longer than ten minutes."""
WORKERS: Final = 2
"""Agents that train at once, a thread each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """What is private of one client, and what it configures."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    tests: tuple[tuple[str, str], ...] = ()
    """Text and label of the examples that it evaluates each result on; none: it evaluates nothing."""
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
    layers: tuple[int, ...] = ()
    """That are adapted; all if empty."""
    clear_bits: int = 16
    """Under `selective`."""
    client_privacy: Mapping[str, float] = field(default_factory=dict)
    """As in a federation's file; empty for none."""

    @property
    def strategy(self) -> Strategy:
        """Its mode's."""
        return strategy_of(self.mode)

    @property
    def bits(self) -> int:
        """Of values that travel in the clear."""
        return self.clear_bits if self.strategy.needs_plan else 32

    @property
    def sealed(self) -> bool:
        """Whether its mode promises that what servers store says nothing of one client's update."""
        return not self.strategy.shows_factors

    def batch_of(self, client: Client) -> int:
        """Examples of a client's batch: it is smaller where a client has fewer."""
        return min(self.batch, len(client.texts))

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
                    "target_layers": self.layers,
                    "local_steps": self.steps,
                    "batch_size": self.batch,
                    "learning_rate": self.learning_rate,
                    "max_tokens": self.max_tokens,
                    "calibration_examples": 4,
                    "evaluation_examples": max(len(client.tests) for client in self.clients),
                },
                "round": {
                    "rounds": self.rounds,
                    "clients": len(self.clients),
                    "min_updates": len(self.clients),
                    "deadline_s": PATIENCE_S,
                },
                "protection": {"mode": self.mode, "clear_bits": self.clear_bits}
                | ({"client_privacy": dict(self.client_privacy)} if self.client_privacy else {}),
                "screening": {"max_norm_ratio": 0.0},
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Insider:
    """What the first client of a federation has, beside its data, if it is curious or colludes."""

    released: bytes
    """GetEpochSecretsResponse as the key authority sent it; empty under `none`."""
    trained: Weights
    """Its first update before it was protected."""
    applied: Weights
    """What it made of the last result, and keeps on its disk."""

    def secrets(self, scene: Scene) -> EpochSecrets:
        """The epoch's secrets; the public values in their place under `none`."""
        if not self.released:
            return EpochSecrets.unprotected(scene.name, 1)
        return EpochSecrets.from_proto(1, GetEpochSecretsResponse.FromString(self.released))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Performance:
    """A federation that has ended: what the servers saw of it, and what one of its clients has."""

    scene: Scene
    rounds: Sequence[Round]
    """Training rounds alone, in order."""
    insider: Insider
    beside: bytes = b""
    """What else Redis wrote of the federation, as `attack.capture.beside` keeps it."""

    @property
    def secrets(self) -> EpochSecrets:
        """The insider's."""
        return self.insider.secrets(self.scene)


class Stage:
    """A local cluster and a folder, for one federation after the other. A context manager."""

    def __init__(self, folder: Path) -> None:
        """Takes the folder for servers' data and, while a federation runs, its agents'."""
        self._folder = folder
        settings = {"coordinator": {"TICK_S": "0.5"}}
        self.cluster = LocalCluster(folder / "cluster", fixed_ports=False, workers=1, settings=settings)

    def __enter__(self) -> Self:
        self.cluster.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cluster.__exit__(kind, error, trace)

    def perform(self, scene: Scene, model: Path) -> Performance:
        """Runs a scene to its end. Raises: INTERNAL if an agent does not finish."""
        homes = self._folder / "agents" / scene.name
        shutil.rmtree(homes, ignore_errors=True)
        for client in scene.clients:
            _prepare(self.cluster, scene, client, model, homes / client.name)
        hoard: list[Weights] = []
        with Tap(self._folder / "cluster" / "redis") as tap:
            outcomes = asyncio.run(_run(self.cluster, scene, homes, hoard))
            log = tap.taken()
        if set(outcomes) != {Outcome.FINISHED}:
            raise DomainError(Reason.INTERNAL, f"the agents of {scene.name} ended as {outcomes}")
        config = AgentConfig.load(homes / scene.clients[0].name / "agent.yaml", {})
        insider = Insider(
            released=asyncio.run(_released(config)) if scene.strategy.needs_keys else b"",
            trained=hoard[0],
            applied=_applied(config),
        )
        shutil.rmtree(homes)
        rounds = [round_ for round_ in replayed(log, scene.name) if _trains(round_)]
        return Performance(scene=scene, rounds=rounds, insider=insider, beside=beside(log, scene.name))


async def _released(config: AgentConfig) -> bytes:
    """What the key authority gives a client, fetched again with its certificate."""
    request = GetEpochSecretsRequest(federation_id=config.federation, epoch=1, client_id=config.client_id)
    async with open_channel(config.key_authority, config.credentials()) as channel:
        response = await call(KeyAuthorityStub(channel).GetEpochSecrets, request)
    released: bytes = response.SerializeToString()
    return released


def _applied(config: AgentConfig) -> Weights:
    state = AgentState(config.state_dir)
    try:
        saved = state.applied()
    finally:
        state.close()
    if saved is None:
        raise DomainError(Reason.INTERNAL, f"{config.client_id} kept no result")
    return saved[1]


def _trains(round_: Round) -> bool:
    """Whether a round adds up updates; a vote adds up tensors named after matrices, and has no matrices."""
    return bool(round_.layout.matrices)


def _prepare(cluster: LocalCluster, scene: Scene, client: Client, model: Path, home: Path) -> None:
    """Writes a client's data and configuration."""
    home.mkdir(parents=True)
    labels = client.labels or ("",) * len(client.texts)
    _write(home / "train.jsonl", zip(client.texts, labels, strict=True))
    if client.tests:
        _write(home / "test.jsonl", client.tests)
    addresses = cluster.addresses
    config: dict[str, Any] = {
        "federation": scene.name,
        "client_id": client.name,
        "coordinator": addresses.coordinator,
        "aggregation": list(addresses.aggregation),
        "key_authority": addresses.key_authority,
        "state_dir": "state",
        "model": {"path": str(model.absolute()), "device": "cpu"},
        "data": {"train": "train.jsonl"} | ({"test": "test.jsonl"} if client.tests else {}),
        "lora": {"rank": client.rank, "alpha": client.alpha},
        "budget": client.budget,
        "resources": {"threads": 1},
        "protection": {"accept": [scene.mode]},
    }
    (home / "agent.yaml").write_text(yaml.safe_dump(config))


def _write(path: Path, examples: Iterable[tuple[str, str]]) -> None:
    """Args: examples: text and label."""
    rows = ({"text": text, "label": label} for text, label in examples)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Credulous(Judge):
    """Finds every result useful."""

    def objection(self, *result: Any, **of: Any) -> str:  # noqa: ANN401 - those of Judge
        """As of `Judge`, which loads the result."""
        super().objection(*result, **of)
        return ""


class Trusting(Learner):
    """A learner that takes every result: clients with a sentence each teach the others nothing, and would object."""

    def __init__(self, *args: Any) -> None:  # noqa: ANN401 - those of Learner
        super().__init__(*args)
        self._judge = Credulous(self._loss_with)


class Hoarder(Trusting):
    """One that keeps every update it made."""

    def __init__(self, hoard: list[Weights], *args: Any) -> None:  # noqa: ANN401 - those of Learner
        self._hoard = hoard
        super().__init__(*args)

    def train(self, number: int, activity: Activity, variant: str = "") -> Trained:
        """As of `Learner`."""
        trained = super().train(number, activity, variant)
        self._hoard.append(trained.weights)
        return trained


async def _run(cluster: LocalCluster, scene: Scene, homes: Path, hoard: list[Weights]) -> Sequence[Outcome]:
    async with operator(cluster.addresses.coordinator, cluster.credentials) as connection:
        await connection.create(scene.specification().to_proto())
        await connection.start(scene.name)
    workers = [Worker() for _ in range(WORKERS)]
    agents = []
    for number, client in enumerate(scene.clients):
        home = homes / client.name
        await cluster.enrol_client(scene.name, client.name, home / "state")
        learn = partial(Hoarder, hoard) if number == 0 else Trusting
        config = AgentConfig.load(home / "agent.yaml", {})
        agents.append(Agent(config, learn, worker=workers[number % WORKERS]))
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.gather(*(agent.run() for agent in agents))
    finally:
        await asyncio.gather(*(worker.close() for worker in workers))
