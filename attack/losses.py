"""Was this text in the batch? From the mean loss that a client reports of its first training round.

Nobody needs the model that comes out: in the first step B = 0, so the loss is that of the public model, which the
attacker computes for any text. With one text in the batch it is the text's own. With few, the reported mean is that of
one choice among the candidates, and of hardly any other.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from math import comb
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from attack.public import Public
from attack.stage import Scene
from shelora.lora.shards import Float64

MOST_CHOICES: Final = 1_000_000
"""Choices of a batch among the candidates that are tried."""
_LEAST: Final = 1e-9
"""Distances below are rounding."""


def scores(
    public: Public, scene: Scene, reported: Mapping[str, float], texts: Sequence[str]
) -> dict[str, dict[str, float]]:
    """By client a score of every text, larger if it is likelier in the batch; the same for all if nothing is told.

    Args: reported: mean loss by client; 0 where none is told.
    """
    own, targets = np.array([_loss(public, text) for text in texts]).T
    told = [loss for loss in reported.values() if loss]
    fallen = float(np.mean(told)) / float(own.mean()) if told and scene.steps > 1 else 1.0
    found = {}
    for client in scene.clients:
        mean = reported[client.name] / fallen
        far = _distances(own, targets, mean, scene.batch_of(client)) if mean else np.ones(len(texts))
        found[client.name] = dict(zip(texts, (-np.log(np.maximum(far, _LEAST))).tolist(), strict=True))
    return found


def _distances(own: Float64, targets: Float64, mean: float, size: int) -> Float64:
    """By text how near the mean of a batch of that size with it comes to the reported one, at best.

    A mean is over all targets of a batch, so the sum of targets * (loss - mean) over the batch is zero.
    """
    if comb(len(own), size) > MOST_CHOICES:
        return np.abs(own - mean)
    beyond = targets * (own - mean)
    choices = _choices(len(own), size)
    far = np.abs(beyond[choices].sum(axis=1)) / targets[choices].sum(axis=1)
    found: Float64 = np.full(len(own), np.inf)
    for column in choices.T:
        np.minimum.at(found, column, far)
    return found


@lru_cache(maxsize=4)
def _choices(count: int, size: int) -> NDArray[np.intp]:
    return np.array(list(combinations(range(count), size)), dtype=np.intp)


@lru_cache(maxsize=1024)
@torch.no_grad()
def _loss(public: Public, text: str) -> tuple[float, int]:
    """Mean loss of a text under the public model, and its targets."""
    return float(public.loss(text)), len(public.ids(text)) - 1
