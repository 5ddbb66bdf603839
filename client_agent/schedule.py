"""The learning rate over all rounds of a federation, by the schedules of transformers."""

import math
from typing import Final

import torch
from transformers import get_scheduler

from shelora.federation import TrainingSpec

_FLOOR: Final = 0.01
"""Least share of a decaying rate: rounds that a federation is extended by still train."""


class Schedule:
    """Rates by round and step. Every client of a federation has the same.

    Args:
        spec: What the federation specifies.
        rounds: Training rounds that the schedule is laid over.
    """

    def __init__(self, spec: TrainingSpec, rounds: int) -> None:
        self._spec = spec
        self._last = rounds * spec.local_steps - 1
        nobody = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        name = spec.learning_rate_schedule
        self._factor = get_scheduler(
            "constant_with_warmup" if name == "constant" else name,
            nobody,
            num_warmup_steps=spec.warmup_steps,
            num_training_steps=rounds * spec.local_steps,
        ).lr_lambdas[0]

    def rate(self, number: int, step: int) -> float:
        """The learning rate of that step, from 0, of that round, from 1; at most the specification's."""
        spec = self._spec
        position = min((number - 1) * spec.local_steps + step, self._last)
        factor = float(self._factor(position))
        if position >= spec.warmup_steps:
            factor = max(factor, _FLOOR)
        return spec.learning_rate * spec.learning_rate_decay ** (number - 1) * factor

    def rates(self, number: int, steps: int) -> list[float]:
        """Of the first steps of that round."""
        return [self.rate(number, step) for step in range(steps)]

    def travel(self, number: int) -> float:
        """The sum of a round's rates: about the farthest that AdamW moves a value."""
        return math.fsum(self.rates(number, self._spec.local_steps))
