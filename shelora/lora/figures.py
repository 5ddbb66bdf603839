"""What clients tell of their examples inside an encrypted sum: nobody learns one client's, everybody the means.

Accuracies and losses say something of a client's labels (docs/threat-model.md), so under `complete` no server sees one
client's. They end the last shard as five values of every client, each within ±1 and multiplied by its weight, as all:

    t, t accuracy, t loss / 32, u, u training loss / 32

with t = 1 if it has test examples and u = 1 if it tells a training loss, else 0. Of the sum over the clients the second
and third over the first, and the fifth over the fourth, are the weighted means over those that tell. They never touch
the model. What one client puts in is not checked, as nothing in a sum is: it can move a mean anywhere in its range.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from shelora.lora.shards import Float64

COUNT: Final = 5
"""Values at the end of the last shard."""
LARGEST_LOSS: Final = 32.0
"""Nats; a loss beyond, either way, is told as this. A guess among as many classes as atoms of a person is at 65."""
TOLD_BY_MORE: Final = 1.5
"""Weight of those that tell over the largest that one client can have: below, they may be one, and are not told."""
NOISE_DEVIATIONS: Final = 8.0
"""How far noise may carry a mean beyond its range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one client measured, or means over several."""

    accuracy: float | None = None
    """On test examples, of what the round began from: 0 to 1. None if that was not evaluated."""
    loss: float | None = None
    """The same of the loss, nats."""
    train_loss: float | None = None
    """Of the round's training, nats; None if it is not told."""


NOTHING: Final = Figures()


def packed(own: Figures) -> Float64:
    """One client's values, [COUNT], each within ±1. A loss that is no number is not told."""
    tests = own.accuracy is not None and own.loss is not None and math.isfinite(own.loss)
    trains = own.train_loss is not None and math.isfinite(own.train_loss)
    values = np.zeros(COUNT)
    if tests:
        values[:3] = 1, own.accuracy, _scaled(own.loss)
    if trains:
        values[3:] = 1, _scaled(own.train_loss)
    return np.clip(values, -1, 1)


def means(values: Float64, *, noise: float, most: float) -> Figures:
    """The means that a sum holds; None for those that cannot be true, and that one client alone may have told.

    Args:
        values: The sum over the sum of weights, [COUNT].
        noise: Standard deviation of the noise in one of them.
        most: Largest share of the sum that one client can have, above 0.
    """
    tested, right, loss, trained, train_loss = map(float, values)
    accuracy, test_loss = (_mean(part, tested, noise=noise, most=most) for part in (right, loss))
    if accuracy is None or test_loss is None or accuracy < 0:
        accuracy = test_loss = None
    mean = _mean(train_loss, trained, noise=noise, most=most)
    return Figures(
        accuracy=accuracy,
        loss=None if test_loss is None else test_loss * LARGEST_LOSS,
        train_loss=None if mean is None else mean * LARGEST_LOSS,
    )


def _scaled(loss: float | None) -> float:
    return (loss or 0.0) / LARGEST_LOSS


def _mean(part: float, share: float, *, noise: float, most: float) -> float | None:
    """A mean within ±1 over clients that have that share of the sum; None as of `means`."""
    slack = NOISE_DEVIATIONS * noise
    if not TOLD_BY_MORE * most <= share <= 1 + slack:  # NaN is neither
        return None
    mean = part / share
    return max(-1.0, min(1.0, mean)) if abs(mean) <= 1 + slack / share else None
