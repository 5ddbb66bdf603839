"""What the agent asks of the part that learns: the port between the protocol, which needs no torch, and training."""

import math
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from client_agent.keys import EpochSecrets
from client_agent.moments import NONE, Moments
from client_agent.progress import Activity
from shelora.lora.layout import FLOAT_BYTES, Matrix, Tensor
from shelora.lora.restore import Restored
from shelora.lora.shards import Float32, Float64, LoraFactors
from shelora.lora.sketches import Exponents
from shelora.obfuscation import Obfuscation


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Weights:
    """Everything trainable: factors by matrix name, tensors by tensor name."""

    factors: Mapping[str, LoraFactors]
    tensors: Mapping[str, Float32]
    frozen: Mapping[str, LoraFactors] = field(default_factory=dict)
    """By matrix name, the part B A that is not trained: ΔW = s B A + B_frozen A_frozen. None under most strategies."""
    exponents: Mapping[str, Exponents] = field(default_factory=dict)
    """By matrix name, the bounds of sketches that the last result left."""
    changes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By matrix and tensor name, how far the last results moved the model (`client_agent.moderating`)."""
    moments: Moments = NONE
    """What the optimizer goes on from; none unless this client keeps it (`training.optimizer_state`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """The outcome of local training."""

    weights: Weights
    loss: float
    """Mean over the steps; 0 under differential privacy, which tells none."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What evaluation measured."""

    count: int
    """Predictions: examples, or tokens."""
    correct: int
    loss: float
    """Mean over the predictions."""
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)
    """Others, by name: `macro_f1` of classes, 0 to 1; `perplexity` of next tokens; the user's own. They stay here, and
    in the card."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseDigest:
    """SHA-256 of what stays as it is during training, 32 bytes each; equal at all agents of a federation."""

    weights: bytes
    tokenizer: bytes
    chat_template: bytes
    start: bytes = b""
    """Of the adapter and the head that training starts from; empty where it starts from the base model alone."""

    def hex(self) -> str:
        """All of it."""
        return (self.weights + self.tokenizer + self.chat_template + self.start).hex()


@dataclass(frozen=True, slots=True)
class Origin:
    """The result that an adapter is made of."""

    number: int
    """Training round, from 1."""
    contributors: int
    """Clients whose updates are in it."""
    fingerprint: str = ""
    """Of its bytes, the same at all clients; "" if unknown."""


class LocalModel(Protocol):
    """The shapes that a client brings to a federation."""

    @property
    def rank(self) -> int:
        """Rank r of the factors."""

    @property
    def scaling(self) -> float:
        """The s of ΔW = s B A."""

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The adapted matrices."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors trained whole."""


def weight_bytes(model: LocalModel) -> int:
    """Bytes of everything trainable, in float32."""
    factors = sum(model.rank * (m.out_features + m.in_features) for m in model.matrices)
    return FLOAT_BYTES * (factors + sum(math.prod(t.shape) for t in model.tensors))


class LocalLearner(Protocol):
    """Model, data and the state they are in: `client_agent.learner.Learner`, or a stand-in. Not thread-safe."""

    @property
    def model(self) -> LocalModel:
        """What is trained."""

    @property
    def examples(self) -> Sized:
        """The training examples."""

    @property
    def base(self) -> BaseDigest | None:
        """Of the base model; None if there is none, as with a stand-in."""

    @property
    def privacy(self) -> str:
        """How training hides an example; "" if it does not. Updates made otherwise are not sent."""

    @property
    def objection(self) -> str:
        """Why the current state serves this client badly, in words; "" if it does not."""

    def holds(self, round_id: str) -> bool:
        """Makes that round's result current if it was applied before, also before a restart; says whether it was."""

    def start(self, secrets: EpochSecrets) -> None:
        """Makes the initial state current."""

    def resume(self, round_id: str, secrets: EpochSecrets) -> None:
        """Makes the last applied result of that round's federation current; the initial state if there is none."""

    def apply(
        self, round_id: str, parts: Iterable[Restored], obfuscation: Obfuscation, number: int = 0
    ) -> None:
        """Makes the result of a round current, cut to this client's rank, and keeps it.

        Args: number: of the training round, to tell how many this client missed; 0 if it is not known.
        """

    def train(self, number: int, activity: Activity, variant: str = "") -> Trained:
        """Trains for a round from the current state, which does not change. Raises: Stopped, DomainError.

        Args: variant: Another one trains on other batches.
        """

    def start_of(self, number: int) -> Weights | None:
        """What this client trained in that round from, if it still holds it: the state that results alone lead to.

        Args: number: of the round; 0 for whichever it trained last.
        """

    def score(self, activity: Activity) -> dict[str, Float64]:
        """Sensitivity of the columns by matrix. Raises: Stopped."""

    def evaluate(self, activity: Activity, *, everything: bool = False) -> Evaluation | None:
        """Evaluates the current state; None if nothing is to be evaluated. Raises: Stopped."""

    def write_samples(self, number: int, activity: Activity) -> None:
        """Has the current state write to the operator's prompts, if there are any. Raises: Stopped.

        Args: number: Of the training round that it results from; 0 for the initial state.
        """

    def save_adapter(self, folder: Path, made: Origin) -> None:
        """Writes the current state as an adapter for users, into an empty folder."""

    def card(self, made: Origin, measured: Evaluation | None) -> str:
        """The adapter's model card; "" if it has none."""
