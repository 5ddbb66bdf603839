"""A learner whose training adds a mark of its own: client i in round n sets one entry, [n - 1, i], and nothing else.

So the aggregate of a round is the list of the weights with which updates were counted: an update that counts twice,
or not at all, or in another round, is a number in the wrong place.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np

from client_agent.config import AgentConfig
from client_agent.keys import EpochSecrets
from client_agent.learning import Evaluation, Origin, Trained, Weights
from client_agent.progress import Activity
from client_agent.state import AgentState
from shelora.lora.layout import Matrix, Tensor
from shelora.lora.restore import Restored, merged
from shelora.lora.shards import Float32, LoraFactors
from shelora.obfuscation import Obfuscation
from shelora.protocol import Stage

MATRIX, TENSOR = "layer.query", "head"
TOLERANCE: Final = 1e-3
"""Weights of runs differ by more than one in a hundred; noise of encryption is up to one in three thousand."""
MATRIX_TOLERANCE: Final = 5e-3
"""Of what is restored from sketches of two or three columns: of 200 000 draws 21 made the noise of additive encryption
an error above 1e-3, the largest one 2.8e-3."""
COLUMNS: Final = 4
"""Of the matrix: at least the rounds, and enough to encrypt some and others not."""

Applied = Callable[[str, str, Float32], None]
"""Told of every result that a client applied: client, round, weights [rounds, clients]."""


class MarkedModel:
    """One matrix [clients, COLUMNS] and one tensor [rounds, clients]."""

    def __init__(self, rounds: int, clients: int, rank: int) -> None:
        self.matrices = (Matrix(MATRIX, clients, COLUMNS),)
        self.tensors = (Tensor(TENSOR, (rounds, clients), 1.0),)
        self.rank = rank
        self.scaling = 1.0


class MarkedLearner:
    """What an agent asks of a learner, without learning. What is on disk is there as with the real one.

    Args:
        config: Whose learner it is.
        state: Where weights are kept.
        index: Place of the client among all.
        examples: Training examples that the client says it has.
        model: Its shapes.
        applied: Told of every result.
    """

    privacy = ""
    objection = ""

    def __init__(
        self,
        config: AgentConfig,
        state: AgentState,
        *,
        index: int,
        examples: int,
        model: MarkedModel,
        applied: Applied,
    ) -> None:
        self._client_id = config.client_id
        self._state = state
        self._index = index
        self._applied = applied
        self._position = ""
        self.examples = range(examples)
        self.base = None
        self.model = model

    def holds(self, round_id: str) -> bool:
        saved, before = self._state.applied(), self._state.applied_before()
        if self._position != round_id and saved is not None and saved[0] == {"round": round_id}:
            self._position = round_id
        elif self._position != round_id and before is not None and before[0] == {"round": round_id}:
            self._position = round_id
            self._state.take_back()
        return self._position == round_id

    def start(self, secrets: EpochSecrets) -> None:
        self._state.forget_applied()
        self._position = ""

    def resume(self, round_id: str, secrets: EpochSecrets) -> None:
        saved = self._state.applied()
        self._position = saved[0]["round"] if saved else ""

    def apply(
        self, round_id: str, parts: Iterable[Restored], obfuscation: Obfuscation, number: int = 0
    ) -> None:
        weights = marks_in(merged(parts))
        self._applied(self._client_id, round_id, weights)
        self._state.save_applied({"round": round_id}, Weights(factors={}, tensors={TENSOR: weights}))
        self._position = round_id

    def train(self, number: int, activity: Activity, variant: str = "") -> Trained:
        activity.report(Stage.TRAINING, 0.0)
        (matrix,), (tensor,) = self.model.matrices, self.model.tensors
        B = np.zeros((matrix.out_features, self.model.rank), dtype=np.float32)
        A = np.zeros((self.model.rank, matrix.in_features), dtype=np.float32)
        mark = np.zeros(tensor.shape, dtype=np.float32)
        B[self._index, 0] = A[0, number - 1] = mark[number - 1, self._index] = 1.0
        return Trained(Weights(factors={MATRIX: LoraFactors(B=B, A=A)}, tensors={TENSOR: mark}), 1.0, 0.0)

    def start_of(self, number: int) -> Weights | None:
        return None

    def score(self, activity: Activity) -> dict[str, Any]:
        activity.report(Stage.SCORING, 0.0)
        (matrix,) = self.model.matrices
        return {MATRIX: 1.0 + np.arange(matrix.in_features, dtype=np.float64)}

    def evaluate(self, activity: Activity, *, everything: bool = False) -> Evaluation | None:
        return Evaluation(count=10, correct=5, loss=1.0, seconds=0.0)

    def write_samples(self, number: int, activity: Activity) -> None:
        pass

    def save_adapter(self, folder: Path, made: Origin) -> None:
        (folder / "position").write_text(self._position)

    def card(self, made: Origin, measured: Evaluation | None) -> str:
        return ""


def marks_in(restored: Restored) -> Float32:
    """The weights [rounds, clients] in an aggregate. Raises ValueError if matrix and tensor do not agree."""
    update, tensor = restored.matrices[MATRIX], restored.tensors[TENSOR]
    product = (update.Q @ update.M).T
    rounds = len(tensor)
    if not (
        np.allclose(product[:rounds], tensor, atol=MATRIX_TOLERANCE)
        and np.allclose(product[rounds:], 0, atol=MATRIX_TOLERANCE)
    ):
        raise ValueError(f"matrix and tensor differ: {product} and {tensor}")
    return tensor
