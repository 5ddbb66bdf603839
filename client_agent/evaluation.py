"""Evaluation on this client's test examples."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from client_agent.learning import Evaluation
from client_agent.model import AdaptedModel
from client_agent.own_metrics import Metric, Predictions
from client_agent.tasks.port import ExampleEncoder, ExampleSet
from client_agent.training import Report

BATCH_EXAMPLES: Final = 32
PARTS: Final = 4
"""Of an evaluation, in which it says how far it is."""
_LARGEST_EXPONENT: Final = 700.0
"""Beyond, a perplexity is not a number of 64 bits."""
_Examples = TypeVar("_Examples", bound=ExampleSet)


def evaluate(
    model: AdaptedModel,
    encoder: ExampleEncoder[_Examples],
    examples: _Examples,
    report: Report,
    metrics: Sequence[Metric] = (),
) -> Evaluation:
    """Predicts every example once; of some thousands, those of like length together: that saves padding.

    Args:
        model: What predicts.
        encoder: Makes the batches.
        examples: What is predicted.
        report: Called before every batch with how far it is, in quarters; what it raises ends the evaluation.
        metrics: Of the user's own; what they say is among the figures, in place of ours of the same name.
    """
    started = time.monotonic()
    count = correct = 0
    loss = 0.0
    confusion: NDArray[np.int64] | None = None
    predictions = Predictions(metrics, classes=model.task.has_head)
    model.module.eval()
    for done, encoded in _batches(encoder, examples):
        report(_told(done / len(examples)))
        batch = encoder.collated(encoded)
        with torch.inference_mode():
            logits, targets = model.predict(batch)
            loss += float(model.task.loss(logits, targets).item())
            correct += model.task.correct(logits, targets)
            predictions.add(logits, targets)
        count += len(targets)
        if model.task.has_head:
            seen = confused(logits, targets)
            confusion = seen if confusion is None else confusion + seen
    mean = loss / max(count, 1)
    figures = {} if confusion is None else {"macro_f1": macro_f1(confusion)}
    if model.task.predicts_next and mean < _LARGEST_EXPONENT:
        figures["perplexity"] = math.exp(mean)
    figures |= predictions.figures()
    return Evaluation(
        count=count, correct=correct, loss=mean, seconds=time.monotonic() - started, figures=figures
    )


def _told(fraction: float) -> float:
    """How far it is, in PARTS: the coordinator is told, and an exact fraction is that of a number of examples."""
    return math.floor(PARTS * fraction) / PARTS


def confused(logits: torch.Tensor, targets: torch.Tensor) -> NDArray[np.int64]:
    """How often each class [row] was taken for each other [column]."""
    classes = logits.shape[-1]
    pairs = targets * classes + logits.argmax(dim=-1)
    counted = torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    return np.asarray(counted.cpu().numpy(), dtype=np.int64)


def macro_f1(confusion: NDArray[np.int64]) -> float:
    """The mean of the F1 scores of all classes that occur or are predicted, each counting alike, 0 to 1."""
    right = np.diag(confusion)
    either = confusion.sum(axis=0) + confusion.sum(axis=1)
    there = either > 0
    return float(np.mean(2 * right[there] / either[there])) if there.any() else 0.0


def _batches(encoder: ExampleEncoder[_Examples], examples: _Examples) -> Iterator[tuple[int, Sequence[Any]]]:
    """Batches of examples of like length, with how many went before."""
    for start in range(0, len(examples), encoder.at_once):
        stop = min(start + encoder.at_once, len(examples))
        window = sorted(encoder.encoded(examples.select(range(start, stop))), key=lambda one: len(one.ids))
        for first in range(0, len(window), BATCH_EXAMPLES):
            yield start + first, window[first : first + BATCH_EXAMPLES]
