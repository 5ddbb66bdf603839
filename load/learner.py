"""A learner that trains nothing: random updates of a real model's shapes."""

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from client_agent.config import AgentConfig
from client_agent.drawing import seed_of
from client_agent.keys import EpochSecrets
from client_agent.learning import BaseDigest, Evaluation, Origin, Trained, Weights
from client_agent.progress import Activity
from client_agent.state import AgentState
from shelora.federation import TrainingSpec
from shelora.lora.layout import Matrix, Tensor
from shelora.lora.restore import Restored
from shelora.lora.shards import Float32, Float64, LoraFactors
from shelora.obfuscation import Obfuscation
from shelora.protocol import Stage

WIDTH: Final = 384
"""Rows and columns of a matrix, those of all-MiniLM-L6-v2."""
MATRICES: Final = tuple(
    Matrix(f"layer.{layer}.{name}", WIDTH, WIDTH) for layer in range(2) for name in ("query", "value")
)
TENSORS: Final = (Tensor("classifier.weight", (8, WIDTH)), Tensor("classifier.bias", (8,)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticModel:
    """Shapes without a model."""

    rank: int
    scaling: float
    matrices: tuple[Matrix, ...] = MATRICES
    tensors: tuple[Tensor, ...] = TENSORS


class SyntheticLearner:
    """A `LocalLearner` that keeps nothing: what it is given it forgets, what it returns it draws."""

    privacy = ""
    objection = ""

    def __init__(self, config: AgentConfig, spec: TrainingSpec, state: AgentState, rounds: int) -> None:  # noqa: ARG002 - as `Learn`
        self.model = SyntheticModel(rank=config.lora.rank, scaling=config.lora.scaling)
        self.examples: Sized = range(64)
        self.base: BaseDigest | None = None
        self._client_id = config.client_id
        self._applied: str | None = None

    def holds(self, round_id: str) -> bool:
        return self._applied == round_id

    def start(self, secrets: EpochSecrets) -> None:
        pass

    def resume(self, round_id: str, secrets: EpochSecrets) -> None:
        pass

    def apply(
        self,
        round_id: str,
        parts: Iterable[Restored],
        obfuscation: Obfuscation,  # noqa: ARG002
        number: int = 0,  # noqa: ARG002
    ) -> None:
        for _ in parts:
            pass
        self._applied = round_id

    def train(self, number: int, activity: Activity, variant: str = "") -> Trained:  # noqa: ARG002 - it learns nothing
        activity.report(Stage.TRAINING, 0.0)
        rng = np.random.default_rng(seed_of(self._client_id, number))
        factors = {
            m.name: LoraFactors(
                B=_values(rng, m.out_features, self.model.rank),
                A=_values(rng, self.model.rank, m.in_features),
            )
            for m in self.model.matrices
        }
        return Trained(
            Weights(factors=factors, tensors={t.name: _values(rng, *t.shape) for t in self.model.tensors}),
            1.0,
            0.0,
        )

    def start_of(self, number: int) -> Weights | None:  # noqa: ARG002 - the port's
        return None

    def score(self, activity: Activity) -> dict[str, Float64]:
        activity.report(Stage.SCORING, 0.0)
        rng = np.random.default_rng(seed_of(self._client_id, "scores"))
        return {m.name: rng.random(m.in_features) for m in self.model.matrices}

    def evaluate(self, activity: Activity, *, everything: bool = False) -> Evaluation | None:  # noqa: ARG002
        activity.report(Stage.EVALUATING, 0.0)
        return Evaluation(count=8, correct=4, loss=1.0, seconds=0.0)

    def write_samples(self, number: int, activity: Activity) -> None:
        pass

    def save_adapter(self, folder: Path, made: Origin) -> None:
        pass

    def card(self, made: Origin, measured: Evaluation | None) -> str:  # noqa: ARG002
        return ""


def _values(rng: np.random.Generator, *shape: int) -> Float32:
    return rng.normal(0.0, 0.02, shape).astype(np.float32)
