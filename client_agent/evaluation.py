"""Evaluation on this client's test examples."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeVar

import torch

from client_agent.learning import Evaluation
from client_agent.model import AdaptedModel
from client_agent.tasks.port import ExampleEncoder, ExampleSet
from client_agent.training import Report

BATCH_EXAMPLES: Final = 32
_Examples = TypeVar("_Examples", bound=ExampleSet)


def evaluate(
    model: AdaptedModel, encoder: ExampleEncoder[_Examples], examples: _Examples, report: Report
) -> Evaluation:
    """Predicts every example once; of some thousands, those of like length together: that saves padding.

    Args: report: Called before every batch; what it raises ends the evaluation.
    """
    started = time.monotonic()
    count = correct = 0
    loss = 0.0
    model.module.eval()
    for done, encoded in _batches(encoder, examples):
        report(done / len(examples))
        batch = encoder.collated(encoded)
        with torch.inference_mode():
            logits, targets = model.predict(batch)
            loss += float(model.task.loss(logits, targets).item())
            correct += model.task.correct(logits, targets)
        count += len(targets)
    return Evaluation(count, correct, loss / max(count, 1), time.monotonic() - started)


def _batches(encoder: ExampleEncoder[_Examples], examples: _Examples) -> Iterator[tuple[int, Sequence[Any]]]:
    """Batches of examples of like length, with how many went before."""
    for start in range(0, len(examples), encoder.at_once):
        stop = min(start + encoder.at_once, len(examples))
        window = sorted(encoder.encoded(examples.select(range(start, stop))), key=lambda one: len(one.ids))
        for first in range(0, len(window), BATCH_EXAMPLES):
            yield start + first, window[first : first + BATCH_EXAMPLES]
