"""Local training: some AdamW steps on this client's examples."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import torch

from client_agent.drawing import batches
from client_agent.encoding import Batch
from client_agent.model import AdaptedModel
from client_agent.tasks.port import ExampleEncoder, ExampleSet
from shelora.errors import DomainError, Reason

MAX_GRADIENT_NORM: Final = 1.0
"""Gradients are scaled down to this norm, as is usual in fine-tuning; one odd batch does not wreck a round."""

_Examples = TypeVar("_Examples", bound=ExampleSet)

Report = Callable[[float], None]
"""Takes the progress, 0 to 1; may raise to stop the work."""


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """How to train in one round."""

    steps: int
    batch_size: int
    """Examples a step."""
    learning_rate: float
    seed: int
    """Fixes the batches and the dropout."""
    micro_batch: int = 0
    """Examples computed at once, to save memory: a step adds up their gradients. 0 for the whole batch."""


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """What training measured."""

    loss: float
    """Mean over the steps; 0 if it is nobody's to know."""
    seconds: float


def train(
    model: AdaptedModel,
    encoder: ExampleEncoder[_Examples],
    examples: _Examples,
    run: TrainingRun,
    report: Report,
) -> TrainingOutcome:
    """Updates the model's trainable parameters in place.

    Args: report: Called before every step; what it raises ends training within that step.
    Raises: DomainError VALUE_NOT_FINITE if the loss is NaN or infinite; DATA_INVALID if a batch has no targets.
    """
    started = time.monotonic()
    optimizer = torch.optim.AdamW(model.trainable(), lr=run.learning_rate, weight_decay=0.0)
    losses = []
    model.module.train()
    try:
        with torch.random.fork_rng(devices=cuda_devices(model.device)):
            torch.manual_seed(run.seed)
            for step, chosen in enumerate(batches(len(examples), run.batch_size, run.steps, run.seed)):
                report(step / run.steps)
                parts = [encoder.batch(examples.select(part)) for part in parts_of(chosen, run.micro_batch)]
                losses.append(_step(model, parts, optimizer, step))
    finally:
        model.module.eval()
    return TrainingOutcome(sum(losses) / len(losses), time.monotonic() - started)


def parts_of(chosen: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The choice in parts of that size, the last perhaps smaller; 0: in one part, if there is any."""
    size = size or max(len(chosen), 1)
    return (chosen[start : start + size] for start in range(0, len(chosen), size))


def _step(
    model: AdaptedModel, parts: Sequence[Batch], optimizer: torch.optim.Optimizer, number: int
) -> float:
    """One optimizer step on the mean over all targets of the parts; returns that mean."""
    optimizer.zero_grad(set_to_none=True)
    count = sum(model.target_count(part) for part in parts)
    if not count:
        raise DomainError(Reason.DATA_INVALID, f"no text of step {number + 1} has a second token to predict")
    value = sum(_accumulate(model, part, count) for part in parts)
    if not math.isfinite(value):
        raise DomainError(
            Reason.VALUE_NOT_FINITE,
            f"the training loss is {value} at step {number + 1}; lower the learning rate or check the data",
        )
    torch.nn.utils.clip_grad_norm_(model.trainable(), MAX_GRADIENT_NORM)
    optimizer.step()
    return value


def _accumulate(model: AdaptedModel, part: Batch, count: int) -> float:
    """Adds the gradient of this part's share of the mean over `count` targets; returns the share."""
    logits, targets = model.predict(part)
    loss = model.task.loss(logits, targets) / count
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return float(loss.item())


def cuda_devices(device: torch.device) -> list[torch.device]:
    """The devices whose random state is another than the CPU's."""
    return [device] if device.type == "cuda" else []
