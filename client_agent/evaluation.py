"""Evaluation on this client's test examples."""

import time
from typing import Final

import torch
from torch.nn import functional

from client_agent.data import Examples
from client_agent.encoding import Encoder
from client_agent.learning import Evaluation
from client_agent.model import AdaptedModel
from client_agent.training import Report

BATCH_EXAMPLES: Final = 32


def evaluate(model: AdaptedModel, encoder: Encoder, examples: Examples, report: Report) -> Evaluation:
    """Predicts every example once, those of like length together: that saves padding.

    Args: report: Called before every batch; what it raises ends the evaluation.
    """
    started = time.monotonic()
    ids = encoder.ids(examples.texts)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    count = correct = 0
    loss = 0.0
    model.module.eval()
    for start in range(0, len(order), BATCH_EXAMPLES):
        report(start / len(order))
        chosen = order[start : start + BATCH_EXAMPLES]
        labels = [examples.labels[i] for i in chosen] if examples.labels else []
        with torch.inference_mode():
            logits, targets = model.predict(encoder.padded([ids[i] for i in chosen], labels))
            loss += float(functional.cross_entropy(logits.float(), targets, reduction="sum").item())
            correct += int((logits.argmax(dim=-1) == targets).sum().item())
        count += len(targets)
    return Evaluation(count, correct, loss / max(count, 1), time.monotonic() - started)
