"""Evaluation on this client's test examples."""

import time
from typing import Final, TypeVar

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
    """Predicts every example once, those of like length together: that saves padding.

    Args: report: Called before every batch; what it raises ends the evaluation.
    """
    started = time.monotonic()
    encoded = sorted(encoder.encoded(examples), key=lambda example: len(example.ids))
    count = correct = 0
    loss = 0.0
    model.module.eval()
    for start in range(0, len(encoded), BATCH_EXAMPLES):
        report(start / len(encoded))
        batch = encoder.collated(encoded[start : start + BATCH_EXAMPLES])
        with torch.inference_mode():
            logits, targets = model.predict(batch)
            loss += float(model.task.loss(logits, targets).item())
            correct += model.task.correct(logits, targets)
        count += len(targets)
    return Evaluation(count, correct, loss / max(count, 1), time.monotonic() - started)
