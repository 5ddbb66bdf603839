"""What varies from task to task: examples, their encoding, targets, loss, and what counts as correct."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from peft import TaskType
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from client_agent.config import DataConfig
from client_agent.encoding import ModelBatch
from client_agent.survey import Survey
from shelora.federation import TrainingSpec
from shelora.tasks import TaskName

_Examples_contra = TypeVar("_Examples_contra", contravariant=True)


class ExampleSet(Protocol):
    """Examples of a task, read and sound."""

    def __len__(self) -> int: ...

    def select(self, indices: Iterable[int]) -> Self:
        """These examples, in this order."""

    def fingerprint(self) -> str:
        """SHA-256 in hex: equal for the same examples in the same order."""

    def count_by_label(self, names: Sequence[str]) -> Mapping[str, int]:
        """Number of examples of every label, in the labels' order."""


class ExampleEncoder(Protocol[_Examples_contra]):
    """Turns a task's examples into token ids and targets."""

    limit: int
    """Tokens an example is cut to."""

    at_once: int
    """Examples to encode at once where not all are needed."""

    def encoded(self, examples: _Examples_contra) -> Sequence[Any]:
        """Every example, special tokens included, cut to the limit; what has more `ids` takes longer."""

    def collated(self, encoded: Sequence[Any]) -> ModelBatch:
        """One batch of them, padded on the right to the longest."""

    def batch(self, examples: _Examples_contra) -> ModelBatch:
        """The batch of these examples."""

    def shown(self, examples: _Examples_contra) -> Mapping[str, str]:
        """The first example as the model sees it, for people: what is shown, by what it is."""


class Task(ABC):
    """A task, without state."""

    name: ClassVar[TaskName]
    peft: ClassVar[TaskType | None]
    """What PEFT calls it, if it has a name for it."""
    loader: ClassVar[Any]
    """The class of transformers that loads its models."""
    processor: ClassVar[Any] = AutoTokenizer
    """The class of transformers that loads what prepares a model's inputs."""
    has_head: ClassVar[bool]
    """Whether a head on top of the base model is trained whole."""
    predicts_next: ClassVar[bool]
    """Whether a model that sees later tokens cannot learn it."""
    reads_text: ClassVar[bool] = True
    """Whether examples have tokens."""
    predictions_named: ClassVar[str]
    """What `correct` counts, in the plural."""
    pipeline: ClassVar[str]
    """What the Hugging Face hub calls it."""
    usage: ClassVar[str]
    """Python lines that load an adapter."""

    def loading(self, labels: Sequence[str]) -> Mapping[str, Any]:
        """The loader's arguments beside the checkpoint."""
        del labels
        return {}

    def sized_inputs(self, configuration: PreTrainedConfig, tokens: int) -> Mapping[str, torch.Tensor]:
        """Inputs of one example of that many tokens, without values that matter, on the default device."""
        del configuration
        return {"input_ids": torch.ones(1, tokens, dtype=torch.int64)}

    def labels_found(self, data: DataConfig) -> tuple[str, ...]:
        """The labels to check with where no federation names them. Raises: DomainError DATA_INVALID."""
        del data
        return ()

    @abstractmethod
    def read(self, path: Path, data: DataConfig, spec: TrainingSpec) -> ExampleSet:
        """The examples of a file. Raises: DomainError DATA_INVALID naming file, line and field."""

    @abstractmethod
    def encoder(
        self, tokenizer: PreTrainedTokenizerBase, limit: int, spec: TrainingSpec
    ) -> ExampleEncoder[Any]:
        """Encodes what `read` returns.

        Args: limit: Tokens that the federation and the model's positions leave.
        Raises: DomainError MODEL_INVALID.
        """

    @abstractmethod
    def survey(
        self, path: Path, data: DataConfig, examples: ExampleSet, encoder: ExampleEncoder[Any]
    ) -> Survey:
        """Encodes every example once. Raises: DomainError DATA_INVALID naming one without anything to learn from."""

    @abstractmethod
    def predictions(self, logits: torch.Tensor, batch: ModelBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [k, classes] and targets [k] of a batch, from the model's logits. Everything on one device."""

    @abstractmethod
    def target_count(self, batch: ModelBatch) -> int:
        """The k of `predictions`."""

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        """Cross-entropy in nats, summed over the targets; a scalar.

        Args: smoothing: Share of a target that is spread over all classes, 0 to below 1.
        """
        return functional.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)

    def correct(self, logits: torch.Tensor, targets: torch.Tensor) -> int:
        """Number of targets that have the largest logit."""
        return int((logits.argmax(dim=-1) == targets).sum().item())
